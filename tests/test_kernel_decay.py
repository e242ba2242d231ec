"""The decay of equivalent kernels, and schedules of weight decay, in plain Lightning scripts."""

from __future__ import annotations

import math
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import randomize_batch_norm, relative_error
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from repnet import create_model, kernel_of
from repnet.blocks import (
    ACBlock,
    DiverseBranchBlock,
    MobileOneBlock,
    PlainBlock,
    QARepVGGBlock,
    RepVGGBlock,
)
from repnet.callbacks import EquivalentKernelDecay, SafeCheckpointIO, WeightDecaySchedule
from repnet.callbacks.kernel_decay import FoldableBlock, foldable_blocks, kernel_gradients
from repnet.errors import InputError

TOLERANCE = 1e-12


def gradients(module: nn.Module, channels: int, *, normalize: bool = False) -> dict[str, Tensor]:
    """Return the penalty's gradients by parameter name, for a coefficient of 1."""
    names = {id(p): name for name, p in module.named_parameters()}
    block = FoldableBlock("block", module, channels, 2)
    return {names[id(p)]: g for p, g in kernel_gradients([block], normalize=normalize)}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, name
        assert relative_error(gradient, actual[name]) < TOLERANCE, name


def differentiated(penalty: Tensor, module: nn.Module) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(penalty, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def published(block: RepVGGBlock) -> Tensor:
    """RepVGG's custom L2, from the formula: the rim of the 3x3, and the center of both."""
    dense, pointwise = block.conv[0], block.conv[1]
    t3, t1 = [
        (b.bn.weight / (b.bn.running_var + b.bn.eps).sqrt()).detach().view(-1, 1, 1, 1)
        for b in (dense, pointwise)
    ]
    kernel = dense.conv.weight
    center = kernel[:, :, 1:2, 1:2]
    both = t3 * center + t1 * pointwise.conv.weight
    rim = (kernel**2).sum() - (center**2).sum()
    return (rim + (both**2 / (t3**2 + t1**2)).sum()) / 2


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_normalized_penalty_is_the_published_one(stride: int, groups: int) -> None:
    block = randomize_batch_norm(RepVGGBlock(4, 4, stride=stride, groups=groups)).double()
    assert len(block.conv) == (3 if stride == 1 else 2)
    expected = differentiated(published(block), block)
    assert set(expected) == {"conv.0.conv.weight", "conv.1.conv.weight"}
    assert_same(gradients(block.conv, 4, normalize=True), strip(expected))


def strip(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("conv."): value for name, value in named.items()}


@pytest.mark.parametrize("groups", [1, 2])
def test_exact_penalty_is_that_of_the_written_out_kernel(groups: int) -> None:
    """It keeps the identity, and decays the gammas; else it is the published one, not divided."""
    block = randomize_batch_norm(RepVGGBlock(4, 4, groups=groups)).double()
    scales = [
        bn.weight / (bn.running_var + bn.eps).sqrt()
        for bn in (block.conv[0].bn, block.conv[1].bn, block.conv[2])
    ]
    t3, t1, t0 = (scale.view(-1, 1, 1, 1) for scale in scales)
    one = torch.eye(4 // groups, dtype=torch.float64).repeat(groups, 1)[:, :, None, None]
    center = t1 * block.conv[1].conv.weight + t0 * one
    kernel = t3 * block.conv[0].conv.weight + nn.functional.pad(center, [1] * 4)
    expected = strip(differentiated((kernel**2).sum() / 2, block))
    assert "2.weight" in expected  # the identity's gamma
    assert "0.bn.bias" not in expected
    assert_same(gradients(block.conv, 4), expected)


@pytest.mark.parametrize(
    "block", [ACBlock, DiverseBranchBlock, MobileOneBlock, QARepVGGBlock, RepVGGBlock]
)
def test_every_block_decays_along_the_gradient_of_its_kernel(block: Any) -> None:
    module = randomize_batch_norm(block(4, 4)).double().conv
    training = [m.training for m in module.train().modules()]
    before = deepcopy(module.state_dict())
    found = gradients(module, 4)
    assert [m.training for m in module.modules()] == training
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
    # finite differences of |K|^2 / 2, along a random direction
    step = 1e-6
    values = []
    torch.manual_seed(0)
    directions = {n: torch.randn_like(p) for n, p in module.named_parameters()}
    for sign in (1, -1):
        moved = deepcopy(module)
        with torch.no_grad():
            for name, p in moved.named_parameters():
                p.add_(directions[name], alpha=sign * step)
        values.append((kernel_of(moved, 4).weight ** 2).sum().item() / 2)
    change = (values[0] - values[1]) / (2 * step)
    assert change == pytest.approx(sum((found[n] * directions[n]).sum().item() for n in found),
                                   rel=1e-6)  # fmt: skip


@pytest.mark.parametrize("block", [ACBlock, MobileOneBlock])
def test_normalized_penalty_is_the_least_usual_one_that_gives_the_kernel(block: Any) -> None:
    """Its gradient is a projection of the branches' weights, the smallest with that kernel."""
    module = randomize_batch_norm(block(4, 4)).double().conv
    FoldableBlock("block", module, 4, 2).check_linear()
    least = deepcopy(module)
    found = gradients(module, 4, normalize=True)
    with torch.no_grad():
        for name, p in least.named_parameters():
            if name in found:
                p.copy_(found[name])
    expected = kernel_of(module, 4)
    assert relative_error(expected.weight, kernel_of(least, 4).weight) < TOLERANCE
    again = gradients(least, 4, normalize=True)
    assert all(relative_error(found[n], again[n]) < TOLERANCE for n in found)
    usual = {n: p for n, p in module.named_parameters() if n in found}
    assert sum(g.square().sum() for g in found.values()) < sum(
        p.square().sum() for p in usual.values()
    )


def test_normalization_refuses_what_is_not_linear() -> None:
    module = randomize_batch_norm(DiverseBranchBlock(4, 4)).conv
    with pytest.raises(InputError, match=r"kernel of 'b' is no sum.*normalize=False"):
        FoldableBlock("b", module, 4, 2).check_linear()
    pooled = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.AvgPool2d(2))
    scaled = nn.Sequential(*(nn.Conv2d(4, 4, 1, groups=4, bias=False) for _ in range(2)))
    for module in (pooled, scaled):
        with pytest.raises(InputError, match="no sum of scaled"):
            FoldableBlock("b", module, 4, 2).check_linear()


def test_blocks_are_the_outermost_of_several_branches() -> None:
    x = torch.randn(2, 3, 16, 16)
    for name in ("repvgg_tiny", "mobileone_tiny"):
        net = create_model(name, num_classes=3)
        blocks = foldable_blocks(net, x)
        modules = dict(net.named_modules())
        assert all(b.module is modules[b.name] for b in blocks)
        assert {b.name for b in blocks} == {n for n in modules if n.split(".")[-1] == "conv"
                                           and not isinstance(modules[n], nn.Conv2d)}  # fmt: skip
    assert foldable_blocks(create_model("repvgg_tiny", block=PlainBlock), x) == []


def test_a_compiled_network_is_decayed_with_the_statistics_that_are_trained() -> None:
    net = create_model("repvgg_tiny", num_classes=3)
    plain = deepcopy(net)
    net.stages.compile(backend="eager")
    x = torch.randn(2, 3, 16, 16)
    blocks = foldable_blocks(net, x)
    for model in (net, plain):
        torch.manual_seed(0)
        randomize_batch_norm(model)
    own = {id(p) for p in net.parameters()}
    pairs = list(zip(kernel_gradients(blocks), kernel_gradients(foldable_blocks(plain, x)),
                     strict=True))  # fmt: skip
    assert len(pairs) > 30
    for (parameter, actual), (_, expected) in pairs:
        assert id(parameter) in own
        torch.testing.assert_close(actual, expected)


class Foreign(LightningModule):
    """Somebody's script: one group that decays, a schedule of its own."""

    def __init__(self, net: nn.Module, optimizer: Any = None) -> None:
        super().__init__()
        self.net = net
        self.make = optimizer or (lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01))
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.calls += 1
        return cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.net.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def small_net() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        RepVGGBlock(3, 4, stride=2), RepVGGBlock(4, 4), PlainBlock(4, 4), nn.Flatten(),
        nn.LazyLinear(3),
    )  # fmt: skip


def batches(dtype: torch.dtype = torch.float64) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 8, 8, generator=generator, dtype=dtype)
    return DataLoader(TensorDataset(x, torch.arange(24) % 3), batch_size=4)


def fit(module: LightningModule, *callbacks: Callback, ckpt: Any = None, **options: Any) -> Trainer:
    defaults = {"precision": "64-true", "max_epochs": 2}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=list(callbacks),
        plugins=[SafeCheckpointIO()], **{**defaults, **options},
    )  # fmt: skip
    trainer.fit(module, batches(), ckpt_path=ckpt)
    return trainer


def ready_net() -> nn.Module:
    net = small_net().double()
    net(torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    return net


class GroupsAreWhole(Callback):
    """Schedules, checkpoints and callbacks see the one group that the script made."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        (group,) = trainer.optimizers[0].param_groups
        assert group["weight_decay"] == 0.01
        assert len(group["params"]) == len(list(trainer.lightning_module.parameters()))


def by_hand(net: nn.Module, optimizer_class: Any, options: Any, clip: float | None) -> None:
    """Train as `fit` does, with the penalty in the loss and two groups made by hand."""
    blocks = [net[0].conv, net[1].conv]
    without = [p for b in blocks for n, p in b.named_parameters() if not n.endswith("bias")]
    others = [p for p in net.parameters() if not any(p is q for q in without)]
    groups = [{"params": others, "weight_decay": 0.01}, {"params": without, "weight_decay": 0.0}]
    optimizer = optimizer_class(groups, **options)
    step = 0
    for _ in range(2):
        for x, y in batches():
            for group in optimizer.param_groups:
                group["lr"] = options["lr"] * 0.9**step
            optimizer.zero_grad()
            loss = cross_entropy(net(x), y)
            kernels = [kernel_of(b, c).weight for b, c in zip(blocks, (3, 4), strict=True)]
            (loss + 0.05 / 2 * sum((k**2).sum() for k in kernels)).backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            step += 1


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.01})],
)
def test_training_is_that_with_the_penalty_in_the_loss(
    optimizer: Any, options: dict[str, Any], clip: float | None
) -> None:
    net = ready_net().train()
    expected = deepcopy(net)
    by_hand(expected, optimizer, options, clip)
    module = Foreign(net, lambda p: optimizer(p, weight_decay=0.01, **options))
    fit(module, EquivalentKernelDecay(0.05), GroupsAreWhole(), gradient_clip_val=clip)
    for (name, a), b in zip(expected.named_parameters(), net.parameters(), strict=True):
        assert relative_error(a, b) < 1e-9, name


def test_gradients_are_accumulated_before_the_penalty_is_added_once() -> None:
    module = Foreign(ready_net())
    seen: list[int] = []

    class Counted(EquivalentKernelDecay):
        def on_before_optimizer_step(self, *args: Any) -> None:
            seen.append(module.calls)
            super().on_before_optimizer_step(*args)

    fit(module, Counted(0.05), accumulate_grad_batches=3, max_epochs=1)
    assert seen == [3, 6]


class SavedAt(Callback):
    """Saves after a step, as a crash would leave it."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def test_a_resumed_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    path = tmp_path / "middle.ckpt"
    callbacks = lambda: (EquivalentKernelDecay(0.05), WeightDecaySchedule(1e-4))
    whole = Foreign(ready_net())
    fit(whole, *callbacks(), SavedAt(6, path))
    (group,) = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["initial_weight_decay"] == 0.01
    resumed = Foreign(ready_net())
    fit(resumed, *callbacks(), ckpt=path)
    assert (whole.calls, resumed.calls) == (12, 6)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_groups_are_whole_after_an_error_within_the_step() -> None:
    module = Foreign(ready_net())

    class Failing(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, *args: Any) -> None:
            assert len(trainer.optimizers[0].param_groups) == 2
            raise RuntimeError("after the split")

    with pytest.raises(RuntimeError, match="after the split"):
        fit(module, EquivalentKernelDecay(), Failing())
    (group,) = module.optimizers(use_pl_optimizer=False).param_groups
    assert len(group["params"]) == len(list(module.parameters()))


def test_gradients_that_a_fused_step_will_unscale_are_scaled() -> None:
    """Called twice before a step, as when a scaler skips one: the groups are split once."""
    net = ready_net()
    callback = EquivalentKernelDecay(0.5)
    callback.blocks = foldable_blocks(net, torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    expected = {id(p): 0.5 * 8 * 2 * g for p, g in kernel_gradients(callback.blocks)}
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]  # as fused ones have
    scaler = SimpleNamespace(get_scale=lambda: 8.0)
    trainer: Any = SimpleNamespace(world_size=1, precision_plugin=SimpleNamespace(scaler=scaler))
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(2):
        callback.on_before_optimizer_step(trainer, Foreign(net), optimizer)
    for p in net.parameters():
        torch.testing.assert_close(p.grad, expected.get(id(p), torch.zeros_like(p)))
    assert [len(g["params"]) for g in optimizer.param_groups] == [
        len(list(net.parameters())) - len(expected), len(expected),
    ]  # fmt: skip


class ByChildren(Foreign):
    """Calls the parts of a network, and never the network."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0]
        for child in self.net:
            x = child(x)
        return cross_entropy(x, batch[1])


def test_what_cannot_be_decayed_is_refused() -> None:
    with pytest.raises(InputError, match="does not call Sequential.*attribute="):
        fit(ByChildren(ready_net()), EquivalentKernelDecay())
    plain = nn.Sequential(PlainBlock(3, 4), nn.Flatten(), nn.Linear(256, 3))
    with pytest.raises(InputError, match="no block of Sequential has several branches"):
        fit(Foreign(plain), EquivalentKernelDecay())
    with pytest.raises(InputError, match="one EquivalentKernelDecay"):
        fit(Foreign(ready_net()), EquivalentKernelDecay(), EquivalentKernelDecay(0.1, "net"))
    with pytest.raises(InputError, match="must not be negative"):
        EquivalentKernelDecay(-1)
    dbb = nn.Sequential(DiverseBranchBlock(3, 4), nn.Flatten(), nn.Linear(256, 3))
    with pytest.raises(InputError, match=r"'0.conv' is no sum"):
        fit(Foreign(dbb), EquivalentKernelDecay(normalize=True))


def test_processes_decay_alike_though_their_statistics_differ(tmp_path: Path) -> None:
    class Compared(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
            values = torch.cat([p.detach().flatten() for p in pl_module.parameters()])
            torch.save(values, tmp_path / f"{trainer.global_rank}.pt")

    decay = EquivalentKernelDecay(0.5)
    fit(Foreign(ready_net()), decay, Compared(), strategy="ddp_fork", devices=2, max_epochs=1)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Recorded(Callback):
    def __init__(self) -> None:
        self.values: list[list[float]] = []

    def on_before_zero_grad(self, trainer: Trainer, *args: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.values.append([group["weight_decay"] for group in groups])


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_weight_decay_follows_its_shape(shape: Any) -> None:
    net = ready_net()

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        weights, rest = [], []
        for p in parameters:
            (weights if p.ndim > 1 else rest).append(p)
        groups = [{"params": weights}, {"params": rest, "weight_decay": 0.0}]
        return torch.optim.SGD(groups, 0.1, weight_decay=1e-2)

    recorded = Recorded()
    fit(Foreign(net, optimizer), WeightDecaySchedule(1e-3, shape), recorded)
    total = 12
    for step, (decaying, fixed) in enumerate(recorded.values):
        left = (1 + math.cos(math.pi * step / total)) / 2 if shape == "cosine" else 1 - step / total
        assert decaying == pytest.approx(1e-3 + 9e-3 * left)
        assert fixed == 0
    assert len(recorded.values) == total


def test_a_weight_decay_schedule_needs_an_end_and_a_shape() -> None:
    with pytest.raises(InputError, match="unknown shape 'step'"):
        WeightDecaySchedule(0.0, "step")  # type: ignore[arg-type]

    class Endless(Foreign):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(InputError, match="needs an end"):
        fit(Endless(ready_net()), WeightDecaySchedule(0.0), max_epochs=-1)
    with pytest.raises(InputError, match="set optimizer.weight_decay"):
        fit(Endless(ready_net()), WeightDecaySchedule(1e-5))
