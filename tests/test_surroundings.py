"""What stands around a model: compilation, hooks, quantization, devices; a sentence for each."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.nn import quantized as ao_quantized
from torch.ao.quantization import FakeQuantize, default_qconfig, get_default_qat_qconfig
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.fold import reparameterize, reparameterize_graph
from repnet.kernel import NotFoldableError
from repnet.layers import Sum, conv, conv_bn
from repnet.surroundings import has_hooks, prepared
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-12

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is .*deprecated"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:Lazy modules are a new feature"),
]
verbs = pytest.mark.parametrize("verb", [reparameterize, reparameterize_graph])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def ready(model: nn.Module) -> Any:
    return randomize_batch_norm(model).double()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def network() -> nn.Sequential:
    block = Sum(conv_bn(4, 4), conv_bn(4, 4, 1))
    return ready(nn.Sequential(block, nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4), nn.ReLU()))


# Compilation


def compile_root(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


def compile_twice(model: nn.Module) -> nn.Module:
    model[0][0] = torch.compile(model[0][0], backend="eager")
    model[0] = torch.compile(model[0], backend="eager")
    return model


def compile_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    model[0].compile(backend="eager")
    return model


@verbs
@pytest.mark.parametrize("compiled", [compile_root, compile_twice, compile_in_place])
def test_a_compiled_model_folds_like_any(
    compiled: Callable[[nn.Module], nn.Module], verb: Callable[..., Any], x: Tensor
) -> None:
    plain = network()
    model = compiled(deepcopy(plain))
    keys = list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    folded, report = verb(model, x, return_report=True)
    assert report.left == norms(folded) == []
    assert not any(key.startswith("_orig_mod") for key in folded.state_dict())
    assert relative_error(plain(x), folded(x)) < TOLERANCE
    assert list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes
    assert all(m._compiled_call_impl is None for m in folded.modules())


def test_nothing_is_copied_where_nothing_is_compiled() -> None:
    model = network()
    assert prepared(model) is model


# Hooks


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda *args: None),
    "before forward": lambda m: m.register_forward_pre_hook(lambda *args: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *args: None),
    "before backward": lambda m: m.register_full_backward_pre_hook(lambda *args: None),
}


@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_a_hook_is_seen(register: Callable[[nn.Module], Any]) -> None:
    layer = conv(4, 4)
    assert not has_hooks(layer)
    handle = register(layer)
    assert has_hooks(layer)
    handle.remove()
    assert not has_hooks(layer)


@verbs
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_a_layer_with_a_hook_stays(
    register: Callable[[nn.Module], Any], verb: Callable[..., Any], x: Tensor
) -> None:
    model = network()
    register(model[0][1].conv)
    folded, report = verb(model, x, return_report=True)
    assert type(folded.get_submodule("0.1.conv")) is nn.Conv2d
    assert not any("0.1.conv" in fold.replaced for fold in report.folded)
    assert has_hooks(model[0][1].conv)
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_the_hook_is_the_reason(x: Tensor) -> None:
    model = network()
    model[0][1].conv.register_forward_hook(lambda *args: None)
    report = reparameterize(model, x, return_report=True)[1]
    assert report.skipped["0"] == "'0.1.conv' has a forward hook; remove it first"


# Modules and weights in two places


def test_tied_weights_are_not_folded(x: Tensor) -> None:
    model = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))
    model[3].weight = model[0].weight
    model = ready(model)
    folded, report = reparameterize(model, x, return_report=True)
    assert report.folded == []
    assert folded[3].weight is folded[0].weight
    assert report.skipped["1"] == "'0' shares a tensor with '3'"
    assert report.skipped["4"] == "'3' shares a tensor with '0'"
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_tied_weights_inside_one_block_fold(x: Tensor) -> None:
    model = nn.Sequential(Sum(conv_bn(4, 4), conv_bn(4, 4)), nn.ReLU())
    model[0][1].conv.weight = model[0][0].conv.weight
    model = ready(model)
    folded, report = reparameterize(model, x, return_report=True)
    assert [fold.name for fold in report.folded] == ["0"]
    assert relative_error(model(x), folded(x)) < TOLERANCE


def test_tied_weights_in_a_graph_are_right(x: Tensor) -> None:
    model = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), nn.ReLU(), conv(4, 4), nn.BatchNorm2d(4))
    model[3].weight = model[0].weight
    model = ready(model)
    folded = reparameterize_graph(model, x)
    assert relative_error(model(x), folded(x)) < TOLERANCE


@verbs
def test_a_module_under_two_names_is_one_layer(verb: Callable[..., Any], x: Tensor) -> None:
    block = nn.Sequential(conv_bn(4, 4), nn.ReLU())
    model = ready(nn.Sequential(block, nn.Sequential(block), block))
    folded, report = verb(model, x, return_report=True)
    assert report.left == []
    assert len({id(m) for m in folded.modules() if isinstance(m, nn.Conv2d)}) == 1
    assert relative_error(model(x), folded(x)) < TOLERANCE


# What cannot be folded


def quantized() -> nn.Module:
    layer = ao_quantized.Conv2d(4, 4, 3)
    return nn.Sequential(conv(4, 4), layer)


def trained_for_quantization() -> nn.Module:
    return nn.Sequential(conv(4, 4), qat.Conv2d(4, 4, 3, qconfig=get_default_qat_qconfig("fbgemm")))


def fake_quantized() -> nn.Module:
    return nn.Sequential(conv(4, 4), nn.BatchNorm2d(4), FakeQuantize())


def scripted() -> nn.Module:
    return nn.Sequential(conv(4, 4), torch.jit.script(nn.Sequential(conv(4, 4), nn.ReLU())))


def lazy() -> nn.Module:
    return nn.Sequential(conv(4, 4), nn.LazyConv2d(4, 3), nn.BatchNorm2d(4))


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "quantized": (quantized, r"'1' is quantized \(.*\); fold first, then quantize"),
    "quantization aware": (
        trained_for_quantization,
        r"'1' is quantized .*; fold first, then quantize",
    ),
    "fake quantization": (
        fake_quantized,
        r"'2' is quantized \(.*fake_quantize.*\); fold first, then quantize",
    ),
    "scripted": (scripted, "'1' is a ScriptModule; fold first, then script"),
    "lazy": (lazy, "'1' has no shape yet; run the model once"),
}


@verbs
@pytest.mark.parametrize(("build", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_folded_is_refused_by_name(
    build: Callable[[], nn.Module], message: str, verb: Callable[..., Any]
) -> None:
    model = build().eval()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(NotFoldableError, match=f"^{message}$"):
        verb(model, torch.randn(2, 4, 9, 8))
    assert [type(m) for m in model.modules()] == classes


@verbs
def test_the_whole_model_is_named_by_its_class(verb: Callable[..., Any]) -> None:
    model = torch.jit.script(nn.Sequential(conv(4, 4), nn.ReLU()))
    with pytest.raises(NotFoldableError, match="ScriptModule' is a ScriptModule"):
        verb(model, torch.randn(2, 4, 9, 8))


def test_a_module_of_another_library_named_like_quantization_is_not_one() -> None:
    class VectorQuantizer(nn.Conv2d):
        pass

    model = nn.Sequential(VectorQuantizer(4, 4, 3), nn.BatchNorm2d(4))
    assert prepared(model) is model
    assert default_qconfig  # what marks a module for quantization later does not count
    model.qconfig = default_qconfig  # type: ignore[assignment]
    assert prepared(model) is model


@verbs
def test_a_packed_weight_is_refused(verb: Callable[..., Any]) -> None:
    class Packed(Tensor):
        pass

    model = nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))
    model[0].weight = nn.Parameter(torch.randn(4, 4, 3, 3).as_subclass(Packed))
    with pytest.raises(NotFoldableError, match="'weight' of '0' is a Packed, which is no plain"):
        verb(model, torch.randn(2, 4, 9, 8))


# Devices, shapes, modes


@verbs
def test_a_model_without_values_folds_without_proof(verb: Callable[..., Any], x: Tensor) -> None:
    model = network().to("meta")
    folded, report = verb(model, x.to("meta"), return_report=True)
    assert report.left == norms(folded) == []
    assert report.proof is None
    assert report.cast is None
    assert {t.device.type for t in folded.state_dict().values()} == {"meta"}
    assert folded(x.to("meta")).shape == x.shape


@verbs
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_example_on_another_device_is_refused(verb: Callable[..., Any], x: Tensor) -> None:
    with pytest.raises(ValueError, match="cannot run on example_input"):
        verb(network().cuda(), x)


@verbs
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_device_stays(verb: Callable[..., Any], x: Tensor) -> None:
    model = network().cuda()
    folded = verb(model, x.cuda())
    assert {t.device.type for t in folded.state_dict().values()} == {"cuda"}
    assert relative_error(model(x.cuda()), folded(x.cuda())) < TOLERANCE


@verbs
def test_a_wrong_shape_is_refused_in_one_sentence(verb: Callable[..., Any]) -> None:
    model = network().train()
    state = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="^the model cannot run on example_input: ") as caught:
        verb(model, torch.randn(2, 3, 9, 8))
    assert "3 channels" in str(caught.value)
    assert all(m.training for m in model.modules())
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@verbs
def test_training_mode_is_reported(verb: Callable[..., Any], x: Tensor) -> None:
    model = network()
    assert not verb(model, x, return_report=True)[1].was_training
    expected = model(x)
    state = deepcopy(model.state_dict())
    folded, report = verb(model.train(), x, return_report=True)
    assert report.was_training
    assert "the model was in training mode" in str(report)
    assert model.training
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    assert relative_error(expected, folded(x)) < TOLERANCE


@verbs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_proved_exactly_and_as_it_is_stored(
    dtype: torch.dtype, verb: Callable[..., Any], x: Tensor
) -> None:
    model = network().to(dtype)
    folded, report = verb(model, x.to(dtype), return_report=True)
    assert (
        {p.dtype for p in folded.parameters()} == {p.dtype for p in model.parameters()} == {dtype}
    )
    assert report.proof.max_relative_error < TOLERANCE
    assert 1e-6 < report.cast.max_relative_error < 0.1
    assert f"{report.cast.max_relative_error:.1e} as it is stored" in str(report)


class NoForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = conv_bn(4, 4)


class Failing(NoForward):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("call encode() instead")


@verbs
@pytest.mark.parametrize("model", [NoForward(), Failing(), nn.ModuleList([conv_bn(4, 4)])])
def test_without_a_usable_forward_there_is_nothing_to_prove(
    model: nn.Module, verb: Callable[..., Any], x: Tensor
) -> None:
    with pytest.raises(ValueError, match="^the model cannot run on example_input"):
        verb(ready(model), x)


class EarlyExit(nn.Module):
    """Stops where the values say so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv_bn(4, 4), nn.Sequential(conv(4, 4), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return x if x.mean() > 1e9 else self.second(x).relu()


@verbs
def test_control_flow_on_values_stays(verb: Callable[..., Any], x: Tensor) -> None:
    model = ready(EarlyExit())
    folded, report = verb(model, x, return_report=True)
    assert type(folded) is EarlyExit
    assert report.left == norms(folded) == []
    for image in (x, x + 1e12, x - 1e12):
        assert relative_error(model(image), folded(image)) < TOLERANCE
