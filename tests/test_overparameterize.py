"""`overparameterize` on every block in `configs/block/`, and on other people's models."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from repnet import kernel_transfer
from repnet.block_insertion import insert_blocks, inserted_blocks, overparameterize
from repnet.equivalence import FoldMismatchError
from repnet.fold import reparameterize
from repnet.layers import Scale, Sum, conv_bn
from repnet.spec import CONFIGS, build, load_choice
from repnet.symbolic import kernel_of
from tests.models import randomize_batch_norm, relative_error

BLOCKS = sorted({p.stem for p in (CONFIGS / "block").rglob("*.yaml")} - {"transposed"})
SHAPES = [  # in channels, out channels, stride, groups
    (4, 4, 1, 1),
    (4, 8, 2, 1),
    (4, 4, 2, 2),
    (6, 6, 1, 6),
]
SINGLE = 1e-6  # float32

every_block = pytest.mark.parametrize("name", BLOCKS)


def convolution(
    name: str,
    in_channels: int = 4,
    out_channels: int = 4,
    stride: int = 1,
    groups: int = 1,
    *,
    bias: bool = True,
) -> nn.Conv2d:
    """Return a convolution of the size that the block has by default."""
    block = build(load_choice("block", name))(
        in_channels, out_channels, stride=stride, groups=groups
    )
    size = kernel_of(block.conv, in_channels).kernel_size[0]
    return nn.Conv2d(
        in_channels, out_channels, size, stride, (size - 1) // 2, groups=groups, bias=bias
    )


def assert_same_kernel(new: nn.Module, old: nn.Conv2d, tolerance: float = SINGLE) -> None:
    ours = kernel_of(deepcopy(new).double(), old.in_channels)
    theirs = kernel_of(deepcopy(old).double(), old.in_channels)
    assert relative_error(theirs.weight, ours.weight) < tolerance
    zero = torch.zeros(old.out_channels, dtype=torch.float64)
    ours_bias, theirs_bias = (zero if k.bias is None else k.bias for k in (ours, theirs))
    assert relative_error(theirs_bias, ours_bias) < tolerance
    for what in ("stride", "padding", "dilation", "groups", "upsample"):
        assert getattr(ours, what) == getattr(theirs, what)


class Net(nn.Module):
    """Convolutions with and without bias, with and without norms, and one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.again = self.body[0]
        self.down = nn.Conv2d(8, 6, 1)
        self.last = nn.Conv2d(6, 4, 3, padding=2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.body(self.stem(x)))
        return self.last(self.down(x).relu()).mean((2, 3))


def net() -> Net:
    return randomize_batch_norm(Net())


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (4, 3, 16, 15)), dtype=dtype)


def train(model: nn.Module, x: Tensor, steps: int = 3) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


@every_block
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_kernel_is_the_old_one(
    name: str, shape: tuple[int, int, int, int], bias: bool
) -> None:
    old = convolution(name, *shape, bias=bias)
    new = overparameterize(old, name, where=nn.Conv2d)
    assert_same_kernel(new, old)
    assert new.original_bias is bias
    if name != "plain":
        assert sum(p.numel() for p in new.parameters()) > old.weight.numel()


@every_block
def test_any_block_statistics_and_scales_are_taken_into_account(name: str) -> None:
    make = build(load_choice("block", name))
    old = convolution(name)

    def block(*args: int, **options: int) -> nn.Module:
        return randomize_batch_norm(make(*args, **options))

    assert_same_kernel(overparameterize(old, block, where=nn.Conv2d), old)


@every_block
def test_batches_make_training_mode_start_at_the_same_function(name: str) -> None:
    old = convolution(name, groups=1)
    batches = [3 * images(16, 4, 9, 9) + 1 for _ in range(4)]
    new = overparameterize(old, name, where=nn.Conv2d, batches=iter(batches))
    assert_same_kernel(new, old)
    x = torch.cat(batches)
    assert new.training
    expected = old(x)
    # The statistics of one large batch are not quite the averages over four.
    error = (new(x) - expected).std()
    assert error < 0.1 * expected.std()
    if [m for m in new.modules() if isinstance(m, nn.BatchNorm2d)]:
        blind = overparameterize(old, name, where=nn.Conv2d)
        assert (blind(x) - expected).std() > 3 * error
        assert all(m.momentum == 0.1 for m in new.modules() if isinstance(m, nn.BatchNorm2d))


@every_block
def test_a_trained_network_folds_back(name: str) -> None:
    size = convolution(name).kernel_size[0]
    old = nn.Sequential(
        nn.Conv2d(3, 4, size, padding=size // 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, size, padding=size // 2), nn.ReLU(),
    ).double()  # fmt: skip
    x = images(2, 3, 9, 9, dtype=torch.float64)
    new = overparameterize(old, name, where=nn.Conv2d)
    assert relative_error(old.eval()(x), new.eval()(x)) < 1e-12
    randomize_batch_norm(train(randomize_batch_norm(new), x))
    folded = reparameterize(new, x, norms="keep")
    assert folded.state_dict().keys() == old.state_dict().keys()
    old.load_state_dict(folded.state_dict(), strict=True)
    assert relative_error(new(x), old(x)) < 1e-12


@every_block
def test_every_parameter_gets_a_gradient(name: str) -> None:
    new = overparameterize(convolution(name), name, where=nn.Conv2d)
    new(images(2, 4, 9, 9)).square().mean().backward()
    assert [n for n, p in new.named_parameters() if p.grad is None] == []


def test_the_argument_is_not_changed_and_the_copy_is_whole() -> None:
    model = net()
    before = deepcopy(model.state_dict())
    new = overparameterize(model)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert set(inserted_blocks(new)) == {"stem.0", "body.0"}
    assert not model.training
    assert not any(m.training for m in new.modules())
    x = images()
    assert relative_error(model(x), new(x)) < SINGLE
    copy = deepcopy(new)
    assert all(b.original_bias == (n == "body.0") for n, b in inserted_blocks(copy).items())
    file = io.BytesIO()
    torch.save(copy.state_dict(), file)
    file.seek(0)
    overparameterize(net()).load_state_dict(torch.load(file, weights_only=True), strict=True)


def test_a_shared_convolution_stays_shared() -> None:
    new = overparameterize(net(), "dbb", where="again")
    assert new.again is new.body[0]
    assert list(inserted_blocks(new)) == ["body.0"]


def test_again_changes_nothing() -> None:
    once = overparameterize(net(), "repvgg")
    twice = overparameterize(once, "repvgg")
    torch.testing.assert_close(once.state_dict(), twice.state_dict(), rtol=0, atol=0)
    again = overparameterize(once, "repvgg", where="stem.0", batches=[images()])
    torch.testing.assert_close(once.state_dict(), again.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, {"stem.0", "body.0"}),
        ("stem*", {"stem.0"}),
        (["stem.?", "body.0"], {"stem.0", "body.0"}),
        (lambda name, conv: conv.bias is None, {"stem.0"}),
        (nn.Sequential, {"stem.0", "body.0"}),
        (nn.Conv2d, {"stem.0", "body.0", "down"}),
        ([nn.Linear, "again"], {"body.0"}),
    ],
)
def test_where(where: object, names: set[str]) -> None:
    assert set(inserted_blocks(overparameterize(net(), where=where))) == names  # type: ignore[arg-type]


def test_a_block_that_takes_other_sizes_gets_them() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 7, 2, 3), nn.Conv2d(4, 4, 3, padding=2, dilation=2))
    assert set(inserted_blocks(overparameterize(model, "dbb"))) == {"0"}
    with pytest.raises(ValueError, match=r"kernel_size \(3, 3\), the convolution has \(7, 7\)"):
        overparameterize(model, "residual", where="0")
    assert set(inserted_blocks(overparameterize(model, "residual"))) == {"1"}
    model[1].dilation, model[1].padding = (1, 1), (1, 1)
    assert set(inserted_blocks(overparameterize(model, "plain"))) == {"0", "1"}


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


REFUSALS = [
    (nn.Conv2d(4, 4, 4, padding="same"), r"padding \(\(1, 1\).*, the convolution has \(\(1, 2\)"),
    (nn.Conv2d(4, 4, 3, padding=2, dilation=2), "padding|dilation"),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "mode 'reflect'"),
    (nn.Conv2d(4, 4, 3, (1, 2), padding=1), "blocks have one stride"),
    (Standardized(4, 4, 3, padding=1), "Standardized has a forward of its own"),
]


@pytest.mark.parametrize(("conv", "reason"), REFUSALS)
def test_what_is_named_but_impossible_is_refused_by_name(conv: nn.Conv2d, reason: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), conv)
    for where in ("1", lambda name, m: m is not None, ["1", nn.Conv2d]):
        with pytest.raises(ValueError, match=f"'1': .*({reason})"):
            overparameterize(model, where=where)  # type: ignore[arg-type]
    assert set(inserted_blocks(overparameterize(model))) == {"0"}
    with pytest.raises(ValueError, match=f"no convolution was selected .*'0' .*({reason})"):
        overparameterize(nn.Sequential(conv))


def test_other_refusals() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"matches no convolution; there are stem\.0, body\.0"):
        overparameterize(model, where=["stem.0", "stem.9"])
    with pytest.raises(ValueError, match="not selected"):
        overparameterize(model, where=lambda name, conv: False)
    with pytest.raises(ValueError, match="the model has none"):
        overparameterize(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="choose 'preserve' or 'paper'"):
        overparameterize(model, init="papr")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot over-parameterize 'again'|'body.0'.*can take its"):
        overparameterize(model, "transposed", where="again")
    with pytest.raises(ValueError, match="no branch of the block has a bias"):
        overparameterize(
            model, lambda i, o, **k: nn.Conv2d(i, o, 3, padding=1, bias=False), where="body.0"
        )
    model.body[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="'body.0': it has a forward hook"):
        overparameterize(model, where="body.0")
    assert not inserted_blocks(model)


def test_a_callable_may_return_any_affine_module() -> None:
    old = nn.Conv2d(4, 8, 3, padding=1)
    for make in (conv_bn, lambda i, o, *, stride, groups: Activated(i, o)):
        new = overparameterize(old, make)
        assert_same_kernel(new, old)
        assert not [m for m in new.modules() if isinstance(m, nn.ReLU)]


def scaled(value: float) -> Callable[..., nn.Module]:
    return lambda i, o, **options: nn.Sequential(conv_bn(i, o, **options), Scale(value, o))


def test_the_branch_that_takes_over_the_weight_holds_it_whatever_its_scale() -> None:
    old = nn.Conv2d(4, 8, 3, padding=1)
    new = overparameterize(old, scaled(1e-3))
    torch.testing.assert_close(new[0].conv.weight, old.weight)
    with pytest.raises(ValueError, match=r"'': a scale of the block is zero.*do it in float32"):
        overparameterize(old, scaled(0.0))


def test_a_convolution_that_others_mix_does_not_take_over_the_weight() -> None:
    def make(i: int, o: int, **options: int) -> nn.Module:
        return Sum(nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 1)), conv_bn(i, o))

    old = nn.Conv2d(4, 4, 3, padding=1)
    assert_same_kernel(overparameterize(old, make), old)


def test_a_bias_that_cannot_be_undone_is_refused() -> None:
    def make(i: int, o: int, **options: int) -> nn.Module:
        norm = nn.BatchNorm2d(o, affine=False)
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=False), randomize_batch_norm(norm))

    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False))
    with pytest.raises(FoldMismatchError, match="the block that replaces '0' does not fold to it"):
        insert_blocks(model, make)
    assert type(model[0]) is nn.Conv2d


class Activated(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv_bn(in_channels, out_channels)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.conv(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_dtype_layout_and_mode_are_kept(dtype: torch.dtype) -> None:
    old = nn.Conv2d(8, 8, 3, padding=1).to(dtype).to(memory_format=torch.channels_last).eval()
    new = overparameterize(old, "repvgg")
    assert {p.dtype for p in new.parameters()} == {dtype}
    large = [p for p in new.parameters() if p.ndim == 4 and p.shape[2] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in large)
    assert not any(m.training for m in new.modules())
    assert_same_kernel(new, old, 8 * torch.finfo(dtype).eps)


def test_frozen_stays_frozen() -> None:
    model = net()
    model.stem.requires_grad_(False)
    new = overparameterize(model)
    assert not any(p.requires_grad for p in new.stem.parameters())
    assert all(p.requires_grad for p in new.body.parameters())


def test_paper_leaves_the_branches_at_their_own_initialization() -> None:
    old = nn.Conv2d(4, 4, 3, padding=1)
    torch.manual_seed(3)
    expected = build(load_choice("block", "repvgg"))(4, 4).conv
    torch.manual_seed(3)
    new = overparameterize(old, "repvgg", init="paper")
    torch.testing.assert_close(new.state_dict(), expected.state_dict(), rtol=0, atol=0)
    with pytest.raises(AssertionError):
        assert_same_kernel(new, old)


@pytest.mark.parametrize(
    ("make", "block"),
    [
        (lambda: torchvision.models.resnet18(num_classes=5), "repvgg"),
        (lambda: torchvision.models.mobilenet_v2(num_classes=5, width_mult=0.35), "mobileone"),
        (lambda: torchvision.models.vgg11(num_classes=5).features[:9], "repvgg"),
    ],
    ids=["resnet18", "mobilenet_v2", "vgg11"],
)
def test_models_of_torchvision_come_back_key_for_key(
    make: Callable[[], nn.Module], block: str
) -> None:
    assert_comes_back(make(), block)


def test_a_model_of_timm_comes_back_key_for_key() -> None:
    timm = pytest.importorskip("timm")
    assert_comes_back(timm.create_model("resnet10t", num_classes=5), "repvgg")


def assert_comes_back(model: nn.Module, block: str) -> None:
    old = randomize_batch_norm(model).double()
    x = images(2, 3, 32, 32, dtype=torch.float64)
    new = overparameterize(old, block)
    assert relative_error(old(x), new(x)) < 1e-10
    train(new, x, steps=2)
    folded = reparameterize(new, x, norms="keep")
    fresh = deepcopy(old)
    fresh.load_state_dict(folded.state_dict(), strict=True)
    assert relative_error(new(x), fresh(x)) < 1e-10
    assert relative_error(old(x), fresh(x)) > 1e-6


WINDOWS = [  # kernel size, stride, padding, groups
    (7, 1, 3, 4),
    (4, 4, 0, 1),
    (2, 2, 0, 1),
    (4, 2, 1, 1),
    (2, 1, 1, 4),
    (3, 1, 0, 4),
    (3, 1, 2, 4),
    (5, 3, 1, 2),
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "name", ["ac", "dbb", "mobileone", "plain", "qarepvgg", "repvgg", "repvit", "unireplk"]
)
def test_a_block_takes_any_window(name: str, window: tuple[int, int, int, int]) -> None:
    kernel_size, stride, padding, groups = window
    old = nn.Conv2d(4, 4, kernel_size, stride, padding, groups=groups).double()
    x = images(2, 4, 17, 16, dtype=torch.float64)
    if name == "unireplk" and kernel_size < 5:
        with pytest.raises(ValueError, match="kernel_size must be one of 5, 7"):
            overparameterize(old, name)
        return
    new = overparameterize(nn.Sequential(old, nn.ReLU()), name, batches=[x]).eval()
    assert relative_error(old(x), new[0](x)) < 1e-9
    assert_same_kernel(new[0], old, 1e-12)
    assert type(reparameterize(new, x, norms="keep")[0]) is nn.Conv2d


@pytest.mark.parametrize("name", ["ac", "mobileone", "plain", "repvgg"])
def test_grouped_and_rectangular_convolutions_are_selected(name: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 8, 3, padding=(1, 0), groups=2),
        nn.Conv2d(8, 8, 1),
    )
    assert set(inserted_blocks(overparameterize(model, name))) == {"0", "1"}


@pytest.mark.parametrize(
    ("name", "count"), [("ac", 6), ("dbb", 6), ("mobileone", 6), ("repvgg", 6), ("unireplk", 3)]
)
def test_convnext_comes_back_key_for_key(name: str, count: int) -> None:
    stages = [CNBlockConfig(6, 8, 1), CNBlockConfig(8, 12, 1), CNBlockConfig(12, None, 1)]
    old = ConvNeXt(stages, num_classes=5).double().eval()
    x = images(2, 3, 32, 32, dtype=torch.float64)
    new = overparameterize(old, name)
    assert len(inserted_blocks(new)) == count
    assert relative_error(old(x), new(x)) < 1e-9
    train(new, x, steps=2)
    folded = reparameterize(new, x, norms="keep")
    assert relative_error(old(x), new(x)) > 1e-6
    assert folded.state_dict().keys() == old.state_dict().keys()
    old.load_state_dict(folded.state_dict(), strict=True)
    assert relative_error(new(x), old(x)) < 1e-9


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_tied_convolutions_stay_tied(key: str) -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    setattr(model[2], key, getattr(model[0], key))
    for where in (None, nn.Conv2d):
        new = overparameterize(model, where=where)
        assert set(inserted_blocks(new)) == {"1"}
        assert getattr(new[2], key) is getattr(new[0], key)
    for where in ("0", lambda name, conv: name == "0"):
        with pytest.raises(ValueError, match=f"'0': its {key} is also '2.{key}'"):
            overparameterize(model, where=where)
    network = nn.Sequential(model[0])  # tied to a module outside of it
    parent = nn.ModuleDict({"network": network, "other": nn.Sequential(model[2], model[0])})
    with pytest.raises(ValueError, match=f"its {key} is also 'other.0.{key}'"):
        insert_blocks(network, parent=parent)


def test_a_convolution_that_the_parent_also_uses_stays_shared() -> None:
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    parent = nn.ModuleDict({"network": network, "other": nn.Sequential(network[0])})
    assert insert_blocks(network, parent=parent) == ["0"]
    assert parent["other"][0] is network[0]


def test_convolutions_of_equal_shape_are_analyzed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    find_roles = kernel_transfer.find_roles

    def counted(block: nn.Module, conv: nn.Conv2d) -> kernel_transfer.Roles:
        shapes.append((conv.in_channels, conv.out_channels, conv.bias is not None))
        return find_roles(block, conv)

    monkeypatch.setattr(kernel_transfer, "find_roles", counted)
    sizes = [(4, 4, True), (4, 8, True), (8, 8, True), (8, 8, True), (8, 8, False)]
    model = nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1, bias=b) for i, o, b in sizes)).eval()
    x = images(2, 4, 9, 9)
    assert relative_error(model(x), overparameterize(model, "dbb")(x)) < SINGLE
    assert shapes == [sizes[0], sizes[1], sizes[2], sizes[4]]
