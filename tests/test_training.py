"""The LightningModule, parameter groups, schedules and the run's config."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from torch import nn

from repnet import create_model
from repnet.blocks import Block, RepVGGBlock
from repnet.data import FakeImages
from repnet.errors import InputError
from repnet.layers import Sum, conv_bn
from repnet.training import (
    Classifier,
    CrossEntropy,
    FocalLoss,
    layerwise_parameter_groups,
    repvgg_parameter_groups,
    warmup_cosine,
)
from repnet.training.announcement import ParameterTable, growing_blocks
from repnet.training.assembly import build_classifier, build_model, complete_model


def test_repvgg_decays_weights_and_identity_gammas_only() -> None:
    model = create_model("repvgg_tiny", num_classes=5)
    model.stem.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    decay, rest = repvgg_parameter_groups(model)
    decaying = {names[id(p)] for p in decay["params"]}
    assert "weight_decay" not in decay  # the optimizer's own
    assert rest["weight_decay"] == 0
    assert "stages.0.1.conv.0.conv.weight" in decaying
    assert "stages.0.1.conv.2.weight" in decaying  # the identity's gamma
    assert "head.weight" in decaying
    left = {names[id(p)] for p in rest["params"]}
    assert {"head.bias", "stages.0.1.conv.2.bias", "stages.0.1.conv.0.bn.weight"} <= left
    assert not any(name.startswith("stem.") for name in decaying | left)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert decaying | left == trainable
    assert not decaying & left


def test_warm_up_then_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(
        optimizer, total_steps=100, steps_per_epoch=10, warmup_epochs=2, final_factor=0.1
    )
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    torch.testing.assert_close(rates[:20], [2 * (n + 1) / 20 for n in range(20)])
    assert rates[20] == 2.0
    assert rates[60] == pytest.approx(2 * (0.1 + 0.9 / 2))
    assert rates == sorted(rates[:20]) + sorted(rates[20:], reverse=True)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


def test_classifier_works_in_a_foreign_script(tmp_path: Any) -> None:
    """A plain network, no Hydra, none of our callbacks."""
    data = FakeImages(image_size=8, classes=3, train_size=24, batch_size=8)
    data.setup()
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    before = [p.detach().clone() for p in net.parameters()]
    module = Classifier(net, 3, optimizer=functools.partial(torch.optim.SGD, lr=0.1))
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    assert all(not torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert "val/top5" not in trainer.callback_metrics  # it would be 1 of 3 classes
    (metrics,) = trainer.test(module, data, verbose=False)
    with torch.no_grad():
        logits, labels = [
            torch.cat(parts)
            for parts in zip(*((net.eval()(x), y) for x, y in data.test_dataloader()), strict=True)
        ]
    assert metrics["test/top1"] == pytest.approx((logits.argmax(1) == labels).double().mean())
    assert metrics["test/loss"] == pytest.approx(
        nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )


def config(**model: Any) -> dict[str, Any]:
    return {"model": {"_target_": "repnet.models.RepVGG", **model}, "block": None}


@pytest.mark.parametrize("limits", [{"max_steps": 7}, {"max_steps": 7, "max_epochs": 50}])
def test_an_epoch_is_one_where_steps_end_the_training(limits: dict[str, int]) -> None:
    data = FakeImages(image_size=8, classes=3, train_size=24, batch_size=4)  # 6 batches
    seen: list[dict[str, int]] = []

    def schedule(optimizer: Any, **options: int) -> Any:
        seen.append(options)
        return warmup_cosine(optimizer, **options)

    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, accumulate_grad_batches=2, limit_val_batches=0, **limits,
    )  # fmt: skip
    trainer.fit(Classifier(model, 3, scheduler=schedule), data)
    assert seen == [{"total_steps": 7, "steps_per_epoch": 3}]


def test_an_epoch_cut_short_has_its_own_loss() -> None:
    class Losses(Callback):
        def __init__(self) -> None:
            self.logged: list[float] = []

        def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
            self.logged.append(float(trainer.callback_metrics["train/loss"]))

    steps: list[float] = []

    def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        value = nn.functional.cross_entropy(logits, labels)
        steps.append(value.item())
        return value

    losses = Losses()
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, limit_val_batches=0, max_steps=8, callbacks=[losses],
    )  # fmt: skip
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    data = FakeImages(image_size=8, classes=3, train_size=24, batch_size=4)
    trainer.fit(Classifier(model, 3, loss=loss), data)
    assert losses.logged == pytest.approx([sum(steps[:6]) / 6, sum(steps[6:]) / 2])


def test_the_model_learns_from_the_data_what_it_must_know() -> None:
    data = FakeImages(channels=2, classes=7)
    assert complete_model(config(), data) == {
        "_target_": "repnet.models.RepVGG", "num_classes": 7, "in_channels": 2,
    }  # fmt: skip
    assert complete_model(config(num_classes=9), data)["num_classes"] == 9
    block = {"_target_": "repnet.blocks.PlainBlock", "_partial_": True}
    assert complete_model({**config(), "block": block}, data)["block"] == block
    foreign = {"_target_": "torchvision.models.resnet18", "num_classes": None}
    assert complete_model({"model": foreign}, data) == {**foreign, "num_classes": 7}
    with pytest.raises(InputError, match="takes no block"):
        complete_model({"model": foreign, "block": block}, data)


@pytest.mark.parametrize("rule", [repvgg_parameter_groups, layerwise_parameter_groups])
def test_the_parameter_groups_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rule: Any
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    data = FakeImages(image_size=8, train_size=64, batch_size=16)
    network = create_model("repvgg_tiny", num_classes=10)
    network.stages[0][0].requires_grad_(False)  # its numbers are missing, then
    module = Classifier(network, 10, parameter_groups=rule)
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[ParameterTable()],
    )
    trainer.fit(module, data)
    printed = capsys.readouterr().out
    values = sum(p.numel() for p in module.parameters())
    assert "SGD" in printed
    rows = [re.split(" {2,}", line.strip()) for line in printed.splitlines() if "0" in line]
    assert sum(int(row[2].replace(",", "")) for row in rows) == values
    learned = {row[0]: row[3:] for row in rows}
    if rule is layerwise_parameter_groups:
        assert learned == {
            "layer 0-8 weights": ["0.01 to 0.1", "0.0001"],
            "layer 0-8 norms and biases": ["0.01 to 0.1", "0"],
            "not trained": ["-", "-"],
        }
    else:
        assert learned == {
            "weights and identity norms": ["0.1", "0.0001"],
            "other norms and biases": ["0.1", "0"],
            "not trained": ["-", "-"],
        }


def test_a_block_that_grows_is_named_before_training() -> None:
    def make(width: int) -> Block:
        return Block(Sum(conv_bn(width, width, 3), conv_bn(width, width, 3, dilation=2)), width)

    network = nn.Sequential(make(4), make(4), RepVGGBlock(4, 4))
    assert growing_blocks(network) == [
        "'0' and 1 more will deploy as one 5x5 convolution with 400 instead of 288 weights"
    ]


def config_of(**changes: Any) -> dict[str, Any]:
    model = {"_target_": "repnet.models.RepVGG", "depths": [1] * 4, "widths": [0.25] * 4,
             "strides": [1, 1, 2, 2, 1]}  # fmt: skip
    return {
        "model": model,
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1},
        "loss": {"_target_": "torch.nn.CrossEntropyLoss"},
        "channels_last": False,
        **changes,
    }


def test_the_learning_rate_follows_the_batch(capsys: pytest.CaptureFixture[str]) -> None:
    data = FakeImages(image_size=8)
    data.setup()
    config = config_of(lr_scaling={"rule": "linear", "base_batch": 256})
    config, model = build_model(config, data)
    module = build_classifier(config, model, data, 1024)
    assert module.optimizer(model.parameters()).param_groups[0]["lr"] == pytest.approx(0.4)
    assert capsys.readouterr().out == "lr 0.4 = 0.1 x 1024/256\n"
    assert config["optimizer"]["lr"] == 0.1  # a resumed run scales again


def test_a_model_that_does_not_fit_the_images_is_refused() -> None:
    data = FakeImages(image_size=8)
    data.setup()
    spec = config_of()["model"]
    with pytest.raises(InputError, match="3 values for an image, the data has 10 classes"):
        build_model(config_of(model={**spec, "num_classes": 3}), data)
    large = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Conv2d",
             "in_channels": 3, "out_channels": 4, "kernel_size": 9}]}  # fmt: skip
    with pytest.raises(InputError, match="Sequential does not run on an image of 3x8x8"):
        build_model(config_of(model=large), data)


@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_weigh_the_loss(soft: bool) -> None:
    logits, labels = torch.randn(6, 3), torch.tensor([0, 0, 0, 1, 1, 2])
    targets: Any = nn.functional.one_hot(labels, 3).float() if soft else labels
    weights = torch.tensor([2 / 3, 1.0, 2.0])
    balanced = CrossEntropy("balanced", class_counts=[30, 20, 10])
    torch.testing.assert_close(balanced.weight, weights)
    listed = CrossEntropy([2 / 3, 1, 2], label_smoothing=0.1)
    for loss, smoothing in ((balanced, 0.0), (listed, 0.1)):
        expected = nn.functional.cross_entropy(
            logits, targets, weight=weights, label_smoothing=smoothing
        )
        torch.testing.assert_close(loss(logits, targets), expected)
        assert not loss.state_dict()  # a resumed run may have others
    focal = FocalLoss(0.0, "balanced", class_counts=[30, 20, 10])
    each = nn.functional.cross_entropy(logits, targets, weight=weights, reduction="none")
    torch.testing.assert_close(focal(logits, targets), each.mean())
    torch.testing.assert_close(FocalLoss(0.0)(logits, labels), CrossEntropy()(logits, labels))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "class_weights has 2 numbers, the data has 10 classes"),
        ("even", "class_weights=even is neither 'balanced' nor a list"),
        ([-1.0] * 10, "numbers of at least 0"),
        ([1.0] * 9 + ["a"], "numbers of at least 0"),
    ],
)
def test_class_weights_that_do_not_fit_are_refused(weights: Any, message: str) -> None:
    data = FakeImages(image_size=8)
    data.setup()
    loss = {"_target_": "repnet.training.losses.CrossEntropy", "class_weights": weights}
    config, model = build_model(config_of(loss=loss), data)
    with pytest.raises(InputError, match=message):
        build_classifier(config, model, data, 8)


def test_balanced_class_weights_are_those_of_the_training_images() -> None:
    data = FakeImages(image_size=8, classes=3, train_size=6)
    data.setup()
    data.splits[0].labels = torch.tensor([0, 0, 0, 1, 1, 2])  # type: ignore[index]
    loss = {"_target_": "repnet.training.losses.CrossEntropy", "class_weights": "balanced"}
    config, model = build_model(config_of(loss=loss), data)
    module = build_classifier(config, model, data, 6)
    torch.testing.assert_close(module.objective.loss.weight, torch.tensor([2 / 3, 1, 2]))


@pytest.mark.parametrize("classes", [3, 7])
def test_metrics_beside_top1(classes: int, tmp_path: Any) -> None:
    data = FakeImages(image_size=4, classes=classes, train_size=30, batch_size=4)
    data.setup()
    test: Any = data.splits[2]  # type: ignore[index]
    test.labels = torch.tensor([0, 0, 0, 1, 1, 0])  # no image of the others
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, classes))
    module = Classifier(net, classes)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False,
                      default_root_dir=tmp_path)  # fmt: skip
    for _ in range(2):  # the second test starts from zero
        (metrics,) = trainer.test(module, data, verbose=False)
    with torch.no_grad():
        predictions = net(torch.stack([x for x, _ in test])).argmax(1)
    expected, scores = [], []
    for label in range(classes):
        hits = ((predictions == label) & (test.labels == label)).sum().item()
        images = (test.labels == label).sum().item()
        found = (predictions == label).sum().item()
        expected.append(round(hits / images, 6) if images else None)
        scores += [2 * hits / (images + found)] if images + found else []
    assert module.recall_of_classes == expected
    assert metrics["test/f1"] == pytest.approx(sum(scores) / len(scores))
    assert ("test/top5" in metrics) == (classes > 5)
