"""What runs of a model show: the frames of its modules, and what their forwards decided on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repnet.equivalence import Inputs
from repnet.fold import reparameterize_graph
from repnet.fold.frame import Frame
from repnet.fold.observe import observe
from repnet.fold.record import RecordingError
from repnet.fold.survey import Survey
from repnet.layers import conv, conv_bn
from tests.models import randomize_batch_norm


class Wired(nn.Module):
    """Named parts, connected by a function of this module and its inputs."""

    def __init__(self, wiring: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Any) -> Any:
        return self.wiring(self, x)


class Flagged(nn.Module):
    """May leave out its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = conv(4, 4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, normalize: bool = True, unread: str = "a") -> Tensor:
        x = self.conv(x)
        return self.norm(x) if normalize else x


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ready(model: nn.Module) -> Any:
    return randomize_batch_norm(model).double()


def wired(wiring: Callable[..., Any]) -> Any:
    return ready(Wired(wiring, conv=conv(4, 4)))


def survey_of(model: nn.Module, *args: Any, **kwargs: Any) -> Survey:
    return observe(model, Inputs(args, kwargs))


def frame_of(model: nn.Module, *args: Any, **kwargs: Any) -> Frame:
    return survey_of(model, *args, **kwargs).frames[""][0]


def targets(frame: Frame) -> list[Any]:
    return [node.target for node in frame.graph.nodes if node.op.startswith("call")]


# Frames


def test_every_module_has_a_frame_in_which_its_children_are_calls(x: Tensor) -> None:
    survey = survey_of(ready(nn.Sequential(conv_bn(4, 6), nn.ReLU(), nn.Flatten(2))), x)
    assert set(survey.frames) == {"", "0"}
    assert set(survey.leaves) == {"0.conv", "0.bn", "1", "2"}
    outer, inner = survey.frames[""][0], survey.frames["0"][0]
    assert targets(outer) == ["0", "1", "2"]
    assert targets(inner) == ["0.conv", "0.bn"]
    assert inner.parent is outer
    shapes = [node.meta["shape"] for node in outer.graph.nodes if node.op != "output"]
    assert shapes == [(2, 4, 9, 8), (2, 6, 9, 8), (2, 6, 9, 8), (2, 6, 72)]


def test_a_tensor_that_forward_reads_is_a_node_of_its_name(x: Tensor) -> None:
    survey = survey_of(wired(lambda m, x: functional.conv2d(x, m.conv.weight, stride=2)), x)
    (read,) = [node for node in survey.frames[""][0].graph.nodes if node.op == "get_attr"]
    assert read.target == "conv.weight"
    assert read.meta["constant"]
    assert survey.readers["conv.weight"] == {""}


def test_an_error_of_forward_is_the_reason(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        raise KeyError("the model needs a target")

    with pytest.raises(RecordingError, match="the model needs a target"):
        survey_of(wired(forward), x)


# Sizes


def pool_by_hand(m: Any, x: Tensor) -> Tensor:
    batch, channels, height, width = m.conv(x).shape
    return m.conv(x).reshape(batch, channels, height * width).sum(2) / (height * width)


def attend(m: Any, x: Tensor) -> Tensor:
    tokens = m.conv(x).flatten(2).transpose(1, 2)
    attention = (tokens @ tokens.transpose(-2, -1) * tokens.shape[-1] ** -0.5).softmax(-1)
    return (attention @ tokens).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


def unpack(m: Any, x: Tensor) -> Tensor:
    size = x.size()
    return m.conv(x).view(size[0], -1).view(size[0], 4, size[-2], size[-1])


def half_of_the_image(m: Any, x: Tensor) -> Tensor:
    return m.conv(x)[:, :, : x.shape[2] // 2]


def positions(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y + torch.arange(y.shape[3], dtype=y.dtype, device=y.device)


SIZED = [pool_by_hand, attend, unpack, half_of_the_image, positions]
OTHER_SIZES = [(1, 4, 9, 8), (5, 4, 9, 8), (3, 4, 11, 6)]


@pytest.mark.parametrize("wiring", SIZED, ids=lambda f: f.__name__)
def test_arithmetic_on_sizes_decides_nothing(wiring: Callable[..., Any], x: Tensor) -> None:
    model = wired(wiring)
    survey = survey_of(model, x)
    assert survey.frames[""][0].decisions == []
    assert survey.is_uniform("")
    graph = reparameterize_graph(model, x)
    assert "same_as_recorded" not in str(graph.graph)
    for shape in OTHER_SIZES:
        other = images(*shape)
        torch.testing.assert_close(graph(other), model(other))


def test_the_dtype_the_device_and_the_number_of_axes_decide_nothing(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.dim() == 4 and x.is_floating_point() and not x.is_cuda:
            return m.conv(x)
        return x

    assert survey_of(wired(forward), x).is_uniform("")


def branch(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) if x.shape[2] > 4 else x


def pad_to_even(m: Any, x: Tensor) -> Tensor:
    if x.shape[2] % 2:
        x = functional.pad(x, (0, 0, 0, 1))
    return m.conv(x)


def loop_over_rows(m: Any, x: Tensor) -> Tensor:
    return sum(m.conv(x)[:, :, row] for row in range(x.shape[2]))


def convert(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) * int(x.shape[2]) + ceil(x.shape[2] / 2) + floor(x.shape[2] / 2)


def round_up(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) * round(x.shape[2] / 3) * float(x.shape[2])


@pytest.mark.parametrize(
    "wiring", [branch, pad_to_even, loop_over_rows, convert, round_up], ids=lambda f: f.__name__
)
def test_what_sizes_decide_is_noted_and_checked_by_a_graph(
    wiring: Callable[..., Any], x: Tensor
) -> None:
    model = wired(wiring)
    survey = survey_of(model, x)
    assert survey.frames[""][0].decisions
    assert not survey.is_uniform("")
    graph = reparameterize_graph(model, x)
    more = images(5, 4, 9, 6)  # the height, on which forward decides, is the same
    torch.testing.assert_close(graph(more), model(more))
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with pytest.raises(ValueError, match="record it again"):
        graph(images(2, 4, 4, 8))


@pytest.mark.parametrize(
    ("wiring", "ways"),
    [
        (branch, {("conv",), ()}),
        (pad_to_even, {(functional.pad, "conv"), ("conv",)}),
        (lambda m, x: m.conv(x) if x.sum() > 0 else x, {("conv",), ()}),
    ],
    ids=["size", "padding", "value"],
)
def test_every_way_through_a_forward_is_found(
    wiring: Callable[..., Any], ways: set[tuple[Any, ...]], x: Tensor
) -> None:
    survey = survey_of(wired(wiring), x)
    found = survey.paths(survey.frames[""][0])
    assert {tuple(t for t in targets(f) if t in ("conv", functional.pad)) for f in found} == ways


def test_too_many_ways_are_a_reason(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        for size in range(20):
            x = x + 1 if x.shape[2] > size else x
        return m.conv(x)

    survey = survey_of(wired(forward), x)
    with pytest.raises(RecordingError, match="branches"):
        survey.paths(survey.frames[""][0])


def padded(x: Tensor) -> Tensor:
    return functional.pad(x, (0, 0, 0, int(x.shape[2]) % 2))


def rows(x: Tensor) -> int:
    return int(x.shape[2])


class Deciding(nn.Module):
    """Converts a size in a function that returns a tensor, and in one that returns a number."""

    def __init__(self, leak: bool) -> None:
        super().__init__()
        self.conv, self.leak = conv(4, 4), leak

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * rows(x) if self.leak else self.conv(padded(x))


@pytest.mark.parametrize("leak", [False, True])
def test_a_decision_ends_with_the_function_that_returns_a_tensor(leak: bool, x: Tensor) -> None:
    decisions = frame_of(ready(Deciding(leak)), x).decisions
    assert decisions
    assert any(decision.end is None for decision in decisions) == leak


class Measuring(nn.Module):
    """Keeps the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        self.rows = x.shape[2]
        return x * 2


def test_a_size_that_another_module_kept_is_a_decision(x: Tensor) -> None:
    model = Wired(lambda m, x: m.part(x) * m.part.rows, part=Measuring()).double()
    assert frame_of(model, x).decisions
    assert not survey_of(model, x).is_uniform("")
    assert not hasattr(model.part, "rows")


# Values


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.conv(x) if x.sum() > 0 else x,
        lambda m, x: m.conv(x) * float(x.mean()),
        lambda m, x: m.conv(x)[int(x.argmax()) * 0 :],
        lambda m, x: [m.conv(x) for _ in range(int(x.abs().max()))],
        lambda m, x: m.conv(x) * x.mean().item(),
    ],
    ids=["if", "float", "int", "range", "item"],
)
def test_what_values_decide_is_noted(wiring: Callable[..., Any], x: Tensor) -> None:
    model = wired(wiring)
    survey = survey_of(model, x)
    assert survey.frames[""][0].decisions
    assert not survey.is_uniform("")
    folded, report = reparameterize_graph(model, x, return_report=True)
    assert type(folded) is Wired
    assert "depends on values" in report.skipped[""]


# Arguments


def test_an_argument_that_forward_reads_is_frozen(x: Tensor) -> None:
    survey = survey_of(ready(Flagged()), x)
    assert survey.frames[""][0].frozen == {"normalize": True}
    assert "reads 'normalize'" in survey.distrust(survey.frames[""][0])


def test_an_argument_that_the_caller_fixes_can_be_trusted(x: Tensor) -> None:
    survey = survey_of(ready(Wired(lambda m, x: m.part(x, False).relu(), part=Flagged())), x)
    frame = survey.frames["part"][0]
    assert frame.frozen == {"normalize": False}
    assert survey.distrust(frame) == ""
    assert survey.is_uniform("part")


def test_two_calls_with_other_arguments_are_not_the_same(x: Tensor) -> None:
    survey = survey_of(
        ready(Wired(lambda m, x: m.part(m.part(x).relu(), False).relu(), part=Flagged())), x
    )
    assert not survey.is_uniform("part")


# Tensors that are kept or changed


class Caching(nn.Module):
    """Keeps a tensor of its first call and counts its calls, as attention does with its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)
        self.cache: dict[Any, Tensor] = {}
        self.last: Any = None
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if "bias" not in self.cache:
            self.cache["bias"] = torch.arange(4.0, dtype=x.dtype).reshape(4, 1, 1)
        self.last = self.conv(x)
        return self.last + self.cache["bias"]


def test_a_tensor_that_forward_keeps_escapes(x: Tensor) -> None:
    frame = frame_of(ready(Caching()), x)
    (call,) = [node for node in frame.graph.nodes if node.target == "conv"]
    assert call.meta["escaped"]


@pytest.mark.parametrize("view", [lambda y: [y], lambda y: y.flatten(2), lambda y: y[:, :2]])
def test_a_tensor_that_forward_returns_does_not_escape(
    view: Callable[[Tensor], Any], x: Tensor
) -> None:
    frame = frame_of(wired(lambda m, x: view(m.conv(x))), x)
    assert not any(node.meta.get("escaped") for node in frame.graph.nodes)


def test_what_forward_keeps_does_not_stay_in_the_model(x: Tensor) -> None:
    model = ready(Caching())
    keys = list(model.state_dict())
    observe(model, Inputs((x,)))
    assert (model.cache, model.last, model.calls) == ({}, None, 0)
    assert list(model.state_dict()) == keys


def test_a_function_in_place_is_marked(x: Tensor) -> None:
    frame = frame_of(wired(lambda m, x: m.conv(x).relu_()), x)
    (node,) = [node for node in frame.graph.nodes if node.target == "relu_"]
    assert node.meta["in_place"]


def test_a_tensor_whose_view_is_changed_is_marked(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        y[:, :2].clamp_(min=0)
        return y

    frame = frame_of(wired(forward), x)
    (call,) = [node for node in frame.graph.nodes if node.target == "conv"]
    assert call.meta["changed"]


def test_a_tensor_of_the_model_that_forward_changes_makes_it_unclear(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.conv(x)

    model = wired(forward)
    model.register_buffer("count", torch.zeros(()))
    assert "in place" in frame_of(model, x).unclear
    assert model.count == 0


# Containers


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Output:
    logits: Tensor
    hidden: Tensor | None = None


@pytest.mark.parametrize(
    "make",
    [
        lambda y: Pair(y, y.relu()),
        lambda y: Output(y),
        lambda y: OrderedDict(a=y, b=[y.relu()]),
        lambda y: {"a": [y, (y.relu(), y.shape[0])], "b": None},
    ],
    ids=["named tuple", "dataclass", "ordered dict", "nested"],
)
def test_an_output_keeps_its_class(make: Callable[[Tensor], Any], x: Tensor) -> None:
    model = wired(lambda m, x: make(m.conv(x)))
    assert frame_of(model, x).rewritable
    actual, expected = reparameterize_graph(model, x)(x), model(x)
    assert type(actual) is type(expected)
    if isinstance(expected, Output):
        actual, expected = actual.logits, expected.logits
    torch.testing.assert_close(actual, expected)


class Case(NamedTuple):
    wiring: Callable[..., Any]
    make: Callable[[Tensor], tuple[tuple[Any, ...], dict[str, Any]]]


def over_a_list(m: Any, xs: list[Tensor]) -> list[Tensor]:
    return [m.conv(x) + n for n, x in enumerate(xs)] + [torch.ones(()) * len(xs)]


def over_a_dict(m: Any, xs: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {key: m.conv(value) for key, value in xs.items()}
    assert "left" in xs
    out["sum"] = sum(xs.values()) * len(xs)
    for key, _ in xs.items():
        assert key in list(xs)
        out[key] = out[key] + xs[key]
    return out


def over_keys(m: Any, xs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: m.conv(xs[key]) for key in xs.keys()}  # noqa: SIM118


def keywords(m: Any, x: Tensor, *, scale: float, mask: Tensor | None = None) -> Tensor:
    y = m.conv(x) * scale
    return y if mask is None else y * mask


def nested_outputs(m: Any, x: Tensor) -> dict[str, Any]:
    y = m.conv(x)
    return {"a": [y, (y.relu(), y.shape[0])], "b": None}


CASES = {
    "list": Case(over_a_list, lambda x: (([x, x.flip(0)],), {})),
    "dict": Case(over_a_dict, lambda x: (({"left": x, "right": -x},), {})),
    "only keywords": Case(keywords, lambda x: ((), {"x": x, "scale": 0.5})),
    "outputs": Case(nested_outputs, lambda x: ((x,), {})),
}


KEYS = Case(over_keys, lambda x: (({"left": x, "right": -x},), {}))


@pytest.mark.parametrize("case", [*CASES.values(), KEYS], ids=[*CASES, "keys"])
def test_containers_of_tensors(case: Case, x: Tensor) -> None:
    # A signature by name, as that of a model: `Wired` hides it.
    class Model(nn.Module):
        forward = case.wiring

        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(4, 4)

    model = ready(Model())
    args, kwargs = case.make(x)
    graph = reparameterize_graph(model, args or kwargs)
    for batch in (2, 3):
        args, kwargs = case.make(images(batch, 4, 9, 8))
        torch.testing.assert_close(graph(*args, **kwargs), model(*args, **kwargs))


def test_a_shorter_list_is_not_silently_cut(x: Tensor) -> None:
    model = wired(over_a_list)
    graph = reparameterize_graph(model, ([x, x],))
    torch.testing.assert_close(graph([x, x]), model([x, x]))
    try:
        actual = graph([x])
    except (IndexError, ValueError):
        return
    torch.testing.assert_close(actual, model([x]))
