"""`reparameterize_graph`: laws over one list of forwards, then what needs a model each."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm
from torchvision.ops import SqueezeExcitation

from repnet.fold import reparameterize, reparameterize_graph
from repnet.layers import Scale, Sum, conv, conv_bn
from tests.models import relative_error
from tests.test_folding import Case, Wired, assert_same_state, chain, norm, norms, ready, spoil

TOLERANCE = 1e-11


class NormAct(nn.BatchNorm2d):
    """Norm by function, and activation: one module, as in foreign libraries."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        return self.act(self.drop(x))


class StandardizedConv2d(nn.Conv2d):
    """Weight standardization (arXiv:1903.10520), by a norm of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0
        ).reshape_as(self.weight)
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class Deciding(nn.Module):
    """Depends on values of its input; its parts do not."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.mean() < 1e9 else x


def normalize(layer: Any, x: Tensor) -> Tensor:
    return functional.batch_norm(
        x, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps
    )


def repvgg_by_hand(m: Any, x: Tensor) -> Tensor:
    return functional.relu(m.bn3(m.conv3(x)) + m.bn1(m.conv1(x)) + m.bn0(x))


def two_residuals(m: Any, x: Tensor) -> Tensor:
    x = functional.relu(x + m.norm(m.conv(x)))
    return functional.relu(x + 0.5 * m.other(x) + m.shift(x))


def all_by_function(m: Any, x: Tensor) -> Tensor:
    y = functional.conv2d(x, m.conv.weight, m.conv.bias, stride=2, padding=1, groups=2)
    return functional.relu(normalize(m.norm, y))


def twice(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(m.norm(m.conv(x)).relu())).relu()


def another_user(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return functional.relu(m.norm(y)) + y


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x)).relu_()
    y = m.other_norm(m.other(y))
    return functional.relu(y, inplace=True).add_(1)


def input_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    return y.relu() + functional.relu_(x)


def in_place_in_between(m: Any, x: Tensor) -> Tensor:
    x = m.before(x)
    y = m.conv(x)
    x = x.relu_()
    return functional.relu(m.norm(y)) + x


def concatenated(m: Any, x: Tensor) -> Tensor:
    return functional.relu(m.norm(torch.cat([m.left(x), m.right(x)], dim=1)))


def squeeze(m: Any, x: Tensor) -> Tensor:
    return m.se(m.norm(m.conv(x)))


CASES = {
    "siblings": Case(lambda: chain(conv(4, 6), norm(6)), ["0"]),
    "block": Case(lambda: chain(Sum(conv_bn(4, 4), conv_bn(4, 4, 1), norm())), ["0.0.conv"]),
    "branches in forward": Case(
        lambda: Wired(
            repvgg_by_hand,
            conv3=conv(4, 4, bias=False),
            conv1=conv(4, 4, 1),
            bn3=norm(),
            bn1=norm(),
            bn0=norm(),
        ),
        ["conv3"],
    ),
    "residuals in forward": Case(
        lambda: Wired(
            two_residuals,
            conv=conv(4, 4),
            norm=norm(),
            other=conv_bn(4, 4),
            shift=conv(4, 4, 1),
        ),
        ["conv", "other.conv"],
    ),
    "functions": Case(
        lambda: Wired(all_by_function, conv=conv(4, 6, groups=2), norm=norm(6)), ["conv"]
    ),
    "norm and activation in one": Case(
        lambda: nn.Sequential(conv(4, 6), NormAct(6), conv(6, 4, 1), NormAct(4)), ["0", "2"]
    ),
    "concatenation": Case(
        lambda: Wired(concatenated, left=conv(4, 2), right=conv(4, 3), norm=norm(5)), ["left"]
    ),
    "depthwise, then pointwise": Case(  # the first norm goes into what follows it
        lambda: chain(conv(4, 4, groups=4), norm(), conv(4, 4, 1), norm()), ["2"]
    ),
    "one layer in two places": Case(lambda: Wired(twice, conv=conv(4, 4), norm=norm()), ["conv"]),
    "another user of the convolution": Case(
        lambda: Wired(another_user, conv=conv(4, 4), norm=norm()), [], ["norm"]
    ),
    "norm alone": Case(lambda: chain(norm()), [], ["0"]),
    "norm before padding": Case(lambda: chain(norm(), conv(4, 4)), [], ["0"]),
    "row and column": Case(  # a square kernel would be larger
        lambda: Wired(
            lambda m, x: functional.relu(m.row(x) + m.column(x)),
            row=conv(4, 4, (1, 3)),
            column=conv(4, 4, (3, 1)),
        ),
        [],
    ),
    "row, column and norm": Case(  # more multiplications, if not more values
        lambda: chain(Sum(norm(), conv_bn(4, 4, (1, 3)), conv_bn(4, 4, (3, 1)))),
        ["0.1.conv", "0.2.conv"],
        ["0.0"],
    ),
    "pointwise, then pool": Case(  # more values, if not more multiplications
        lambda: chain(conv(4, 4, 1), nn.AvgPool2d(3)), []
    ),
    "plain": Case(lambda: chain(conv(4, 4)), []),
    "in-place functions": Case(
        lambda: Wired(in_place, conv=conv(4, 4), norm=norm(), other=conv(4, 4), other_norm=norm()),
        ["conv", "other"],
    ),
    "in-place function in between": Case(
        lambda: Wired(in_place_in_between, before=nn.Tanh(), conv=conv(4, 4), norm=norm()),
        ["conv"],
    ),
    "weight norm": Case(lambda: chain(weight_norm(conv(4, 4)), norm()), ["0"]),
    "synchronized norm": Case(lambda: chain(conv(4, 4), nn.SyncBatchNorm(4)), ["0"]),
    "norm of its batch": Case(
        lambda: chain(conv(4, 4), nn.BatchNorm2d(4, track_running_stats=False)), [], ["1"]
    ),
    "reflection": Case(
        lambda: chain(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), norm()), ["0"]
    ),
    "transposed": Case(
        lambda: chain(nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), norm(6)), ["0"]
    ),
    "linear": Case(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(288, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)
        ),
        ["1"],
    ),
    "linear layers of tokens": Case(
        lambda: Wired(
            lambda m, x: m.norm(m.linear(x.flatten(2)).flatten(0, 1)).relu(),
            linear=nn.Linear(72, 6),
            norm=nn.BatchNorm1d(6),
        ),
        ["linear"],
    ),
    "layer scale": Case(lambda: chain(conv(4, 4), norm(), Scale(0.5, channels=4)), ["0"]),
    "squeeze and excitation": Case(
        lambda: Wired(squeeze, conv=conv(4, 4), norm=norm(), se=SqueezeExcitation(4, 2)), ["conv"]
    ),
    "unused head": Case(
        lambda: Wired(lambda m, x: functional.relu(m.body(x)), body=conv_bn(4, 4), head=norm()),
        ["body.conv"],
    ),
    "part that depends on values": Case(
        lambda: chain(conv_bn(4, 4), nn.ReLU(), Deciding()), ["0.conv", "2.body.0"]
    ),
    "root that depends on values": Case(Deciding, ["body.0"]),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
verbs = pytest.mark.parametrize(
    "verb",
    [
        lambda *args, **options: reparameterize(*args, method="graph", **options),
        lambda *args, **options: reparameterize(*args, method="auto", **options),
    ],
    ids=["graph", "auto"],
)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def size(model: nn.Module) -> int:
    return sum(t.numel() for t in model.state_dict().values())


# Laws


@every_case
def test_the_outputs_agree_and_the_report_is_complete(case: Case, x: Tensor) -> None:
    model = ready(case.build())
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert relative_error(model(x.clone()), folded(x.clone())) < TOLERANCE
    assert report.method == "graph"
    assert [fold.name for fold in report.folded] == case.folded
    assert report.left == case.left
    assert set(report.left) <= set(report.skipped)
    assert all(report.skipped.values())
    assert report.proof is not None
    assert report.proof.max_relative_error < TOLERANCE
    assert report.cast is not None


@every_case
@verbs
def test_every_method_agrees(case: Case, verb: Callable[..., Any], x: Tensor) -> None:
    model = ready(case.build())
    folded, report = verb(model, x, return_report=True)
    for image in (x, torch.randn(5, 4, 9, 8, dtype=torch.float64)):
        assert relative_error(model(image.clone()), folded(image.clone())) < TOLERANCE
    assert set(report.left) <= set(report.skipped)
    assert len(report.left) <= len(norms(model))


@every_case
def test_the_argument_is_not_changed(case: Case, x: Tensor) -> None:
    model = ready(case.build()).train()
    copy, modules, image = deepcopy(model), list(model.modules()), x.clone()
    _, report = reparameterize_graph(model, x, return_report=True)
    assert report.was_training
    assert "training mode" in str(report)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(module.training for module in model.modules())
    assert all(not module._forward_hooks for module in model.modules())
    assert_same_state(copy, model)
    torch.testing.assert_close(x, image, rtol=0, atol=0)


@every_case
def test_the_result_is_in_evaluation_mode(case: Case, x: Tensor) -> None:
    folded = reparameterize_graph(ready(case.build()).train(), x)
    assert [name for name, module in folded.named_modules() if module.training] == []


@every_case
def test_a_second_time_folds_nothing(case: Case, x: Tensor) -> None:
    once = reparameterize_graph(ready(case.build()), x)
    twice, report = reparameterize_graph(once, x, return_report=True)
    assert report.folded == []
    assert_same_state(once, twice)


@every_case
def test_nothing_grows(case: Case, x: Tensor) -> None:
    model = ready(case.build())
    assert size(reparameterize_graph(model, x)) <= size(model)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_dtype_stays(case: Case, dtype: torch.dtype, x: Tensor) -> None:
    folded = reparameterize_graph(ready(case.build()).to(dtype), x.to(dtype))
    assert {t.dtype for t in folded.state_dict().values() if t.is_floating_point()} <= {dtype}


@every_case
def test_the_numbers_of_the_norms_are_gone(case: Case, x: Tensor) -> None:
    folded = reparameterize_graph(ready(case.build()), x)
    owners = {key.rpartition(".")[0] for key in folded.state_dict() if key.endswith("running_mean")}
    assert owners <= set(case.left)


# Names


def test_a_layer_has_the_name_of_the_first_convolution(x: Tensor) -> None:
    model = ready(CASES["branches in forward"].build())
    folded, report = reparameterize_graph(model, x, return_report=True)
    (fold,) = report.folded
    assert set(fold.replaced) == {"conv3", "conv1", "bn3", "bn1", "bn0"}
    assert set(folded.state_dict()) == {"conv3.weight", "conv3.bias"}
    assert type(folded.get_submodule("conv3")) is nn.Conv2d


def test_a_weight_of_the_model_itself_folds(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = functional.conv2d(x, m.own, padding=1)
        return functional.relu(normalize(m.norm, y))

    model = Wired(forward, norm=norm())
    model.own = nn.Parameter(torch.randn(4, 4, 3, 3))
    model, image = ready(model), x
    folded, report = reparameterize_graph(model, image, return_report=True)
    (fold,) = report.folded
    assert fold.name.isidentifier()
    assert type(folded.get_submodule(fold.name)) is nn.Conv2d
    assert relative_error(model(image), folded(image)) < TOLERANCE


def test_one_layer_stays_one_layer(x: Tensor) -> None:
    folded = reparameterize_graph(ready(CASES["one layer in two places"].build()), x)
    assert [n.target for n in folded.graph.nodes if n.op == "call_module"].count("conv") == 2
    assert set(folded.state_dict()) == {"conv.weight", "conv.bias"}


def test_two_uses_with_different_norms_stay(x: Tensor) -> None:
    model = ready(
        Wired(
            lambda m, x: m.second(m.conv(m.first(m.conv(x)).relu())).relu(),
            conv=conv(4, 4),
            first=norm(),
            second=norm(),
        )
    )
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert sorted(report.left) == ["first", "second"]
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_two_uses_on_different_strides_stay(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        small = functional.conv2d(x, m.conv.weight, padding=1, stride=2)
        large = functional.conv2d(x, m.conv.weight, padding=1)
        return m.norm(large).relu().mean((2, 3)) + small.relu().mean((2, 3))

    model = ready(Wired(forward, conv=conv(4, 4), norm=norm()))
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert report.left == ["norm"]
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_a_name_that_something_else_needs_is_not_taken(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = functional.conv2d(x, m.part.weight, padding=1)
        return functional.relu(m.norm(y)) * m.part.inner(x)

    part = conv(4, 4)
    part.inner = nn.Hardtanh()
    model = ready(Wired(forward, part=part, norm=norm()))
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert report.left == []
    assert type(folded.get_submodule(report.folded[0].name)) is nn.Conv2d
    assert relative_error(model(x), folded(x)) < TOLERANCE


# What is changed, and what is not


@pytest.mark.parametrize("act", [lambda m: m.half(), lambda m: m[0].weight.data.zero_()])
def test_nothing_is_shared_with_the_model(act: Callable[[Any], Any], x: Tensor) -> None:
    model = ready(nn.Sequential(conv(4, 4), nn.ReLU(), conv_bn(4, 4)))
    copy = deepcopy(model)
    folded = reparameterize_graph(model, x)
    mine = {t.data_ptr() for t in model.state_dict().values()}
    assert not mine & {t.data_ptr() for t in folded.state_dict().values()}
    act(nn.ModuleList([folded.get_submodule("0")]))
    assert_same_state(copy, model)


def test_a_forward_that_changes_its_input_in_place(x: Tensor) -> None:
    def forward(m: Any, image: Tensor) -> Tensor:
        y = m.norm(m.conv(image))
        return y.relu() + functional.relu_(image)

    model, before = ready(Wired(forward, conv=conv(4, 4), norm=norm())), x.clone()
    folded = reparameterize_graph(model, x)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert relative_error(model(x.clone()), folded(x.clone())) < TOLERANCE


@pytest.mark.parametrize("layers", [1, 2])
def test_a_computed_weight_becomes_the_weight(layers: int, x: Tensor) -> None:
    model = ready(nn.Sequential(*[StandardizedConv2d(4, 4, 3), norm()][:layers], nn.ReLU()))
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert report.left == []
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}
    assert relative_error(model(x), folded(x)) < TOLERANCE


@pytest.mark.parametrize("layers", [1, 2])
def test_a_computed_weight_is_right_however_it_is_folded(layers: int, x: Tensor) -> None:
    model = ready(nn.Sequential(*[StandardizedConv2d(4, 4, 3), norm()][:layers], nn.ReLU()))
    folded = reparameterize_graph(model, x)
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_asymmetric_padding_becomes_a_layer_before_the_convolution(x: Tensor) -> None:
    model = ready(chain(nn.ZeroPad2d((2, 0, 0, 1)), nn.Conv2d(4, 4, 3), norm()))
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert report.left == []
    assert [type(layer) for layer in folded.get_submodule("1")] == [nn.ZeroPad2d, nn.Conv2d]
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_asymmetric_padding_is_not_wrapped_again(x: Tensor) -> None:
    model = ready(chain(nn.ZeroPad2d((2, 0, 0, 1)), nn.Conv2d(4, 4, 3), norm()))
    once = reparameterize_graph(model, x)
    twice, report = reparameterize_graph(once, x, return_report=True)
    assert report.folded == []
    assert_same_state(once, twice)


# What stays


def test_hooks_stay_and_see_the_same_tensors(x: Tensor) -> None:
    model = ready(nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4), nn.ReLU()))
    seen: list[Tensor] = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert {type(output) for output in seen} <= {Tensor}
    seen.clear()
    assert relative_error(model(x), folded(x)) < TOLERANCE
    assert relative_error(*seen) < TOLERANCE
    assert [fold.name for fold in report.folded][-1:] == ["2.conv"]


def test_a_hook_of_a_layer_keeps_it(x: Tensor) -> None:
    model = ready(chain(conv(4, 4), norm()))
    model[1].register_forward_hook(lambda module, args, output: output * 2)
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert report.left == ["1"]
    assert report.folded == []
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_frozen_weights_stay_frozen(x: Tensor) -> None:
    model = ready(nn.Sequential(conv_bn(4, 4), nn.ReLU(), conv_bn(4, 4), nn.ReLU()))
    model[2].requires_grad_(False)
    folded = reparameterize_graph(model, x)
    trainable = {name: p.requires_grad for name, p in folded.named_parameters()}
    assert trainable == {
        "0.conv.weight": True,
        "0.conv.bias": True,
        "2.conv.weight": False,
        "2.conv.bias": False,
    }


def test_a_frozen_convolution_that_no_kernel_follows_stays_frozen(x: Tensor) -> None:
    model = ready(CASES["reflection"].build()).requires_grad_(False)
    folded = reparameterize_graph(model, x)
    assert [p.requires_grad for p in folded.parameters()] == [False, False]


def test_the_memory_format_stays(x: Tensor) -> None:
    model = ready(nn.Sequential(conv_bn(4, 6), nn.ReLU(), conv_bn(6, 4)))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        folded = reparameterize_graph(model.to(memory_format=memory_format), x)
        for parameter in folded.parameters():
            if parameter.ndim == 4:
                assert parameter.is_contiguous(memory_format=memory_format)


def test_half_precision_is_folded_in_float64(x: Tensor) -> None:
    model = ready(chain(conv(4, 4), norm())).to(torch.bfloat16)
    exact = reparameterize_graph(deepcopy(model).double(), x)
    folded = reparameterize_graph(model, x.bfloat16())
    expected = {key: value.to(torch.bfloat16) for key, value in exact.state_dict().items()}
    for key, value in folded.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)


def test_the_result_can_be_trained_and_saved(x: Tensor, tmp_path: Any) -> None:
    folded = reparameterize_graph(ready(CASES["branches in forward"].build()), x)
    folded(x).sum().backward()
    assert all(p.grad is not None for p in folded.parameters())
    torch.save(folded.state_dict(), tmp_path / "weights.pt")
    assert list(torch.load(tmp_path / "weights.pt", weights_only=True)) == [
        "conv3.weight",
        "conv3.bias",
    ]
    copy = deepcopy(folded)
    torch.testing.assert_close(copy(x), folded(x), rtol=0, atol=0)


# Parts that cannot be recorded


def test_a_part_that_depends_on_values_keeps_its_class(x: Tensor) -> None:
    model = ready(CASES["part that depends on values"].build())
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert isinstance(folded, fx.GraphModule)
    part = folded.get_submodule("2")
    assert type(part) is Deciding
    assert isinstance(part.body, fx.GraphModule)
    assert "depends on values" in report.skipped["2"]
    assert norms(folded) == []


class Detector(nn.Module):
    """Keeps the positions that score, so that its output depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(conv_bn(4, 4), nn.ReLU(), Sum(conv_bn(4, 4), norm()))
        self.head = nn.Sequential(conv(4, 2), norm(2))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        detections = []
        for image in images:
            scores = self.head(self.backbone(image[None]).relu()).flatten()
            kept = scores[scores > 0.5] if bool((scores > 0.5).any()) else scores[:1]
            detections.append({"scores": kept.sort(descending=True).values})
        return detections


def test_a_detector_keeps_its_class_and_its_backbone_is_a_graph() -> None:
    model = ready(Detector())
    images = [torch.randn(4, 9, 8).double(), torch.randn(4, 12, 6).double()]
    folded, report = reparameterize_graph(model, (images,), return_report=True)
    assert type(folded) is Detector
    assert isinstance(folded.backbone, fx.GraphModule)
    assert "depends on values" in report.skipped[""]
    assert report.left == norms(folded) == []
    assert [fold.name for fold in report.folded] == [
        "backbone.0.conv",
        "backbone.2.0.conv",
        "head.0",
    ]
    for expected, actual in zip(model(images), folded(images), strict=True):
        assert relative_error(expected["scores"], actual["scores"]) < TOLERANCE


# Reasons


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        (
            "another user of the convolution",
            "norm",
            "'conv' (Conv2d), which comes before",
        ),
        ("norm alone", "0", "it comes after the input of the model; a norm goes into"),
        ("norm of its batch", "1", "without running statistics"),
        ("root that depends on values", "", "cannot be recorded"),
    ],
)
def test_the_reason_is_given(name: str, module: str, reason: str, x: Tensor) -> None:
    report = reparameterize_graph(ready(CASES[name].build()), x, return_report=True)[1]
    assert reason in report.skipped[module]
    assert reason in str(report)


@pytest.mark.parametrize(
    ("name", "graphs"),
    [
        ("siblings", []),
        ("block", []),
        ("norm alone", []),
        ("functions", ["0"]),
        ("branches in forward", ["0"]),
    ],
)
def test_only_a_forward_that_adds_branches_becomes_a_graph(
    name: str, graphs: list[str], x: Tensor
) -> None:
    model = ready(nn.Sequential(CASES[name].build(), nn.ReLU()))
    folded, report = reparameterize(model, x, return_report=True)
    assert report.method == "auto"
    assert report.graphs == graphs
    found = [n for n, m in folded.named_modules() if isinstance(m, fx.GraphModule)]
    assert found == graphs


@pytest.mark.parametrize("example", [torch.randn(1, 3, 8, 8), (), {"y": 1}, None])
def test_an_example_that_does_not_fit_is_a_value_error(example: Any) -> None:
    with pytest.raises(ValueError, match="cannot run on example_input"):
        reparameterize_graph(ready(chain(conv(4, 4), norm())), example)


# The proof


@verbs
@pytest.mark.parametrize(("wrong", "first"), [((2,), "2.conv"), ((1, 3), "0.conv")])
def test_wrong_convolutions_alone_are_put_back(
    verb: Callable[..., Any],
    wrong: tuple[int, ...],
    first: str,
    monkeypatch: pytest.MonkeyPatch,
    x: Tensor,
) -> None:
    model = ready(nn.Sequential(*(layer for _ in range(3) for layer in (conv_bn(4, 4), nn.ReLU()))))
    spoil(monkeypatch, *wrong)
    folded, report = verb(model, x, return_report=True)
    assert report.put_back
    if not isinstance(folded, fx.GraphModule):  # its folds are compared together, and built anew
        assert next(iter(report.put_back)) in (first, first.removesuffix(".conv"))
        assert len(report.put_back) == len(wrong)
    assert relative_error(model(x), folded(x)) < TOLERANCE


# Networks of others


@pytest.mark.parametrize(
    ("name", "image_size"), [("resnet18", 32), ("mobilenet_v3_small", 32), ("googlenet", 64)]
)
def test_no_norm_of_torchvision_is_left(name: str, image_size: int) -> None:
    options = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = ready(getattr(torchvision.models, name)(num_classes=4, **options))
    image = torch.randn(1, 3, image_size, image_size, dtype=torch.float64)
    folded, report = reparameterize_graph(model, image, return_report=True)
    assert report.left == norms(folded) == []
    other = torch.randn(2, 3, image_size, image_size, dtype=torch.float64)
    assert relative_error(model(other), folded(other)) < 1e-9


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128s", "resnet10t"])
def test_no_norm_of_timm_is_left(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = ready(timm.create_model(name, num_classes=4))
    side = 224 if name.startswith("levit") else 32
    image = torch.randn(1, 3, side, side, dtype=torch.float64)
    folded, report = reparameterize_graph(model, image, return_report=True)
    assert relative_error(model(image), folded(image)) < 1e-9
    statistics = [key for key in folded.state_dict() if key.endswith("running_var")]
    assert report.left == statistics == []
