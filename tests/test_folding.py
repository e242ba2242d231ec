"""`reparameterize`: laws over one list of models, then the promises that need a model each."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any, NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.resnet import BasicBlock
from torchvision.ops import FrozenBatchNorm2d, SqueezeExcitation

from repnet.blocks import Block, RepVGGBlock
from repnet.convolution import as_module
from repnet.fold import FoldReport, reparameterize
from repnet.fold.core import Folding
from repnet.kernel import ConvKernel
from repnet.layers import Scale, Sum, conv, conv_bn
from repnet.models import create_model
from repnet.symbolic import kernel_of
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-12

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


class Wired(nn.Module):
    """Named parts, connected by a function of this module and its input."""

    def __init__(self, wiring: Callable[[Any, Tensor], Any], **parts: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Any:
        return self.wiring(self, x)


class NormWithReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


class OwnConv2d(nn.Conv2d):
    """As many libraries have it: a subclass that computes the same."""


class NormalizedPad(nn.Conv2d):
    """Pads by the size of its input, which no kernel has, and divides its weight by its norm."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, [0, x.shape[3] % 3, 0, 0])
        return functional.conv2d(x, self.weight / self.weight.norm())


def chain(*layers: nn.Module) -> nn.Sequential:
    """Return layers and a ReLU, which keeps the sequence from being one convolution."""
    return nn.Sequential(*layers, nn.ReLU())


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def frozen_norm() -> nn.Module:
    layer = FrozenBatchNorm2d(4)
    for statistic in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(statistic)
    nn.init.uniform_(layer.running_var, 0.5, 2)
    return layer


def shared_block() -> nn.Module:
    block = conv_bn(4, 4)
    return nn.Sequential(block, nn.ReLU(), block)


def branching(model: Any, x: Tensor) -> Tensor:
    """Control flow on sizes, which torch.fx cannot trace."""
    return model.body(x) if x.shape[2] > 4 else x


def branching_and_reaching_in(model: Any, x: Tensor) -> Tensor:
    return branching(model, x) + model.body[0](x)


class Case(NamedTuple):
    build: Callable[[], nn.Module]  # for inputs (2, 4, 9, 8)
    folded: list[str]
    left: list[str] = []


CASES = {
    "the root is the block": Case(lambda: conv_bn(4, 8), [""]),
    "blocks": Case(
        lambda: nn.Sequential(RepVGGBlock(4, 4), RepVGGBlock(4, 8, stride=2)), ["0.conv", "1.conv"]
    ),
    "outermost first": Case(lambda: chain(Sum(conv_bn(4, 4), conv_bn(4, 4, 1), norm())), ["0"]),
    "dilation": Case(lambda: chain(Sum(conv_bn(4, 4, dilation=2), conv_bn(4, 4, 1))), ["0"]),
    "depthwise, then pointwise": Case(  # the first norm goes into what follows it
        lambda: chain(conv(4, 4, groups=4), norm(), conv(4, 4, 1), norm()), ["2"]
    ),
    "row and column": Case(lambda: chain(Sum(conv(4, 4, (1, 3)), conv(4, 4, (3, 1)))), []),
    "siblings": Case(lambda: chain(nn.Conv2d(4, 6, 3, stride=2), norm(6)), ["0"]),
    "residual block": Case(lambda: BasicBlock(4, 4), ["conv1", "conv2"]),
    "two norms": Case(lambda: chain(conv(4, 4), norm(), norm()), ["0"]),
    "norm, then a number": Case(lambda: chain(conv(4, 4), norm(), Scale(2.0)), ["0"]),
    "number, then norm": Case(lambda: chain(conv(4, 4), Scale(2.0), norm()), ["0"]),
    "layer scale": Case(lambda: chain(conv(4, 4), norm(), Scale(0.5, channels=4)), ["0"]),
    "convolution of another class": Case(lambda: chain(OwnConv2d(4, 4, 3), norm()), ["0"]),
    "weight norm": Case(lambda: chain(weight_norm(nn.Conv2d(4, 4, 3)), norm()), ["0"]),
    "synchronized norm": Case(lambda: chain(conv(4, 4), nn.SyncBatchNorm(4)), ["0"]),
    "frozen norm": Case(lambda: chain(conv(4, 4), frozen_norm()), ["0"]),
    "norm that is not affine": Case(
        lambda: chain(conv(4, 4), nn.BatchNorm2d(4, affine=False)), ["0"]
    ),
    "asymmetric padding in front": Case(
        lambda: chain(nn.Sequential(nn.ZeroPad2d((2, 0, 0, 1)), nn.Conv2d(4, 4, 3), norm())), ["0"]
    ),
    "asymmetric padding in a block": Case(
        lambda: chain(nn.Sequential(nn.Conv2d(4, 4, 2, padding="same"), norm())), ["0"]
    ),
    "asymmetric padding of siblings": Case(
        lambda: chain(nn.Conv2d(4, 4, 2, padding="same"), norm()), ["0"]
    ),
    "transposed block": Case(
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), norm(6)), [""]
    ),
    "transposed, not upsampling": Case(
        lambda: chain(nn.ConvTranspose2d(4, 6, 3, padding=1, groups=2), norm(6)), ["0"]
    ),
    "transposed siblings": Case(
        lambda: chain(
            nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), norm(6)
        ),
        ["0"],
    ),
    "shared block": Case(shared_block, ["0"]),
    "untraceable": Case(
        lambda: Wired(branching, body=chain(conv(4, 4), norm())),
        ["body.0"],
    ),
    "untraceable, one of two users": Case(
        lambda: Wired(branching_and_reaching_in, body=chain(conv(4, 4), norm())), [], ["body.1"]
    ),
    "norm before padding": Case(lambda: chain(norm(), conv(4, 4)), [], ["0"]),
    "norm alone": Case(lambda: chain(norm()), [], ["0"]),
    "norm that hides a ReLU": Case(lambda: chain(conv(4, 4), NormWithReLU(4)), ["0"]),
    "norm of its batch": Case(
        lambda: chain(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False)), [], ["1"]
    ),
    "reflection": Case(
        lambda: chain(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), norm()), ["0"]
    ),
    "weight from its own size": Case(lambda: chain(NormalizedPad(4, 4, 3), norm()), [], ["1"]),
    "convolution used twice": Case(
        lambda: Wired(
            lambda m, x: functional.relu(m.norm(m.conv(x))) + m.conv(x),
            conv=conv(4, 4),
            norm=norm(),
        ),
        [],
        ["norm"],
    ),
    "norm used twice": Case(
        lambda: Wired(
            lambda m, x: functional.relu(m.norm(m.a(x))) + m.norm(m.b(x)),
            a=conv(4, 4),
            b=conv(4, 4),
            norm=norm(),
        ),
        ["a", "b"],
    ),
    "another user of the convolution": Case(
        lambda: Wired(
            lambda m, x: (lambda y: functional.relu(m.norm(y)) + y)(m.conv(x)),
            conv=conv(4, 4),
            norm=norm(),
        ),
        [],
        ["norm"],
    ),
    "unused head": Case(
        lambda: Wired(lambda m, x: functional.relu(m.body(x)), body=conv_bn(4, 4), head=norm()),
        ["body"],
        ["head"],
    ),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def ready(model: nn.Module) -> Any:
    """Return `model` in float64, with batch norms that are not at their defaults."""
    return randomize_batch_norm(model).double()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    expected, actual = first.state_dict(), second.state_dict()
    assert list(actual) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=0, atol=0)


@every_case
def test_the_outputs_agree_and_the_report_is_complete(case: Case, x: Tensor) -> None:
    model = ready(case.build())
    folded, report = reparameterize(model, x, return_report=True)
    assert relative_error(model(x), folded(x)) < TOLERANCE
    assert list(dict.fromkeys(fold.name for fold in report.folded)) == case.folded
    assert norms(folded) == report.left == case.left
    assert set(report.left) <= set(report.skipped)
    assert report.proof is not None
    assert report.proof.max_relative_error < TOLERANCE


@every_case
def test_the_argument_is_not_changed(case: Case, x: Tensor) -> None:
    model = ready(case.build()).train()
    copy, modules, image = deepcopy(model), list(model.modules()), x.clone()
    _, report = reparameterize(model, x, return_report=True)
    assert report.was_training
    assert "training mode" in str(report)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(module.training for module in model.modules())
    assert_same_state(copy, model)
    torch.testing.assert_close(x, image, rtol=0, atol=0)


@every_case
def test_the_result_is_in_evaluation_mode(case: Case, x: Tensor) -> None:
    folded = reparameterize(ready(case.build()).train(), x)
    assert [name for name, module in folded.named_modules() if module.training] == []


@every_case
def test_a_second_time_changes_nothing(case: Case, x: Tensor) -> None:
    once = reparameterize(ready(case.build()), x)
    twice, report = reparameterize(once, x, return_report=True)
    assert report.folded == []
    assert_same_state(once, twice)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_stays(case: Case, dtype: torch.dtype, x: Tensor) -> None:
    folded = reparameterize(ready(case.build()).to(dtype), x.to(dtype))
    assert {t.dtype for t in folded.state_dict().values() if t.is_floating_point()} == {dtype}


@every_case
def test_shapes_fold_without_values(case: Case, x: Tensor) -> None:
    folded = reparameterize(ready(case.build()), x)
    with torch.device("meta"):
        model = case.build()
    shapes, report = reparameterize(model, x.float().to("meta"), return_report=True)
    assert report.proof is None
    expected = {key: value.shape for key, value in folded.state_dict().items()}
    assert {key: value.shape for key, value in shapes.state_dict().items()} == expected


# torchvision's ResNet-18


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ready(torchvision.models.resnet18(num_classes=10))


@pytest.fixture(scope="module")
def folded_resnet(resnet: nn.Module) -> tuple[nn.Module, FoldReport]:
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    return reparameterize(resnet, image, return_report=True)


def test_resnet_keeps_no_norm_and_its_outputs(
    resnet: nn.Module, folded_resnet: tuple[nn.Module, FoldReport]
) -> None:
    folded, report = folded_resnet
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert relative_error(resnet(image), folded(image)) < TOLERANCE
    assert norms(folded) == report.left == []
    assert str(report).startswith("folded 40 layers into 20 convolutions, relative error ")
    assert type(folded) is type(resnet)


def test_resnet_keeps_its_names(
    resnet: nn.Module, folded_resnet: tuple[nn.Module, FoldReport]
) -> None:
    norm_names = tuple(f"{name}." for name in norms(resnet))
    kept = {name for name, _ in resnet.named_parameters() if not name.startswith(norm_names)}
    kept |= {f"{name}.bias" for name, m in resnet.named_modules() if isinstance(m, nn.Conv2d)}
    # Convolution and norm of a shortcut are a block, and so one convolution under the block's name.
    expected = {name.replace("downsample.0.", "downsample.") for name in kept}
    assert set(folded_resnet[0].state_dict()) == expected


def test_a_convolution_and_its_norm_follow_the_formula(
    resnet: nn.Module, folded_resnet: tuple[nn.Module, FoldReport]
) -> None:
    layer = resnet.bn1
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    weight = resnet.conv1.weight * scale[:, None, None, None]
    conv1 = folded_resnet[0].conv1
    assert relative_error(weight, conv1.weight) < TOLERANCE
    assert relative_error(layer.bias - layer.running_mean * scale, conv1.bias) < TOLERANCE


# What a fold becomes


def test_the_bias_of_a_convolution_is_scaled_too(x: Tensor) -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    first, second = model
    scale = second.weight / (second.running_var + second.eps).sqrt()
    expected = (first.bias - second.running_mean) * scale + second.bias
    folded = reparameterize(model, x)
    assert type(folded) is nn.Conv2d
    assert relative_error(expected, folded.bias) < TOLERANCE


class Tally:
    def __init__(self) -> None:
        self.calls = 0


class Counting(nn.Module):
    """Keeps numbers in containers, which no tensor shows."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.conv, self.norm = conv(4, 4), nn.BatchNorm2d(4)
        self.kind, self.list, self.dict, self.nested = kind, [1], {"calls": 0}, {"calls": [0]}
        self.object = Tally()

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "list":
            self.list.append(1)
        elif self.kind == "dict":
            self.dict["calls"] += 1
        elif self.kind == "nested":
            self.nested["calls"][0] += 1
        else:
            self.object.calls += 1
        return self.norm(self.conv(x))

    def state(self) -> tuple[Any, ...]:
        return [*self.list], {**self.dict}, [*self.nested["calls"]], self.object.calls


@pytest.mark.parametrize("kind", ["list", "dict", "nested", "object"])
def test_what_a_forward_counts_is_kept_and_not_counted_by_the_fold(kind: str, x: Tensor) -> None:
    model = ready(nn.Sequential(Counting(kind), RepVGGBlock(4, 4)))
    before = model[0].state()
    folded, report = reparameterize(model, x, return_report=True)
    assert model[0].state() == folded[0].state() == before
    assert "from call to call" in report.skipped["0.norm"]
    assert "1.conv" in {fold.name for fold in report.folded}
    folded(x)
    assert folded[0].state() != before


def dilated() -> Sum:
    """Return two branches that together need a 5x5."""
    return Sum(conv_bn(4, 4, 3), conv_bn(4, 4, 3, dilation=2))


def test_grow_names_what_may_become_larger(x: Tensor) -> None:
    model = ready(nn.Sequential(dilated(), nn.ReLU(), dilated()))
    folded, report = reparameterize(model, x, grow="2", return_report=True)
    assert "2" in {fold.name for fold in report.folded}
    assert folded[2].kernel_size == (5, 5)
    assert "one convolution is larger" in report.skipped["0"]
    assert any("'2' grew: one convolution is larger" in line for line in report.health)
    assert relative_error(model(x), folded(x)) < TOLERANCE
    graph = reparameterize(model, x, grow="*", method="graph")
    assert sum(isinstance(m, nn.Conv2d) for m in graph.modules()) == 2
    assert relative_error(model(x), graph(x)) < TOLERANCE


def test_a_block_of_the_users_own_always_becomes_one_convolution(x: Tensor) -> None:
    model = ready(Block(dilated(), 4))
    folded, report = reparameterize(model, x, return_report=True)
    assert type(folded.conv) is nn.Conv2d
    assert report.skipped == {}
    assert any("'conv' grew" in line for line in report.health)
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_a_sum_becomes_one_convolution_under_its_own_name(x: Tensor) -> None:
    branches = [conv_bn(4, 6, size, stride=2, groups=2) for size in (3, (1, 3), (3, 1), 1)]
    model = ready(chain(Sum(*branches)))
    folded, report = reparameterize(model, x, return_report=True)
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    assert type(folded[0]) is nn.Conv2d
    assert folded[0].weight.shape == (6, 2, 3, 3)
    (fold,) = report.folded
    assert set(fold.replaced) == {f"0.{i}.{part}" for i in range(4) for part in ("conv", "bn")}


def test_nothing_grows(x: Tensor) -> None:
    model = chain(
        nn.Sequential(conv(4, 4, groups=4), conv(4, 4, 1)),
        Sum(conv(4, 4, (1, 3)), conv(4, 4, (3, 1))),
    )
    folded, report = reparameterize(model.double(), x, return_report=True)
    assert report.folded == []
    assert "larger" in report.skipped["0"]
    assert "larger" in report.skipped["1"]
    assert_same_state(model, folded)


def test_two_pointwise_convolutions_shrink_to_one_where_that_is_smaller(x: Tensor) -> None:
    folded = reparameterize(nn.Sequential(conv(4, 16, 1), conv(16, 4, 1)).double(), x)
    assert type(folded) is nn.Conv2d
    assert folded.weight.shape == (4, 4, 1, 1)


def test_asymmetric_padding_becomes_a_layer_before_the_convolution(x: Tensor) -> None:
    model = ready(nn.Sequential(nn.ZeroPad2d((2, 0, 0, 1)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)))
    folded = reparameterize(model, x)
    assert [type(layer) for layer in folded] == [nn.ZeroPad2d, nn.Conv2d]
    assert folded[0].padding == (2, 0, 0, 1)
    assert relative_error(model(x), folded(x)) < TOLERANCE


@pytest.mark.parametrize("groups", [1, 2])
def test_a_norm_scales_the_output_axis_of_a_transposed_convolution(groups: int, x: Tensor) -> None:
    model = ready(
        nn.Sequential(
            nn.ConvTranspose2d(4, 4, 3, stride=2, groups=groups, bias=False), nn.BatchNorm2d(4)
        )
    )
    first, second = model
    scale = second.weight / (second.running_var + second.eps).sqrt()
    folded = reparameterize(model, x)
    by_output = scale.reshape(groups, 1, -1).repeat_interleave(4 // groups, 1).reshape(4, -1, 1, 1)
    assert type(folded) is nn.ConvTranspose2d
    assert relative_error(first.weight * by_output, folded.weight) < TOLERANCE
    assert relative_error(first.weight * scale[:, None, None, None], folded.weight) > 0.1


def test_squeeze_and_excitation_stays() -> None:
    model = ready(
        create_model(
            "repvgg_d2se", num_classes=5, depths=[1, 2, 1, 1], widths=[0.25, 0.25, 0.25, 0.25]
        )
    )
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    folded = reparameterize(model, image)
    attention = [m for m in folded.modules() if isinstance(m, SqueezeExcitation)]
    assert len(attention) == 6
    assert relative_error(model(image), folded(image)) < TOLERANCE
    for module in attention:  # the law above is only worth something if attention matters
        nn.init.zeros_(module.fc2.weight)
    assert relative_error(model(image), folded(image)) > 1e-3


def test_a_shared_block_is_one_convolution_in_both_places(x: Tensor) -> None:
    folded = reparameterize(ready(shared_block()), x)
    assert type(folded[0]) is nn.Conv2d
    assert folded[0] is folded[2]


def test_frozen_weights_stay_frozen(x: Tensor) -> None:
    model = ready(nn.Sequential(RepVGGBlock(4, 4), chain(conv(4, 4), nn.BatchNorm2d(4))))
    model[1].requires_grad_(False)
    folded = reparameterize(model, x)
    assert [p.requires_grad for p in folded[0].parameters()] == [True, True]
    assert [p.requires_grad for p in folded[1].parameters()] == [False, False]


def test_the_memory_format_stays(x: Tensor) -> None:
    model = ready(nn.Sequential(RepVGGBlock(4, 6), chain(conv(6, 4), nn.BatchNorm2d(4))))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        folded = reparameterize(model.to(memory_format=memory_format), x)
        for weight in (folded[0].conv.weight, folded[1][0].weight):
            assert weight.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "build",
    [
        lambda: chain(conv(4, 4), nn.BatchNorm2d(4)),
        lambda: chain(Sum(conv(4, 4), nn.BatchNorm2d(4))),
        lambda: chain(nn.Sequential(nn.Conv2d(4, 4, 2, padding="same"), nn.BatchNorm2d(4))),
    ],
    ids=["siblings", "block", "asymmetric block"],
)
def test_a_convolution_in_half_precision_with_a_norm_in_float32(
    build: Callable[[], nn.Module], x: Tensor
) -> None:
    model = randomize_batch_norm(build()).half()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    folded = reparameterize(model, x.half())
    assert {t.dtype for t in folded.state_dict().values()} == {torch.float16}
    assert folded(x.half()).dtype == torch.float16


def test_half_precision_weights_are_folded_in_float64(x: Tensor) -> None:
    model = ready(conv_bn(4, 4)).to(torch.bfloat16)
    expected = kernel_of(deepcopy(model).double(), 4).weight.to(torch.bfloat16)
    torch.testing.assert_close(
        reparameterize(model, x.bfloat16()).weight, expected, rtol=0, atol=0, check_stride=False
    )


# Why a norm is left


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        ("convolution used twice", "norm", "'conv' is also used elsewhere"),
        (
            "another user of the convolution",
            "norm",
            "'conv' (Conv2d), which comes before",
        ),
        ("unused head", "head", "it was not run on the example input"),
        ("weight from its own size", "0", "which a kernel lacks"),
        ("norm before padding", "0", "it comes after the input of the model; a norm goes into"),
        ("norm of its batch", "1", "without running statistics"),
    ],
)
def test_the_reason_is_given(name: str, module: str, reason: str, x: Tensor) -> None:
    report = reparameterize(ready(CASES[name].build()), x, return_report=True)[1]
    assert reason in report.skipped[module]
    assert f"skipped '{module}': {report.skipped[module]}" in str(report)


@pytest.fixture(params=["0.conv", "0.conv.0", "0.conv.1.bn", "1.0", "1.1", "1.2"])
def hooked(request: pytest.FixtureRequest) -> tuple[nn.Module, str, list[Tensor]]:
    """Return a model, the name of a layer of it with a hook, and what that hook saw."""
    model = nn.Sequential(RepVGGBlock(4, 4), chain(conv(4, 4), nn.Identity(), nn.BatchNorm2d(4)))
    seen: list[Tensor] = []
    layer = model.get_submodule(request.param)
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    return ready(model), request.param, seen


def test_what_has_a_hook_is_left_by_name(
    hooked: tuple[nn.Module, str, list[Tensor]], x: Tensor
) -> None:
    model, name, _ = hooked
    folded, report = reparameterize(model, x, return_report=True)
    assert type(folded.get_submodule(name)) is type(model.get_submodule(name))
    assert any("forward hook" in reason for reason in report.skipped.values())


def test_a_hook_sees_the_same_tensors_and_nothing_else(
    hooked: tuple[nn.Module, str, list[Tensor]], x: Tensor
) -> None:
    model, _, seen = hooked
    folded = reparameterize(model, x)
    assert {type(output) for output in seen} == {Tensor}
    seen.clear()
    assert relative_error(model(x), folded(x)) < TOLERANCE
    assert relative_error(*seen) < TOLERANCE


# Inputs and outputs of any form


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = RepVGGBlock(4, 4), RepVGGBlock(4, 4)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Any]:
        return {"both": [self.left(left), self.right(right)], "size": left.shape[0]}


@pytest.mark.parametrize("form", ["positional", "keywords"])
def test_several_inputs_and_nested_outputs(form: str, x: Tensor) -> None:
    model, y = ready(TwoInputs()), x.flip(0)
    example = (x, y) if form == "positional" else {"right": y, "left": x}
    folded, report = reparameterize(model, example, return_report=True)
    assert [fold.name for fold in report.folded] == ["left.conv", "right.conv"]
    for expected, actual in zip(model(x, y)["both"], folded(x, y)["both"], strict=True):
        assert relative_error(expected, actual) < TOLERANCE


@pytest.mark.parametrize(
    "example",
    [torch.randn(1, 3, 8, 8), torch.randn(4, 4), (), {"y": torch.randn(1, 4, 8, 8)}, None],
)
def test_an_example_that_does_not_fit_is_a_value_error(example: Any) -> None:
    with pytest.raises(ValueError, match="cannot run on example_input"):
        reparameterize(conv_bn(4, 4), example)


def test_a_forward_that_changes_its_input_in_place(x: Tensor) -> None:
    def normalize_in_place(model: Any, image: Tensor) -> Tensor:
        image -= 1
        return functional.relu(model.body(image))

    model, before = ready(Wired(normalize_in_place, body=conv_bn(4, 4))), x.clone()
    folded = reparameterize(model, x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert relative_error(model(x.clone()), folded(x.clone())) < TOLERANCE


def test_a_block_whose_weight_another_forward_reads_stays(x: Tensor) -> None:
    model = ready(
        Wired(
            lambda m, image: functional.relu(m.body(image)) * m.body.conv.weight.mean(),
            body=conv_bn(4, 4),
        )
    )
    folded, report = reparameterize(model, x, return_report=True)
    assert report.skipped["body"] == "the model's own forward also reads 'weight' of 'body.conv'"
    assert relative_error(model(x), folded(x)) < TOLERANCE


# The proof


def spoil(monkeypatch: pytest.MonkeyPatch, *wrong: int) -> None:
    """Make some new convolutions slightly wrong, counted from 1, whenever they are built."""
    count = 0

    def as_module_or_wrong(kernel: ConvKernel, *, like: nn.Module) -> nn.Module:
        nonlocal count
        layer = as_module(kernel, like=like)
        if not kernel.weight.is_meta:
            count += 1
            if count in wrong:
                *_, convolution = layer.modules()
                with torch.no_grad():
                    convolution.weight.mul_(1 + 1e-6)
        return layer

    monkeypatch.setattr("repnet.fold.core.as_module", as_module_or_wrong)


@torch.no_grad()
@pytest.mark.parametrize("wrong", [(2,), (2, 4), (2, 3, 4, 5, 6)])
def test_wrong_blocks_are_put_back_and_named(
    wrong: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ready(create_model("repvgg_tiny", num_classes=4, depths=[1, 2, 1, 1]))
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    spoil(monkeypatch, *wrong)
    folded, report = reparameterize(model, image, return_report=True)
    differs = [name for name, reason in report.skipped.items() if "differs" in reason]
    assert differs[0] == "stages.0.0.conv"
    assert len(differs) == len(wrong)
    assert not set(differs) & {fold.name for fold in report.folded}
    assert {type(folded.get_submodule(name)) for name in differs} == {Sum}
    assert f"skipped 'stages.0.0.conv': {report.skipped['stages.0.0.conv']}" in str(report)
    assert relative_error(model(image), folded(image)) < TOLERANCE


def test_a_wrong_norm_fold_is_put_back(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    absorbed = Folding._absorbed

    def wrong_bias(self: Folding, *args: Any) -> nn.Module:
        layer = absorbed(self, *args)
        if layer.out_channels == 6:
            layer.bias.data += 1e-6
        return layer

    model = ready(chain(conv(4, 4), norm(), nn.ReLU(), conv(4, 6), norm(6)))
    monkeypatch.setattr(Folding, "_absorbed", wrong_bias)
    folded, report = reparameterize(model, x, return_report=True)
    assert [fold.name for fold in report.folded] == ["0"]
    assert report.left == ["4"]
    assert "differs" in report.skipped["3"]
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_a_wrong_rule_is_put_back(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    original = ConvKernel.then

    def wrong_bias(self: ConvKernel, other: ConvKernel) -> ConvKernel:
        composed = original(self, other)
        if composed.bias is not None:
            object.__setattr__(composed, "bias", composed.bias * (1 + 1e-6))
        return composed

    model = ready(chain(conv_bn(4, 4)))
    monkeypatch.setattr(ConvKernel, "then", wrong_bias)
    folded, report = reparameterize(model, x, return_report=True)
    assert "differs" in report.skipped["0"]
    assert report.left == ["0.bn"]
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_a_deep_net_with_attention_passes_in_float64() -> None:
    model = randomize_batch_norm(
        create_model("repvgg_d2se", num_classes=4, widths=[0.25, 0.25, 0.25, 0.25])
    )
    image = torch.randn(2, 3, 32, 32)
    folded, report = reparameterize(model, image, return_report=True)
    assert report.proof is not None
    assert len(report.proof.blocks) == len(report.folded) == 48
    assert all(block.relative_error < TOLERANCE for block in report.proof.blocks)
    assert folded(image).dtype == torch.float32


def test_a_deep_net_with_wild_statistics_passes_in_float64() -> None:
    model = create_model("repvgg_a0", num_classes=4, widths=[0.125, 0.125, 0.125, 0.25])
    randomize_batch_norm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(1e-4, 1e4)
            module.running_mean.mul_(100)
    report = reparameterize(model, torch.randn(2, 3, 32, 32), return_report=True)[1]
    assert report.proof is not None
    assert report.proof.agreement == 1
    assert len(report.proof.blocks) == 22


class Remembering(nn.Module):
    """Keeps a tensor of its first call in a plain attribute, as attention biases are cached."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(4, 4)
        self.head = nn.Linear(4, 3)
        self.kept: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x).relu().mean((2, 3))
        self.kept.setdefault("mask", torch.ones(4, 4, dtype=x.dtype))
        return self.head(x @ self.kept["mask"])


def test_what_the_proof_run_keeps_aside_does_not_stay_in_the_result():
    model = randomize_batch_norm(Remembering())
    x = torch.randn(2, 4, 9, 8)
    folded = reparameterize(model, x)
    assert not model.kept
    assert relative_error(model(x), folded(x)) < 1e-5
