"""Mixing, augmentation configs and losses, each against its formula and with soft labels."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn import functional

from repnet.data.batch_augment import RandomCrop
from repnet.errors import InputError
from repnet.spec import CONFIGS, build, choices, load_choice
from repnet.training import BinaryCrossEntropy, FocalLoss, Mix

CLASSES = 5


def batch(n: int = 6) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 3, 8, 10), torch.randint(CLASSES, (n,))


# Mixing


def test_mixup_is_one_convex_combination_of_neighbors() -> None:
    images, labels = batch()
    mixed, soft = Mix(CLASSES, mixup_alpha=0.8)(images, labels)
    hard = functional.one_hot(labels, CLASSES).float()
    other, other_hard = images.roll(1, 0), hard.roll(1, 0)
    share = ((mixed - other) / (images - other)).median()
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * images + (1 - share) * other)
    torch.testing.assert_close(soft, share * hard + (1 - share) * other_hard)


def test_cutmix_labels_are_shares_of_the_area() -> None:
    mix = Mix(CLASSES, cutmix_alpha=1.0)
    shares = []
    for _ in range(20):
        images, labels = batch()
        mixed, soft = mix(images, labels)
        kept = (mixed == images).all(1).float()  # by pixel
        assert ((mixed == images) | (mixed == images.roll(1, 0))).all()
        assert (kept == kept[0]).all()
        hard = functional.one_hot(labels, CLASSES).float()
        share = kept[0].mean()
        torch.testing.assert_close(soft, share * hard + (1 - share) * hard.roll(1, 0))
        shares.append(float(share))
    assert len(set(shares)) > 10


def test_each_batch_gets_one_of_both_with_the_given_probability() -> None:
    mix = Mix(CLASSES, mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.5)
    counts = {"none": 0, "cutmix": 0, "mixup": 0}
    for _ in range(300):
        images, labels = batch(3)
        mixed, soft = mix(images, labels)
        torch.testing.assert_close(soft.sum(1), torch.ones(3))
        if torch.equal(mixed, images):
            counts["none"] += 1  # with CutMix, now and then an empty rectangle
        elif ((mixed == images) | (mixed == images.roll(1, 0))).all():
            counts["cutmix"] += 1
        else:
            counts["mixup"] += 1
    assert 120 < counts["none"] < 190
    assert min(counts["cutmix"], counts["mixup"]) > 45


def test_what_is_not_mixed_has_soft_labels_too() -> None:
    images, labels = batch()
    unchanged, soft = Mix(CLASSES, mixup_alpha=1.0, probability=0.0)(images, labels)
    assert unchanged is images
    assert torch.equal(soft, functional.one_hot(labels, CLASSES).float())
    again = Mix(CLASSES, mixup_alpha=1.0)(images, soft)[1]
    assert again.shape == soft.shape


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "above 0"),
        ({"mixup_alpha": -1.0, "cutmix_alpha": 1.0}, "above 0"),
        ({"mixup_alpha": 1.0, "probability": 1.5}, "between 0 and 1"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Mix(CLASSES, **options)


@pytest.mark.parametrize("name", choices("mix"))
def test_configs_mix(name: str) -> None:
    images, labels = batch()
    mix = build({**load_choice("mix", name), "num_classes": CLASSES})
    changed = 0
    for _ in range(10):
        mixed, soft = mix(images, labels)
        assert mixed.shape == images.shape
        assert soft.shape == (6, CLASSES)
        changed += not torch.equal(mixed, images)
    assert changed


# Losses


def soft_labels(n: int) -> Tensor:
    return torch.rand(n, CLASSES, dtype=torch.float64).softmax(1)


def by_hand(logits: Tensor, labels: Tensor, smoothing: float, sum_classes: bool) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, target in zip(logits, labels, strict=True):
        for x, y in zip(row, target, strict=True):
            y = y * (1 - smoothing) + smoothing / CLASSES
            p = 1 / (1 + torch.exp(-x))
            total = total - (y * p.log() + (1 - y) * (1 - p).log())
    return total / len(logits) / (1 if sum_classes else CLASSES)


@pytest.mark.parametrize("sum_classes", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_cross_entropy_is_its_formula(smoothing: float, sum_classes: bool) -> None:
    logits = torch.randn(4, CLASSES, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 2])
    loss = BinaryCrossEntropy(smoothing, sum_classes=sum_classes)
    hard = functional.one_hot(labels, CLASSES).double()
    torch.testing.assert_close(loss(logits, labels), by_hand(logits, hard, smoothing, sum_classes))
    soft = soft_labels(4)
    torch.testing.assert_close(loss(logits, soft), by_hand(logits, soft, smoothing, sum_classes))


def test_focal_loss_is_its_formula() -> None:
    logits, labels = torch.randn(4, CLASSES, dtype=torch.float64), torch.tensor([0, 4, 2, 2])
    soft = soft_labels(4)
    for target in (labels, soft):
        expected = functional.cross_entropy(logits, target)
        torch.testing.assert_close(FocalLoss(0.0)(logits, target), expected)
    p = logits.softmax(1)[range(4), labels]
    torch.testing.assert_close(FocalLoss(3.0)(logits, labels), -((1 - p) ** 3 * p.log()).mean())
    p = logits.softmax(1)
    expected = -(soft * (1 - p) ** 2 * p.log()).sum(1).mean()
    torch.testing.assert_close(FocalLoss(2.0)(logits, soft), expected)


@pytest.mark.parametrize("name", choices("loss"))
@pytest.mark.parametrize("smoothing", [None, 0.1])
def test_losses_by_config_take_hard_and_soft_labels(name: str, smoothing: float | None) -> None:
    spec = load_choice("loss", name)
    if smoothing is not None and "label_smoothing" in spec:
        spec["label_smoothing"] = smoothing
    loss: Any = build(spec)
    labels = torch.tensor([0, 4, 2, 2])
    hard = functional.one_hot(labels, CLASSES).float()
    for scale in (1.0, 200.0):  # confident ones have finite gradients
        logits = (torch.randn(4, CLASSES) * scale).requires_grad_()
        value = loss(logits, labels)
        torch.testing.assert_close(value, loss(logits, hard))
        (loss(logits, hard.roll(1, 0) / 2 + hard / 2) + value).backward()
        assert value.ndim == 0
        assert logits.grad is not None
        assert logits.grad.isfinite().all()
    right = (hard * 20 - 10).requires_grad_()
    assert loss(right, labels) < loss(-right, labels)


# Augmentation


def augment(name: str, data: str, **options: Any) -> list[Any]:
    """Return the transforms of a config, composed as in a run."""
    with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        overrides = [f"data={data}", f"augment={name}"]
        overrides += [f"++data.{key}={value}" for key, value in options.items()]
        config = compose("train", overrides=overrides)
    found = OmegaConf.to_container(config.data.augment, resolve=True)
    assert isinstance(found, list)
    return build(found)


IMAGENET = [name for name in choices("augment") if "imagenet" in name or name == "mobileone"]


def test_there_are_augmentations() -> None:
    assert len(IMAGENET) >= 5
    assert set(choices("augment")) - set(IMAGENET) >= {
        *("none", "flip_crop", "randaugment", "autoaugment", "trivialaugment", "augmix")
    }


@pytest.mark.parametrize("name", choices("augment"))
def test_augmentations_keep_images(name: str) -> None:
    folder = name in IMAGENET
    data, size = ("imagefolder", 48) if folder else ("cifar10", 32)
    options = {"root": "x", "image_size": size} if folder else {}
    transforms = augment(name, data, **options)
    changed = 0
    for channels in (1, 3):
        for _ in range(15):
            side = torch.randint(50, 90, (2,)).tolist() if folder else (32, 32)
            image = torch.randint(256, (channels, *side), dtype=torch.uint8)
            if channels == 1 and folder:
                continue  # image folders are RGB
            result = functools.reduce(lambda x, transform: transform(x), transforms, image)
            assert result.dtype == torch.uint8
            assert result.shape == (channels, size, size)
            changed += result.shape != image.shape or not torch.equal(result, image)
    assert bool(changed) == (name != "none")


@pytest.mark.parametrize("name", sorted(set(choices("augment")) - set(IMAGENET)))
def test_augmentations_of_small_images_take_the_size_that_the_data_have(name: str) -> None:
    transforms = augment(name, "fake", image_size=40)
    crops = [t.size for t in transforms if isinstance(t, RandomCrop)]
    assert crops == ([] if name == "none" else [40])
