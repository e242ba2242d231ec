"""Which norms a convolution takes in, where modules and calls share layers.

A proof catches a wrong plan and puts the part back, so that outputs alone would not show it: here
no part may have been put back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import repnet
from tests.models import randomize_batch_norm
from tests.runs import assert_outputs_agree
from tests.test_faults import conv, image, network, norm

X = image(2, 4, 8, 8)
OTHER = image(3, 4, 7, 9)


def in_module(layer: nn.Module) -> Any:
    """Return a module that does more than its layer, which therefore stays where it is."""
    return network(lambda m, x: m.layer(x).sin(), layer=layer)


def pointwise(out_channels: int = 4, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(4, out_channels, 1, groups=groups)


@torch.no_grad()
def fold(model: nn.Module, *inputs: Tensor) -> tuple[Any, dict[str, tuple[str, ...]]]:
    """Return the folded model, which must be right without being put back, and its folds."""
    randomize_batch_norm(model)
    model.double().eval()
    for x in (inputs := inputs or (X, OTHER)):
        model(x.double())
    result, report = repnet.reparameterize(model, inputs[0].double(), return_report=True)
    assert not report.put_back
    for x in inputs:
        assert_outputs_agree(model(x.double()), result(x.double()), 1e-9)
    return result, {fold.name: fold.replaced for fold in report.folded}


def after_itself(m: Any, x: Tensor) -> Tensor:
    return m.conv(m.norm(m.conv(x).relu()))


def before_itself(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(m.norm(x).relu()))


@pytest.mark.parametrize("forward", [after_itself, before_itself])
def test_the_input_of_the_model_feeds_a_layer_too(forward: Callable[..., Tensor]) -> None:
    _, folds = fold(network(forward, conv=pointwise(), norm=norm()))
    assert folds == {}


def test_two_convolutions_in_a_row_take_in_no_norm_before_them() -> None:
    rest = nn.Sequential(pointwise(2), nn.Conv2d(2, 2, 1), nn.ReLU())
    model = network(lambda m, x: m.rest(m.norm(x.relu())), rest=rest, norm=norm())
    assert fold(model)[1] == {"rest.0": ("rest.0", "rest.1")}


def test_a_layer_takes_in_one_neighbor_and_goes_into_none_after_that() -> None:
    """A depthwise 1x1 convolution is both a layer and a channelwise map."""
    parts = {"norm": norm(), "scale": pointwise(groups=4), "last": in_module(pointwise(3))}
    model = network(lambda m, x: m.last(m.scale(m.norm(x.relu()))), **parts)
    assert fold(model)[1] == {"scale": ("norm", "scale")}


def test_a_map_that_a_layer_took_in_is_no_layer_for_the_next_one() -> None:
    first = network(lambda m, x: m.scale(x.relu()), scale=pointwise(groups=4))
    parts = {"first": first, "second": in_module(pointwise(groups=4))}
    model = network(lambda m, x: m.second(m.first(x)), **parts)
    assert fold(model)[1] == {"first.scale": ("first.scale", "second.layer")}


def test_a_module_still_returns_a_tuple_without_the_scale_that_it_begins_with() -> None:
    scaled = network(
        lambda m, x: (m.activation(x * m.scale),),
        scale=nn.Parameter(torch.rand(4, 1, 1) + 0.5),
        activation=nn.ReLU(),
    )
    model = network(lambda m, x: m.scaled(m.conv(x)), conv=conv(), scaled=scaled)
    assert fold(model)[1] == {"conv": ("conv", "scaled")}


def test_a_module_that_begins_with_nothing_to_fold_keeps_its_class() -> None:
    activation = network(lambda m, x: x.contiguous().sin())
    model = network(lambda m, x: m.activation(m.conv(x)), conv=conv(), activation=activation)
    result, folds = fold(model)
    assert folds == {}
    assert type(result.activation) is type(activation)


def test_a_norm_is_taken_in_where_its_module_keeps_the_output() -> None:
    def keep(m: Any, x: Tensor) -> Tensor:
        m.seen = m.norm(x)
        return m.seen.relu()

    model = network(
        lambda m, x: m.keeper(m.conv(x)), conv=conv(), keeper=network(keep, norm=norm())
    )
    result, folds = fold(model)
    assert folds == {"conv": ("conv", "keeper.norm")}
    torch.testing.assert_close(result.keeper.seen, model.keeper.seen)


def moved_in_two_ways(m: Any, x: Tensor) -> Tensor:
    x = functional.adaptive_avg_pool2d(x, 4)  # as many as there are channels, at every size
    wide = m.norm(m.conv(x).permute(0, 1, 3, 2))
    narrow = m.norm(m.conv(x[:, :, :1]).permute(0, 3, 2, 1))
    return wide.mean() + narrow


def mixed(m: Any, x: Tensor) -> Tensor:
    return m.norm(m.conv(functional.adaptive_avg_pool2d(x, 4)).permute(0, 3, 2, 1))


@pytest.mark.parametrize("forward", [moved_in_two_ways, mixed])
def test_channels_that_become_another_axis_are_not_those_of_the_norm(
    forward: Callable[..., Tensor],
) -> None:
    assert fold(network(forward, conv=pointwise(), norm=norm()))[1] == {}


def test_a_norm_goes_into_a_convolution_behind_it_only_if_it_feeds_it_every_time() -> None:
    parts = {"norm": norm(), "last": in_module(pointwise(3))}
    model = network(lambda m, x: m.last(m.norm(x.relu())), **parts)
    assert fold(model)[1] == {"last.layer": ("norm", "last.layer")}
    model = network(lambda m, x: m.last(m.norm(x.relu())) + m.last(x), **parts)
    assert fold(model)[1] == {}
    model = network(lambda m, x: m.last(y := m.norm(x.relu())).sum() + y, **parts)
    assert fold(model)[1] == {}


def normalized_as_often_as_a_number_says(m: Any, y: Tensor) -> Tensor:
    for _ in range(1 - int(2 / y.shape[2] + 0.5)):  # once if it is 5 or more
        y = m.norm(y)
    return y


def in_the_forward(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    for _ in range(1 - int(2 / x.shape[2] + 0.5)):
        y = m.norm(y)
    return y


def in_a_function(m: Any, x: Tensor) -> Tensor:
    return normalized_as_often_as_a_number_says(m, m.conv(x))


def read_again(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    z = m.norm(y)
    for _ in range(int(2 / x.shape[2] + 0.5)):  # never if it is 5 or more
        z = z + y
    return z


@pytest.mark.parametrize("forward", [in_the_forward, in_a_function, read_again])
def test_a_number_that_is_not_followed_may_change_what_reads_a_convolution(
    forward: Callable[..., Tensor],
) -> None:
    model = network(forward, conv=pointwise(), norm=norm())
    assert fold(model, X, image(2, 4, 2, 8))[1] == {}


def test_what_was_done_before_such_a_number_is_folded() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x)).relu()
        for _ in range(int(2 / x.shape[2] + 0.5)):
            y = y + 1
        return y

    model = network(forward, conv=pointwise(), norm=norm())
    assert fold(model, X, image(2, 4, 2, 8))[1] == {"conv": ("conv", "norm")}


def keeps(m: Any, x: Tensor) -> Tensor:
    m.seen = m.conv(x)
    return m.norm(m.seen)


def changes_a_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y[:, :1].mul_(2)
    return m.norm(y).relu()


@pytest.mark.parametrize("forward", [keeps, changes_a_view])
def test_a_value_that_is_kept_or_changed_on_the_way_stays_as_it_is(
    forward: Callable[..., Tensor],
) -> None:
    model = network(forward, conv=pointwise(), norm=norm())
    result, folds = fold(model)
    assert folds == {}
    if hasattr(model, "seen"):
        torch.testing.assert_close(result.seen, model.seen)


def beside_something_else(m: Any, x: Tensor) -> Tensor:
    return m.norm(torch.cat([m.conv(x), x.relu()], 1))


def moved_before(m: Any, x: Tensor) -> Tensor:
    return m.norm(torch.cat([m.conv(x).transpose(2, 3), m.other(x).transpose(2, 3)], 1))


def mixed_before(m: Any, x: Tensor) -> Tensor:
    return m.norm(torch.cat([m.conv(x).transpose(1, 3), m.other(x).transpose(1, 3)], 1))


@pytest.mark.parametrize(
    ("forward", "folded"),
    [(beside_something_else, set()), (moved_before, {"conv", "other"}), (mixed_before, set())],
)
def test_a_norm_goes_in_parts_into_all_that_is_concatenated(
    forward: Callable[..., Tensor], folded: set[str]
) -> None:
    model = network(forward, conv=pointwise(), other=pointwise(), norm=norm(8))
    assert set(fold(model, image(2, 4, 5, 4), image(3, 4, 6, 4))[1]) == folded


def test_a_layer_that_a_forward_calls_unseen_keeps_its_output() -> None:
    def counts(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return m.layer(x).relu()

    layer = pointwise()
    parts = {"layer": layer, "norm": norm(), "other": network(counts, layer=layer, calls=0)}
    model = network(lambda m, x: m.norm(m.layer(x)) + m.other(x), **parts)
    assert fold(model)[1] == {}


def test_a_module_that_keeps_what_it_scaled_is_not_rewritten() -> None:
    def keep_scaled(m: Any, x: Tensor) -> Tensor:
        m.seen = x * m.scale
        return m.seen.relu()

    scaled = network(keep_scaled, scale=nn.Parameter(torch.rand(4, 1, 1) + 0.5))
    model = network(lambda m, x: m.scaled(m.conv(x)), conv=conv(), scaled=scaled)
    result, folds = fold(model)
    assert folds == {}
    torch.testing.assert_close(result.scaled.seen, model.scaled.seen)


def test_a_module_that_moves_axes_depending_on_the_size_stands_before_no_norm() -> None:
    move = network(lambda m, x: x.transpose(1, 3) if x.shape[2] < 5 else x.transpose(2, 3))
    model = network(lambda m, x: m.norm(m.move(m.conv(x))), conv=conv(), norm=norm(), move=move)
    assert fold(model, image(2, 4, 8, 4), image(2, 4, 4, 4))[1] == {}
