"""`record` follows what forward does; `InFloat64` runs it in float64, whatever it converts to."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from math import ceil, floor
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from repnet.equivalence import Inputs
from repnet.layers import conv, conv_bn
from repnet.precision import InFloat64
from repnet.fold.observe import observe
from repnet.tracing import Recording, RecordingError, record
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-12


class Wired(nn.Module):
    """Named parts, connected by a function of this module and its inputs."""

    def __init__(self, wiring: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wiring(self, *args, **kwargs)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def ready(model: nn.Module) -> Any:
    return randomize_batch_norm(model).double()


def recorded(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[nn.Module, Recording]:
    """Return the recorded model as a module, and the recording; leaves are layers of torch."""
    recording = record(
        model, Inputs(args, kwargs), lambda m: type(m).__module__.startswith("torch")
    )
    return fx.GraphModule(recording.root, recording.graph), recording


# Sizes stay symbolic


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
@pytest.mark.parametrize("shape", OTHER_SIZES, ids=str)
def test_a_graph_takes_other_sizes(wiring: Callable, shape: tuple[int, ...], x: Tensor) -> None:
    model = ready(Wired(wiring, conv=conv(4, 4)))
    graph, _ = recorded(model, x)
    other = images(*shape)
    torch.testing.assert_close(graph(other), model(other), rtol=0, atol=0)


# Where forward branches on a size


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
def test_another_branch_is_refused_by_the_graph(wiring: Callable, x: Tensor) -> None:
    model = ready(Wired(wiring, conv=conv(4, 4)))
    graph, _ = recorded(model, x)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)
    more = images(5, 4, 9, 6)  # the height, on which forward decides, is the same
    torch.testing.assert_close(graph(more), model(more), rtol=0, atol=0)
    with pytest.raises(ValueError, match="record it again"):
        graph(images(2, 4, 4, 8))


def test_the_check_outlives_the_removal_of_unused_nodes(x: Tensor) -> None:
    graph, _ = recorded(ready(Wired(branch, conv=conv(4, 4))), x)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with pytest.raises(ValueError, match="record it again"):
        graph(images(2, 4, 4, 8))


def test_what_no_size_decides_has_no_check(x: Tensor) -> None:
    _, recording = recorded(ready(Wired(unpack, conv=conv(4, 4))), x)
    assert "same_as_recorded" not in str(recording.graph)


def test_the_dtype_the_device_and_the_number_of_axes_need_no_check(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if x.ndim == 4 and x.dim() == 4 and x.dtype == torch.float64 and not x.is_cuda:
            return m.conv(x) if x.device.type == "cpu" else x
        return x

    model = ready(Wired(forward, conv=conv(4, 4)))
    graph, recording = recorded(model, x)
    assert "same_as_recorded" not in str(recording.graph)
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


# Containers


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
    "keywords": Case(keywords, lambda x: ((x,), {"scale": 2.0, "mask": x > 0})),
    "only keywords": Case(keywords, lambda x: ((), {"x": x, "scale": 0.5})),
    "outputs": Case(nested_outputs, lambda x: ((x,), {})),
}


KEYS = Case(over_keys, lambda x: (({"left": x, "right": -x},), {}))


@pytest.mark.parametrize(
    "case",
    [
        *(pytest.param(case, id=name) for name, case in CASES.items()),
        pytest.param(KEYS, id="keys"),
    ],
)
@pytest.mark.parametrize("batch", [2, 3])
def test_containers_of_tensors(case: Case, batch: int, x: Tensor) -> None:
    # A signature by name, as that of a model: `Wired` hides it.
    class Model(nn.Module):
        forward = case.wiring

        def __init__(self) -> None:
            super().__init__()
            self.conv = conv(4, 4)

    model = ready(Model())
    args, kwargs = case.make(x)
    recording = record(model, Inputs(args, kwargs), lambda m: isinstance(m, nn.Conv2d))
    graph = fx.GraphModule(recording.root, recording.graph)
    args, kwargs = case.make(images(batch, 4, 9, 8))
    torch.testing.assert_close(graph(*args, **kwargs), model(*args, **kwargs), rtol=0, atol=0)


def test_a_shorter_list_is_not_silently_cut(x: Tensor) -> None:
    model = ready(Wired(over_a_list, conv=conv(4, 4)))
    graph, _ = recorded(model, [x, x])
    with pytest.raises((IndexError, ValueError)):
        graph([x])


# What forward makes or keeps


def with_constant(m: Any, x: Tensor) -> Tensor:
    return m.conv(x) * torch.linspace(0, 1, 4, dtype=x.dtype).reshape(4, 1, 1) + torch.tensor(3.0)


def test_constants_that_forward_makes_are_in_the_graph(x: Tensor) -> None:
    model = ready(Wired(with_constant, conv=conv(4, 4)))
    graph, _ = recorded(model, x)
    other = images(3, 4, 5, 5)
    torch.testing.assert_close(graph(other), model(other), rtol=0, atol=0)


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


def test_what_forward_keeps_does_not_stay_in_the_model(x: Tensor) -> None:
    model = ready(Caching())
    state = deepcopy(model.state_dict())
    graph, recording = recorded(model, x)
    for kept in (model, recording.root):
        assert kept.cache == {}
        assert kept.last is None
        assert kept.calls == 0
    observe(model, Inputs((x,)))
    assert (model.cache, model.last, model.calls) == ({}, None, 0)
    assert list(model.state_dict()) == list(state)
    other = images(3, 4, 5, 5)
    torch.testing.assert_close(graph(other), model(other), rtol=0, atol=0)


def test_the_recording_shares_the_parameters_of_the_model(x: Tensor) -> None:
    model = ready(nn.Sequential(conv_bn(4, 4), nn.ReLU()))
    _, recording = recorded(model, x)
    shared = {t.data_ptr() for t in recording.root.parameters()}
    assert shared == {t.data_ptr() for t in model.parameters()}
    torch.testing.assert_close(recording.root.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_parameters_that_forward_reads_are_nodes(x: Tensor) -> None:
    model = ready(
        Wired(lambda m, x: functional.conv2d(x, m.conv.weight, stride=2), conv=conv(4, 4))
    )
    graph, recording = recorded(model, x)
    (read,) = [node for node in recording.graph.nodes if node.op == "get_attr"]
    assert read.target == "conv.weight"
    graph.get_submodule("conv").weight.data.mul_(2)  # shared, so both models change
    torch.testing.assert_close(graph(x), model(x), rtol=0, atol=0)


# Control flow on values


class Skipping(nn.Module):
    """Depends on values of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.mean() > 0 else x


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.stage = conv(4, 4), nn.ModuleDict({"block": Skipping()})

    def forward(self, x: Tensor) -> Tensor:
        return self.stage["block"](self.before(x)).relu()


@pytest.mark.parametrize("sign", [1, -1])
def test_a_module_that_depends_on_values_is_called_whole_and_named(sign: int, x: Tensor) -> None:
    model = ready(Outer())
    graph, recording = recorded(model, x)
    assert list(recording.opaque) == ["stage.block"]
    assert "depends on values" in recording.opaque["stage.block"]
    shift = sign * 1e3 * torch.sign(model.before.weight.sum())
    torch.testing.assert_close(graph(x + shift), model(x + shift), rtol=0, atol=0)


@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: m.conv(x) if x.sum() > 0 else x,
        lambda m, x: m.conv(x) * float(x.mean()),
        lambda m, x: m.conv(x)[int(x.argmax()) :],
        lambda m, x: [m.conv(x) for _ in range(int(x.abs().max()))],
    ],
    ids=["if", "float", "int", "range"],
)
def test_a_root_that_depends_on_values_cannot_be_recorded(wiring: Callable, x: Tensor) -> None:
    with pytest.raises(RecordingError, match="depends on values"):
        recorded(ready(Wired(wiring, conv=conv(4, 4))), x)


def test_an_error_of_forward_is_the_reason(x: Tensor) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        raise KeyError("the model needs a target")

    with pytest.raises(RecordingError, match="the model needs a target"):
        recorded(ready(Wired(forward, conv=conv(4, 4))), x)


def test_every_node_knows_its_shape(x: Tensor) -> None:
    _, recording = recorded(ready(nn.Sequential(conv_bn(4, 6), nn.ReLU(), nn.Flatten(2))), x)
    shapes = [node.meta.get("shape") for node in recording.graph.nodes]
    assert (2, 4, 9, 8) in shapes
    assert (2, 6, 9, 8) in shapes
    assert (2, 6, 72) in shapes


# In float64


def always_float(m: Any, x: Tensor) -> Tensor:
    return m.conv(x.float()).float().to(torch.float16) * 1.5


def zeros_in_forward(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(x.shape[0], 4, 9, 8)
    for _ in range(2):
        state = (state + m.conv(x)).type_as(torch.ones(1))
    return state + torch.full((4, 1, 1), 0.1) + torch.tensor(1 / 3)


def with_numbers(m: Any, x: Tensor) -> Tensor:
    return torch.where(x > 0, m.conv(x), torch.zeros_like(x)).clamp(-1.0, 0.7).half()


def norm_by_function(m: Any, x: Tensor) -> Tensor:
    return functional.layer_norm(m.conv(x).float(), (8,)).to(x.dtype)


WIRINGS = [always_float, zeros_in_forward, with_numbers, norm_by_function]


@pytest.mark.parametrize("wiring", WIRINGS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_model_of_any_dtype_runs_in_float64(
    wiring: Callable, dtype: torch.dtype, x: Tensor
) -> None:
    model = Wired(wiring, conv=conv(4, 4)).to(dtype)
    exact = deepcopy(model).double()
    with torch.no_grad(), InFloat64():
        actual, expected = model(x.to(dtype)), exact(x.to(dtype).double())
    assert actual.dtype == torch.float64
    assert relative_error(expected, actual) < TOLERANCE
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_the_result_is_that_of_float64_and_not_of_float32(x: Tensor) -> None:
    model = Wired(always_float, conv=conv(4, 4))
    with torch.no_grad(), InFloat64():
        actual = model(x)
    expected = deepcopy(model.conv).double()(x) * 1.5
    assert relative_error(expected, actual) < TOLERANCE
    rounded = model.conv(x.float()).half() * 1.5
    assert relative_error(expected, rounded.double()) > 1e-5


class WithBuffers(nn.Module):
    """A float32 buffer, an integer buffer, a mask, and a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.rand(4, 1, 1))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.shift = torch.rand(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order] * self.scale * self.mask.reshape(4, 1, 1) + self.shift


def test_buffers_and_plain_tensors_are_exact_and_integers_stay(x: Tensor) -> None:
    model = WithBuffers()
    with InFloat64():
        actual = model(x)
        assert (model.order + 1).dtype == torch.int64
    masked = x[:, model.order] * model.scale.double() * model.mask.reshape(4, 1, 1)
    torch.testing.assert_close(actual, masked + model.shift.double(), rtol=0, atol=0)


def test_containers_of_tensors_are_exact() -> None:
    parts = [torch.rand(2, 3), torch.rand(2, 3)]
    with InFloat64():
        joined = torch.cat(parts)
        values, indices = torch.max(parts[0], 1)
        first, _ = torch.ones(4).split(2)
    assert joined.dtype == values.dtype == first.dtype == torch.float64
    assert indices.dtype == torch.int64


def test_nothing_is_changed_outside() -> None:
    with InFloat64():
        pass
    assert (torch.ones(2) * 0.5).dtype == torch.float32
