"""Objectives, each against its formula in float64, and the teachers that they learn from."""

from __future__ import annotations

import copy
import functools
import urllib.error
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import StochasticDepth

from repnet import load_deployed, reparameterize, save_deployed
from repnet.checkpoint import describe, load_checkpoint, save_checkpoint
from repnet.errors import InputError
from repnet.models import create_model
from repnet.spec import CONFIGS, build, choices, load_choice
from repnet.training import (
    AuxiliaryHeads,
    Classifier,
    Distillation,
    RDrop,
    Supervised,
    checkpoint_activations,
    load_teacher,
    rdrop_loss,
)
from repnet.training.objectives import drops
from repnet.training.run import train
from tests.commands import TINY
from tests.models import randomize_batch_norm

CLASSES, SHAPE = 3, (3, 8, 8)
LOSS = nn.CrossEntropyLoss(label_smoothing=0.1)
Outputs = namedtuple("Outputs", ["logits", "aux_logits2", "aux_logits1"])


def tiny(**options: Any) -> nn.Module:
    options = {"num_classes": CLASSES, "widths": [0.1] * 4, "depths": [1, 1, 1, 1], **options}
    return randomize_batch_norm(create_model("repvgg_tiny", **options)).double()


def batch(n: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *SHAPE, dtype=torch.float64), torch.arange(n) % CLASSES


def soft(labels: Tensor) -> Tensor:
    return functional.one_hot(labels, CLASSES).double() * 0.7 + 0.1


def logits(n: int = 4) -> Tensor:
    return torch.randn(n, CLASSES, dtype=torch.float64)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return `KL(p, q)` of distributions, averaged over the batch, term by term."""
    total = torch.zeros((), dtype=torch.float64)
    for row, other in zip(p, q, strict=True):
        for a, b in zip(row, other, strict=True):
            total = total + a * torch.log(a / b)
    return total / len(p)


# Supervised


def test_the_loss_of_one_tensor() -> None:
    images, labels = batch()
    output = logits()
    for outputs in (output, (output,), [output, None], {"out": output}, {"logits": output}):
        for target in (labels, soft(labels)):
            loss = Supervised(LOSS)(lambda x, o=outputs: o, images, target)
            torch.testing.assert_close(loss, LOSS(output, target), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b, c: (a, b, c),
        lambda a, b, c: [a, b, c],
        lambda a, b, c: Outputs(a, b, c),
        lambda a, b, c: {"out": a, "aux": b, "aux2": c},
        lambda a, b, c: OrderedDict(loss=None, aux_1=b, aux_2=c, logits=a, hidden_states=(a,)),
    ],
    ids=["tuple", "list", "named", "dict", "model output"],
)
def test_auxiliary_losses_are_averaged(make: Any) -> None:
    images, labels = batch()
    main, first, second = logits(), logits(), logits()
    found = Supervised(LOSS, 0.25)(lambda x: make(main, first, second), images, labels)
    auxiliary = (LOSS(first, labels) + LOSS(second, labels)) / 2
    torch.testing.assert_close(found, LOSS(main, labels) + 0.25 * auxiliary)


def test_googlenet_trains_with_its_own_heads() -> None:
    network = torchvision.models.googlenet(weights=None, num_classes=CLASSES, init_weights=False)
    images, labels = torch.randn(2, 3, 64, 64), torch.tensor([0, 2])
    torch.manual_seed(1)
    found = Supervised(LOSS)(network, images, labels)
    torch.manual_seed(1)
    main, second, first = network(images)
    auxiliary = (LOSS(first, labels) + LOSS(second, labels)) / 2
    torch.testing.assert_close(found, LOSS(main, labels) + 0.3 * auxiliary)


@pytest.mark.parametrize("outputs", [{"features": 1}, "text", (), [None], (1.0,)])
def test_other_outputs_are_refused(outputs: Any) -> None:
    with pytest.raises(InputError, match="the network returns .*logits are wanted"):
        Supervised(LOSS)(lambda x: outputs, *batch())


def test_losses_of_half_precision_are_in_float32() -> None:
    images, labels = batch()
    output = logits().bfloat16()
    for objective in (Supervised(LOSS), RDrop(LOSS)):
        loss = objective(lambda x: output.repeat(len(x) // 4, 1), images, labels)
        torch.testing.assert_close(loss, LOSS(output.float(), labels), rtol=1e-6, atol=0)


# R-Drop


class Masked(nn.Module):
    """Dropout with fixed masks, one for each image of the doubled batch."""

    def __init__(self, masks: Tensor) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, x: Tensor) -> Tensor:
        return x * self.masks[: len(x)]


@pytest.mark.parametrize("is_soft", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 5.0])
def test_r_drop_is_its_formula(alpha: float, is_soft: bool) -> None:
    images, labels = batch()
    target = soft(labels) if is_soft else labels
    masks = (torch.rand(8, 6) < 0.5).double() * 2
    first, last = nn.Linear(192, 6).double(), nn.Linear(6, CLASSES).double()
    network = nn.Sequential(nn.Flatten(), first, Masked(masks), last)
    found = RDrop(LOSS, alpha)(network, images, target)
    grads = torch.autograd.grad(found, network.parameters())

    hidden = images.flatten(1) @ first.weight.T + first.bias
    outputs = [(hidden * m) @ last.weight.T + last.bias for m in masks.chunk(2)]
    assert not torch.equal(*outputs)
    p, q = (x.exp() / x.exp().sum(1, keepdim=True) for x in outputs)
    supervised = (LOSS(outputs[0], target) + LOSS(outputs[1], target)) / 2
    expected = supervised + alpha * (divergence(p, q) + divergence(q, p)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, network.parameters()))
    torch.testing.assert_close(rdrop_loss(*outputs, target, LOSS, alpha), found)


def test_r_drop_runs_the_network_once_with_other_dropout_for_each_copy() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 3))
    network.double()
    images, labels = batch()
    found = RDrop(LOSS, 1.0, model=network)(network, images, labels)
    norm: Any = network[0]
    assert int(norm.num_batches_tracked) == 1
    doubled = torch.cat([images, images])
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * doubled.var((0, 2, 3)))
    plain = LOSS(network.eval()(images), labels)
    assert not torch.equal(found, plain)
    torch.testing.assert_close(RDrop(LOSS)(network, images, labels), plain)  # no divergence


def test_equal_predictions_have_no_divergence_and_it_is_symmetric() -> None:
    labels = torch.arange(4) % CLASSES
    a, b = logits(), logits()
    torch.testing.assert_close(rdrop_loss(a, a, labels), functional.cross_entropy(a, labels))
    assert rdrop_loss(a, b, labels, alpha=2.0) > rdrop_loss(a, b, labels, alpha=0.0)
    torch.testing.assert_close(rdrop_loss(a, b, labels), rdrop_loss(b, a, labels))


class Rate(nn.Module):
    """As timm's models keep theirs."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.drop_rate = rate


@pytest.mark.parametrize(
    ("dropping", "not_dropping"),
    [
        (nn.Dropout(0.1), nn.Dropout(0.0)),
        (nn.Dropout2d(0.1), nn.Identity()),
        (nn.AlphaDropout(0.1), nn.AlphaDropout(0.0)),
        (StochasticDepth(0.1, "row"), StochasticDepth(0.0, "row")),
        (nn.MultiheadAttention(4, 2, dropout=0.1), nn.MultiheadAttention(4, 2)),
        (Rate(0.1), Rate(0.0)),
        (torchvision.models.mobilenet_v2(), torchvision.models.resnet18()),
    ],
)
def test_r_drop_needs_dropout(dropping: nn.Module, not_dropping: nn.Module) -> None:
    assert drops(dropping)
    RDrop(LOSS, model=nn.Sequential(nn.Conv2d(3, 3, 1), dropping))
    with pytest.raises(InputError, match=r"Sequential has none.*model\.dropout.*model\.drop_path"):
        RDrop(LOSS, model=nn.Sequential(nn.Conv2d(3, 3, 1), not_dropping))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("repvgg_tiny", {"dropout": 0.1}),
        ("mobileone_tiny", {"dropout": 0.1}),
        ("resnet20", {"dropout": 0.1}),
        ("resnet20", {"drop_path": 0.1}),
    ],
)
def test_our_models_can_have_dropout(name: str, options: dict[str, float]) -> None:
    RDrop(LOSS, model=create_model(name, **options))
    with pytest.raises(InputError, match="has none"):
        RDrop(LOSS, model=create_model(name))


def test_timm_models_can_have_dropout() -> None:
    timm = pytest.importorskip("timm")
    assert drops(timm.create_model("resnet18", drop_path_rate=0.1))
    assert drops(timm.create_model("resnet18", drop_rate=0.1))
    assert not drops(timm.create_model("resnet18"))


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(InputError, match="alpha >= 0"):
        RDrop(LOSS, -1.0)


# Distillation


@pytest.mark.parametrize("is_soft", [False, True])
def test_distillation_is_its_formula(is_soft: bool) -> None:
    student, teacher = tiny().train(), tiny(dropout=0.5)
    images, labels = batch()
    target = soft(labels) if is_soft else labels
    found = Distillation(LOSS, teacher, alpha=0.3, temperature=2.5)(student, images, target)
    output, wanted = student(images), teacher.eval()(images)
    q, p = ((x / 2.5).exp() / (x / 2.5).exp().sum(1, keepdim=True) for x in (output, wanted))
    expected = 0.7 * LOSS(output, target) + 0.3 * 2.5**2 * divergence(p, q)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(found, student.parameters()),
        torch.autograd.grad(expected, student.parameters()),
    )


def test_a_teacher_is_frozen_and_nowhere_saved() -> None:
    student, teacher = tiny().train(), tiny(dropout=0.5).train()
    objective = Distillation(LOSS, teacher)
    module = Classifier(student, CLASSES, objective=objective).train()
    assert not list(objective.parameters())
    assert not objective.state_dict()
    assert not any(key.startswith("objective") for key in module.state_dict())
    assert not teacher.training
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    teacher.train()  # as a foreign script may
    images, labels = batch()
    objective(student, images, labels).backward()
    assert not teacher.training
    assert not objective._teach(images.requires_grad_()).requires_grad
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student.parameters())
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


def test_a_teacher_of_another_precision_and_device() -> None:
    student, teacher = tiny().float().train(), tiny()
    images, labels = batch()
    loss = Distillation(LOSS, teacher)(student, images.float(), labels)
    torch.testing.assert_close(
        loss, Distillation(LOSS, teacher)(copy.deepcopy(student), images.float(), labels)
    )
    with torch.autocast("cpu", torch.bfloat16):
        mixed = Distillation(LOSS, teacher.float())(student, images.float(), labels)
    assert mixed.dtype == torch.float32
    mixed.backward()
    with torch.device("meta"):
        abstract = create_model("repvgg_tiny", num_classes=CLASSES)
        images, labels = torch.empty(4, *SHAPE), torch.empty(4, dtype=torch.int64)
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    objective = Distillation(LOSS, create_model("repvgg_tiny", num_classes=CLASSES))
    assert objective(network, images, labels).device.type == "meta"
    assert next(objective.teacher.parameters()).device == next(abstract.parameters()).device


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    teacher, known = tiny(), {"num_classes": CLASSES, "input_shape": SHAPE}
    Distillation(LOSS, teacher, **known)
    with pytest.raises(InputError, match=r"teacher returns \(3,\) for each image.* 10 classes"):
        Distillation(LOSS, teacher, num_classes=10, input_shape=SHAPE)
    with pytest.raises(InputError, match="does not take images of 1x8x8"):
        Distillation(LOSS, teacher, num_classes=CLASSES, input_shape=(1, 8, 8))
    with pytest.raises(InputError, match=r"logits are \(4, 3\), the student's \(4, 5\)"):
        Distillation(LOSS, teacher)(tiny(num_classes=5).train(), *batch())
    for wrong in ({"alpha": 1.5}, {"temperature": 0.0}):
        with pytest.raises(InputError, match="alpha from 0 to 1 and a temperature above 0"):
            Distillation(LOSS, teacher, **wrong)


# Auxiliary heads


def heads(model: nn.Module, **options: Any) -> AuxiliaryHeads:
    known = {"num_classes": CLASSES, "input_shape": SHAPE, "places": ["stages.0", "stages.2"]}
    return AuxiliaryHeads(LOSS, model=model, **{**known, **options})


def test_auxiliary_heads_are_their_formula() -> None:
    model = tiny().train()
    objective = heads(model, weight=0.4)
    assert model.training
    images, labels = batch()
    found = objective(model, images, labels)
    x = model.stages[0](model.stem(images))
    y = model.stages[2](model.stages[1](x))
    output = model.head(model.pool(model.stages[3](y)))
    others = [
        functional.linear(feature.mean((2, 3)), head[-1].weight, head[-1].bias)
        for feature, head in zip((x, y), objective.heads, strict=True)
    ]
    expected = LOSS(output, labels) + 0.4 * sum(LOSS(o, labels) for o in others) / 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    parameters = [*model.stem.parameters(), *objective.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters)
    )


def test_auxiliary_heads_leave_the_model_as_it_is() -> None:
    model = tiny().train()
    state = copy.deepcopy(model.state_dict())
    objective = heads(model)
    assert list(objective.state_dict()) == [
        f"heads.{i}.2.{key}" for i in range(2) for key in ("weight", "bias")
    ]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
    objective(model, *batch())
    assert list(model.state_dict()) == list(state)
    assert not any(m._forward_hooks for m in model.modules())
    keys = Classifier(model, CLASSES, objective=objective).state_dict()
    assert sum(key.startswith("objective.") for key in keys) == 4
    assert sum(key.startswith("model.") for key in keys) == len(state)


def test_auxiliary_heads_with_a_convolution_and_activation_checkpointing() -> None:
    plain = tiny().train()
    checkpointed = copy.deepcopy(plain)
    checkpoint_activations(checkpointed, "stages.*")
    images, labels = batch()
    objective = heads(plain, hidden_channels=5)
    assert [type(m).__name__ for m in objective.heads[0]][:3] == ["Conv2d", "BatchNorm2d", "ReLU"]
    other = heads(checkpointed, hidden_channels=5)
    other.load_state_dict(objective.state_dict())
    found = []
    for make, model in ((objective, plain), (other, checkpointed)):
        make(model, images, labels).backward()
        found.append([p.grad for p in (*model.parameters(), *make.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_auxiliary_heads_of_tokens_and_vectors() -> None:
    tokens = nn.Sequential(nn.Flatten(2), nn.Linear(64, 7))  # (batch, 3 tokens, 7)
    model = nn.Sequential(tokens, nn.Flatten(), nn.Linear(21, CLASSES)).double()
    objective = heads(model, places=["0", "1"], weight=1.0)
    assert [head[-1].in_features for head in objective.heads] == [7, 21]
    images, labels = batch()
    a, b = model[0](images), model[1](model[0](images))
    first, second = objective.heads
    auxiliary = LOSS(first[-1](a.mean(1)), labels) + LOSS(second[-1](b), labels)
    expected = LOSS(model(images), labels) + auxiliary / 2
    torch.testing.assert_close(objective(model, images, labels), expected)


def test_places_that_cannot_have_a_head_are_refused() -> None:
    model = tiny()
    with pytest.raises(InputError, match=r"RepVGG has no part 'stages\.7'.*it has stem, stages"):
        heads(model, places=["stages.7"])
    with pytest.raises(InputError, match="need places"):
        heads(model, places=[])
    model.unused = nn.Identity()
    with pytest.raises(InputError, match="'unused' was not called"):
        heads(model, places=["unused"])
    model.stem = nn.Sequential(model.stem, nn.Unflatten(1, (1, -1)), nn.Flatten(1, 2))
    with pytest.raises(InputError, match=r"'stem\.1' returns \(1, 1, .*an auxiliary head takes"):
        heads(model, places=["stem.1"])
    assert not any(m._forward_hooks for m in model.modules())
    objective = heads(tiny())
    with pytest.raises(InputError, match="'stages.0' was not called while RepVGG ran"):
        objective(tiny(), *batch())  # another network


# Nesting


def test_objectives_nest() -> None:
    model, teacher = tiny(dropout=0.5).train(), tiny()
    images, labels = batch()
    make = functools.partial(AuxiliaryHeads, places=["stages.1"], weight=0.5)
    distill = functools.partial(Distillation, teacher=teacher, alpha=0.3, base=make)
    known = {"model": model, "num_classes": CLASSES, "input_shape": SHAPE}
    objective = RDrop(LOSS, 2.0, base=distill, **known)
    assert [name for name, _ in objective.named_parameters()] == [
        f"base.base.heads.0.2.{key}" for key in ("weight", "bias")
    ]
    torch.manual_seed(1)
    found = objective(model, images, labels)

    torch.manual_seed(1)
    doubled, twice = torch.cat([images, images]), torch.cat([labels, labels])
    feature = model.stages[:2](model.stem(doubled))
    output = model.head(model.pool(model.stages[2:](feature)))
    auxiliary = LOSS(objective.base.base.heads[0](feature), twice)
    p, q = ((x / 4).softmax(1) for x in (teacher(doubled), output))
    expected = 0.7 * (LOSS(output, twice) + 0.5 * auxiliary) + 0.3 * 16 * divergence(p, q)
    a, b = output.softmax(1).chunk(2)
    expected = expected + 2.0 * (divergence(a, b) + divergence(b, a)) / 2
    torch.testing.assert_close(found, expected)


def test_a_base_may_be_an_objective_or_a_function() -> None:
    images, labels = batch()
    output = logits()
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES)).double()
    for base in (Supervised(LOSS), lambda network, x, y: LOSS(network(x), y)):
        found = Distillation(LOSS, teacher, alpha=0.0, base=base)(lambda x: output, images, labels)
        torch.testing.assert_close(found, LOSS(output, labels))


def test_heads_around_r_drop_are_refused() -> None:
    model = tiny(dropout=0.5).train()
    objective = heads(model, base=functools.partial(RDrop, alpha=1.0))
    with pytest.raises(InputError, match="R-Drop doubles it; make the heads its base"):
        objective(model, *batch())


# Teachers


@pytest.fixture
def resnet(tmp_path: Path) -> tuple[nn.Module, Path]:
    model = torchvision.models.resnet18(num_classes=CLASSES)
    randomize_batch_norm(model)
    path = tmp_path / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, path


def assert_teaches(teacher: nn.Module, model: nn.Module) -> None:
    images = torch.randn(2, 3, 32, 32)
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    torch.testing.assert_close(teacher(images), model.eval()(images), rtol=0, atol=0)


def test_teachers_of_torchvision(resnet: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, path = resnet
    assert_teaches(load_teacher("torchvision", "resnet18", path, num_classes=CLASSES), model)
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, tmp_path / "wrapped.pth")
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for name in ("wrapped.pth", "weights.safetensors"):
        teacher = load_teacher("torchvision", "resnet18", tmp_path / name, num_classes=CLASSES)
        assert_teaches(teacher, model)


def test_teachers_with_heads_of_their_own(tmp_path: Path) -> None:
    model = torchvision.models.googlenet(weights=None, num_classes=CLASSES, init_weights=False)
    torch.save(model.state_dict(), tmp_path / "googlenet.pth")
    teacher = load_teacher(
        "torchvision", "googlenet", tmp_path / "googlenet.pth", num_classes=CLASSES
    )
    assert_teaches(teacher, model)


def test_teachers_of_timm(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = randomize_batch_norm(timm.create_model("resnet18", num_classes=CLASSES))
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    teacher = load_teacher("timm", "resnet18", tmp_path / "timm.pth", num_classes=CLASSES)
    assert_teaches(teacher, model)
    gray = timm.create_model("resnet18", num_classes=CLASSES, in_chans=1)
    torch.save(gray.state_dict(), tmp_path / "gray.pth")
    options = {"num_classes": CLASSES, "in_channels": 1}
    teacher = load_teacher("timm", "resnet18", tmp_path / "gray.pth", **options)
    assert teacher(torch.randn(1, 1, 32, 32)).shape == (1, CLASSES)
    for name in ("hf-hub:someone/something", "resnet-18"):
        with pytest.raises(InputError, match="timm has no model"):
            load_teacher("timm", name, tmp_path / "timm.pth")


def test_teachers_of_repnet(tmp_path: Path) -> None:
    model = create_model("repvgg_tiny", num_classes=CLASSES)
    randomize_batch_norm(model)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    teacher = load_teacher("repnet", "repvgg_tiny", tmp_path / "weights.pth", num_classes=CLASSES)
    assert_teaches(teacher, model)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    entry = describe({"model": model.architecture}, {"class_names": ["a", "b", "c"]})
    (tmp_path / "checkpoints").mkdir()
    save_checkpoint({"state_dict": state, "repnet": entry}, tmp_path / "checkpoints" / "best.ckpt")
    for path in (tmp_path, tmp_path / "checkpoints" / "best.ckpt"):
        assert_teaches(load_teacher("repnet", None, path), model)
    folded = reparameterize(model, torch.randn(1, 3, 32, 32))
    save_deployed(folded, tmp_path / "deployed")
    teacher = load_teacher("deployed", None, str(tmp_path / "deployed"))
    assert_teaches(teacher, load_deployed(tmp_path / "deployed"))


def test_what_is_no_teacher_is_refused(resnet: tuple[nn.Module, Path], tmp_path: Path) -> None:
    _, path = resnet
    torch.save({"weight": torch.ones(1), "code": print}, tmp_path / "code.pth")
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (("hub", "resnet18", path), {}, "unknown source 'hub'"),
        (("torchvision", "resnet19", path), {}, "torchvision has no model 'resnet19'"),
        (("torchvision", None, path), {}, "needs the name of a model"),
        (("torchvision", "resnet18", path), {}, r"'fc\.weight' is \(3, 512\).*num_classes"),
        (("torchvision", "resnet34", path), {"num_classes": CLASSES}, "does not hold the weights"),
        (("torchvision", "resnet18", path), {"in_channels": 1}, "cannot make the teacher"),
        (("torchvision", "resnet18", tmp_path / "no.pth"), {}, "not there"),
        (("torchvision", "resnet18", tmp_path / "code.pth"), {}, "could run code"),
        (("repnet", "repvgg_tiny"), {}, "needs weights=PATH"),
        (("deployed", "repvgg_tiny", path), {}, "says itself how .*remove name"),
        (("repnet", None, path), {"num_classes": 3}, "remove num_classes"),
        (("deployed", None, path), {}, "is not a deploy model"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(InputError, match=message):
            load_teacher(*arguments, **options)


def test_published_weights_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize_batch_norm(torchvision.models.resnet18())

    def fetch(url: str, *args: Any, **kwargs: Any) -> Any:
        assert "resnet18" in url
        return model.state_dict()

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fetch)
    assert_teaches(load_teacher("torchvision", "resnet18"), model)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    with pytest.raises(InputError, match=r"cannot be fetched.*no network.*weights=PATH"):
        load_teacher("torchvision", "resnet18")


# Configs


@pytest.mark.parametrize("name", choices("objective"))
def test_objectives_by_config_train(name: str, tmp_path: Path) -> None:
    model = tiny(dropout=0.2).train()
    save_deployed(reparameterize(tiny().float(), torch.randn(1, *SHAPE)), tmp_path)
    spec = load_choice("objective", name)
    if "teacher" in spec:
        spec["teacher"] |= {"source": "deployed", "weights": str(tmp_path)}
    known = {"model": model, "num_classes": CLASSES, "input_shape": SHAPE}
    make = build({**spec, "_partial_": True})
    takes = make.func.__init__.__annotations__
    objective = make(loss=LOSS, **{k: v for k, v in known.items() if k in takes})
    module = Classifier(model, CLASSES, objective=objective)
    loss = module.objective(module.forward, *batch())
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in module.parameters())


def train_with(directory: Path, *overrides: str) -> dict[str, Any]:
    """Train as the command does, in this process."""
    with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        config = compose("train", overrides=[*TINY, *overrides])
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return train({k: v for k, v in plain.items() if k not in ("resume", "trust")}, directory)


def test_runs_train_with_objectives_mixing_losses_and_augmentation(tmp_path: Path) -> None:
    shared = ["mix=mixup_cutmix", "loss=bce", "augment=randaugment"]
    with pytest.raises(InputError, match=r"model\.dropout=0\.1"):
        train_with(tmp_path / "refused", "objective=rdrop", *shared)
    train_with(tmp_path / "first", "objective=rdrop", "model.dropout=0.2", *shared)
    train_with(
        tmp_path / "second",
        "objective=distillation",
        f"objective.teacher.weights={tmp_path / 'first'}",
        *("model=resnet20", "model.width=4", "model.drop_path=0.1"),
    )
    result = train_with(tmp_path / "third", "objective=auxiliary_heads")
    contents = torch.load(result["best_checkpoint"], weights_only=True)
    assert "objective.heads.0.2.weight" in contents["state_dict"]
    assert not any(
        "objective" in key for key in load_checkpoint(tmp_path / "third")[0].state_dict()
    )


def test_a_base_in_a_config_is_given_what_it_asks_for(tmp_path: Path) -> None:
    heads = "{_target_: repnet.training.AuxiliaryHeads, _partial_: true, places: [stages.1]}"
    train_with(tmp_path, "objective=rdrop", "model.dropout=0.2", f"+objective.base={heads}")
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert "objective.base.heads.0.2.weight" in state
