"""Forwards by which a fold could go wrong without being noticed, each with inputs that show it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from repnet.fold import reparameterize
from tests.models import randomize_batch_norm, relative_error

METHODS = ("modules", "graph")


class Net(nn.Module):
    """A convolution, a norm and a linear layer, connected by a function."""

    def __init__(self, wiring: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.pointwise, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(8, 8)
        self.norm1 = nn.BatchNorm1d(8)
        self.register_buffer("count", torch.tensor(0))
        self.wiring = wiring

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wiring(self, *args, **kwargs)

    def block(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


def net(wiring: Callable[..., Any]) -> Any:
    return randomize_batch_norm(Net(wiring)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 16, 16, dtype=torch.float64)


def clamp(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    y.clamp_(max=50.0)
    return y * 2


def clamp_view(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    y.flatten(2).clamp_(-50, 50)
    return functional.relu(m.norm(y))


def activate_module(m: Any, x: Tensor) -> Tensor:
    y = m.norm(m.conv(x))
    functional.hardtanh(y, -50, 50, inplace=True)
    return y


def change_between_reads(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    functional.relu(x, inplace=True)
    return functional.relu(y + m.pointwise(x))


def add_in_place(m: Any, x: Tensor) -> Tensor:
    y = x * 1
    z = y
    y += m.norm(m.conv(x))[:, :3]
    return functional.relu(y) + z


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "wiring", [clamp, clamp_view, activate_module, change_between_reads, add_in_place]
)
def test_what_is_changed_in_place(wiring: Callable[..., Any], method: Any, x: Tensor) -> None:
    model = net(wiring)
    folded = reparameterize(model, x.abs(), method=method)
    for image in (x.clone(), 1000 * x):
        assert relative_error(model(image.clone()), folded(image.clone())) < 1e-10


def by_width(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return functional.relu(y if x.shape[-1] > 18 else m.norm(y))


def by_dimensions(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return functional.relu(y if x.ndim == 3 else m.norm(y))


def by_membership(m: Any, x: Tensor) -> Tensor:
    return m.block(x) * (2.0 if 16 in x.shape else 1.0)


def by_length(m: Any, x: Tensor) -> Tensor:
    return m.block(x).reshape(len(x) * 4, -1)


def by_sample(m: Any, x: Tensor) -> Tensor:
    return torch.stack([m.block(image[None])[0] for image in x])


def by_value(m: Any, x: Tensor) -> Tensor:
    y = m.block(x)
    return y * 2 if x.mean().item() > 0 else y


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "wiring", [by_width, by_dimensions, by_membership, by_length, by_sample, by_value]
)
def test_another_branch_is_right_or_refused(
    wiring: Callable[..., Any], method: Any, x: Tensor
) -> None:
    model = net(wiring)
    folded = reparameterize(model, x.abs(), method=method)
    others = [torch.randn(3, 3, 24, 20), torch.randn(1, 3, 16, 16), -x.abs()]
    if wiring is by_dimensions:
        others.append(torch.randn(3, 16, 16))
    for image in (x.abs(), *(o.double() for o in others)):
        refusal, actual = "", None
        try:
            actual = folded(image)
        except ValueError as error:
            refusal = str(error)
        if actual is None:
            assert method == "graph"
            assert "record it again with an example of this kind" in refusal
        else:
            assert relative_error(model(image), actual) < 1e-10
    assert relative_error(model(x.abs()), folded(x.abs())) < 1e-10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "wiring",
    [
        lambda m, x: (
            functional.relu(m.norm(m.conv(x)) * 0.5)
            + functional.relu(m.norm(m.conv(x.flip(1))) * 2)
        ),
        lambda m, x: (
            m.block(x) + functional.relu(m.norm(functional.conv2d(x, m.conv.weight))).mean()
        ),
        lambda m, x: m.block(x) if isinstance(x, Tensor) else x,
        lambda m, x: m.block(x) if torch.is_tensor(x) else x,
        lambda m, x: m.block(x) + torch.arange(x.shape[-1]),
        lambda m, x: m.block(x) + torch.zeros(x.shape[0], 1, 1, 1),
        lambda m, x: functional.linear(
            m.norm1(m.linear(m.block(x).mean((2, 3)))).relu(), m.linear.weight.t()
        ),
        lambda m, x: m.block(x).masked_fill(x[:, :1] < 0, float("-inf")),
    ],
    ids=["factors", "weight", "type", "tensor", "range", "zeros", "tied", "masked"],
)
def test_the_outputs_agree(wiring: Callable[..., Any], method: Any, x: Tensor) -> None:
    model = net(wiring)
    folded = reparameterize(model, x, method=method)
    expected, actual = model(x), folded(x)
    finite = expected.isfinite()
    assert torch.equal(finite, actual.isfinite())
    assert relative_error(expected[finite], actual[finite]) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_every_output_is_compared_on_its_own_scale(method: Any, x: Tensor) -> None:
    def wiring(m: Any, x: Tensor) -> Any:
        y = m.norm(m.conv(x))
        return {"large": y * 1e6, "small": functional.relu(y) * 1e-3, "class": y.argmax(1)}

    model = net(wiring)
    folded = reparameterize(model, x, method=method)
    for key, value in model(x).items():
        assert relative_error(value.double(), folded(x)[key].double()) < 1e-10


@pytest.mark.parametrize("method", METHODS)
def test_neither_the_model_nor_the_example_changes(method: Any, x: Tensor) -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        m.count.add_(1)
        return m.block(x.mul_(2))

    model, before = net(wiring), x.clone()
    folded = reparameterize(model, x, method=method)
    assert model.count == 0
    assert torch.equal(x, before)
    folded.half()
    assert {p.dtype for p in model.parameters()} == {torch.float64}


@pytest.mark.parametrize("method", METHODS)
def test_keyword_arguments_keep_their_names(method: Any, x: Tensor) -> None:
    class Named(Net):
        def forward(self, image: Tensor, offset: Tensor, mode: str = "a") -> Tensor:
            return self.block(image) + offset.mean() * (2 if mode == "a" else 3)

    model, offset = randomize_batch_norm(Named(lambda m: m)).double(), torch.randn(3).double()
    example = {"offset": offset, "image": x, "mode": "b"}
    folded = reparameterize(model, example, method=method)
    assert relative_error(model(**example), folded(**example)) < 1e-10


class NormWithReLU(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(super().forward(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_result_can_be_pickled(method: Any, x: Tensor) -> None:
    model = randomize_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), NormWithReLU(8))).double()
    folded = reparameterize(model, x, method=method)
    read = pickle.loads(pickle.dumps(folded))
    assert relative_error(folded(x), read(x)) == 0


def test_what_a_forward_keeps_does_not_prevent_a_copy(x: Tensor) -> None:
    def wiring(m: Any, x: Tensor) -> Tensor:
        m.kept = m.block(x)
        return m.kept * 2

    model = net(wiring)
    model(x)  # with gradients
    folded = reparameterize(model, x)
    assert relative_error(model(x), folded(x)) < 1e-10


def test_a_model_folded_in_inference_mode_can_be_trained(x: Tensor) -> None:
    model = net(Net.block)
    with torch.inference_mode():
        folded = reparameterize(model, x)
    folded(x).sum().backward()
    assert folded.conv.weight.grad is not None
