"""Forwards that a fold may get wrong, or break at: each class of faults with its neighbors.

A fold holds for every input that the model takes, not only for the example; what cannot be folded
is left and named. Only a graph may refuse an input on which the model takes another way.
"""

from __future__ import annotations

import copy
import functools
import math
import warnings
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import register_pytree_node, tree_map_only

import repnet
from tests.models import randomize_batch_norm, relative_error
from tests.runs import assert_outputs_agree, count_calls
from tests.structures import BNAndPadLayer, conv_bn

METHODS: dict[str, Any] = {
    "default": {},
    "modules": {"method": "modules"},
    "graph": {"method": "graph"},
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}

every_method = pytest.mark.parametrize("method", METHODS)


def image(*size: int) -> Tensor:
    """Return the same values in every process."""
    return torch.randn(size, generator=torch.Generator().manual_seed(len(size) + sum(size)))


X = image(2, 4, 8, 8)
OTHER = (image(3, 4, 12, 10), image(1, 4, 7, 9))  # of other batches and sizes


class Fault(NamedTuple):
    """A model, and the inputs for which its fold must equal it.

    Args:
        build: returns the model.
        example: what it is folded with: a tensor, a tuple of arguments, or a dict of keywords.
        others: inputs that take the same way through `forward`; every form must take them.
        ways: inputs that take another way, which a graph may refuse.
        left: names of norms that the default call may leave.
        layers: calls of layers that it may leave, where branches become one.
        dtype: of the model and its inputs.
        tolerance: None for the usual one of the dtype.
    """

    build: Callable[[], nn.Module]
    example: Any = X
    others: tuple[Any, ...] = OTHER
    ways: tuple[Any, ...] = ()
    left: tuple[str, ...] = ()
    layers: int | None = None
    dtype: torch.dtype = torch.float64
    tolerance: float | None = None


def network(forward: Callable[..., Any], **parts: Any) -> Any:
    """Return a module of a class of its own, with this `forward` and these attributes."""
    module = type("Network", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        setattr(module, name, part)
    return module


def conv(in_channels: int = 4, out_channels: int = 4, kernel_size: int = 3) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def norm(channels: int = 4) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def pair(forward: Callable[..., Any], **parts: Any) -> nn.Module:
    """Return a network with a convolution `conv` and a norm `norm`, which `forward` connects."""
    return network(forward, **{"conv": conv(), "norm": norm(), **parts})


def layer_then_norm(layer: nn.Module) -> nn.Module:
    return network(lambda m, x: functional.relu(m.norm(m.conv(x))), conv=layer, norm=norm())


# What a forward decides on


def maybe_norm(m: Any, x: Tensor, normalize: bool = True) -> Tensor:
    y = m.conv(x)
    return (m.norm(y) if normalize else y).relu()


def decides_on_data(m: Any, x: Tensor) -> Tensor:
    return m.block(x, normalize=bool(x.mean() > 0)).relu()


def sets_a_flag(m: Any, x: Tensor) -> Tensor:
    m.block.normalize = bool(x.mean() > 0)
    return m.block(x).relu()


def reads_its_flag(m: Any, x: Tensor) -> Tensor:
    return maybe_norm(m, x, m.normalize)


def chosen_by_name(m: Any, x: Tensor, domain: str) -> Tensor:
    return m.norms[domain](m.conv(x)).relu()


def chosen_by_index(m: Any, x: Tensor, index: int) -> Tensor:
    return list(m.norms.values())[index](m.conv(x)).relu()


def maybe_skip(m: Any, x: Tensor, skip: Tensor | None = None) -> Tensor:
    y = m.conv(x)
    return m.norm(y if skip is None else y + skip).relu()


def scaled_by(m: Any, x: Tensor, factor: float = 1.0) -> Tensor:
    return m.norm(m.conv(x) * factor).relu()


def sum_of_list(m: Any, images: list[Tensor]) -> Tensor:
    return m.norm(sum(m.conv(x) for x in images)).relu()


def maybe_masked(m: Any, batch: dict[str, Tensor]) -> Tensor:
    y = m.conv(batch["image"])
    return m.norm(y * batch["mask"] if "mask" in batch else y).relu()


def of_any_dtype(m: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.uint8:
        x = x.float() / 255
    return m.norm(m.conv(x)).relu()


def only_without_gradients(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return (y if torch.is_grad_enabled() else m.norm(y)).relu()


def without_gradients_or_negative(m: Any, x: Tensor) -> Tensor:
    y = only_without_gradients(m, x)
    return y if x.shape[2] > 4 else -y


def in_float64_or_negative(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y = m.norm(y) if x.dtype == torch.float64 else y
    return y if x.shape[2] > 4 else -y


def written_into_a_tensor(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    torch.add(y, 1.0, out=y)  # refuses gradients
    return m.norm(y) if x.dtype == torch.float64 else y


def keeps_and_decides(m: Any, x: Tensor) -> Tensor:
    m.kept = m.conv(x)
    y = m.norm(m.kept)
    return y if x.shape[2] > 4 else -y


def resized(m: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(m.norm(m.conv(x)).relu(), size)


def repeated(m: Any, x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = m.norm(m.conv(x)).relu()
    return x


def recurrent(m: Any, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    state = torch.zeros_like(x) if state is None else state
    state = m.norm(m.conv(torch.cat([x, state], 1))).tanh()
    return m.head(state), state


def asserts_a_size(m: Any, x: Tensor) -> Tensor:
    torch._assert(x.shape[1] == 4, "of 4 channels")
    assert x.shape[2] > 1
    return m.norm(m.conv(x)).relu()


def asserts_a_size_on_one_way(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    if x.shape[2] > 4:
        assert x.shape[3] > 1
        y = m.norm(y)
    return y.relu()


def on_a_size(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return (m.norm(y) if x.shape[2] > 4 else y).relu()


def norms_of_domains() -> nn.Module:
    return nn.ModuleDict({"photo": norm(), "sketch": norm()})


POSITIVE = X.abs()
BYTES = (255 * POSITIVE.clamp(0, 1)).to(torch.uint8)

DECISIONS = {
    "bool that depends on data": Fault(
        lambda: network(decides_on_data, block=pair(maybe_norm)),
        POSITIVE,
        (),
        (-POSITIVE, *OTHER),
        ("block.norm",),
    ),
    "flag that the parent sets": Fault(
        lambda: network(sets_a_flag, block=pair(reads_its_flag, normalize=True)),
        POSITIVE,
        (),
        (-POSITIVE, *OTHER),
        ("block.norm",),
    ),
    "bool": Fault(
        lambda: pair(maybe_norm), ways=((X, False), {"x": X, "normalize": False}), left=("norm",)
    ),
    "string": Fault(
        lambda: network(chosen_by_name, conv=conv(), norms=norms_of_domains()),
        (X, "photo"),
        ((OTHER[0], "photo"),),
        ((X, "sketch"), (OTHER[0], "sketch")),
        ("norms.photo", "norms.sketch"),
    ),
    "integer": Fault(
        lambda: network(chosen_by_index, conv=conv(), norms=norms_of_domains()),
        (X, 0),
        ((OTHER[0], 0),),
        ((X, 1), (X, -1)),
        ("norms.photo", "norms.sketch"),
    ),
    "None, then a tensor": Fault(
        lambda: pair(maybe_skip), X, OTHER, ((X, X), {"x": X, "skip": X}), ("norm",)
    ),
    "a tensor, then None": Fault(lambda: pair(maybe_skip), (X, X), (), (X, (X, None)), ("norm",)),
    "number": Fault(lambda: pair(scaled_by), (X, 2.0), (), ((X, 3.0), X, (X, 1)), ("norm",)),
    "list of any length": Fault(
        lambda: pair(sum_of_list), ([X, -X],), (), (([X],), ([X, X, -X],)), ("norm",)
    ),
    "dictionary of any keys": Fault(
        lambda: pair(maybe_masked),
        ({"image": X},),
        (({"image": OTHER[0]},),),
        (({"image": X, "mask": X},),),
        ("norm",),
    ),
    "dtype of the image": Fault(lambda: pair(of_any_dtype), ways=(BYTES,), dtype=torch.float32),
    "gradients": Fault(lambda: pair(only_without_gradients), ways=(X,), others=(), left=("norm",)),
    "gradients, and a size": Fault(
        lambda: pair(without_gradients_or_negative), ways=(X, X[:, :, :3]), left=("norm",)
    ),
    "size that is given": Fault(
        lambda: pair(resized),
        (X, (16, 16)),
        ((OTHER[0], (16, 16)),),
        ((X, (9, 7)), (OTHER[0], (4, 4))),
    ),
    "number of repetitions": Fault(
        lambda: pair(repeated), (X, 1), ((OTHER[0], 1),), ((X, 3), (X, 0)), ("norm",)
    ),
    "state of a recurrence": Fault(
        lambda: pair(recurrent, conv=conv(8, 4), head=conv_bn(4, 4, 1)),
        X,
        OTHER,
        ((X, X),),
        ("norm",),
    ),
    "size that is asserted": Fault(lambda: pair(asserts_a_size)),
    "size that is asserted on one way": Fault(
        lambda: pair(asserts_a_size_on_one_way), ways=(X[:, :, :3],), left=("norm",)
    ),
    "size": Fault(lambda: pair(on_a_size), ways=(X[:, :, :3],), left=("norm",)),
}


# Reshapes that move channels, where the example's sizes hide it


def swaps_batch_and_channels(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x).transpose(0, 1).reshape(x.shape[0], 4, 8, 8)).relu()


def features_become_positions(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.linear(x).view(x.shape[0], 6, -1)).relu()


def positions_become_channels(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(x).permute(0, 2, 3, 1).reshape(x.shape[0], 6, -1)).relu()


def squeezed(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.linear(x).squeeze(1)).relu()


RESHAPES = {
    "batch of one": Fault(
        lambda: pair(swaps_batch_and_channels), X[:1], (X, image(3, 4, 8, 8)), (), ("norm",)
    ),
    "one token": Fault(
        lambda: network(features_become_positions, linear=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)),
        image(5, 1, 6),
        (image(3, 7, 6),),
        (),
        ("norm",),
    ),
    "map of one pixel": Fault(
        lambda: network(positions_become_channels, conv=conv(4, 6, 1), norm=nn.BatchNorm1d(6)),
        image(5, 4, 1, 1),
        (image(3, 4, 5, 5),),
        (),
        ("norm",),
    ),
    "axis that may be squeezed": Fault(
        lambda: network(squeezed, linear=nn.Linear(6, 6), norm=nn.BatchNorm1d(6)),
        image(5, 1, 6),
        (),
        (image(3, 6, 6),),
        ("norm",),
    ),
    "reshape that moves nothing": Fault(
        lambda: network(
            lambda m, x: m.norm(m.conv(x).flatten(2)).relu(), conv=conv(), norm=nn.BatchNorm1d(4)
        ),
        X[:1],
    ),
    "channels last, and back": Fault(
        lambda: network(
            lambda m, x: m.norm(m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).relu(),
            linear=nn.Linear(4, 4),
            norm=norm(),
        )
    ),
}


# Subclasses of layers


class Clamped(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-30, 30)


class Sized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[-1] <= 8 else functional.relu(y)


class SameConv2d(nn.Conv2d):
    """Pads as TensorFlow does, by the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        padding: list[int] = []
        for size, k, s in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride, strict=True):
            total = max((math.ceil(size / s) - 1) * s + k - size, 0)
            padding += [total // 2, total - total // 2]
        x = functional.pad(x, padding)
        return functional.conv2d(
            x, self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups
        )


class Rounded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, (8 * self.weight).round() / 8, self.bias)


class HalfLinear(nn.Linear):
    """As language models have it: the product in the precision of the input."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype)) + self.bias.to(x.dtype)


SUBCLASSES = {
    "clamps": Fault(
        lambda: layer_then_norm(Clamped(4, 4, 3, padding=1)), X, (*OTHER, 100 * X), (), ("norm",)
    ),
    "decides on the size": Fault(
        lambda: layer_then_norm(Sized(4, 4, 3, padding=1)), X, (), OTHER, ("norm",)
    ),
    "pads by the size": Fault(
        lambda: layer_then_norm(SameConv2d(4, 4, 3, 2)), X, (image(3, 4, 12, 10),), OTHER
    ),
    "rounds its weight": Fault(lambda: layer_then_norm(Rounded(4, 4, 3, padding=1))),
    "casts its weight": Fault(
        lambda: network(
            lambda m, x: m.norm(m.linear(x)).relu(), linear=HalfLinear(6, 6), norm=nn.BatchNorm1d(6)
        ),
        image(5, 6),
        (image(3, 6),),
        left=("norm",),
    ),
}


# Weights that are computed


class PlusIdentity(nn.Conv2d):
    """Adds to its weight a tensor, of any kind of attribute."""

    def __init__(self, kind: str) -> None:
        super().__init__(4, 4, 3, padding=1, bias=False)
        tensor = torch.zeros(4, 4, 3, 3)
        tensor[range(4), range(4), 1, 1] = 1
        if kind == "buffer":
            self.register_buffer("id_tensor", tensor)
        else:
            self.id_tensor = nn.Parameter(tensor) if kind == "parameter" else tensor

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight + self.id_tensor.to(self.weight)
        return functional.conv2d(x, weight, None, padding=1)


class ScaledStandardized(nn.Conv2d):
    """Weight standardization with a gain (arXiv:2101.08692)."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(4, 1, 1, 1) + 0.5)
        self.scale, self.eps = self.weight[0].numel() ** -0.5, 1e-6

    def forward(self, x: Tensor) -> Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, 4, -1), None, None, weight=(self.gain * self.scale).view(-1),
            training=True, momentum=0.0, eps=self.eps,
        ).reshape_as(self.weight)  # fmt: skip
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


class LowRank(nn.Conv2d):
    """An adapter of low rank, added to the weight (arXiv:2106.09685)."""

    def __init__(self) -> None:
        super().__init__(4, 4, 3, padding=1)
        self.lora_a, self.lora_b = nn.Parameter(torch.rand(2, 36)), nn.Parameter(torch.rand(4, 2))
        self.scaling, self.merged = 0.5, False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return super().forward(x)
        delta = (self.lora_b @ self.lora_a).view_as(self.weight) * self.scaling
        return self._conv_forward(x, self.weight + delta, self.bias)


def weight_of_another(m: Any, x: Tensor) -> Tensor:
    return m.norm(functional.conv2d(m.conv(x).relu(), m.conv.weight, padding=1)).relu()


def weight_of_the_input(m: Any, x: Tensor) -> Tensor:
    routing = m.routing(x.mean((0, 2, 3))).softmax(0)
    weight = (routing @ m.experts).view(4, 4, 3, 3)
    return m.norm(functional.conv2d(x, weight, padding=1)).relu()


WEIGHTS = {
    **{
        f"plus an identity that is a {kind}": Fault(
            functools.partial(lambda kind: layer_then_norm(PlusIdentity(kind)), kind)
        )
        for kind in ("tensor", "buffer", "parameter")
    },
    "standardized, with a gain": Fault(lambda: layer_then_norm(ScaledStandardized())),
    "plus low rank": Fault(lambda: layer_then_norm(LowRank())),
    "weight of another layer": Fault(lambda: pair(weight_of_another), left=("norm",)),
    "weight that depends on the input": Fault(
        lambda: network(
            weight_of_the_input,
            routing=nn.Linear(4, 3),
            experts=nn.Parameter(image(3, 4 * 4 * 9)),
            norm=norm(),
        ),
        left=("norm",),
    ),
}


# Precision


def sequence(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x)).relu()
    n, c, h, w = y.shape
    return m.rest(y.permute(0, 3, 1, 2).reshape(n, w, c * h))


def first_of(m: Any, x: Tensor) -> Tensor:
    return m.rnn(x)[0]


def cell(m: Any, x: Tensor) -> Tensor:
    state = torch.zeros(x.shape[0], 6), torch.zeros(x.shape[0], 6)
    for step in x.unbind(1):
        state = m.cell(step, state)
    return state[0]


def asserts_the_dtype(m: Any, x: Tensor) -> Tensor:
    assert x.dtype == m.conv.weight.dtype, "dtype"
    return m.norm(m.conv(x)).relu()


def refuses_float64(m: Any, x: Tensor) -> Tensor:
    if x.dtype == torch.float64 or m.norm(m.conv(x)).dtype != torch.float32:
        raise TypeError("float32 only")
    return m.norm(m.conv(x)).relu()


def autocasts(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.norm(m.conv(x)).relu()
    return y.float()


def crnn(rest: nn.Module) -> nn.Module:
    return network(sequence, conv=conv(1, 4), norm=norm(), rest=rest)


LINES = {"example": image(2, 1, 8, 12), "others": (image(3, 1, 8, 16), image(1, 1, 8, 5))}
FLOAT32 = {"dtype": torch.float32}

PRECISIONS = {
    **{
        kind.__name__: Fault(
            functools.partial(
                lambda kind: crnn(network(first_of, rnn=kind(32, 6, batch_first=True))), kind
            ),
            **LINES,
            **FLOAT32,
        )
        for kind in (nn.LSTM, nn.GRU, nn.RNN)
    },
    "cell of a recurrence": Fault(
        lambda: crnn(network(cell, cell=nn.LSTMCell(32, 6))),
        LINES["example"],
        (image(3, 1, 8, 12),),
        LINES["others"],
        **FLOAT32,
    ),
    "transformer layer": Fault(
        lambda: crnn(nn.TransformerEncoderLayer(32, 4, 16, batch_first=True)), **LINES, **FLOAT32
    ),
    "Fourier transform": Fault(
        lambda: pair(lambda m, x: torch.fft.rfft2(m.norm(m.conv(x)).relu()).abs()), **FLOAT32
    ),
    "embedding": Fault(
        lambda: network(
            lambda m, x: m.norm(m.conv(m.table(x).transpose(1, 2))).relu(),
            table=nn.Embedding(9, 4),
            conv=nn.Conv1d(4, 6, 3),
            norm=nn.BatchNorm1d(6),
        ),
        torch.arange(8).view(1, 8),
        (torch.arange(12).view(2, 6) % 9,),
        **FLOAT32,
    ),
    "asserts its dtype": Fault(lambda: pair(asserts_the_dtype), **FLOAT32),
    "refuses float64": Fault(lambda: pair(refuses_float64), **FLOAT32),
    "rounds to half": Fault(
        lambda: pair(lambda m, x: m.norm(m.conv(x)).half().relu().float()),
        **FLOAT32,
        tolerance=2e-3,
    ),
    "autocasts": Fault(lambda: pair(autocasts), **FLOAT32, tolerance=3e-2, left=("norm",)),
}


# How functions are called


def all_by_keyword(m: Any, x: Tensor) -> Tensor:
    y = functional.conv2d(input=x, weight=m.conv.weight, bias=m.conv.bias, padding=1)
    return functional.relu(input=m.norm(y))


def keyword_behind(m: Any, x: Tensor) -> Tensor:
    return functional.conv2d(input=m.norm(m.conv(x)).relu(), weight=m.pointwise)


def branches_by_keyword(m: Any, x: Tensor) -> Tensor:
    y = torch.add(input=m.conv(input=x), other=m.point(x))
    return functional.relu(input=m.norm(input=y))


def norm_by_keyword(m: Any, x: Tensor) -> Tensor:
    y = functional.batch_norm(
        input=m.conv(x), running_mean=m.norm.running_mean, running_var=m.norm.running_var,
        weight=m.norm.weight, bias=m.norm.bias, training=False, eps=m.norm.eps,
    )  # fmt: skip
    y = torch.cat(tensors=[y, functional.pad(input=y, pad=(1, 1))[..., 1:-1]], dim=1)
    return functional.relu(input=y)


CALLS = {
    "convolution by keywords": Fault(lambda: pair(all_by_keyword), layers=1),
    "convolution by keywords behind": Fault(
        lambda: pair(keyword_behind, pointwise=nn.Parameter(image(4, 4, 1, 1)))
    ),
    "branches by keywords": Fault(lambda: pair(branches_by_keyword, point=conv(4, 4, 1)), layers=1),
    "norm by keywords": Fault(lambda: pair(norm_by_keyword), left=("norm",)),
}


# Floating-point models that are prepared for quantization


class Quantizable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.other = conv(), norm(), conv_bn(4, 4, 1)
        self.add, self.cat = (torch.ao.nn.quantized.FloatFunctional() for _ in range(2))
        self.quant, self.dequant = (
            torch.ao.quantization.QuantStub(),
            torch.ao.quantization.DeQuantStub(),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.quant(x)
        y = self.add.add_relu(self.norm(self.conv(x)), self.other(x))
        return self.dequant(self.cat.cat([y, self.add.mul_scalar(x, 2.0)], dim=1))


# Parents that look into their children


class Reading(nn.Module):
    """A block with what others read: an attribute, and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out_channels = conv(), norm(), 4

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()

    def halve(self, x: Tensor) -> Tensor:
        return x / 2


def unrecordable(m: Any, x: Tensor) -> Tensor:
    y = m.block(x)
    return y if y.sum() > 1e9 else m.block.halve(y) * m.block.out_channels


def correlated(m: Any, first: Tensor, second: Tensor) -> list[Tensor]:
    """The flow networks' way: a pyramid that a child keeps, and steps that look at values."""
    features = torch.chunk(m.encoder(torch.cat([first, second])), 2)
    if features[0].shape[-2:] != first.shape[-2:]:
        raise ValueError("the encoder must keep the size")
    m.pyramid.build(*features)
    sizes = [m.update.out_channels, m.pyramid.out_channels]
    hidden, context = torch.split(m.context(first), sizes, dim=1)
    flows = []
    for _ in range(2):
        hidden = m.update(hidden + m.pyramid.look_up(context))
        if hidden.abs().max() > 1e9:
            break
        flows.append(hidden)
    m.pyramid.levels.clear()
    return flows


class Pyramid(nn.Module):
    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.levels: list[Tensor] = []

    def build(self, first: Tensor, second: Tensor) -> None:
        self.levels.append(first * second)

    def look_up(self, context: Tensor) -> Tensor:
        return self.levels[0] * context


def iterates(m: Any, x: Tensor) -> Tensor:
    for child in m.children():
        x = child(x)
    return x.relu() * (1 + sum(isinstance(child, _BatchNorm) for child in m.children()))


def by_name(m: Any, x: Tensor) -> Tensor:
    for name, child in m.named_children():
        x = child(x).relu() if name.startswith("norm") else child(x)
    return x


def with_penalty(m: Any, x: Tensor) -> tuple[Tensor, Any]:
    return m.norm(m.conv(x)).relu(), sum(p.pow(2).sum() for p in m.parameters())


def with_state(m: Any, x: Tensor) -> tuple[Tensor, Any]:
    return m.norm(m.conv(x)).relu(), len(m.state_dict()), len(list(m.modules()))


READERS = {
    "attribute and method of a child": Fault(lambda: network(unrecordable, block=Reading())),
    "methods that keep a pyramid": Fault(
        lambda: network(
            correlated,
            encoder=Reading(),
            pyramid=Pyramid(),
            update=Reading(),
            context=conv_bn(4, 8, 1),
        ),
        (X, -X),
        ((OTHER[0], 1 - OTHER[0]),),
    ),
    "number of features of a norm": Fault(
        lambda: pair(lambda m, x: m.norm(m.conv(x)).relu() / m.norm.num_features)
    ),
    "dtype of a norm's weight": Fault(
        lambda: pair(lambda m, x: m.norm(m.conv(x.to(m.norm.weight.dtype))).relu()), left=("norm",)
    ),
    "dtype of the first parameter": Fault(
        lambda: pair(lambda m, x: m.norm(m.conv(x.to(next(m.parameters()).dtype))).relu())
    ),
    "values of a weight": Fault(
        lambda: network(
            lambda m, x: (m.body(x) * m.body.conv.weight.mean()).relu(), body=conv_bn(4, 4, 3)
        ),
        left=("body.bn",),
    ),
    "sum over parameters": Fault(lambda: pair(with_penalty), left=("norm",)),
    "size of the state": Fault(lambda: pair(with_state), left=("norm",)),
    "classes of children": Fault(lambda: pair(iterates), left=("norm",)),
    "names of children": Fault(lambda: pair(by_name), left=("norm",)),
}


# Blocks that are called in several ways


def block_with_skip(m: Any, x: Tensor, skip: Tensor | None = None) -> Tensor:
    y = m.norm(m.conv(x) + m.point(x))
    return y if skip is None else y + skip


SHARED = {
    "with and without a tensor": Fault(
        lambda: network(
            lambda m, x: m.block(m.block(x), x).relu(),
            block=pair(block_with_skip, point=conv(4, 4, 1)),
        ),
        left=("block.norm",),
    ),
    "at two sizes": Fault(
        lambda: network(
            lambda m, x: [m.block(x), m.block(functional.max_pool2d(x, 2))], block=Reading()
        )
    ),
    "with and without the norm": Fault(
        lambda: network(lambda m, x: m.block(m.block(x), normalize=False), block=pair(maybe_norm)),
        left=("block.norm",),
    ),
    "wrapped for several devices": Fault(lambda: nn.DataParallel(Reading())),
}


# Crops and borders


class ReplacedBorder(BNAndPadLayer):
    """A border of another value than what the norm makes of zero."""

    def forward(self, input: Tensor) -> Tensor:
        output = functional.pad(self.bn(input), [self.pad_pixels] * 4)
        output[:, :, : self.pad_pixels, :] = 0.5
        return output


def bordered(border: nn.Module) -> nn.Module:
    small = nn.Conv2d(4, 4, 1, bias=False)
    return nn.Sequential(small, border, nn.Conv2d(4, 4, 3), norm(), nn.ReLU())


def cropped(crop: Callable[[Tensor], Tensor], small: nn.Module) -> nn.Module:
    forward = lambda m, x: (m.norm(m.conv(x)) + m.small(crop(x))).relu()
    return network(forward, conv=nn.Conv2d(4, 4, 3), norm=norm(), small=small)


BORDERS = {
    "crop": Fault(lambda: cropped(lambda x: x[:, :, 1:-1, 1:-1], nn.Conv2d(4, 4, 1)), layers=1),
    "crop by negative padding": Fault(
        lambda: cropped(lambda x: functional.pad(x, [-1] * 4), conv_bn(4, 4, 1)), layers=1
    ),
    "crop with an ellipsis": Fault(
        lambda: cropped(lambda x: x[..., 1:-1, 1:-1], nn.Conv2d(4, 4, 1)), layers=1
    ),
    "crop by the size": Fault(
        lambda: cropped(lambda x: x[:, :, 1 : x.shape[2] - 1, 1 : x.shape[3] - 1], conv(4, 4, 1))
    ),
    "crop in front of padding": Fault(lambda: cropped(lambda x: x[:, :, 1:-1, 1:-1], conv())),
    "crop on one side": Fault(lambda: cropped(lambda x: x[:, :, 2:, :-2], conv(4, 4, 1))),
    "border of the norm": Fault(lambda: bordered(BNAndPadLayer(1, 4)), layers=1),
    "border of another value": Fault(lambda: bordered(ReplacedBorder(1, 4)), left=("1.bn",)),
}


# Padding by size in front of a convolution


class TFConvLayer(nn.Module):
    """As in the MobileNets of the transformers library."""

    normalization: nn.Module | None

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.config = SimpleNamespace(tf_padding=True)
        padding = 0 if self.config.tf_padding else 1
        self.convolution = nn.Conv2d(
            in_channels, out_channels, 3, stride, padding, groups=in_channels, bias=False
        )
        self.normalization = nn.BatchNorm2d(out_channels)
        self.activation: nn.Module | None = nn.ReLU6()

    def pad(self, features: Tensor) -> Tensor:
        stride, kernel = self.convolution.stride, self.convolution.kernel_size
        padding: list[int] = []
        for size, s, k in zip(features.shape[:1:-1], stride, kernel, strict=True):
            along = max(k - s, 0) if int(size) % s == 0 else max(k - int(size) % s, 0)
            padding += [along // 2, along - along // 2]
        return functional.pad(features, padding, "constant", 0.0)

    def forward(self, features: Tensor) -> Tensor:
        if self.config.tf_padding:
            features = self.pad(features)
        features = self.convolution(features)
        if self.normalization is not None:
            features = self.normalization(features)
        if self.activation is not None:
            features = self.activation(features)
        return features


PADDINGS = {
    "padding by the size": Fault(
        lambda: nn.Sequential(TFConvLayer(4, 8, 2), TFConvLayer(8, 8, 1)),
        X,
        (image(3, 4, 8, 8),),
        (image(3, 4, 12, 10), *OTHER),
    )
}


# Outputs


@dataclass
class Output:
    features: Tensor
    size: int = 3


Pair = namedtuple("Pair", "features size")


class Plain:
    """Of no kind that torch knows."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plain) and relative_error(self.features, other.features) < 1e-9

    __hash__ = None  # type: ignore[assignment]


class ModelOutput(OrderedDict):
    """Dictionary without what is None, tuple and dataclass, as the transformers library has it."""

    def __init_subclass__(cls) -> None:
        register_pytree_node(
            cls,
            lambda output: (list(output.values()), list(output.keys())),
            lambda values, keys: cls(**dict(zip(keys, values, strict=True))),
            serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        )

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: Any) -> Any:
        return dict(self.items())[key] if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self[key] for key in self)


@dataclass
class ImageOutput(ModelOutput):
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


collector: ContextVar[list[Tensor] | None] = ContextVar("collector", default=None)


def collect(module: nn.Module, args: Any, output: Tensor) -> None:
    found = collector.get()
    if found is not None:
        found.append(output)


class ImageClassifier(nn.Module):
    """Registers, when it first runs, hooks on inner containers that record hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_return_dict=True, output_hidden_states=False)
        self.num_channels, self.hooked = 4, False
        self.embedder = conv_bn(4, 4, 3)
        self.stages = nn.ModuleList(nn.Sequential(Reading()) for _ in range(2))
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        if pixel_values is None:
            raise ValueError("pixel_values is None")
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError("another number of channels")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return_dict = return_dict if return_dict is not None else self.config.use_return_dict
        if not self.hooked:
            for stage in self.stages:
                stage.register_forward_hook(collect)
            self.hooked = True
        token = collector.set([] if output_hidden_states else None)
        try:
            x = self.embedder(pixel_values)
            for stage in self.stages:
                x = stage(x)
            found = collector.get()
        finally:
            collector.reset(token)
        logits = self.classifier(functional.adaptive_avg_pool2d(x, 1))
        hidden = None if found is None else tuple(found)
        if not return_dict:
            return (logits,) if hidden is None else (logits, hidden)
        return ImageOutput(logits=logits, hidden_states=hidden)


def that_ran() -> nn.Module:
    model = ImageClassifier().eval()
    model(X)
    return model


def returns(make: Callable[[Tensor], Any]) -> Fault:
    return Fault(lambda: pair(lambda m, x: make(m.norm(m.conv(x)).relu())))


ASKED: Any = (
    {"pixel_values": X, "output_hidden_states": True},
    {"pixel_values": X, "return_dict": False},
)

OUTPUTS = {
    "dataclass": returns(Output),
    "named tuple": returns(lambda y: Pair(y, 2)),
    "named tuple of torch": returns(lambda y: torch.max(y, dim=1)),
    "ordered dictionary": returns(lambda y: OrderedDict(a=y, b=[y, None])),
    "nested": returns(lambda y: (y, {"size": y.shape[0], "none": None, "text": "a"}, [y.mean()])),
    "object": returns(Plain),
    "model output": returns(lambda y: ImageOutput(logits=y)),
    "model of the transformers library": Fault(ImageClassifier, ways=ASKED),
    "model of the transformers library that ran": Fault(that_ran, ways=ASKED),
}


# State, randomness, and the rest


def counting(m: Any, x: Tensor) -> Tensor:
    m.calls += 1
    y = m.conv(x)
    return (m.norm(y) if m.calls % 2 else y).relu()


def writes_its_input(m: Any, x: Tensor) -> Tensor:
    x -= 1
    return m.norm(m.conv(x)).relu_()


def conditional(m: Any, x: Tensor) -> Tensor:
    return torch.cond(x.mean() > 0, lambda y: y * 2.0, lambda y: y * 3.0, (m.norm(m.conv(x)),))


def forward_of_its_own() -> nn.Module:
    """A block whose forward was replaced on the instance, as offloading libraries do."""
    model: Any = nn.Sequential(Reading(), Reading())
    block = model[0]
    block._old_forward = block.forward
    block.forward = functools.partial(lambda m, x: m._old_forward(x.contiguous()), block)
    return model


OTHERS = {
    "made for quantization": Fault(Quantizable),
    "dropout that is always on": Fault(
        lambda: pair(lambda m, x: functional.dropout(m.norm(m.conv(x)), 0.5).relu())
    ),
    "every other call": Fault(lambda: pair(counting, calls=0), left=("norm",)),
    "writes its input": Fault(lambda: pair(writes_its_input)),
    "forward of an instance": Fault(forward_of_its_own, left=("0.norm",)),
    "condition as an operator": Fault(lambda: pair(conditional), ways=(-POSITIVE,), left=("norm",)),
    "tied weights": Fault(
        lambda: tied(
            network(
                lambda m, x: m.b_norm(m.b(m.a_norm(m.a(x)).relu())).relu(),
                a=conv(),
                a_norm=norm(),
                b=conv(),
                b_norm=norm(),
            )
        ),
        left=("a_norm", "b_norm"),
    ),
    "empty batch": Fault(lambda: layer_then_norm(conv()), others=(X[:0],)),
}


# What goes on beside the graph of a forward


def changes_between_branches(m: Any, x: Tensor) -> Tensor:
    x = x.relu()
    y = m.conv(x)
    z = m.child(x)
    return (y + m.point(x)).relu() + z


def changes_a_view_of_the_input(m: Any, x: Tensor) -> Tensor:
    x[:, :1].mul_(2)
    return m.norm(m.conv(x))


def changed_by_its_child(m: Any, x: Tensor) -> Tensor:
    x = x.relu()
    return m.child(x).relu() + x


def changes_a_view_of_the_output(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :1].mul_(2)
    return m.norm(y)


def changes_through_a_storage(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    with torch.no_grad():
        torch.empty(0, dtype=y.dtype, device=y.device).set_(y.untyped_storage()).mul_(2)
    return m.norm(y).relu()


def changes_a_view_in_a_branch(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :1].mul_(2)
    return (m.norm(y) + m.point(x)).relu()


def reads_a_view_of_what_changed(m: Any, x: Tensor) -> Tensor:
    x = x.relu()
    view = x[:, :1]
    y = m.conv(x.mul_(2)) + m.point(x)
    return y.relu() + view


PASSED: list[Tensor] = []


def passes_unseen(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    PASSED.append(y)
    return m.child(m.norm(y).relu())


@torch.overrides.wrap_torch_function(lambda m, x: (x,))
def torch_function(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.conv(x)
    return result


def weight_computed_for_two(m: Any, x: Tensor) -> Tensor:
    weight = m.conv.weight * 2
    y = functional.conv2d(x, weight, padding=1) + m.point(x)
    return functional.conv2d(y.relu(), weight)


def sums_branches(m: Any, x: Tensor) -> Tensor:
    return (m.conv(x) + m.point(x)).relu()


def sums_written_branches(m: Any, x: Tensor) -> Tensor:
    y = functional.conv2d(x, m.conv.weight, padding=1)
    return (y + functional.conv2d(x, m.point.weight)).relu()


def branches(forward: Callable[..., Any], child: Callable[..., Any] | None = None) -> nn.Module:
    """Return a network of two branches, with a child that also holds the first of them."""
    first = conv()
    parts = {} if child is None else {"child": network(child, conv=first)}
    return network(
        lambda m, x: m.child(m.block(x)) if parts else m.block(x),
        block=network(forward, conv=first, point=conv(4, 4, 1)),
        **parts,
    )


def by_mantissa(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return (m.norm(y) if math.frexp(x.shape[2])[1] > 3 else y).relu()


def by_three_sizes(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    if x.shape[2] > 5 or x.shape[3] > 5:
        return m.norm(y).relu()
    return m.norm(y).relu() if x.shape[0] > 1 else y


BESIDE = {
    "change between branches": Fault(
        lambda: network(
            changes_between_branches,
            conv=conv(),
            point=conv(4, 4, 1),
            child=network(lambda m, x: x.mul_(2).mean()),
        )
    ),
    "change of a view of the input": Fault(
        lambda: nn.Sequential(pair(changes_a_view_of_the_input), nn.ReLU()), left=("0.norm",)
    ),
    "change of the input of a child": Fault(
        lambda: network(changed_by_its_child, child=pair(lambda m, x: m.norm(m.conv(x.mul_(2)))))
    ),
    "change of a view of the output": Fault(
        lambda: nn.Sequential(pair(changes_a_view_of_the_output), nn.ReLU()), left=("0.norm",)
    ),
    "change through a storage": Fault(lambda: pair(changes_through_a_storage), left=("norm",)),
    "change of a view in a branch": Fault(
        lambda: pair(changes_a_view_in_a_branch, point=conv(4, 4, 1)), left=("norm",)
    ),
    "view of what changed": Fault(
        lambda: network(reads_a_view_of_what_changed, conv=conv(), point=conv(4, 4, 1))
    ),
    "passed unseen": Fault(
        lambda: pair(passes_unseen, child=network(lambda m, x: x + PASSED.pop())), left=("norm",)
    ),
    "called in a torch function": Fault(
        lambda: pair(lambda m, x: m.norm(m.conv(x)) + torch_function(m, x)), left=("norm",)
    ),
    "weight computed for two": Fault(
        lambda: network(weight_computed_for_two, conv=conv(), point=conv(4, 4, 1))
    ),
    "branch called elsewhere": Fault(
        lambda: branches(sums_branches, lambda m, x: m.conv(x).relu())
    ),
    "weight read elsewhere": Fault(
        lambda: branches(sums_written_branches, lambda m, x: x * m.conv.weight.mean())
    ),
    "random constant": Fault(
        lambda: pair(lambda m, x: m.norm(m.conv(x) + torch.rand(4, 1, 1))), left=("norm",)
    ),
    "argument that is passed on": Fault(
        lambda: network(lambda m, x, flag=True: m.child(x, flag), child=pair(maybe_norm)),
        (X, True),
        (),
        ((X, False), X),
        ("child.norm",),
    ),
    "number that counts as an index": Fault(
        lambda: pair(lambda m, x, n: (torch.relu, m.norm)[n](m.conv(x))),
        (X, 1),
        (),
        ((X, 0),),
        ("norm",),
    ),
    "mantissa of a size": Fault(
        lambda: pair(by_mantissa), others=(), ways=(X[:, :, :7], *OTHER), left=("norm",)
    ),
    "third of three sizes": Fault(
        lambda: pair(by_three_sizes), ways=(X[:1, :, :4, :4], X[:, :, :4, :4]), left=("norm",)
    ),
    "keyword behind a norm": Fault(
        lambda: network(
            lambda m, x: m.child(m.conv(x)),
            conv=conv(),
            child=network(
                lambda m, x: m.scaled(m.norm(x), gain=3.0),
                norm=norm(),
                scaled=network(lambda m, x, *, gain=1.0: x.relu() * gain),
            ),
        )
    ),
}


def tied(model: Any) -> nn.Module:
    model.b.weight = model.a.weight
    return model


FAULTS: dict[str, Fault] = {
    **DECISIONS, **RESHAPES, **SUBCLASSES, **WEIGHTS, **PRECISIONS, **CALLS, **READERS, **SHARED,
    **BORDERS, **PADDINGS, **OUTPUTS, **OTHERS, **BESIDE,
}  # fmt: skip
assert len(FAULTS) == sum(
    map(len, (DECISIONS, RESHAPES, SUBCLASSES, WEIGHTS, PRECISIONS, CALLS, READERS, SHARED,
              BORDERS, PADDINGS, OUTPUTS, OTHERS, BESIDE))
)  # fmt: skip

PROVEN = ("dtype of a norm's weight", "classes of children")  # which only the proof finds

every_fault = pytest.mark.parametrize("name", FAULTS)


def converted(inputs: Any, dtype: torch.dtype) -> Any:
    """Return a copy of `inputs` with its floating-point tensors in `dtype`."""
    return tree_map_only(
        Tensor, lambda t: t.to(dtype, copy=True) if t.is_floating_point() else t.clone(), inputs
    )


def call(model: nn.Module, inputs: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    inputs = converted(inputs, dtype)
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


@functools.cache
def fold_or_error(name: str, method: str) -> Any:
    torch.manual_seed(0)
    fault = FAULTS[name]
    model = randomize_batch_norm(fault.build()).to(fault.dtype)
    example = converted(fault.example, fault.dtype)
    try:
        return model, *repnet.reparameterize(model, example, return_report=True, **METHODS[method])
    except Exception as error:
        return error


def folded(name: str, method: str) -> tuple[nn.Module, nn.Module, repnet.FoldReport]:
    """Return a model, its fold and the report. The model and the fold have the same history."""
    found = fold_or_error(name, method)
    if isinstance(found, Exception):
        pytest.fail(f"it raises {type(found).__name__}: {found}")
    return found


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.cond
@every_method
@every_fault
def test_a_fold_holds_for_every_input(name: str, method: str) -> None:
    fault = FAULTS[name]
    model, result, report = folded(name, method)
    assert name in PROVEN or not report.put_back  # the engine knows it without a proof
    tolerance = fault.tolerance or TOLERANCES[fault.dtype]
    for inputs in (fault.example, *fault.others, *fault.ways):
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                expected = call(model, inputs, fault.dtype)
                try:
                    actual = call(result, inputs, fault.dtype)
                except ValueError as error:
                    another_way = name == "gradients" or any(inputs is w for w in fault.ways)
                    if method != "graph" or not another_way or "record" not in str(error):
                        raise
                    continue
            with torch.no_grad():
                assert_outputs_agree(expected, actual, tolerance)


@pytest.mark.parametrize("forward", [in_float64_or_negative, written_into_a_tensor])
def test_a_forward_that_reads_the_dtype_of_its_input_is_left(forward: Any) -> None:
    model = randomize_batch_norm(pair(forward)).double()
    result = repnet.reparameterize(model, X.double()).float()
    with torch.no_grad():
        assert_outputs_agree(model.float()(X.float()), result(X.float()), TOLERANCES[torch.float32])


@every_method
@every_fault
def test_every_norm_that_is_left_is_named_with_a_reason(name: str, method: str) -> None:
    _, result, report = folded(name, method)
    assert set(norms(result)) == set(report.left)
    assert all(report.skipped.get(name) for name in report.left)


@every_fault
def test_the_default_leaves_nothing_that_folds(name: str) -> None:
    fault = FAULTS[name]
    model, result, report = folded(name, "default")
    assert set(report.left) <= set(fault.left)
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, result))
    assert after <= before
    if fault.layers is not None:
        with torch.no_grad():
            assert (
                count_calls(result, converted(fault.example, fault.dtype))["layers"] <= fault.layers
            )


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


# Sizes that enter an operation, on which forward does not decide


def tokens(y: Tensor) -> Tensor:
    return y.flatten(2).mT[None]


def grid(y: Tensor) -> Tensor:
    return functional.affine_grid(
        torch.eye(2, 3)[None].expand(len(y), -1, -1).to(y), y.size(), False
    )


def windows(y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    y = y.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
    y = y.softmax(1).view(b, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4)
    return y.reshape(b, c, h, w)


def meshed(y: Tensor) -> Tensor:
    axes = (torch.arange(size, dtype=y.dtype) for size in y.shape[2:])
    return y + torch.stack(torch.meshgrid(*axes, indexing="ij")).sum(0)


SIZES: dict[str, Callable[[Tensor], Tensor]] = {
    "pooling": lambda y: y * functional.avg_pool2d(y, kernel_size=list(y.shape[2:])),
    "pooling, one side": lambda y: functional.avg_pool2d(y, kernel_size=(2, y.size(3) // 2)),
    "interpolate": lambda y: functional.interpolate(functional.max_pool2d(y, 2), y.shape[2:]),
    "interpolate, two numbers": lambda y: functional.interpolate(
        functional.max_pool2d(y, 2), size=(y.shape[2], y.shape[3]), mode="bilinear"
    ),
    "adaptive pooling": lambda y: functional.adaptive_avg_pool2d(y, (y.shape[2] // 2, 3)),
    "adaptive maximum": lambda y: functional.adaptive_max_pool2d(y, (2, y.shape[3] // 2)),
    "view": lambda y: y.view(y.shape[0], -1),
    "expand": lambda y: y.mean((2, 3)) * torch.ones(1, dtype=y.dtype).expand(y.shape[0], 4),
    "pad": lambda y: functional.pad(y, (0, y.shape[3] % 2 + 1, 0, 1)),
    "roll": lambda y: torch.roll(y, (y.shape[2] // 2,), (2,)),
    "zeros": lambda y: torch.cat([y, torch.zeros(len(y), 1, *y.shape[2:], dtype=y.dtype)], 1),
    "zeros like": lambda y: torch.cat([y, y.new_zeros(y.shape[0], 1, *y.shape[2:])], 1),
    "quotient": lambda y: y / y.shape[2] ** 0.5,
    "square root": lambda y: y / math.sqrt(y.shape[2]),
    "hyperbolic tangent": lambda y: y * math.tanh(y.shape[2] / 8),
    "fold": lambda y: functional.fold(
        functional.unfold(y, 3, padding=1), (y.shape[2], y.shape[3]), 3, padding=1
    ),
    "linspace": lambda y: y + torch.linspace(-1, 1, y.shape[3], dtype=y.dtype),
    "arange": lambda y: y + torch.arange(y.shape[3]),
    "mesh": meshed,
    "sampling grid": lambda y: functional.grid_sample(y, grid(y), align_corners=False),
    "layer norm": lambda y: functional.layer_norm(y, y.shape[1:]),
    "split": lambda y: torch.cat(y.split(y.shape[3] // 2, 3), 1),
    "repeat": lambda y: y.repeat(1, 1, y.shape[2], 1),
    "triangle": lambda y: y.triu(y.shape[2] - y.shape[3]),
    "attention": lambda y: functional.scaled_dot_product_attention(tokens(y), tokens(y), tokens(y)),
    "pixel shuffle": lambda y: functional.pixel_shuffle(y, 2),
    "slice": lambda y: y[:, :, : y.shape[2] // 2],
    "einsum": lambda y: torch.einsum("bchw,bchv->bwv", y, y),
    "diagonal": lambda y: y + torch.eye(y.shape[3])[: y.shape[2], : y.shape[3]][:1],
    "windows": windows,
    "shape as a tensor": lambda y: y / torch.tensor(y.shape[2:], dtype=y.dtype).prod(),
    "number of values": lambda y: y / y.numel() * len(y) * y.size(-1),
}


@torch.no_grad()
@pytest.mark.parametrize("method", ["default", "graph"])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_enters_an_operation_is_not_fixed(name: str, method: str) -> None:
    model = pair(lambda m, x: SIZES[name](m.norm(m.conv(x)).relu()))
    randomize_batch_norm(model).double()
    result, report = repnet.reparameterize(model, X.double(), return_report=True, **METHODS[method])
    if method == "default":
        assert report.left == norms(result) == []
    for x in (X, image(3, 4, 12, 10), image(1, 4, 6, 14)):
        assert_outputs_agree(model(x.double()), result(x.double()), 1e-9)


# What a forward keeps aside


def keeps_features(m: Any, x: Tensor) -> Tensor:
    m.kept = m.conv(x)
    return m.norm(m.kept).relu()


def keeps_a_list(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x)).relu()
    m.kept.append(y.mean())
    return y


def keeps_by_size(m: Any, x: Tensor) -> Tensor:
    if m.kept is None or m.kept.shape != x.shape[2:]:
        m.kept = torch.rand(x.shape[2:], dtype=x.dtype)
    return m.norm(m.conv(x)).relu() * m.kept


def keeps_an_average(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x)).relu()
    m.kept.mul_(0.9).add_(0.1 * y.mean())
    return y + m.kept


def calls_forward(m: Any, x: Tensor) -> Tensor:
    y = m.block.forward(x)  # without hooks, and without a call that could be seen
    m.kept = m.block.kept
    return y


def counts_and_decides(m: Any, x: Tensor) -> Tensor:
    m.kept += 1
    y = m.conv(x)
    return m.norm(y) if m.kept % 2 else y


KEEPERS: dict[str, Callable[[], nn.Module]] = {
    "features of a forward that is called": lambda: network(
        calls_forward, block=pair(keeps_features, kept=None), kept=None
    ),
    "count of a forward that is called": lambda: network(
        calls_forward, block=pair(counts_and_decides, kept=0), kept=0
    ),
    "features before the norm": lambda: pair(keeps_features, kept=None),
    "features, and a size": lambda: pair(keeps_and_decides, kept=None),
    "list that grows": lambda: pair(keeps_a_list, kept=[]),
    "mask by size": lambda: pair(keeps_by_size, kept=None),
    "average": lambda: pair(keeps_an_average, kept=torch.zeros(())),
}


@torch.no_grad()
@every_method
@pytest.mark.parametrize("name", KEEPERS)
def test_what_a_forward_keeps_aside_is_the_same(name: str, method: str) -> None:
    model: Any = randomize_batch_norm(KEEPERS[name]()).double()
    before = copy.deepcopy(model.kept)
    result: Any = repnet.reparameterize(model, X.double(), **METHODS[method])
    for candidate in (model, result):
        assert_outputs_agree(before, candidate.kept, 0)
    for x in (X, OTHER[0], X):
        try:
            expected, actual = (call(m, x, torch.float64) for m in (model, result))
        except ValueError as error:
            if method != "graph" or "record" not in str(error):
                raise
            return
        assert_outputs_agree(expected, actual, 1e-9)
        assert_outputs_agree(model.kept, result.kept, 1e-9)


# Precision and modes of the model


def half_overflow(weight: float, bias: float, mean: float) -> nn.Module:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3), norm(), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    model[0].weight.data.mul_(weight)
    model[0].bias.data.fill_(bias)
    model[1].running_mean.fill_(mean)
    model[1].running_var.zero_()
    return model.half()


@torch.no_grad()
@every_method
@pytest.mark.parametrize(
    ("weight", "bias", "mean", "scale"),
    [(1, 0, 300, 1), (1, -300, -300, 1), (4000, 0, 0, 1e-5), (1, 2e4, 2e4, 1e-3), (1, 0, 0, 1)],
)
def test_what_half_precision_cannot_hold_is_left_or_said(
    weight: float, bias: float, mean: float, scale: float, method: str
) -> None:
    model, x = half_overflow(weight, bias, mean), (X * scale).half()
    expected = model(x)
    assert bool(expected.isfinite().all())
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        result = repnet.reparameterize(model, x, **METHODS[method])
    assert result(x).dtype == torch.float16
    assert bool(result(x).isfinite().all())
    finite = all(bool(t.isfinite().all()) for t in result.state_dict().values())
    assert finite or raised


@every_method
@pytest.mark.parametrize("inner", [False, True])
def test_a_norm_in_training_mode_stays_in_effect_or_the_report_says_so(
    inner: bool, method: str
) -> None:
    model: Any = nn.Sequential(conv(), norm(), nn.ReLU(), conv_bn(4, 4, 1), nn.ReLU())
    randomize_batch_norm(model).double()
    (model[3].bn if inner else model[1]).train()
    x = X.double()
    expected = copy.deepcopy(model)(x)
    result, report = repnet.reparameterize(model, x, return_report=True, **METHODS[method])
    if report.was_training:
        assert "training mode" in str(report)
        torch.testing.assert_close(result(x), copy.deepcopy(model).eval()(x))
    else:
        assert relative_error(expected, result(x)) < 1e-9
        assert report.left == norms(result) == (["3.bn"] if inner else ["1"])


@torch.no_grad()
@every_method
def test_norms_of_an_exported_program_fold_or_are_reported(method: str) -> None:
    model = randomize_batch_norm(nn.Sequential(conv(), norm(), nn.ReLU(), conv_bn(4, 4, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (X,)).module()
        result, report = repnet.reparameterize(program, X, return_report=True, **METHODS[method])
    assert relative_error(model(X), result(X)) < 1e-4
    remaining = count_calls(result, X)["norms"]
    assert bool(report.left) == bool(remaining)
    assert bool(report.skipped) == bool(remaining)


# Plain networks whose norms are kept


class ConvNormAct(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, apply_act: bool = True) -> None:
        super().__init__()
        self.conv = conv(in_channels, out_channels, 1)
        self.bn = norm(out_channels)
        self.act = nn.ReLU() if apply_act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


def cross_stage(m: Any, x: Tensor) -> Tensor:
    xs, xb = m.conv_exp(m.conv_down(x)).split(4, dim=1)
    return m.conv_transition(torch.cat([xs, m.block(xb)], dim=1))


def test_a_plain_network_keeps_its_keys_with_its_norms() -> None:
    model = network(
        cross_stage,
        conv_down=ConvNormAct(4, 4),
        conv_exp=ConvNormAct(4, 8, apply_act=False),
        block=ConvNormAct(4, 4),
        conv_transition=ConvNormAct(8, 4),
    )
    randomize_batch_norm(model).double()
    result = repnet.reparameterize(model, X.double(), norms="keep")
    assert list(result.state_dict()) == list(model.state_dict())
    assert relative_error(model(X.double()), result(X.double())) < 1e-9


# The inverse


class ConvNeXtBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim)
        self.pwconv1, self.act = nn.Linear(dim, 2 * dim), nn.GELU()
        self.pwconv2 = nn.Linear(2 * dim, dim)
        self.gamma = nn.Parameter(torch.rand(dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.act(self.pwconv1(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, stride=4), ConvNeXtBlock(8), nn.Conv2d(8, 12, 2, stride=2),
        ConvNeXtBlock(12),
    )  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("block", ["dbb", "ac", "unireplk"])
def test_a_convnext_can_be_over_parameterized(block: str) -> None:
    model = convnext().eval().double()
    x = image(2, 3, 32, 32).double()
    made = repnet.overparameterize(model, block).eval()
    for layer in (model[1].dwconv, model[3].dwconv):
        name = next(n for n, m in model.named_modules() if m is layer)
        assert type(made.get_submodule(name)) is not nn.Conv2d
    assert relative_error(model(x), made(x)) < 1e-9
    result = repnet.reparameterize(made, x, norms="keep")
    assert {k: v.shape for k, v in result.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert relative_error(model(x), result(x)) < 1e-9


@torch.no_grad()
def test_patch_convolutions_can_be_over_parameterized() -> None:
    model = convnext().eval().double()
    made = repnet.overparameterize(model, "dbb", where=["0", "2"]).eval()
    assert sum(p.numel() for p in made.parameters()) > sum(p.numel() for p in model.parameters())
    x = image(2, 3, 32, 32).double()
    assert relative_error(model(x), made(x)) < 1e-9
    assert relative_error(model(x), repnet.reparameterize(made, x)(x)) < 1e-9


def test_tied_weights_are_not_untied_when_over_parameterized() -> None:
    shapes = {"a": conv(), "b": conv(), "c": conv()}
    model: Any = tied(network(lambda m, x: m.c(m.b(m.a(x).relu()).relu()), **shapes)).eval()
    made: Any = repnet.overparameterize(model, "repvgg").eval()
    assert made.a.weight is made.b.weight
    assert type(made.c) is not nn.Conv2d
    assert relative_error(model(X), made(X)) < 1e-5
    with pytest.raises(ValueError, match="its weight is also 'b.weight'"):
        repnet.overparameterize(model, "repvgg", where="a")


# Models whose convolutions may be replaced by sums without example.
REPLACEABLE = [*SUBCLASSES, *PADDINGS, *BORDERS, *OUTPUTS, "norm by keywords",
               "bool that depends on data", "dtype of the image", "plus low rank",
               "plus an identity that is a tensor", "standardized, with a gain", "LSTM",
               "wrapped for several devices", "made for quantization", "forward of an instance",
               "tied weights"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", REPLACEABLE)
def test_over_parameterizing_changes_no_output(name: str) -> None:
    fault = FAULTS[name]
    model = folded(name, "default")[0]
    try:
        made = repnet.overparameterize(model, "repvgg").eval()
    except ValueError as error:
        assert "no convolution was selected" in str(error)  # noqa: PT017
        return
    for inputs in (fault.example, *fault.others, *fault.ways):
        expected, actual = (call(m, inputs, fault.dtype) for m in (model, made))
        assert_outputs_agree(expected, actual, fault.tolerance or TOLERANCES[fault.dtype])
