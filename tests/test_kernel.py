"""The laws of `ConvKernel`, for kernels of every geometry, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError, replace
from functools import reduce
from itertools import count
from math import gcd

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from repnet.kernel import ConvKernel, NotFoldableError, add, concat, select
from tests.models import relative_error

TOLERANCE = 1e-10
DTYPE = torch.float64
NO_PADDING = ((0, 0), (0, 0))

CHANNELS = st.sampled_from([2, 4, 6])
SEEDS = st.integers(0, 2**16)


def random(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=DTYPE, generator=generator)


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def output_size(kernel: ConvKernel, size: int, axis: int) -> int:
    """Return the output size along an axis, 0 where the input is too small for the kernel."""
    spread = kernel.upsample[axis] * (size - 1) + 1
    kept = spread + sum(min(side, 0) for side in kernel.padding[axis])
    padded = kept + sum(max(side, 0) for side in kernel.padding[axis])
    reach = kernel.dilation[axis] * (kernel.kernel_size[axis] - 1)
    return max(0, (padded - reach - 1) // kernel.stride[axis] + 1) if kept > 0 else 0


def fits(chain: Sequence[ConvKernel], size: int, axis: int) -> bool:
    for kernel in chain:
        size = output_size(kernel, size, axis)
        if size == 0:
            return False
    return True


@st.composite
def images(draw: st.DrawFn, *chains: Sequence[ConvKernel]) -> Tensor:
    """Draw an input that every chain of kernels can process, of the smallest size or larger."""
    sides = []
    for axis in range(2):
        smallest = next(n for n in count(1) if all(fits(chain, n, axis) for chain in chains))
        sides.append(smallest + draw(st.integers(0, 4)))
    return random(draw(SEEDS), 2, chains[0][0].in_channels, *sides)


@st.composite
def pairs(draw: st.DrawFn, lowest: int, highest: int) -> tuple[int, int]:
    return draw(st.integers(lowest, highest)), draw(st.integers(lowest, highest))


@st.composite
def kernels(
    draw: st.DrawFn,
    after: ConvKernel | None = None,
    *,
    in_channels: int | None = None,
    transparent: bool = False,
    largest: int = 4,
    steps: int = 3,
) -> ConvKernel:
    """Draw a kernel of any geometry, every other time one without stride, padding and dilation.

    Args:
        draw: given by hypothesis.
        after: a kernel that the border law lets the drawn one follow; None for no such limit.
        in_channels: drawn where None, those that leave `after` where that is given.
        transparent: a pointwise kernel without bias, through which zeros pass.
        largest: kernel size.
        steps: largest stride and dilation.
    """
    if in_channels is None:
        in_channels = draw(CHANNELS) if after is None else after.out_channels
    out_channels = draw(CHANNELS)
    groups = draw(st.sampled_from(divisors(gcd(in_channels, out_channels))))
    plain = draw(st.booleans())
    may_insert = not plain and (after is None or (after.is_pointwise and after.bias is None))
    padding, upsample = [], []
    for axis in range(2):
        sides = []
        for side in range(2):
            cropped = after is not None and after.padding[axis][side] < 0
            most = 2 if may_insert and not cropped else 0
            sides.append(0 if plain else draw(st.integers(-1, most)))
        padding.append((sides[0], sides[1]))
        strided = after is not None and after.stride[axis] > 1
        upsample.append(draw(st.integers(1, 3 if may_insert and not strided else 1)))
    height, width = (1, 1) if transparent else draw(pairs(1, largest))
    has_bias = not transparent and draw(st.booleans())
    seed = draw(SEEDS)
    return ConvKernel(
        random(seed, out_channels, in_channels // groups, height, width),
        random(seed + 1, out_channels) if has_bias else None,
        stride=draw(pairs(1, 1 if plain else steps)),
        padding=(padding[0], padding[1]),
        dilation=draw(pairs(1, 1 if plain else steps)),
        upsample=(upsample[0], upsample[1]),
        groups=groups,
    )


@st.composite
def chains(
    draw: st.DrawFn, length: int, *, transparent: bool = False, largest: int = 4, steps: int = 3
) -> tuple[list[ConvKernel], Tensor]:
    """Draw kernels that may follow each other, and an input.

    With `transparent`, all but the last kernel are.
    """
    options = {"largest": largest, "steps": steps}
    chain = [draw(kernels(transparent=transparent, **options))]
    composed = chain[0]
    while len(chain) < length:
        is_last = len(chain) == length - 1
        chain.append(draw(kernels(composed, transparent=transparent and not is_last, **options)))
        composed = composed.then(chain[-1])
    return chain, draw(images(chain))


@st.composite
def branches(draw: st.DrawFn, *, same_channels: bool = True) -> tuple[list[ConvKernel], Tensor]:
    """Draw kernels that read one input and give outputs of one size, and an input."""
    in_channels, out_channels = draw(CHANNELS), draw(CHANNELS)
    stride, upsample = draw(pairs(1, 3)), draw(pairs(1, 3))
    growth = draw(pairs(-2, 2))  # samples that the output has more than the input, unstrided
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        outputs = out_channels if same_channels else draw(CHANNELS)
        groups = draw(st.sampled_from(divisors(gcd(in_channels, outputs))))
        kernel_size, dilation, before = draw(pairs(1, 4)), draw(pairs(1, 3)), draw(pairs(-1, 3))
        padding = []
        for axis in range(2):
            reach = dilation[axis] * (kernel_size[axis] - 1)
            padding.append((before[axis], growth[axis] + reach - before[axis]))
        seed = draw(SEEDS)
        parts.append(
            ConvKernel(
                random(seed, outputs, in_channels // groups, *kernel_size),
                random(seed + 1, outputs) if draw(st.booleans()) else None,
                stride=stride,
                padding=(padding[0], padding[1]),
                dilation=dilation,
                upsample=upsample,
                groups=groups,
            )
        )
    return parts, draw(images(*([part] for part in parts)))


def apply(chain: Sequence[ConvKernel], x: Tensor) -> Tensor:
    return reduce(lambda value, kernel: kernel(value), chain, x)


def or_none(law: Callable[..., ConvKernel], *args: object) -> ConvKernel | None:
    try:
        return law(*args)
    except NotFoldableError:
        return None


def identity(channels: int) -> ConvKernel:
    return ConvKernel.identity(channels, dtype=DTYPE)


# What a kernel computes


def apply_by_definition(kernel: ConvKernel, x: Tensor) -> Tensor:
    """Return the sum over the taps, one output sample at a time."""
    height, width = (output_size(kernel, x.shape[2 + axis], axis) for axis in range(2))
    weight = kernel.with_groups(1).weight
    output = x.new_zeros(len(x), kernel.out_channels, height, width)

    def source(axis: int, position: int, tap: int) -> int | None:
        """Return the index of the sample that is read, None for an inserted zero."""
        place = kernel.stride[axis] * position + kernel.dilation[axis] * tap
        index, remainder = divmod(place - kernel.padding[axis][0], kernel.upsample[axis])
        return index if remainder == 0 and 0 <= index < x.shape[2 + axis] else None

    for i in range(height):
        for j in range(width):
            for a in range(kernel.kernel_size[0]):
                for b in range(kernel.kernel_size[1]):
                    row, column = source(0, i, a), source(1, j, b)
                    if row is not None and column is not None:
                        output[:, :, i, j] += x[:, :, row, column] @ weight[:, :, a, b].T
    return output if kernel.bias is None else output + kernel.bias.reshape(-1, 1, 1)


@st.composite
def single_kernels(draw: st.DrawFn) -> tuple[ConvKernel, Tensor]:
    kernel = draw(kernels())
    return kernel, draw(images([kernel]))


@given(single_kernels())
def test_a_kernel_computes_its_definition(case):
    kernel, x = case
    assert relative_error(apply_by_definition(kernel, x), kernel(x)) < TOLERANCE


def test_the_identity_returns_its_input():
    x = random(0, 2, 3, 4, 5)
    torch.testing.assert_close(identity(3)(x), x, rtol=0, atol=0)


# Composition


@given(chains(2))
def test_then_is_composition(case):
    (f, g), x = case
    assert relative_error(g(f(x)), f.then(g)(x)) < TOLERANCE


@given(chains(2, transparent=True))
def test_zeros_pass_through_a_pointwise_kernel_without_bias(case):
    (f, g), x = case
    assert relative_error(g(f(x)), f.then(g)(x)) < TOLERANCE


@given(st.data())
def test_upsampling_spreads_the_taps_of_an_unstrided_kernel_without_bias(data):
    f = replace(data.draw(kernels()), bias=None, stride=(1, 1))
    g = data.draw(kernels(in_channels=f.out_channels))
    g = replace(g, padding=NO_PADDING, upsample=(2, 3))
    x = data.draw(images([f, g]))
    assert relative_error(g(f(x)), f.then(g)(x)) < TOLERANCE


@st.composite
def arbitrary_pairs(draw: st.DrawFn) -> tuple[ConvKernel, ConvKernel, Tensor]:
    first = draw(kernels(transparent=draw(st.booleans())))
    second = draw(kernels(in_channels=first.out_channels))
    return first, second, draw(images([first, second]))


@given(arbitrary_pairs())
def test_then_is_composition_or_is_refused(case):
    f, g, x = case
    composed = or_none(f.then, g)
    if composed is None:
        assert g.upsample != (1, 1) or max(max(sides) for sides in g.padding) > 0
    else:
        assert relative_error(g(f(x)), composed(x)) < TOLERANCE


@given(st.booleans(), st.data())
def test_composition_is_associative(transparent, data):
    (f, g, h), x = data.draw(chains(3, transparent=transparent, largest=3, steps=2))
    expected = apply([f, g, h], x)
    assert relative_error(expected, f.then(g).then(h)(x)) < TOLERANCE
    tail = or_none(g.then, h)
    nested = None if tail is None else or_none(f.then, tail)
    assume(nested is not None)
    assert relative_error(expected, nested(x)) < TOLERANCE


@given(single_kernels())
def test_the_identity_is_neutral_on_both_sides(case):
    kernel, x = case
    for composed in (
        identity(kernel.in_channels).then(kernel),
        kernel.then(identity(kernel.out_channels)),
    ):
        assert relative_error(kernel(x), composed(x)) < TOLERANCE
        torch.testing.assert_close(composed.weight, kernel.weight, rtol=0, atol=0)
        assert composed.groups == kernel.groups


@given(single_kernels(), SEEDS, st.booleans())
def test_channelwise_kernels_take_the_fast_path_to_the_same_result(case, seed, has_bias):
    kernel, x = case
    scale = ConvKernel(
        random(seed, kernel.out_channels, 1, 1, 1),
        random(seed + 1, kernel.out_channels) if has_bias else None,
        groups=kernel.out_channels,
    )
    fast, obvious = kernel.then(scale), kernel.then(scale.with_groups(1))
    assert scale.is_channelwise
    assert fast.groups == kernel.groups
    assert relative_error(scale(kernel(x)), fast(x)) < TOLERANCE
    assert relative_error(obvious(x), fast(x)) < TOLERANCE


POINTWISE = ConvKernel(torch.ones(4, 1, 1, 1), torch.ones(4), groups=4)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (POINTWISE, True),
        (ConvKernel.identity(1), True),
        (replace(POINTWISE, stride=(1, 2)), False),
        (replace(POINTWISE, upsample=(2, 1)), False),
        (replace(POINTWISE, padding=((0, 1), (0, 0))), False),
        (replace(POINTWISE, padding=((0, 0), (-1, 0))), False),
        (ConvKernel(torch.ones(4, 2, 1, 1), groups=2), False),
        (ConvKernel(torch.ones(8, 1, 1, 1), groups=4), False),
        (ConvKernel(torch.ones(4, 1, 1, 3), groups=4), False),
    ],
)
def test_channelwise_is_a_number_for_each_channel(kernel, expected):
    assert kernel.is_channelwise == expected


@given(SEEDS, SEEDS)
def test_a_transposed_convolution_is_a_kernel_that_upsamples(weight_seed, input_seed):
    weight, x = random(weight_seed, 4, 6, 3, 2), random(input_seed, 2, 4, 5, 6)
    kernel = ConvKernel(
        weight.transpose(0, 1).flip(2, 3), padding=((2, 2), (1, 1)), upsample=(2, 3)
    )
    expected = torch.nn.functional.conv_transpose2d(x, weight, stride=(2, 3))
    assert relative_error(expected, kernel(x)) < TOLERANCE


def test_then_requires_matching_channels():
    with pytest.raises(ValueError, match="4 channels cannot enter a kernel of 3"):
        identity(4).then(identity(3))


# Sums, concatenations, selections


@given(branches())
def test_add_is_the_sum(case):
    parts, x = case
    expected = reduce(torch.add, [part(x) for part in parts])
    assert relative_error(expected, add(parts)(x)) < TOLERANCE


@given(branches())
def test_add_is_commutative(case):
    parts, x = case
    forward, backward = add(parts), add(parts[::-1])
    assert relative_error(forward.weight, backward.weight) < TOLERANCE
    assert (forward.padding, forward.dilation) == (backward.padding, backward.dilation)
    assert relative_error(forward(x), backward(x)) < TOLERANCE


@given(branches())
def test_add_is_associative(case):
    parts, x = case
    assert relative_error(add(parts)(x), reduce(lambda f, g: add([f, g]), parts)(x)) < TOLERANCE


@given(branches(), st.data())
def test_composition_distributes_over_sums(case, data):
    parts, _ = case
    after = data.draw(kernels(add(parts)))
    after = replace(after, bias=None)
    composed = [or_none(part.then, after) for part in parts]
    assume(all(part is not None for part in composed))
    x = data.draw(images(*([part, after] for part in parts)))
    assert relative_error(after(add(parts)(x)), add(composed)(x)) < TOLERANCE


@given(branches(same_channels=False))
def test_concat_is_the_concatenation(case):
    parts, x = case
    expected = torch.cat([part(x) for part in parts], dim=1)
    assert relative_error(expected, concat(parts)(x)) < TOLERANCE


@given(single_kernels(), st.data())
def test_select_takes_output_channels(case, data):
    kernel, x = case
    start = data.draw(st.integers(0, kernel.out_channels - 1))
    stop = data.draw(st.integers(start + 1, kernel.out_channels))
    assert relative_error(kernel(x)[:, start:stop], select(kernel, start, stop)(x)) < TOLERANCE


@given(single_kernels(), st.data())
def test_concat_undoes_select(case, data):
    kernel, x = case
    cut = data.draw(st.integers(1, kernel.out_channels - 1))
    parts = [select(kernel, 0, cut), select(kernel, cut, kernel.out_channels)]
    assert relative_error(kernel(x), concat(parts)(x)) < TOLERANCE


@given(single_kernels())
def test_a_grouped_kernel_is_the_concatenation_of_its_parts(case):
    kernel, x = case
    inputs, outputs = kernel.weight.shape[1], kernel.out_channels // kernel.groups
    parts = []
    for group in range(kernel.groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        bias = None if kernel.bias is None else kernel.bias[rows]
        part = replace(kernel, weight=kernel.weight[rows], bias=bias, groups=1)
        channels = select(identity(kernel.in_channels), group * inputs, (group + 1) * inputs)
        parts.append(channels.then(part))
    assert relative_error(kernel(x), concat(parts)(x)) < TOLERANCE
    dense = kernel.with_groups(1)
    assert relative_error(dense.weight, concat(parts).weight) < TOLERANCE


def square(size: int, *, seed: int = 0, out_channels: int = 4, **geometry) -> ConvKernel:
    return ConvKernel(random(seed, out_channels, 4, size, size), **geometry)


PAD_ONE = ((1, 1), (1, 1))


TWO = ((2, 2), (2, 2))


@pytest.mark.parametrize(
    ("merge", "kernel_size", "dilation"),
    [
        (lambda: add([square(3, padding=PAD_ONE), square(1)]), (3, 3), (1, 1)),
        (lambda: add([square(3, padding=PAD_ONE), identity(4)]), (3, 3), (1, 1)),
        (lambda: add([square(1), square(1)]), (1, 1), (1, 1)),
        (lambda: add([square(3, padding=TWO, dilation=(2, 2)), square(1)]), (3, 3), (2, 2)),
        (
            lambda: add([square(3, padding=TWO, dilation=(2, 2)), square(5, padding=TWO)]),
            (5, 5),
            (1, 1),
        ),
        (lambda: square(1).then(square(3, dilation=(2, 3))), (3, 3), (2, 3)),
        (lambda: square(3, dilation=(2, 3)).then(square(1)), (3, 3), (2, 3)),
        (lambda: square(2, stride=(2, 2)).then(square(2)), (4, 4), (1, 1)),
        (lambda: square(1, stride=(2, 2)).then(square(3)), (3, 3), (2, 2)),
        (lambda: square(3, dilation=(2, 2)).then(square(2, dilation=(4, 2))), (5, 4), (2, 2)),
    ],
)
def test_merged_kernels_have_no_more_taps_than_they_need(merge, kernel_size, dilation):
    kernel = merge()
    assert (kernel.kernel_size, kernel.dilation) == (kernel_size, dilation)


@pytest.mark.parametrize("law", [add, concat])
@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([square(1), square(1, stride=(2, 2))], "stride .* different lattices"),
        ([square(1), square(1, upsample=(1, 2))], "upsample .* different lattices"),
        ([square(1), square(3)], "differ in size"),
        ([square(1), square(2, padding=PAD_ONE)], "differ in size"),
        ([square(3, padding=PAD_ONE), square(3, padding=PAD_ONE, dilation=(2, 1))], "in size"),
        ([square(1), ConvKernel(random(0, 4, 2, 1, 1))], "differ in (input )?channels"),
    ],
)
def test_parts_that_read_different_lattices_are_refused(law, parts, reason):
    for order in (parts, parts[::-1]):
        with pytest.raises(NotFoldableError, match=reason):
            law(order)


def test_summands_need_equal_output_channels():
    with pytest.raises(NotFoldableError, match="summands differ in channels: 4 -> 4, 4 -> 2"):
        add([square(1), square(1, out_channels=2)])


# Groups


@given(single_kernels())
def test_with_groups_keeps_the_function(case):
    kernel, x = case
    for groups in divisors(kernel.groups):
        rewritten = kernel.with_groups(groups)
        assert rewritten.groups == groups
        assert relative_error(kernel(x), rewritten(x)) < TOLERANCE


@pytest.mark.parametrize("groups", divisors(12))
def test_the_identity_is_a_kernel_at_any_grouping(groups):
    x = random(0, 2, 12, 3, 4)
    rewritten = identity(12).with_groups(groups)
    assert rewritten.weight.shape == (12, 12 // groups, 1, 1)
    torch.testing.assert_close(rewritten(x), x, rtol=0, atol=0)


@pytest.mark.parametrize("groups", [0, -1, 3, 8])
def test_with_groups_refuses_what_does_not_divide(groups):
    with pytest.raises(ValueError, match=f"4 groups cannot be written with {groups}"):
        identity(4).with_groups(groups)


# Differentiability


def kernel_parts(kernel: ConvKernel) -> tuple[Tensor, ...]:
    return (kernel.weight,) if kernel.bias is None else (kernel.weight, kernel.bias)


BINARY_LAWS = {
    "then": lambda f, g: f.then(replace(g, padding=NO_PADDING, stride=(2, 1), dilation=(1, 2))),
    "then channelwise": lambda f, g: f.then(identity(4)).then(g.then(select(g, 0, 4))),
    "add": lambda f, g: add([f, replace(g, padding=((1, 0), (0, 1)))]),
    "add of other sizes": lambda f, g: add([f, identity(4)]),
    "concat": lambda f, g: concat([f, replace(g, padding=((1, 0), (0, 1)))]),
    "with_groups": lambda f, g: f.with_groups(1),
}


@pytest.mark.parametrize("law", BINARY_LAWS.values(), ids=BINARY_LAWS)
def test_laws_are_differentiable(law):
    def merged(first, first_bias, second, second_bias):
        f = ConvKernel(first, first_bias, padding=((0, 1), (1, 0)), groups=2)
        g = ConvKernel(second, second_bias, groups=4)
        return kernel_parts(law(f, g))

    shapes = [(4, 2, 2, 2), (4,), (4, 1, 2, 2), (4,)]
    tensors = [random(n, *shape).requires_grad_() for n, shape in enumerate(shapes)]
    assert torch.autograd.gradcheck(merged, tensors)


# Construction


WEIGHT = torch.ones(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"weight": WEIGHT[0, 0, 0]}, "weight must be 2-D to 5-D"),
        ({"weight": WEIGHT[None, None]}, "weight must be 2-D to 5-D"),
        ({"weight": WEIGHT, "stride": (1,)}, "stride must have 2 entries"),
        ({"weight": WEIGHT, "bias": torch.zeros(3)}, r"bias must have shape \(4,\)"),
        ({"weight": WEIGHT, "bias": torch.zeros(4, 1)}, r"bias must have shape \(4,\)"),
        ({"weight": WEIGHT, "groups": 0}, "groups=0 must divide"),
        ({"weight": WEIGHT, "groups": 3}, "groups=3 must divide"),
        ({"weight": WEIGHT, "stride": (0, 1)}, "must be positive"),
        ({"weight": WEIGHT, "dilation": (1, 0)}, "must be positive"),
        ({"weight": WEIGHT, "upsample": (-1, 1)}, "must be positive"),
    ],
)
def test_parts_that_do_not_fit_are_refused(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        ConvKernel(**arguments)


@pytest.mark.parametrize("dtypes", [(torch.float32, DTYPE), (DTYPE, torch.float32)], ids=str)
def test_weight_and_bias_are_held_in_the_higher_precision(dtypes):
    kernel = ConvKernel(WEIGHT.to(dtypes[0]), torch.ones(4, dtype=dtypes[1]), groups=2)
    assert (kernel.weight.dtype, kernel.bias.dtype, kernel.dtype) == (DTYPE, DTYPE, DTYPE)


def test_a_kernel_is_a_value():
    kernel = ConvKernel(WEIGHT, groups=2)
    assert (kernel.in_channels, kernel.out_channels, kernel.kernel_size) == (4, 4, (3, 3))
    with pytest.raises(FrozenInstanceError):
        kernel.groups = 1


@given(branches())
def test_laws_leave_their_operands_unchanged(case):
    parts, _ = case
    before = [kernel_parts(part) for part in parts]
    copies = [[tensor.clone() for tensor in tensors] for tensors in before]
    add(parts), concat(parts), parts[0].then(identity(parts[0].out_channels))
    for tensors, copied in zip(before, copies, strict=True):
        torch.testing.assert_close(list(tensors), copied, rtol=0, atol=0)
