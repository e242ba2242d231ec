"""Defects that systems of this kind are known to have, a test for each."""

from __future__ import annotations

import time
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import SqueezeExcitation

from repnet.blocks import RepVGGBlock
from repnet.data.fake import FakeImages
from repnet.deploy.evaluation import evaluate
from repnet.deploy.latency import measure_latency
from repnet.equivalence import FoldMismatchError, compare
from repnet.errors import InputError
from repnet.fold import reparameterize, reparameterize_graph
from repnet.kernel import NotFoldableError
from repnet.layers import Sum, conv, conv_bn
from repnet.models import create_model
from repnet.symbolic import kernel_of
from repnet.training import Classifier
from repnet.weights import load_weights
from tests.commands import run
from tests.models import randomize_batch_norm, relative_error

TOLERANCE = 1e-11

verbs = pytest.mark.parametrize("verb", [reparameterize, reparameterize_graph])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 9, 8, dtype=torch.float64)


def ready(model: nn.Module) -> Any:
    return randomize_batch_norm(model).double()


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


@verbs
def test_attention_survives(verb: Any, x: Tensor) -> None:
    """The attention of a block is lost when the block becomes one convolution."""
    block = RepVGGBlock(4, 4, attention=lambda channels: SqueezeExcitation(channels, 2))
    model = ready(block)
    folded = verb(model, x)
    assert relative_error(model(x), folded(x)) < TOLERANCE
    without = functional.relu(kernel_of(model.conv, 4)(x))
    assert relative_error(model(x), without) > 0.1


@torch.no_grad()
def test_a_wrong_sign_shows_only_in_statistics_that_are_not_the_default(x: Tensor) -> None:
    """Blocks are tested at mean 0 and variance 1, where a wrong formula is right as well."""

    def wrong(block: nn.Sequential) -> nn.Conv2d:
        layer, norm = deepcopy(block)
        scale = norm.weight / norm.running_var  # no root, no eps
        folded = conv(4, 4).double()
        folded.weight.copy_(layer.weight * scale[:, None, None, None])
        folded.bias.copy_(norm.bias + norm.running_mean * scale)  # wrong sign
        return folded

    default = conv_bn(4, 4).double().eval()
    assert relative_error(default(x), wrong(default)(x)) < 1e-4
    random = ready(conv_bn(4, 4))
    assert relative_error(random(x), wrong(random)(x)) > 0.1


@torch.no_grad()
def test_a_comparison_that_fails_is_an_error(x: Tensor) -> None:
    """The result of the comparison is computed, and thrown away."""
    model = ready(nn.Sequential(RepVGGBlock(4, 4), nn.Conv2d(4, 3, 1)))
    folded = reparameterize(model, x)
    folded[0].conv.bias += 1e-3
    with pytest.raises(FoldMismatchError, match=r"0\.conv"):
        compare(model, folded, x).check(1e-9, 1e-6)


@verbs
@pytest.mark.filterwarnings("ignore:.*auxiliary")
def test_auxiliary_heads_do_not_break_the_folded_forward(verb: Any) -> None:
    """The folded network lacks an attribute that its forward reads: its heads for training."""
    model = ready(torchvision.models.googlenet(num_classes=4, aux_logits=True, init_weights=False))
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    folded, report = verb(model, image, return_report=True)
    assert relative_error(model(image), folded(image)) < 1e-9
    assert set(report.left) <= set(report.skipped)


def test_an_unknown_flag_is_an_error(tmp_path: Path) -> None:
    """A documented flag that does not exist is ignored without a word."""
    result = run("train.py", "trainer.max_epoch=1", cwd=tmp_path, code=2)
    assert "max_epoch" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_an_error(change: str) -> None:
    """Weights are loaded with `strict=False`, and what does not fit stays random."""
    model = create_model("repvgg_tiny", num_classes=4, depths=[1, 1, 1, 1])
    state = deepcopy(model.state_dict())
    key = next(key for key in state if key.endswith("conv.weight"))
    if change == "unexpected":
        state["stages.9.weight"] = state[key]
    elif change == "missing":
        del state[key]
    else:
        state[key] = state[key][:, :, :1]
    before = deepcopy(model.state_dict())
    with pytest.raises(InputError):
        load_weights(model, state)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@verbs
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_folded_convolution_is_padded(verb: Any, kernel_size: int, x: Tensor) -> None:
    """The folded convolution is built without the padding of its branches."""
    block = Sum(conv_bn(4, 4, kernel_size), conv_bn(4, 4, 1))
    folded = verb(ready(nn.Sequential(block, nn.ReLU())), x)
    (layer,) = [m for m in folded.modules() if isinstance(m, nn.Conv2d)]
    assert layer.padding == (kernel_size // 2,) * 2
    assert folded(x).shape == x.shape


@verbs
@pytest.mark.parametrize(
    "branch",
    [
        lambda: conv_bn(4, 4, dilation=2),
        lambda: conv_bn(4, 4, dilation=2, groups=2),
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)
        ),
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4)
        ),
    ],
    ids=["dilation", "dilation and groups", "reflect", "circular"],
)
def test_both_forms_have_the_dilation_and_padding_mode(branch: Any, verb: Any, x: Tensor) -> None:
    """Dilation or padding mode is honored in one of the two forms, and ignored in the other."""
    model = ready(nn.Sequential(Sum(branch(), conv_bn(4, 4, 1)), nn.ReLU()))
    folded = verb(model, x)
    assert relative_error(model(x), folded(x)) < TOLERANCE


@verbs
def test_synchronized_norms_fold(verb: Any, x: Tensor) -> None:
    """Networks that were trained on several devices cannot be folded."""
    block = RepVGGBlock(4, 4)
    model = ready(nn.SyncBatchNorm.convert_sync_batchnorm(block))
    assert norms(model)
    folded = verb(model, x)
    assert norms(folded) == []
    assert relative_error(model(x), folded(x)) < TOLERANCE


@verbs
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_has_one_dtype_before_and_after(dtype: torch.dtype, verb: Any, x: Tensor) -> None:
    """Half precision is folded into layers of different dtypes; float64 is an error."""
    model = randomize_batch_norm(nn.Sequential(RepVGGBlock(4, 4), conv_bn(4, 4), nn.ReLU()))
    model.to(dtype)
    folded = verb(model, x.to(dtype))
    assert {p.dtype for p in folded.parameters()} == {dtype}
    assert folded(x.to(dtype)).dtype == dtype


@verbs
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_norm_scales_the_outputs_of_a_transposed_convolution(
    groups: int, verb: Any, x: Tensor
) -> None:
    """The weight of a transposed convolution is scaled on its first axis, that of its input."""
    model = ready(
        nn.Sequential(
            nn.ConvTranspose2d(4, 4, 3, stride=2, groups=groups), nn.BatchNorm2d(4), nn.ReLU()
        )
    )
    folded = verb(model, x)
    assert norms(folded) == []
    assert relative_error(model(x), folded(x)) < TOLERANCE
    layer, norm, _ = deepcopy(model)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    layer.weight.data *= scale[:, None, None, None]
    layer.bias.data = (layer.bias - norm.running_mean) * scale + norm.bias
    naive = relative_error(model(x), layer(x).relu())
    assert naive < TOLERANCE if groups == 4 else naive > 0.1


@verbs
@pytest.mark.parametrize("name", ["resnet18", "mnasnet0_5", "shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_no_norm_is_left_in_networks_of_all_kinds(name: str, verb: Any) -> None:
    """Most norms stay, and nobody says so."""
    model = ready(getattr(torchvision.models, name)(num_classes=4))
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    assert len(norms(model)) > 15
    folded, report = verb(model, image, return_report=True)
    assert norms(folded) == report.left == []
    assert relative_error(model(image), folded(image)) < 1e-9


@verbs
def test_the_root_may_be_the_block(verb: Any, x: Tensor) -> None:
    """A block that is the model itself is left, or its new convolution searched for more."""
    model = ready(RepVGGBlock(4, 4)).conv
    folded, report = verb(model, x, return_report=True)
    assert len(report.folded) == 1
    assert [type(m) for m in folded.modules() if list(m.parameters(False))] == [nn.Conv2d]
    assert relative_error(model(x), folded(x)) < TOLERANCE


@torch.no_grad()
def test_rounding_of_a_deep_network_is_not_taken_for_a_wrong_fold() -> None:
    """Float32 outputs of deep networks are compared, where rounding grows without a defect."""
    model = create_model("repvgg_d2se", num_classes=4, widths=[0.25, 0.25, 0.25, 0.25])
    randomize_batch_norm(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(1e-3, 1)
    image = torch.randn(1, 3, 32, 32)
    folded, report = reparameterize(model, image, return_report=True)
    assert report.proof is not None
    assert report.proof.max_relative_error < 1e-9
    as_it_runs = compare(model, folded, image).max_relative_error
    assert as_it_runs > 1e4 * report.proof.max_relative_error
    assert as_it_runs > 1e-6


def test_means_are_over_samples_and_not_over_batches() -> None:
    """Means of batches or processes of different size are averaged as if they were equal."""
    logits, labels = torch.eye(4)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 1])
    batches = [(logits[:3], labels[:3]), (logits[3:], labels[3:])]
    evaluation = evaluate(nn.Identity(), nn.Identity(), batches, torch.device("cpu"))
    assert evaluation.samples == 4
    assert evaluation.metrics["train_form"]["top1"] == 3 / 4  # not (1 + 0) / 2
    loss = functional.cross_entropy(logits, labels).item()
    assert evaluation.metrics["deploy_form"]["loss"] == pytest.approx(loss)


def test_processes_add_counts_and_not_means() -> None:
    """The same for processes: what they exchange must be counts."""
    classifier = Classifier(nn.Identity(), num_classes=4)
    for split in ("val", "test"):
        metrics: Any = classifier.accuracies[f"{split}_accuracy"]
        for metric in metrics.values():
            assert {reduce.__name__ for reduce in metric._reductions.values()} == {"dim_zero_sum"}
        metrics.update(torch.eye(4)[[0, 1, 2]], torch.tensor([0, 1, 2]))
        metrics.update(torch.eye(4)[:1], torch.tensor([1]))
        assert metrics.compute()[f"{split}/top1"] == 3 / 4


def test_no_sample_is_counted_twice() -> None:
    """A sampler pads an evaluation split until it divides evenly."""
    data = FakeImages(train_size=50, batch_size=8)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        images = torch.cat([x for x, _ in loader])
        assert len(images) == len(loader.dataset) == 10
        assert len(images.flatten(1).unique(dim=0)) == 10


@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 5), (3, 5), (1, 3)])
def test_a_small_kernel_stands_in_the_middle_of_a_large_one(
    kernel_size: tuple[int, int], x: Tensor
) -> None:
    """The 1x1 weight is added at an offset that is right for 3x3 only."""
    model = ready(Sum(conv(4, 4, kernel_size, bias=False), conv(4, 4, 1, bias=False)))
    expected = model[0].weight.clone()
    expected[:, :, kernel_size[0] // 2, kernel_size[1] // 2] += model[1].weight[:, :, 0, 0]
    kernel = kernel_of(model, 4)
    torch.testing.assert_close(kernel.weight, expected)
    assert relative_error(model(x), kernel(x)) < TOLERANCE


def test_a_small_kernel_without_the_matching_padding_is_refused() -> None:
    """The same sum, where the outputs do not even have one size."""
    with pytest.raises(NotFoldableError, match="differ in size"):
        kernel_of(Sum(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), 4)


@verbs
def test_the_bias_of_a_convolution_is_scaled_by_its_norm(verb: Any, x: Tensor) -> None:
    """The bias of the convolution is added to the folded one as it is, or forgotten."""
    model = ready(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
    layer, norm, _ = model
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    folded = verb(model, x).get_submodule("0")
    shift = norm.bias - norm.running_mean * scale
    torch.testing.assert_close(folded.bias, layer.bias * scale + shift)
    assert relative_error(folded.bias, layer.bias + shift) > 0.01
    assert relative_error(folded.bias, shift) > 0.01


@verbs
def test_no_setting_takes_the_place_of_another(verb: Any, x: Tensor) -> None:
    """Settings are passed by position, and padding and groups change places."""
    layer = nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 3), groups=2)
    folded = verb(ready(nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU())), x).get_submodule("0")
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "out_channels"):
        assert getattr(folded, name) == getattr(layer, name)


@verbs
def test_the_weights_are_really_set(verb: Any, x: Tensor) -> None:
    """A misspelled attribute leaves the new weight random; a bias is assigned to itself."""
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()))
    first, norm, _ = model
    layer = verb(model, x).get_submodule("0")
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    torch.testing.assert_close(layer.weight, first.weight * scale[:, None, None, None])
    torch.testing.assert_close(layer.bias, norm.bias - norm.running_mean * scale)
    assert set(vars(layer)) <= set(vars(nn.Conv2d(4, 4, 3)))


def test_a_timing_is_of_the_forward() -> None:
    """The construction of the model is timed, not its forward."""

    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(0.01)
            return x

    calls: list[str] = []
    models = {"slow": Slow(), "fast": nn.Identity()}
    for name, model in models.items():
        model.register_forward_hook(lambda *_, name=name: calls.append(name))
    result = measure_latency(models, torch.zeros(1), runs=3, warmup=2)
    assert sorted(calls) == ["fast"] * 5 + ["slow"] * 5
    assert result["slow"].median >= 10 > result["fast"].median
