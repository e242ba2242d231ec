"""Kernels over 0, 1 and 3 spatial axes: linear layers, sequences and volumes."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from math import gcd
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.convolution import as_module
from repnet.fold import reparameterize
from repnet.kernel import ConvKernel, NotFoldableError, add, concat
from repnet.layers import Concat, Sum
from repnet.symbolic import kernel_of
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-10
DTYPE = torch.float64
AXES = st.sampled_from([0, 1, 3])
CHANNELS = st.sampled_from([2, 4])
SEEDS = st.integers(0, 2**16)
SIZE = 13  # of each side of an input: two kernels of reach 4 and stride 2 leave a sample

every_axes = pytest.mark.parametrize("axes", [0, 1, 3])


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=DTYPE, generator=generator)


def image(axes: int, channels: int = 4) -> Tensor:
    return random(7, 2, channels, *(SIZE,) * axes)


@st.composite
def kernels(
    draw: st.DrawFn,
    axes: int,
    in_channels: int,
    *,
    out_channels: int | None = None,
    transparent: bool = False,
    inserts: bool = False,
    keeps_size: bool = False,
) -> ConvKernel:
    """Draw a kernel over some axes.

    Args:
        draw: given by hypothesis.
        axes: of the kernel.
        in_channels: of the kernel.
        out_channels: drawn where None.
        transparent: pointwise, without stride and bias: zeros pass through it.
        inserts: may pad with zeros, and insert them between samples.
        keeps_size: the output is as large as the input.
    """
    out_channels = draw(CHANNELS) if out_channels is None else out_channels
    groups = draw(st.sampled_from([n for n in (1, 2) if gcd(in_channels, out_channels) % n == 0]))
    size, padding, dilation, stride, upsample = [], [], [], [], []
    for _ in range(axes):
        size.append(1 if transparent else draw(st.integers(1, 3)))
        dilation.append(draw(st.integers(1, 2)))
        reach = dilation[-1] * (size[-1] - 1)
        before = draw(st.integers(0, 2)) if inserts else 0
        after = draw(st.integers(0, 2)) if inserts else 0
        padding.append((before, reach - before) if keeps_size else (before, after))
        fixed = transparent or keeps_size
        stride.append(1 if fixed else draw(st.integers(1, 2)))
        upsample.append(draw(st.integers(1, 2)) if inserts and not keeps_size else 1)
    seed = draw(SEEDS)
    has_bias = not transparent and draw(st.booleans())
    return ConvKernel(
        random(seed, out_channels, in_channels // groups, *size),
        random(seed + 1, out_channels) if has_bias else None,
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        upsample=tuple(upsample),
        groups=groups,
    )


# Laws


@given(AXES, CHANNELS, st.data())
def test_then_is_composition(axes, channels, data):
    f = data.draw(kernels(axes, channels, inserts=True))
    g = data.draw(kernels(axes, f.out_channels))
    x = image(axes, channels)
    assert relative_error(g(f(x)), f.then(g)(x)) < TOLERANCE


@given(AXES, CHANNELS, st.data())
def test_zeros_pass_through_a_pointwise_kernel_without_bias(axes, channels, data):
    f = data.draw(kernels(axes, channels, transparent=True))
    g = data.draw(kernels(axes, f.out_channels, inserts=True))
    x = image(axes, channels)
    assert relative_error(g(f(x)), f.then(g)(x)) < TOLERANCE


@given(st.sampled_from([1, 3]), CHANNELS, st.data())
def test_then_is_composition_or_is_refused(axes, channels, data):
    f = data.draw(kernels(axes, channels, transparent=data.draw(st.booleans())))
    g = data.draw(kernels(axes, f.out_channels, inserts=True))
    x = image(axes, channels)
    try:
        composed = f.then(g)
    except NotFoldableError:
        assert max(g.upsample) > 1 or max(max(sides) for sides in g.padding) > 0
    else:
        assert relative_error(g(f(x)), composed(x)) < TOLERANCE


@given(AXES, CHANNELS, st.data())
def test_composition_is_associative(axes, channels, data):
    f = data.draw(kernels(axes, channels, inserts=True))
    g = data.draw(kernels(axes, f.out_channels))
    h = data.draw(kernels(axes, g.out_channels, keeps_size=False, transparent=True))
    x = image(axes, channels)
    expected = reduce(lambda value, kernel: kernel(value), (f, g, h), x)
    assert relative_error(expected, f.then(g).then(h)(x)) < TOLERANCE
    assert relative_error(expected, f.then(g.then(h))(x)) < TOLERANCE


@given(AXES, CHANNELS, CHANNELS, st.data())
def test_add_is_the_sum(axes, channels, out_channels, data):
    branch = kernels(axes, channels, out_channels=out_channels, inserts=True, keeps_size=True)
    parts = data.draw(st.lists(branch, min_size=1, max_size=3))
    x = image(axes, channels)
    assert relative_error(sum(part(x) for part in parts), add(parts)(x)) < TOLERANCE


@given(AXES, CHANNELS, st.data())
def test_concat_is_the_concatenation(axes, channels, data):
    branch = kernels(axes, channels, inserts=True, keeps_size=True)
    parts = data.draw(st.lists(branch, min_size=1, max_size=3))
    x = image(axes, channels)
    expected = torch.cat([part(x) for part in parts], dim=1)
    assert relative_error(expected, concat(parts)(x)) < TOLERANCE


@given(AXES, st.data())
def test_with_groups_keeps_the_function(axes, data):
    kernel = data.draw(kernels(axes, 4, inserts=True))
    x = image(axes)
    dense = kernel.with_groups(1)
    assert dense.groups == 1
    assert dense.weight.shape[:2] == (kernel.out_channels, 4)
    assert relative_error(kernel(x), dense(x)) < TOLERANCE


@every_axes
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_the_identity_at_any_grouping(axes: int, groups: int) -> None:
    kernel = ConvKernel.identity(4, axes=axes, dtype=DTYPE).with_groups(groups)
    x = image(axes)
    assert kernel.axes == axes
    assert relative_error(x, kernel(x)) < TOLERANCE


# Other numbers of axes


@given(AXES, AXES, SEEDS)
def test_a_channelwise_map_is_the_same_over_any_axes(axes, others, seed):
    kernel = ConvKernel(random(seed, 4, 1, *(1,) * axes), random(seed + 1, 4), groups=4)
    over = kernel.over(others)
    assert over.is_channelwise
    assert over.axes == others
    x = image(others)
    expected = x * kernel.weight.reshape(-1, *(1,) * others)
    expected = expected + kernel.bias.reshape(-1, *(1,) * others)
    assert relative_error(expected, over(x)) < TOLERANCE


@pytest.mark.parametrize(
    "kernel",
    [
        ConvKernel(torch.ones(4, 2, 1), groups=2),
        ConvKernel(torch.ones(4, 1, 2), groups=4),
        ConvKernel(torch.ones(4, 1, 1), groups=4, stride=(2,)),
        ConvKernel(torch.ones(4, 1, 1), groups=4, padding=((1, 1),)),
    ],
    ids=["mixes channels", "reads neighbors", "strided", "padded"],
)
def test_more_than_a_channelwise_map_is_not(kernel: ConvKernel) -> None:
    with pytest.raises(ValueError, match="only a channelwise map"):
        kernel.over(2)


def test_maps_over_different_axes_do_not_follow_each_other() -> None:
    with pytest.raises(NotFoldableError, match="over 1 spatial axes enters one over 3"):
        ConvKernel.identity(4, axes=1).then(ConvKernel.identity(4, axes=3))


@pytest.mark.parametrize("law", [add, concat])
def test_maps_over_different_axes_have_no_sum(law: Callable[..., ConvKernel]) -> None:
    with pytest.raises(NotFoldableError):
        law([ConvKernel.identity(4, axes=1), ConvKernel.identity(4, axes=3)])


@pytest.mark.parametrize("shape", [(4,), (4, 4, 1, 1, 1, 1)])
def test_a_weight_has_at_most_three_axes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="weight must be 2-D to 5-D"):
        ConvKernel(torch.ones(shape))


@pytest.mark.parametrize("axes", [1, 3])
def test_each_axis_needs_its_own_settings(axes: int) -> None:
    with pytest.raises(ValueError, match=f"stride must have {axes} entries"):
        ConvKernel(torch.ones(4, 4, *(3,) * axes), stride=(1, 1))


# The border law


BORDERS = {
    1: (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d),
    3: (nn.Conv3d, nn.BatchNorm3d, nn.ConvTranspose3d),
}


def pointwise_then(axes: int, kind: str) -> nn.Sequential:
    """Return a 1x1 convolution and norm, then what inserts zeros."""
    convolution, norm, transposed = BORDERS[axes]
    second = convolution(4, 4, 3, padding=1) if kind == "padded" else transposed(4, 4, 3, 2, 2)
    layers = nn.Sequential(convolution(4, 4, 1, bias=False), norm(4), second)
    return randomize_batch_norm(layers).double()


@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("kind", ["padded", "upsampled"])
def test_a_border_behind_a_bias_is_refused_and_its_naive_merge_is_wrong(
    axes: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers, x = pointwise_then(axes, kind), image(axes)
    with pytest.raises(NotFoldableError, match="but the first has a bias"):
        kernel_of(layers, 4, axes=axes)
    monkeypatch.setattr(ConvKernel, "_check_border", lambda self, other: None)
    assert relative_error(layers(x), kernel_of(layers, 4, axes=axes)(x)) > 1e-3


# Modules


class Case(NamedTuple):
    axes: int
    build: Callable[[], nn.Module]  # for 4 channels
    grows: bool = False  # and so stays, or is a convolution with its padding already


CASES = {
    "linear, norm": Case(0, lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))),
    "norm, linear": Case(0, lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False))),
    "two linear": Case(0, lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4))),
    "sum of linear": Case(
        0, lambda: Sum(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    ),
    "concat of linear": Case(0, lambda: Concat(nn.Linear(4, 3), nn.Identity()), grows=True),
    "conv1d, norm": Case(
        1, lambda: nn.Sequential(nn.Conv1d(4, 6, 3, 2, 1, groups=2), nn.BatchNorm1d(6))
    ),
    "conv1d of even size, padding same": Case(
        1, lambda: nn.Sequential(nn.Conv1d(4, 4, 4, padding="same"), nn.BatchNorm1d(4))
    ),
    "sum of conv1d": Case(
        1,
        lambda: Sum(
            nn.Sequential(nn.Conv1d(4, 4, 5, padding=2), nn.BatchNorm1d(4)),
            nn.Sequential(nn.Conv1d(4, 4, 3, padding=2, dilation=2), nn.BatchNorm1d(4)),
            nn.Conv1d(4, 4, 1),
            nn.BatchNorm1d(4),
        ),
    ),
    "pool1d": Case(
        1,
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1), nn.AvgPool1d(3, 2), nn.BatchNorm1d(4)),
        grows=True,
    ),
    "pad1d": Case(1, lambda: nn.Sequential(nn.ZeroPad1d((3, 0)), nn.Conv1d(4, 4, 4)), grows=True),
    "transposed 1d": Case(
        1,
        lambda: nn.Sequential(
            nn.ConvTranspose1d(4, 6, 3, 2, padding=1, output_padding=1, groups=2),
            nn.BatchNorm1d(6),
        ),
    ),
    "conv3d, norm": Case(
        3,
        lambda: nn.Sequential(
            nn.Conv3d(4, 6, (1, 3, 2), (1, 2, 1), (0, 1, 2), (1, 2, 3)), nn.BatchNorm3d(6)
        ),
    ),
    "sum of conv3d": Case(
        3,
        lambda: Sum(
            nn.Sequential(nn.Conv3d(4, 4, 3, padding=1), nn.BatchNorm3d(4)),
            nn.Sequential(nn.Conv3d(4, 4, (1, 1, 3), padding=(0, 0, 1)), nn.BatchNorm3d(4)),
            nn.BatchNorm3d(4),
        ),
    ),
    "pool3d": Case(
        3, lambda: nn.Sequential(nn.Conv3d(4, 4, 1), nn.AvgPool3d((1, 2, 3))), grows=True
    ),
    "pad3d": Case(
        3, lambda: nn.Sequential(nn.ZeroPad3d((1, 0, 2, 0, 0, 3)), nn.Conv3d(4, 4, 2)), grows=True
    ),
    "transposed 3d": Case(
        3,
        lambda: nn.Sequential(
            nn.ConvTranspose3d(4, 6, (2, 3, 1), (2, 3, 1), padding=(0, 1, 0), dilation=(1, 2, 1)),
            nn.BatchNorm3d(6),
        ),
    ),
    "synchronized norm": Case(3, lambda: nn.Sequential(nn.Conv3d(4, 6, 3), nn.SyncBatchNorm(6))),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def ready(model: nn.Module) -> Any:
    return randomize_batch_norm(model).double()


@every_case
def test_the_kernel_is_the_module(case: Case) -> None:
    module, x = ready(case.build()), image(case.axes)
    kernel = kernel_of(module, 4, axes=case.axes)
    assert kernel.axes == case.axes
    assert relative_error(module(x), kernel(x)) < TOLERANCE


@every_case
def test_the_layer_is_the_kernel(case: Case) -> None:
    module, x = ready(case.build()), image(case.axes)
    layer = as_module(kernel_of(module, 4, axes=case.axes), like=module)
    assert relative_error(module(x), layer(x)) < TOLERANCE


@pytest.mark.parametrize(
    "geometry",
    [
        {"padding": ((3, 3),)},
        {"padding": ((1, 0),)},
        {"padding": ((1, 3),)},
        {"padding": ((1, 1),), "stride": (3,)},
    ],
    ids=["more than the reach", "less after than before", "a stride more after", "strided"],
)
def test_a_transposed_convolution_that_torch_lacks_is_refused(geometry: dict[str, Any]) -> None:
    kernel = ConvKernel(torch.ones(4, 4, 3), upsample=(2,), **geometry)
    with pytest.raises(NotFoldableError, match="torch has no transposed convolution"):
        as_module(kernel, like=nn.Identity())


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_block_folds_under_its_name_and_in_its_dtype(case: Case, dtype: torch.dtype) -> None:
    block = ready(case.build())
    model = nn.Sequential(block, nn.ReLU()).to(dtype)
    x = image(case.axes).to(dtype)
    folded, report = reparameterize(model, x, return_report=True)
    assert type(folded) is nn.Sequential
    assert [fold.name for fold in report.folded] == ([] if case.grows else ["0"])
    assert report.left == [n for n, m in folded.named_modules() if isinstance(m, _BatchNorm)]
    assert case.grows or report.left == []
    assert {t.dtype for t in folded.state_dict().values() if t.is_floating_point()} == {dtype}
    assert report.proof is not None
    assert report.proof.max_relative_error < TOLERANCE
    if dtype == torch.float64:
        assert relative_error(model(x), folded(x)) < TOLERANCE


@every_axes
def test_a_norm_alone_stays(axes: int) -> None:
    norm = nn.BatchNorm3d(4) if axes == 3 else nn.BatchNorm1d(4)
    report = reparameterize(ready(nn.Sequential(norm, nn.ReLU())), image(axes), return_report=True)[
        1
    ]
    assert report.folded == []
    assert report.left == ["0"]


@every_axes
def test_the_reason_is_right_for_norms_of_other_axes(axes: int) -> None:
    norm = nn.BatchNorm3d(4) if axes == 3 else nn.BatchNorm1d(4)
    model = ready(nn.Sequential(norm, nn.ReLU()))
    report = reparameterize(model, image(axes), return_report=True)[1]
    assert report.skipped["0"].startswith("it comes after the input of the model; a norm goes into")


def test_a_linear_layer_over_a_map_mixes_its_last_axis_and_is_no_kernel() -> None:
    layer = nn.Linear(4, 4).double()
    with pytest.raises(NotFoldableError, match="last axis"):
        kernel_of(layer, 4)
    x = random(0, 2, 4, 4, 4)
    naive = torch.einsum("oi,bihw->bohw", layer.weight, x) + layer.bias.reshape(-1, 1, 1)
    assert relative_error(layer(x), naive) > 1e-3


# Norms of tokens, behind a linear layer


class TokenNorm(nn.Module):
    """A linear layer of tokens `(batch, tokens, channels)`, then a norm over all tokens."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.bn = nn.BatchNorm1d(6)
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        x = self.linear(x)
        if self.form == "flatten, reshape_as":
            x = self.bn(x.flatten(0, 1)).reshape_as(x)
        elif self.form == "reshape":
            x = self.bn(x.reshape(-1, 6)).reshape(batch, tokens, 6)
        elif self.form == "transpose":
            x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        elif self.form == "permute":
            x = self.bn(x.permute(0, 2, 1)).permute(0, 2, 1)
        elif self.form == "wrong axis":
            x = self.bn(x)
        elif self.form == "mixed":  # as many values, in another order
            x = self.bn(x.transpose(1, 2).flatten(0, 1).reshape(-1, 6)).reshape(-1, 6)
        return x.relu()


@pytest.mark.parametrize("form", ["flatten, reshape_as", "reshape", "transpose", "permute"])
def test_a_norm_of_tokens_folds_into_the_linear_layer(form: str) -> None:
    model, x = ready(TokenNorm(form)), random(0, 3, 5, 4)
    folded, report = reparameterize(model, x, return_report=True)
    assert type(folded) is TokenNorm
    assert type(folded.linear) is nn.Linear
    assert type(folded.bn) is nn.Identity
    assert [fold.name for fold in report.folded] == ["linear"]
    assert relative_error(model(x), folded(x)) < TOLERANCE
    other = random(1, 2, 7, 4)
    assert relative_error(model(other), folded(other)) < TOLERANCE


@pytest.mark.parametrize(("form", "tokens"), [("wrong axis", 6), ("mixed", 6)])
def test_a_norm_of_another_axis_stays(form: str, tokens: int) -> None:
    model, x = ready(TokenNorm(form)), random(0, 3, tokens, 4)
    folded, report = reparameterize(model, x, return_report=True)
    assert report.left == ["bn"]
    assert relative_error(model(x), folded(x)) < TOLERANCE
    naive = kernel_of(nn.Sequential(model.linear, model.bn), 4, axes=0)
    merged = naive(x.flatten(0, 1)).reshape(3, tokens, 6).relu()
    assert relative_error(model(x).reshape(3, tokens, 6), merged) > 1e-3


def test_a_norm_of_a_sequence_of_an_image_folds_into_the_convolution() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 6, 3, padding=1)
            self.bn = nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x).flatten(2)).relu()

    model, x = ready(Flat()), random(0, 2, 4, 5, 6)
    folded, report = reparameterize(model, x, return_report=True)
    assert report.left == []
    assert relative_error(model(x), folded(x)) < TOLERANCE
