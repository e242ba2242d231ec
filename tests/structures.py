"""Small networks in the idioms of public ones, to be folded.

What follows the authors is what a fold depends on: the names of parts, flags and attributes, which
part holds which, and what `forward` does in which order. Widths and depths are a few, and training,
export and initialization are left out.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import checkpoint


def conv_bn(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, **options: Any
) -> nn.Sequential:
    """Return a convolution called `conv` and a norm called `bn`, "same" padding by default."""
    options.setdefault("padding", kernel_size // 2)
    layers = nn.Sequential()
    layers.add_module(
        "conv", nn.Conv2d(in_channels, out_channels, kernel_size, stride, bias=False, **options)
    )
    layers.add_module("bn", nn.BatchNorm2d(out_channels))
    return layers


def conv_bn_relu(*args: Any, **options: Any) -> nn.Sequential:
    layers = conv_bn(*args, **options)
    layers.add_module("nonlinear", nn.ReLU())
    return layers


# RepVGG (arXiv:2101.03697)


class RepVGGSqueeze(nn.Module):
    """Attention that pools with a kernel as large as the map, which must be square."""

    def __init__(self, input_channels: int, internal_neurons: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(input_channels, internal_neurons, 1)
        self.up = nn.Conv2d(internal_neurons, input_channels, 1)
        self.input_channels = input_channels

    def forward(self, inputs: Tensor) -> Tensor:
        x = functional.avg_pool2d(inputs, kernel_size=inputs.size(3))
        x = functional.relu(self.down(x))
        x = torch.sigmoid(self.up(x)).view(-1, self.input_channels, 1, 1)
        return inputs * x


class RepVGGBlock(nn.Module):
    rbr_identity: nn.Module | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        use_se: bool = False,
    ) -> None:
        super().__init__()
        self.deploy, self.groups, self.in_channels = False, groups, in_channels
        self.nonlinearity = nn.ReLU()
        self.se = RepVGGSqueeze(out_channels, 2) if use_se else nn.Identity()
        keeps = out_channels == in_channels and stride == 1
        self.rbr_identity = nn.BatchNorm2d(in_channels) if keeps else None
        self.rbr_dense = conv_bn(in_channels, out_channels, 3, stride, groups=groups)
        self.rbr_1x1 = conv_bn(in_channels, out_channels, 1, stride, groups=groups)

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.se(self.rbr_reparam(inputs)))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        return self.nonlinearity(self.se(self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out))


class RepVGG(nn.Module):
    def __init__(self, block: Any = RepVGGBlock, **options: Any) -> None:
        super().__init__()
        self.block, self.options = block, options
        self.override_groups_map = {2: 4, 4: 4} if block is RepVGGBlock else {}
        self.use_checkpoint = False
        self.in_planes, self.cur_layer_idx = 8, 1
        self.stage0 = block(3, 8, stride=2, **options)
        self.stage1 = self._make_stage(8, 2)
        self.stage2 = self._make_stage(16, 2)
        self.gap = nn.AdaptiveAvgPool2d(output_size=1)
        self.linear = nn.Linear(16, 5)

    def _make_stage(self, planes: int, num_blocks: int) -> nn.ModuleList:
        blocks = []
        for stride in [2] + [1] * (num_blocks - 1):
            groups = self.override_groups_map.get(self.cur_layer_idx, 1)
            block = self.block(self.in_planes, planes, stride, groups, **self.options)
            blocks.append(block)
            self.in_planes = planes
            self.cur_layer_idx += 1
        return nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stage0(x)
        for stage in (self.stage1, self.stage2):
            for block in stage:
                if self.use_checkpoint:
                    out = checkpoint.checkpoint(block, out, use_reentrant=False)
                else:
                    out = block(out)
        out = self.gap(out)
        out = out.view(out.size(0), -1)
        return self.linear(out)


# MobileOne (arXiv:2206.04040), with the options that FastViT's copy of the block has


class MobileOneSqueeze(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(in_channels, 2, 1)
        self.expand = nn.Conv2d(2, in_channels, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        _, c, h, w = inputs.size()
        x = functional.avg_pool2d(inputs, kernel_size=[h, w])
        x = functional.relu(self.reduce(x))
        x = torch.sigmoid(self.expand(x)).view(-1, c, 1, 1)
        return inputs * x


class MobileOneBlock(nn.Module):
    rbr_skip: nn.Module | None
    rbr_scale: nn.Module | None
    rbr_conv: nn.ModuleList | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        use_se: bool = False,
        use_act: bool = True,
        use_scale_branch: bool = True,
        num_conv_branches: int = 1,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.inference_mode, self.num_conv_branches = False, num_conv_branches
        self.se = MobileOneSqueeze(out_channels) if use_se else nn.Identity()
        self.activation = (activation or nn.ReLU()) if use_act else nn.Identity()
        keeps = out_channels == in_channels and stride == 1
        self.rbr_skip = nn.BatchNorm2d(in_channels) if keeps else None
        self.rbr_conv = self.rbr_scale = None
        shape = (in_channels, out_channels)
        if num_conv_branches > 0:
            branches = range(num_conv_branches)
            self.rbr_conv = nn.ModuleList(
                conv_bn(*shape, kernel_size, stride, groups=groups) for _ in branches
            )
        if kernel_size > 1 and use_scale_branch:
            self.rbr_scale = conv_bn(*shape, 1, stride, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        if self.inference_mode:
            return self.activation(self.se(self.reparam_conv(x)))
        identity_out: Any = 0
        if self.rbr_skip is not None:
            identity_out = self.rbr_skip(x)
        scale_out: Any = 0
        if self.rbr_scale is not None:
            scale_out = self.rbr_scale(x)
        out = scale_out + identity_out
        if self.rbr_conv is not None:
            for ix in range(self.num_conv_branches):
                out += self.rbr_conv[ix](x)
        return self.activation(self.se(out))


class MobileOne(nn.Module):
    def __init__(self, num_conv_branches: int, use_se: bool = False) -> None:
        super().__init__()
        self.inference_mode, self.num_conv_branches = False, num_conv_branches
        self.stage0 = MobileOneBlock(3, 8, 3, stride=2)
        self.stage1 = self._make_stage(8, 8, 1, 0)
        self.stage2 = self._make_stage(8, 12, 2, 1 if use_se else 0)
        self.gap = nn.AdaptiveAvgPool2d(output_size=1)
        self.linear = nn.Linear(12, 5)

    def _make_stage(self, channels: int, planes: int, units: int, num_se: int) -> nn.Sequential:
        blocks = []
        for ix in range(units):
            options: Any = {"use_se": ix >= units - num_se, "num_conv_branches": 1}
            options["num_conv_branches"] = self.num_conv_branches
            stride = 2 if ix == 0 else 1
            blocks.append(MobileOneBlock(channels, channels, 3, stride, channels, **options))
            blocks.append(MobileOneBlock(channels, planes, 1, **options))
            channels = planes
        return nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage0(x)
        x = self.stage1(x)
        x = self.stage2(x)
        x = self.gap(x)
        x = x.view(x.size(0), -1)
        return self.linear(x)


# RepLKNet (arXiv:2203.06717); FastViT's large kernel has an activation behind the sum


class ReparamLargeKernelConv(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        small_kernel: int | None = 3,
        activation: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.kernel_size, self.small_kernel = kernel_size, small_kernel
        self.activation = activation
        self.lkb_origin = conv_bn(in_channels, out_channels, kernel_size, stride, groups=groups)
        if small_kernel is not None:
            self.small_conv = conv_bn(
                in_channels, out_channels, small_kernel, stride, groups=groups
            )

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "lkb_reparam"):
            out = self.lkb_reparam(inputs)
        else:
            out = self.lkb_origin(inputs)
            if hasattr(self, "small_conv"):
                out += self.small_conv(inputs)
        return out if self.activation is None else self.activation(out)


class RepLKBlock(nn.Module):
    def __init__(self, channels: int, dw_channels: int) -> None:
        super().__init__()
        self.pw1 = conv_bn_relu(channels, dw_channels, 1)
        self.pw2 = conv_bn(dw_channels, channels, 1)
        self.large_kernel = ReparamLargeKernelConv(dw_channels, dw_channels, 7, groups=dw_channels)
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = nn.BatchNorm2d(channels)
        self.drop_path = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.prelkb_bn(x)
        out = self.pw1(out)
        out = self.large_kernel(out)
        out = self.lk_nonlinear(out)
        out = self.pw2(out)
        return x + self.drop_path(out)


class RepLKConvFFN(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.drop_path = nn.Identity()
        self.preffn_bn = nn.BatchNorm2d(channels)
        self.pw1 = conv_bn(channels, 2 * channels, 1)
        self.pw2 = conv_bn(2 * channels, channels, 1)
        self.nonlinear = nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.preffn_bn(x)
        out = self.pw1(out)
        out = self.nonlinear(out)
        out = self.pw2(out)
        return x + self.drop_path(out)


class RepLKNetStage(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.use_checkpoint = False
        self.blocks = nn.ModuleList([RepLKBlock(channels, channels), RepLKConvFFN(channels)])
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.use_checkpoint:
                x = checkpoint.checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


class RepLKNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out_indices, self.num_stages = None, 2
        self.stem = nn.ModuleList(
            [conv_bn_relu(3, 8, 3, 2), conv_bn_relu(8, 8, 3, groups=8), conv_bn_relu(8, 8, 1)]
        )
        self.stages = nn.ModuleList([RepLKNetStage(8), RepLKNetStage(12)])
        self.transitions = nn.ModuleList(
            [nn.Sequential(conv_bn_relu(8, 12, 1), conv_bn_relu(12, 12, 3, 2, groups=12))]
        )
        self.norm = nn.BatchNorm2d(12)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(12, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem[0](x)
        for stem_layer in self.stem[1:]:
            x = stem_layer(x)
        for index in range(self.num_stages):
            x = self.stages[index](x)
            if index < self.num_stages - 1:
                x = self.transitions[index](x)
        return x

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.forward_features(x)
        if self.out_indices:
            return [x]
        x = self.norm(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.head(x)


# FastViT (arXiv:2303.14189)


class RepMixer(nn.Module):
    def __init__(self, dim: int, use_layer_scale: bool = True) -> None:
        super().__init__()
        options: Any = {"groups": dim, "use_act": False}
        self.norm = MobileOneBlock(
            dim, dim, 3, use_scale_branch=False, num_conv_branches=0, **options
        )
        self.mixer = MobileOneBlock(dim, dim, 3, **options)
        self.use_layer_scale = use_layer_scale
        if use_layer_scale:
            self.layer_scale = nn.Parameter(torch.rand(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv(x)
        if self.use_layer_scale:
            return x + self.layer_scale * (self.mixer(x) - self.norm(x))
        return x + self.mixer(x) - self.norm(x)


class ConvFFN(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = conv_bn(in_channels, in_channels, 7, groups=in_channels)
        self.fc1 = nn.Conv2d(in_channels, 2 * in_channels, kernel_size=1)
        self.act = nn.GELU()
        self.fc2 = nn.Conv2d(2 * in_channels, in_channels, kernel_size=1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.fc1(x)
        x = self.act(x)
        x = self.drop(x)
        x = self.fc2(x)
        return self.drop(x)


class RepMixerBlock(nn.Module):
    def __init__(self, dim: int, use_layer_scale: bool) -> None:
        super().__init__()
        self.token_mixer = RepMixer(dim, use_layer_scale)
        self.convffn = ConvFFN(dim)
        self.drop_path = nn.Identity()
        self.use_layer_scale = use_layer_scale
        if use_layer_scale:
            self.layer_scale = nn.Parameter(torch.rand(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        if self.use_layer_scale:
            return x + self.drop_path(self.layer_scale * self.convffn(x))
        return x + self.drop_path(self.convffn(x))


class RepCPE(nn.Module):
    """Conditional positional encoding: a depthwise convolution beside the identity."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.pe = nn.Conv2d(dim, dim, 7, 1, 3, bias=True, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "reparam_conv"):
            return self.reparam_conv(x)
        return self.pe(x) + x


class MHSA(nn.Module):
    def __init__(self, dim: int, head_dim: int = 4) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.scale = head_dim, dim // head_dim, head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=False)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        b, c, h, w = shape
        n = h * w
        if len(shape) == 4:
            x = torch.flatten(x, start_dim=2).transpose(-2, -1)
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, c)
        x = self.proj(x)
        if len(shape) == 4:
            x = x.transpose(-2, -1).reshape(b, c, h, w)
        return x


class AttentionBlock(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(dim)
        self.token_mixer = MHSA(dim)
        self.convffn = ConvFFN(dim)
        self.drop_path = nn.Identity()
        self.layer_scale_1 = nn.Parameter(torch.rand(dim, 1, 1))
        self.layer_scale_2 = nn.Parameter(torch.rand(dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.layer_scale_1 * self.token_mixer(self.norm(x)))
        return x + self.drop_path(self.layer_scale_2 * self.convffn(x))


class FastViTPatchEmbed(nn.Module):
    def __init__(self, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            ReparamLargeKernelConv(
                in_channels, embed_dim, 7, 2, in_channels, 3, activation=nn.GELU()
            ),
            MobileOneBlock(embed_dim, embed_dim, 1, activation=nn.GELU()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class FastViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fork_feat = False
        gelu: Any = {"activation": nn.GELU()}
        self.patch_embed = nn.Sequential(
            MobileOneBlock(3, 8, 3, 2, **gelu),
            MobileOneBlock(8, 8, 3, 2, groups=8, **gelu),
            MobileOneBlock(8, 8, 1, **gelu),
        )
        self.network = nn.ModuleList(
            [
                nn.Sequential(RepMixerBlock(8, True), RepMixerBlock(8, False)),
                FastViTPatchEmbed(8, 16),
                RepCPE(16),
                nn.Sequential(AttentionBlock(16)),
            ]
        )
        self.conv_exp = MobileOneBlock(16, 32, 3, groups=16, use_se=True, **gelu)
        self.gap = nn.AdaptiveAvgPool2d(output_size=1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        outs = []
        for index, block in enumerate(self.network):
            x = block(x)
            if self.fork_feat and index in (0, 2):
                outs.append(x)
        x = self.conv_exp(x)
        x = self.gap(x)
        x = x.view(x.size(0), -1)
        return self.head(x)


# Diverse branch block (arXiv:2103.13425), in a ResNet


class IdentityBasedConv1x1(nn.Conv2d):
    """A pointwise convolution that starts as the identity, which is not among its parameters."""

    def __init__(self, channels: int, groups: int, registered: bool) -> None:
        super().__init__(channels, channels, 1, groups=groups, bias=False)
        nn.init.normal_(self.weight, std=0.1)
        id_tensor = torch.zeros_like(self.weight.detach())
        for i in range(channels):
            id_tensor[i, i % (channels // groups), 0, 0] = 1
        if registered:
            self.register_buffer("id_tensor", id_tensor, persistent=False)
        else:
            self.id_tensor = id_tensor

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.weight + self.id_tensor.to(self.weight.device).type_as(self.weight)
        return functional.conv2d(
            input, kernel, None, stride=1, padding=0, dilation=self.dilation, groups=self.groups
        )


class BNAndPadLayer(nn.Module):
    """A norm, then a border of what the norm makes of zero."""

    def __init__(self, pad_pixels: int, num_features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(num_features)
        self.pad_pixels = pad_pixels

    def forward(self, input: Tensor) -> Tensor:
        output = self.bn(input)
        if self.pad_pixels > 0:
            deviation = torch.sqrt(self.bn.running_var + self.bn.eps)
            if self.bn.affine:
                shift = self.bn.running_mean * self.bn.weight.detach() / deviation
                pad_values = self.bn.bias.detach() - shift
            else:
                pad_values = -self.bn.running_mean / deviation
            output = functional.pad(output, [self.pad_pixels] * 4)
            pad_values = pad_values.view(1, -1, 1, 1)
            output[:, :, 0 : self.pad_pixels, :] = pad_values
            output[:, :, -self.pad_pixels :, :] = pad_values
            output[:, :, :, 0 : self.pad_pixels] = pad_values
            output[:, :, :, -self.pad_pixels :] = pad_values
        return output

    @property
    def weight(self) -> Tensor:
        return self.bn.weight


class DiverseBranchBlock(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
        nonlinear: nn.Module | None = None,
        registered: bool = False,
    ) -> None:
        super().__init__()
        self.deploy = False
        self.nonlinear = nn.Identity() if nonlinear is None else nonlinear
        padding = kernel_size // 2
        shape: Any = (in_channels, out_channels)
        self.dbb_origin = conv_bn(*shape, kernel_size, stride, groups=groups)
        self.dbb_avg = nn.Sequential()
        if groups < out_channels:
            self.dbb_avg.add_module("conv", nn.Conv2d(*shape, 1, groups=groups, bias=False))
            self.dbb_avg.add_module("bn", BNAndPadLayer(padding, out_channels))
            self.dbb_avg.add_module("avg", nn.AvgPool2d(kernel_size, stride, padding=0))
            self.dbb_1x1 = conv_bn(*shape, 1, stride, groups=groups)
        else:
            self.dbb_avg.add_module("avg", nn.AvgPool2d(kernel_size, stride, padding))
        self.dbb_avg.add_module("avgbn", nn.BatchNorm2d(out_channels))
        internal = in_channels if groups < out_channels else 2 * in_channels
        self.dbb_1x1_kxk = nn.Sequential()
        if internal == in_channels:
            identity = IdentityBasedConv1x1(in_channels, groups, registered)
            self.dbb_1x1_kxk.add_module("idconv1", identity)
        else:
            conv1 = nn.Conv2d(in_channels, internal, 1, groups=groups, bias=False)
            self.dbb_1x1_kxk.add_module("conv1", conv1)
        self.dbb_1x1_kxk.add_module("bn1", BNAndPadLayer(padding, internal))
        conv2 = nn.Conv2d(internal, out_channels, kernel_size, stride, groups=groups, bias=False)
        self.dbb_1x1_kxk.add_module("conv2", conv2)
        self.dbb_1x1_kxk.add_module("bn2", nn.BatchNorm2d(out_channels))

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "dbb_reparam"):
            return self.nonlinear(self.dbb_reparam(inputs))
        out = self.dbb_origin(inputs)
        if hasattr(self, "dbb_1x1"):
            out += self.dbb_1x1(inputs)
        out += self.dbb_avg(inputs)
        out += self.dbb_1x1_kxk(inputs)
        return self.nonlinear(out)


# Asymmetric convolution block (arXiv:1908.03930)


class CropLayer(nn.Module):
    """Negative padding."""

    def __init__(self, crop_set: tuple[int, int]) -> None:
        super().__init__()
        self.rows_to_crop, self.cols_to_crop = -crop_set[0], -crop_set[1]
        assert self.rows_to_crop >= 0
        assert self.cols_to_crop >= 0

    def forward(self, input: Tensor) -> Tensor:
        if self.rows_to_crop == 0 and self.cols_to_crop == 0:
            return input
        if self.rows_to_crop > 0 and self.cols_to_crop == 0:
            return input[:, :, self.rows_to_crop : -self.rows_to_crop, :]
        if self.rows_to_crop == 0 and self.cols_to_crop > 0:
            return input[:, :, :, self.cols_to_crop : -self.cols_to_crop]
        rows, cols = self.rows_to_crop, self.cols_to_crop
        return input[:, :, rows:-rows, cols:-cols]


class ACBlock(nn.Module):
    """Three kernels; less padding than half the kernel crops the input of the flat ones."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 1,
        groups: int = 1,
        crop_layer: bool = False,
    ) -> None:
        super().__init__()
        self.deploy, self.crop_layer = False, crop_layer
        missing = padding - kernel_size // 2
        self.crop = max(0, -missing)
        ver_padding, hor_padding = (padding, max(0, missing)), (max(0, missing), padding)
        shape: Any = (in_channels, out_channels)
        options: Any = {"stride": stride, "groups": groups, "bias": False}
        self.square_conv = nn.Conv2d(*shape, kernel_size, padding=padding, **options)
        self.square_bn = nn.BatchNorm2d(out_channels)
        if crop_layer:
            self.ver_conv_crop_layer = CropLayer((0, -self.crop))
            self.hor_conv_crop_layer = CropLayer((-self.crop, 0))
        self.ver_conv = nn.Conv2d(*shape, (kernel_size, 1), padding=ver_padding, **options)
        self.hor_conv = nn.Conv2d(*shape, (1, kernel_size), padding=hor_padding, **options)
        self.ver_bn = nn.BatchNorm2d(out_channels)
        self.hor_bn = nn.BatchNorm2d(out_channels)

    def forward(self, input: Tensor) -> Tensor:
        if self.deploy:
            return self.fused_conv(input)
        square_outputs = self.square_conv(input)
        square_outputs = self.square_bn(square_outputs)
        ver_input = hor_input = input
        if self.crop_layer:
            ver_input = self.ver_conv_crop_layer(input)
            hor_input = self.hor_conv_crop_layer(input)
        elif self.crop > 0:
            ver_input = input[:, :, :, self.crop : -self.crop]
            hor_input = input[:, :, self.crop : -self.crop, :]
        vertical_outputs = self.ver_conv(ver_input)
        vertical_outputs = self.ver_bn(vertical_outputs)
        horizontal_outputs = self.hor_conv(hor_input)
        horizontal_outputs = self.hor_bn(horizontal_outputs)
        return square_outputs + vertical_outputs + horizontal_outputs


class ACNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(OrderedDict(conv=ACBlock(3, 8, 3, stride=2), relu=nn.ReLU())),
            nn.Sequential(OrderedDict(conv=ACBlock(8, 8, 3, padding=0), relu=nn.ReLU())),
            nn.Sequential(
                OrderedDict(conv=ACBlock(8, 8, 5, 1, 1, 2, crop_layer=True), relu=nn.ReLU())
            ),
            nn.Sequential(OrderedDict(conv=ACBlock(8, 12, 3, padding=2), relu=nn.ReLU())),
        )
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.features(x)
        out = functional.adaptive_avg_pool2d(out, 1).view(out.size(0), -1)
        return self.linear(out)


class DBBConvBN(nn.Module):
    """What the authors build for sizes that get no branches."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1
    ) -> None:
        super().__init__()
        self.nonlinear = nn.Identity()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "bn"):
            return self.nonlinear(self.bn(self.conv(x)))
        return self.nonlinear(self.conv(x))


class DBBBasicBlock(nn.Module):
    def __init__(self, in_planes: int, planes: int, stride: int, **options: Any) -> None:
        super().__init__()
        self.shortcut = nn.Identity()
        if stride != 1 or in_planes != planes:
            self.shortcut = DBBConvBN(in_planes, planes, 1, stride)
        self.conv1 = DiverseBranchBlock(
            in_planes, planes, 3, stride, nonlinear=nn.ReLU(), **options
        )
        self.conv2 = DiverseBranchBlock(planes, planes, 3, **options)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(x)
        out = self.conv2(out)
        out = out + self.shortcut(x)
        return self.relu(out)


class DBBResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stage0 = nn.Sequential()
        self.stage0.add_module("conv1", conv_bn_relu(3, 8, 7, 2))
        self.stage0.add_module("maxpool", nn.MaxPool2d(3, 2, 1))
        self.stage1 = nn.Sequential(DBBBasicBlock(8, 8, 1))
        self.stage2 = nn.Sequential(DBBBasicBlock(8, 12, 2, registered=True))
        self.depthwise = DiverseBranchBlock(12, 12, 3, groups=12, nonlinear=nn.ReLU())
        self.gap = nn.AdaptiveAvgPool2d(output_size=1)
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stage0(x)
        out = self.stage1(out)
        out = self.stage2(out)
        out = self.depthwise(out)
        out = self.gap(out)
        out = out.view(out.size(0), -1)
        return self.linear(out)


# YOLOv6 (arXiv:2209.02976, 2301.05586) and QARepVGG (arXiv:2212.01593)


class ConvModule(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        activation_type: str | None = "relu",
        groups: int = 1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_channels)
        if activation_type is not None:
            self.act = {"relu": nn.ReLU(), "silu": nn.SiLU()}[activation_type]
        self.activation_type = activation_type

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_type is None:
            return self.bn(self.conv(x))
        return self.act(self.bn(self.conv(x)))


class ConvBNReLU(nn.Module):
    def __init__(self, *args: Any) -> None:
        super().__init__()
        self.block = ConvModule(*args, activation_type="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class QARepVGGBlock(RepVGGBlock):
    """Only the largest branch has a norm of its own; one more follows the sum."""

    def __init__(
        self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__(in_channels, out_channels, stride, groups)
        self.bn = nn.BatchNorm2d(out_channels)
        self.rbr_1x1 = nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False)
        keeps = out_channels == in_channels and stride == 1
        self.rbr_identity = nn.Identity() if keeps else None
        self._id_tensor = None

    def forward(self, inputs: Tensor) -> Tensor:
        if hasattr(self, "rbr_reparam"):
            return self.nonlinearity(self.bn(self.se(self.rbr_reparam(inputs))))
        id_out = 0 if self.rbr_identity is None else self.rbr_identity(inputs)
        out = self.rbr_dense(inputs) + self.rbr_1x1(inputs) + id_out
        return self.nonlinearity(self.bn(self.se(out)))


class BottleRep(nn.Module):
    def __init__(
        self, in_channels: int, out_channels: int, basic_block: Any, weight: bool = True
    ) -> None:
        super().__init__()
        self.conv1 = basic_block(in_channels, out_channels)
        self.conv2 = basic_block(out_channels, out_channels)
        self.shortcut = in_channels == out_channels
        self.alpha = nn.Parameter(torch.ones(1)) if weight else 1.0

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.conv1(x)
        outputs = self.conv2(outputs)
        return outputs + self.alpha * x if self.shortcut else outputs


class RepBlock(nn.Module):
    block: nn.Sequential | None

    def __init__(
        self, in_channels: int, out_channels: int, n: int, block: Any, basic_block: Any = None
    ) -> None:
        super().__init__()
        make: Any = block if basic_block is None else lambda i, o: block(i, o, basic_block)
        self.conv1 = make(in_channels, out_channels)
        rest = [make(out_channels, out_channels) for _ in range(n - 1)]
        self.block = nn.Sequential(*rest) if n > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if self.block is not None:
            x = self.block(x)
        return x


class BepC3(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, n: int, block: Any) -> None:
        super().__init__()
        c_ = out_channels // 2
        self.cv1 = ConvBNReLU(in_channels, c_, 1, 1)
        self.cv2 = ConvBNReLU(in_channels, c_, 1, 1)
        self.cv3 = ConvBNReLU(2 * c_, out_channels, 1, 1)
        self.m = RepBlock(c_, c_, n, BottleRep, block)
        self.concat = True

    def forward(self, x: Tensor) -> Tensor:
        if self.concat is True:
            return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), dim=1))
        return self.cv3(self.m(self.cv1(x)))


class CSPSPPF(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 5) -> None:
        super().__init__()
        c_ = out_channels // 2
        self.cv1, self.cv2 = ConvBNReLU(in_channels, c_, 1), ConvBNReLU(in_channels, c_, 1)
        self.cv3, self.cv4 = ConvBNReLU(c_, c_, 3), ConvBNReLU(c_, c_, 1)
        self.m = nn.MaxPool2d(kernel_size, stride=1, padding=kernel_size // 2)
        self.cv5, self.cv6 = ConvBNReLU(4 * c_, c_, 1), ConvBNReLU(c_, c_, 3)
        self.cv7 = ConvBNReLU(2 * c_, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.cv4(self.cv3(self.cv1(x)))
        y0 = self.cv2(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y1 = self.m(x1)
            y2 = self.m(y1)
            y3 = self.cv6(self.cv5(torch.cat([x1, y1, y2, self.m(y2)], 1)))
        return self.cv7(torch.cat((y0, y3), dim=1))


class Transpose(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.upsample_transpose = nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample_transpose(x)


class EfficientRep(nn.Module):
    def __init__(self, block: Any, csp: bool, fuse_p2: bool = False) -> None:
        super().__init__()
        self.fuse_P2 = fuse_p2

        def stage(channels: int, n: int) -> nn.Module:
            if csp:
                return BepC3(channels, channels, n, block)
            return RepBlock(channels, channels, n, block)

        self.stem = block(3, 8, 2)
        self.ERBlock_2 = nn.Sequential(block(8, 12, 2), stage(12, 2))
        self.ERBlock_3 = nn.Sequential(block(12, 16, 2), stage(16, 1), CSPSPPF(16, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        x = self.stem(x)
        x = self.ERBlock_2(x)
        outputs.append(x)
        x = self.ERBlock_3(x)
        outputs.append(x)
        return tuple(outputs)


class RepPANNeck(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.reduce_layer0 = ConvBNReLU(16, 12, 1)
        self.upsample0 = Transpose(12)
        self.Rep_p4 = RepBlock(24, 12, 1, block)
        self.downsample2 = ConvBNReLU(12, 12, 3, 2)
        self.Rep_n3 = RepBlock(24, 16, 2, block)

    def forward(self, input: tuple[Tensor, ...]) -> list[Tensor]:
        x1, x0 = input
        fpn_out0 = self.reduce_layer0(x0)
        upsample_feat0 = self.upsample0(fpn_out0)
        f_concat_layer0 = torch.cat([upsample_feat0, x1], 1)
        f_out0 = self.Rep_p4(f_concat_layer0)
        down_feat1 = self.downsample2(f_out0)
        p_concat_layer1 = torch.cat([down_feat1, fpn_out0], 1)
        return [f_out0, self.Rep_n3(p_concat_layer1)]


def anchors_of(feats: Sequence[Tensor], strides: Any) -> tuple[Tensor, Tensor]:
    """Return the centers `(positions, 2)` of all cells, and the stride of each `(positions, 1)`."""
    points, steps = [], []
    for index, stride in enumerate(strides):
        _, _, h, w = feats[index].shape
        shift_x = torch.arange(end=w, dtype=feats[0].dtype, device=feats[0].device) + 0.5
        shift_y = torch.arange(end=h, dtype=feats[0].dtype, device=feats[0].device) + 0.5
        grid_y, grid_x = torch.meshgrid(shift_y, shift_x, indexing="ij")
        points.append(torch.stack((grid_x, grid_y), -1).view(-1, 2))
        steps.append(torch.full((h * w, 1), float(stride), dtype=feats[0].dtype))
    return torch.cat(points), torch.cat(steps)


class EffiDeHead(nn.Module):
    """Decoupled head: a Python loop over levels, which writes into the list that it is given."""

    proj: Tensor

    def __init__(self, channels: Sequence[int], num_classes: int = 3) -> None:
        super().__init__()
        self.nc, self.nl, self.reg_max = num_classes, len(channels), 4
        self.stride = torch.tensor([4, 8])
        self.stems, self.cls_convs, self.reg_convs = (nn.ModuleList() for _ in range(3))
        self.cls_preds, self.reg_preds = nn.ModuleList(), nn.ModuleList()
        self.proj_conv = nn.Conv2d(self.reg_max + 1, 1, 1, bias=False)
        for c in channels:
            self.stems.append(ConvBNReLU(c, c, 1))
            self.cls_convs.append(ConvBNReLU(c, c, 3))
            self.reg_convs.append(ConvBNReLU(c, c, 3))
            self.cls_preds.append(nn.Conv2d(c, self.nc, 1))
            self.reg_preds.append(nn.Conv2d(c, 4 * (self.reg_max + 1), 1))

    def forward(self, x: list[Tensor]) -> Any:
        scores, distances = [], []
        for i in range(self.nl):
            b, _, h, w = x[i].shape
            length = h * w
            x[i] = self.stems[i](x[i])
            cls_x = x[i]
            reg_x = x[i]
            cls_feat = self.cls_convs[i](cls_x)
            cls_output = self.cls_preds[i](cls_feat)
            reg_feat = self.reg_convs[i](reg_x)
            reg_output = self.reg_preds[i](reg_feat)
            if self.training:
                continue
            reg_output = reg_output.reshape([-1, 4, self.reg_max + 1, length]).permute(0, 2, 1, 3)
            reg_output = self.proj_conv(functional.softmax(reg_output, dim=1))
            scores.append(torch.sigmoid(cls_output).reshape([b, self.nc, length]))
            distances.append(reg_output.reshape([b, 4, length]))
        cls_scores = torch.cat(scores, dim=-1).permute(0, 2, 1)
        left_top, right_bottom = torch.cat(distances, dim=-1).permute(0, 2, 1).split(2, dim=-1)
        anchor_points, stride_tensor = anchors_of(x, self.stride)
        boxes = torch.cat([anchor_points - left_top, anchor_points + right_bottom], -1)
        boxes *= stride_tensor
        ones = torch.ones((boxes.shape[0], boxes.shape[1], 1), dtype=boxes.dtype)
        return torch.cat([boxes, ones, cls_scores], dim=-1)


class YOLOv6(nn.Module):
    def __init__(self, block: Any = RepVGGBlock, csp: bool = False) -> None:
        super().__init__()
        self.export = False
        self.backbone = EfficientRep(block, csp)
        self.neck = RepPANNeck(block)
        self.detect = EffiDeHead((12, 16))
        self.stride = self.detect.stride

    def forward(self, x: Tensor) -> Any:
        export_mode = torch.onnx.is_in_onnx_export() or self.export
        x = self.backbone(x)
        x = self.neck(x)
        if not export_mode:
            featmaps: list[Tensor] = []
            featmaps.extend(x)
        x = self.detect(x)
        return x if export_mode is True or self.export is True else [x, featmaps]


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    batchsize, num_channels, height, width = x.data.size()
    x = x.view(batchsize, groups, num_channels // groups, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, -1, height, width)


class LiteSqueeze(nn.Module):
    def __init__(self, channel: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.conv1, self.conv2 = nn.Conv2d(channel, 2, 1), nn.Conv2d(2, channel, 1)
        self.relu, self.hardsigmoid = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.avg_pool(x)
        x = self.relu(self.conv1(x))
        x = self.hardsigmoid(self.conv2(x))
        return identity * x


class LiteEffiBlockS1(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.conv_pw_1 = ConvModule(half, half, 1, activation_type="silu")
        self.conv_dw_1 = ConvModule(half, half, 3, 1, None, half)
        self.se = LiteSqueeze(half)
        self.conv_1 = ConvModule(half, half, 1, activation_type="silu")

    def forward(self, inputs: Tensor) -> Tensor:
        half = inputs.shape[1] // 2
        x1, x2 = torch.split(inputs, split_size_or_sections=[half, half], dim=1)
        x2 = self.conv_pw_1(x2)
        x3 = self.conv_dw_1(x2)
        x3 = self.se(x3)
        x3 = self.conv_1(x3)
        out = torch.cat([x1, x3], dim=1)
        return channel_shuffle(out, 2)


class DPBlock(nn.Module):
    def __init__(self, in_channel: int, out_channel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv_dw_1 = nn.Conv2d(in_channel, out_channel, 5, stride, 2, groups=out_channel)
        self.bn_1, self.act_1 = nn.BatchNorm2d(out_channel), nn.Hardswish()
        self.conv_pw_1 = nn.Conv2d(out_channel, out_channel, 1)
        self.bn_2, self.act_2 = nn.BatchNorm2d(out_channel), nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act_1(self.bn_1(self.conv_dw_1(x)))
        return self.act_2(self.bn_2(self.conv_pw_1(x)))


class YOLOv6Lite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_0 = ConvModule(3, 8, 3, 2, "silu")
        self.lite_effiblock_1 = nn.Sequential(LiteEffiBlockS1(8), LiteEffiBlockS1(8))
        self.neck = nn.ModuleList([DPBlock(8, 8, 2), DPBlock(8, 8)])
        self.cls_preds = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.lite_effiblock_1(self.conv_0(x))
        outputs = []
        for layer in self.neck:
            x = layer(x)
            outputs.append(self.cls_preds(x))
        return outputs


# YOLOv9 (arXiv:2402.13616), as packages of detectors hold it: a list of layers that name sources


class Conv(nn.Module):
    default_act = nn.SiLU()

    def __init__(
        self,
        c1: int,
        c2: int,
        k: int = 1,
        s: int = 1,
        p: int | None = None,
        g: int = 1,
        act: Any = True,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        known = act if isinstance(act, nn.Module) else nn.Identity()
        self.act = self.default_act if act is True else known

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class RepConvN(nn.Module):
    default_act = nn.SiLU()
    bn: nn.Module | None

    def __init__(self, c1: int, c2: int, bn: bool = False) -> None:
        super().__init__()
        self.g, self.c1, self.c2 = 1, c1, c2
        self.act = self.default_act
        self.bn = nn.BatchNorm2d(num_features=c1, eps=1e-3) if bn and c1 == c2 else None
        self.conv1 = Conv(c1, c2, 3, 1, p=1, act=False)
        self.conv2 = Conv(c1, c2, 1, 1, p=0, act=False)

    def forward(self, x: Tensor) -> Tensor:
        id_out = 0 if self.bn is None else self.bn(x)
        return self.act(self.conv1(x) + self.conv2(x) + id_out)


class RepNBottleneck(nn.Module):
    def __init__(self, c1: int, c2: int, shortcut: bool = True) -> None:
        super().__init__()
        self.cv1, self.cv2 = RepConvN(c1, c2, bn=shortcut), Conv(c2, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class RepNCSP(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 1) -> None:
        super().__init__()
        c_ = c2 // 2
        self.cv1, self.cv2, self.cv3 = Conv(c1, c_), Conv(c1, c_), Conv(2 * c_, c2)
        self.m = nn.Sequential(*(RepNBottleneck(c_, c_, shortcut=i != 1) for i in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class RepNCSPELAN4(nn.Module):
    def __init__(self, c1: int, c2: int, c3: int, c4: int, n: int = 1) -> None:
        super().__init__()
        self.c = c3 // 2
        self.cv1 = Conv(c1, c3, 1, 1)
        self.cv2 = nn.Sequential(RepNCSP(c3 // 2, c4, n), Conv(c4, c4, 3, 1))
        self.cv3 = nn.Sequential(RepNCSP(c4, c4, n), Conv(c4, c4, 3, 1))
        self.cv4 = Conv(c3 + 2 * c4, c2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend((m(y[-1])) for m in [self.cv2, self.cv3])
        return self.cv4(torch.cat(y, 1))


class ADown(nn.Module):
    def __init__(self, c1: int, c2: int) -> None:
        super().__init__()
        self.c = c2 // 2
        self.cv1 = Conv(c1 // 2, self.c, 3, 2, 1)
        self.cv2 = Conv(c1 // 2, self.c, 1, 1, 0)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.avg_pool2d(x, 2, 1, 0, False, True)
        x1, x2 = x.chunk(2, 1)
        x1 = self.cv1(x1)
        x2 = functional.max_pool2d(x2, 3, 2, 1)
        x2 = self.cv2(x2)
        return torch.cat((x1, x2), 1)


class SPPELAN(nn.Module):
    def __init__(self, c1: int, c2: int, c3: int) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c3, 1, 1)
        self.cv2, self.cv3, self.cv4 = (nn.MaxPool2d(5, stride=1, padding=2) for _ in range(3))
        self.cv5 = Conv(4 * c3, c2, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.cv1(x)]
        y.extend(m(y[-1]) for m in [self.cv2, self.cv3, self.cv4])
        return self.cv5(torch.cat(y, 1))


class Concat(nn.Module):
    def __init__(self, dimension: int = 1) -> None:
        super().__init__()
        self.d = dimension

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat(x, self.d)


class CBLinear(nn.Module):
    def __init__(self, c1: int, c2s: list[int]) -> None:
        super().__init__()
        self.c2s = c2s
        self.conv = nn.Conv2d(c1, sum(c2s), 1, bias=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.conv(x).split(self.c2s, dim=1)


class CBFuse(nn.Module):
    def __init__(self, idx: list[int]) -> None:
        super().__init__()
        self.idx = idx

    def forward(self, xs: list[Any]) -> Tensor:
        target_size = xs[-1].shape[2:]
        res = [
            functional.interpolate(x[self.idx[i]], size=target_size, mode="nearest")
            for i, x in enumerate(xs[:-1])
        ]
        return torch.sum(torch.stack(res + xs[-1:]), dim=0)


class DFL(nn.Module):
    """The expectation of a distribution over distances, as a convolution with fixed weights."""

    def __init__(self, c1: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)
        self.c1 = c1

    def forward(self, x: Tensor) -> Tensor:
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class Detect(nn.Module):
    """Keeps its anchors until an input of another shape comes."""

    dynamic = False
    export = False
    shape = None
    anchors = torch.empty(0)
    strides = torch.empty(0)

    def __init__(self, nc: int, ch: Sequence[int]) -> None:
        super().__init__()
        self.nc, self.nl, self.reg_max = nc, len(ch), 4
        self.no = nc + self.reg_max * 4
        self.stride = torch.tensor([4.0, 8.0])
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(c, 8, 3), Conv(8, 8, 3), nn.Conv2d(8, 4 * self.reg_max, 1))
            for c in ch
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(Conv(c, c, 3, g=c), Conv(c, 8, 1)), nn.Conv2d(8, self.nc, 1)
            )
            for c in ch
        )
        self.dfl = DFL(self.reg_max)

    def forward(self, x: list[Tensor]) -> Any:
        for i in range(self.nl):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
        if self.training:
            return x
        shape = x[0].shape
        x_cat = torch.cat([xi.view(shape[0], self.no, -1) for xi in x], 2)
        if self.dynamic or self.shape != shape:
            self.anchors, self.strides = (a.transpose(0, 1) for a in anchors_of(x, self.stride))
            self.shape = shape
        box, cls = x_cat.split((self.reg_max * 4, self.nc), 1)
        left_top, right_bottom = self.dfl(box).chunk(2, 1)
        anchors = self.anchors.unsqueeze(0)
        x1y1, x2y2 = anchors - left_top, anchors + right_bottom
        boxes = torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), 1) * self.strides
        y = torch.cat((boxes, cls.sigmoid()), 1)
        return y if self.export else (y, x)


def listed(layers: Sequence[tuple[Any, nn.Module]]) -> tuple[nn.Sequential, list[int]]:
    """Return layers that carry their number and sources, and the numbers of what is used later."""
    save: list[int] = []
    for i, (f, m) in enumerate(layers):
        tags: Any = m
        tags.i, tags.f, tags.type = i, f, type(m).__name__
        tags.np = sum(p.numel() for p in m.parameters())
        save.extend(x % i for x in ([f] if isinstance(f, int) else f) if x != -1)
    return nn.Sequential(*(m for _, m in layers)), sorted(save)


class DetectionModel(nn.Module):
    def __init__(self, layers: Sequence[tuple[Any, nn.Module]]) -> None:
        super().__init__()
        self.model, self.save = listed(layers)
        self.names = {i: f"{i}" for i in range(3)}
        self.inplace = True

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, dict):
            raise NotImplementedError("training")
        return self.predict(x, *args, **kwargs)

    def predict(self, x: Any, profile: bool = False, visualize: bool = False) -> Any:
        y: list[Any] = []
        for m in self.model:
            layer: Any = m
            if layer.f != -1:
                x = (
                    y[layer.f]
                    if isinstance(layer.f, int)
                    else [x if j == -1 else y[j] for j in layer.f]
                )
            x = layer(x)
            y.append(x if layer.i in self.save else None)
        return x


def yolov9() -> nn.Module:
    return DetectionModel(
        [
            (-1, Conv(3, 8, 3, 2)),
            (-1, Conv(8, 16, 3, 2)),
            (-1, RepNCSPELAN4(16, 16, 16, 8, n=2)),
            (-1, ADown(16, 16)),
            (-1, SPPELAN(16, 16, 8)),
            (-1, nn.Upsample(None, 2, "nearest")),
            ([-1, 2], Concat(1)),
            (-1, RepNCSPELAN4(32, 16, 16, 8)),
            (2, CBLinear(16, [8, 16])),
            ([8, 7], CBFuse([1])),
            ([9, 4], Detect(3, (16, 16))),
        ]
    )


# RT-DETR (arXiv:2304.08069)


class ConvNormLayer(nn.Module):
    def __init__(
        self, ch_in: int, ch_out: int, kernel_size: int, stride: int = 1, act: str | None = None
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            ch_in, ch_out, kernel_size, stride, padding=(kernel_size - 1) // 2, bias=False
        )
        self.norm = nn.BatchNorm2d(ch_out)
        self.act = nn.Identity() if act is None else {"relu": nn.ReLU(), "silu": nn.SiLU()}[act]

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class PResNetBlock(nn.Module):
    def __init__(self, ch_in: int, ch_out: int, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.shortcut = shortcut
        if not shortcut:
            pool = nn.AvgPool2d(2, 2, 0, ceil_mode=True)
            self.short: nn.Module = nn.Sequential(
                OrderedDict([("pool", pool), ("conv", ConvNormLayer(ch_in, ch_out, 1))])
            )
        self.branch2a = ConvNormLayer(ch_in, ch_out, 3, stride, act="relu")
        self.branch2b = ConvNormLayer(ch_out, ch_out, 3)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch2a(x)
        out = self.branch2b(out)
        short = x if self.shortcut else self.short(x)
        out = out + short
        return self.act(out)


class AIFI(nn.Module):
    """An encoder layer over the positions of a map, with embeddings that follow its size."""

    def __init__(self, c1: int, num_heads: int = 2) -> None:
        super().__init__()
        self.ma = nn.MultiheadAttention(c1, num_heads, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(c1, 2 * c1), nn.Linear(2 * c1, c1)
        self.norm1, self.norm2 = nn.LayerNorm(c1), nn.LayerNorm(c1)
        self.dropout, self.act = nn.Dropout(0.1), nn.GELU()

    @staticmethod
    def position_embedding(w: int, h: int, dim: int) -> Tensor:
        grid = torch.meshgrid(torch.arange(w, dtype=torch.float32),
                              torch.arange(h, dtype=torch.float32), indexing="ij")  # fmt: skip
        omega = 1.0 / 10000.0 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
        angles = [axis.flatten()[..., None] @ omega[None] for axis in grid]
        return torch.cat([f(a) for a in angles for f in (torch.sin, torch.cos)], 1)[None]

    def forward(self, x: Tensor) -> Tensor:
        c, h, w = x.shape[1:]
        pos = self.position_embedding(w, h, c)
        src = x.flatten(2).permute(0, 2, 1)
        q = k = src + pos.to(device=x.device, dtype=x.dtype)
        src2 = self.ma(q, k, value=src)[0]
        src = self.norm1(src + self.dropout(src2))
        src2 = self.fc2(self.dropout(self.act(self.fc1(src))))
        src = self.norm2(src + src2)
        return src.permute(0, 2, 1).view([-1, c, h, w]).contiguous()


class RepC3(nn.Module):
    def __init__(self, c1: int, c2: int, n: int = 2) -> None:
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c2, 1, 1), Conv(c1, c2, 1, 1)
        self.m = nn.Sequential(*[RepConvN(c2, c2) for _ in range(n)])
        self.cv3 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.m(self.cv1(x)) + self.cv2(x))


class RTDETRDecoder(nn.Module):
    """Chooses the positions with the best scores, and looks at values before it decides."""

    def __init__(self, ch: Sequence[int], hd: int = 8, num_queries: int = 5) -> None:
        super().__init__()
        self.hidden_dim, self.num_queries, self.shapes = hd, num_queries, []  # type: ignore[var-annotated]
        self.input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(x, hd, 1, bias=False), nn.BatchNorm2d(hd)) for x in ch
        )
        self.enc_output = nn.Sequential(nn.Linear(hd, hd), nn.LayerNorm(hd))
        self.enc_score_head, self.enc_bbox_head = nn.Linear(hd, 3), nn.Linear(hd, 4)

    def _get_encoder_input(self, x: Sequence[Tensor]) -> tuple[Tensor, list[list[int]]]:
        x = [self.input_proj[i](feat) for i, feat in enumerate(x)]
        feats, shapes = [], []
        for feat in x:
            h, w = feat.shape[2:]
            feats.append(feat.flatten(2).permute(0, 2, 1))
            shapes.append([h, w])
        return torch.cat(feats, 1), shapes

    def forward(self, x: Sequence[Tensor]) -> Any:
        feats, shapes = self._get_encoder_input(x)
        bs = feats.shape[0]
        if self.shapes != shapes:
            self.anchors = torch.cat([torch.arange(h * w) / (h * w) for h, w in shapes])
            self.valid_mask = (self.anchors > 0.05) & (self.anchors < 0.95)
            self.shapes = shapes
        features = self.enc_output(self.valid_mask[None, :, None] * feats)
        scores = self.enc_score_head(features)
        scores = scores.masked_fill(~self.valid_mask[None, :, None], -1e3)
        topk_ind = torch.topk(scores.max(-1).values, self.num_queries, dim=1).indices.view(-1)
        batch_ind = torch.arange(bs).unsqueeze(-1).repeat(1, self.num_queries).view(-1)
        queries = features[batch_ind, topk_ind].view(bs, self.num_queries, -1)
        boxes = self.enc_bbox_head(queries).sigmoid()
        mask = boxes[..., 2] * boxes[..., 3] < 0.1
        if mask.any():
            boxes = torch.where(mask[..., None], boxes.clamp(min=0.4), boxes)
        logits = scores[batch_ind, topk_ind].view(bs, self.num_queries, -1)
        return {"pred_logits": logits, "pred_boxes": boxes, "kept": int((~mask).sum())}


class RTDETR(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(
            OrderedDict(
                conv1_1=ConvNormLayer(3, 8, 3, 2, act="relu"),
                conv1_2=ConvNormLayer(8, 8, 3, act="relu"),
            )
        )
        self.res_layers = nn.ModuleList(
            [PResNetBlock(8, 8, 1, True), PResNetBlock(8, 12, 2, False)]
        )
        self.proj = Conv(12, 8, 1, 1, act=False)
        self.encoder = AIFI(8)
        self.fpn = RepC3(16, 8)
        self.decoder = RTDETRDecoder((8, 8))

    def forward(self, x: Tensor) -> Any:
        x = self.conv1(x)
        outs = []
        for layer in self.res_layers:
            x = layer(x)
            outs.append(x)
        top = self.encoder(self.proj(outs[1]))
        size = outs[0].shape[-2:]
        merged = torch.cat([functional.interpolate(top, size=size, mode="nearest"), outs[0]], 1)
        return self.decoder([self.fpn(merged), top])


# RepViT (arXiv:2307.09283)


class Conv2d_BN(nn.Sequential):
    def __init__(self, a: int, b: int, ks: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(a, b, ks, stride, ks // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(b))


class BN_Linear(nn.Sequential):
    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.add_module("bn", nn.BatchNorm1d(a))
        self.add_module("l", nn.Linear(a, b))


class Residual(nn.Module):
    def __init__(self, m: nn.Module, drop: float = 0.0) -> None:
        super().__init__()
        self.m, self.drop = m, drop

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.drop > 0:
            raise NotImplementedError("training")
        return x + self.m(x)


class RepVGGDW(nn.Module):
    """One norm inside, one behind the sum."""

    def __init__(self, ed: int) -> None:
        super().__init__()
        self.conv = Conv2d_BN(ed, ed, 3, 1, groups=ed)
        self.conv1 = nn.Conv2d(ed, ed, 1, 1, 0, groups=ed)
        self.dim = ed
        self.bn = nn.BatchNorm2d(ed)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn((self.conv(x) + self.conv1(x)) + x)


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.bn, self.act, self.gate = nn.Identity(), nn.ReLU(inplace=True), nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        x_se = x.mean((2, 3), keepdim=True)
        x_se = self.fc1(x_se)
        x_se = self.act(self.bn(x_se))
        x_se = self.fc2(x_se)
        return x * self.gate(x_se)


class RepViTBlock(nn.Module):
    def __init__(self, inp: int, oup: int, stride: int = 1, use_se: bool = True) -> None:
        super().__init__()
        self.identity = stride == 1 and inp == oup
        attention = SqueezeExcite(inp) if use_se else nn.Identity()
        if stride == 2:
            self.token_mixer = nn.Sequential(
                Conv2d_BN(inp, inp, 3, stride, groups=inp), attention, Conv2d_BN(inp, oup)
            )
        else:
            self.token_mixer = nn.Sequential(RepVGGDW(inp), attention)
        self.channel_mixer = Residual(
            nn.Sequential(Conv2d_BN(oup, 2 * oup), nn.GELU(), Conv2d_BN(2 * oup, oup))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.channel_mixer(self.token_mixer(x))


class RepViTClassifier(nn.Module):
    def __init__(self, dim: int, num_classes: int, distillation: bool = True) -> None:
        super().__init__()
        self.classifier = BN_Linear(dim, num_classes)
        self.distillation = distillation
        if distillation:
            self.classifier_dist = BN_Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Any:
        if self.distillation:
            x = self.classifier(x), self.classifier_dist(x)  # type: ignore[assignment]
            if not self.training:
                x = (x[0] + x[1]) / 2
        else:
            x = self.classifier(x)
        return x


class RepViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Sequential(Conv2d_BN(3, 4, 3, 2), nn.GELU(), Conv2d_BN(4, 8, 3, 2))]
        layers.append(RepViTBlock(8, 8))
        layers.append(Residual(Conv2d_BN(8, 8, 3, 1, groups=8), drop=0.1))
        layers.append(RepViTBlock(8, 12, 2))
        layers.append(RepViTBlock(12, 12, use_se=False))
        self.features = nn.ModuleList(layers)
        self.classifier = RepViTClassifier(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for f in self.features:
            x = f(x)
        x = functional.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(x)


# RepGhost (arXiv:2211.06088)


class RepGhostModule(nn.Module):
    """Empty sequences stand for activations that are not there."""

    def __init__(
        self, inp: int, oup: int, relu: bool = True, reparam_identity: bool = False
    ) -> None:
        super().__init__()
        self.primary_conv = nn.Sequential(
            nn.Conv2d(inp, oup, 1, 1, 0, bias=False),
            nn.BatchNorm2d(oup),
            nn.ReLU(inplace=True) if relu else nn.Sequential(),
        )
        fusion_conv: list[nn.Module] = [nn.Identity()]
        fusion_bn: list[nn.Module] = [nn.BatchNorm2d(oup)]
        if reparam_identity:
            fusion_conv.append(nn.Identity())
            fusion_bn.append(nn.Identity())
        self.fusion_conv = nn.Sequential(*fusion_conv)
        self.fusion_bn = nn.Sequential(*fusion_bn)
        self.cheap_operation = nn.Sequential(
            nn.Conv2d(oup, oup, 3, 1, 1, groups=oup, bias=False), nn.BatchNorm2d(oup)
        )
        self.relu = nn.ReLU(inplace=False) if relu else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.primary_conv(x)
        x2 = self.cheap_operation(x1)
        for conv, bn in zip(self.fusion_conv, self.fusion_bn, strict=True):
            x2 = x2 + bn(conv(x1))
        return self.relu(x2)


class RepGhostBottleneck(nn.Module):
    def __init__(
        self, in_chs: int, mid_chs: int, out_chs: int, stride: int = 1, use_se: bool = False
    ) -> None:
        super().__init__()
        self.stride, self.in_chs, self.out_chs = stride, in_chs, out_chs
        self.ghost1 = RepGhostModule(in_chs, mid_chs, relu=True)
        if stride > 1:
            self.conv_dw = nn.Conv2d(mid_chs, mid_chs, 3, stride, 1, groups=mid_chs, bias=False)
            self.bn_dw = nn.BatchNorm2d(mid_chs)
        self.se = SqueezeExcite(mid_chs) if use_se else None
        self.ghost2 = RepGhostModule(mid_chs, out_chs, relu=False, reparam_identity=True)
        self.shortcut = nn.Sequential()
        if in_chs != out_chs or stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_chs, in_chs, 3, stride, 1, groups=in_chs, bias=False),
                nn.BatchNorm2d(in_chs),
                nn.Conv2d(in_chs, out_chs, 1, 1, 0, bias=False),
                nn.BatchNorm2d(out_chs),
            )

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x1 = self.ghost1(x)
        x = self.bn_dw(self.conv_dw(x1)) if self.stride > 1 else x1
        if self.se is not None:
            x = self.se(x)
        x = self.ghost2(x)
        if not self.shortcut and self.in_chs == self.out_chs and self.stride == 1:
            return x + residual
        return x + self.shortcut(residual)


class RepGhostNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = nn.Conv2d(3, 8, 3, 2, 1, bias=False)
        self.bn1, self.act1 = nn.BatchNorm2d(8), nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(
            nn.Sequential(RepGhostBottleneck(8, 8, 8)),
            nn.Sequential(RepGhostBottleneck(8, 16, 12, 2, use_se=True)),
        )
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv_stem(x)))
        x = self.blocks(x)
        x = functional.adaptive_avg_pool2d(x, (1, 1)).view(x.size(0), -1)
        x = functional.dropout(x, p=0.2, training=self.training)
        return self.classifier(x)


# UniRepLKNet (arXiv:2311.15599)


class GRNwithNHWC(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.randn(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.randn(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        norms = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        share = norms / (norms.mean(dim=-1, keepdim=True) + 1e-6)
        return (self.gamma * share + 1) * x + self.beta


class NCHWtoNHWC(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


class NHWCtoNCHW(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)


class LayerNorm(nn.Module):
    """Of either axis, by name."""

    def __init__(self, channels: int, data_format: str = "channels_first") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels))
        self.bias = nn.Parameter(torch.rand(channels))
        self.data_format = data_format

    def forward(self, x: Tensor) -> Tensor:
        if self.data_format == "channels_last":
            return functional.layer_norm(x, (x.shape[-1],), self.weight, self.bias)
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class DilatedReparamBlock(nn.Module):
    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.lk_origin = nn.Conv2d(
            channels, channels, kernel_size, 1, kernel_size // 2, groups=channels, bias=False
        )
        self.kernel_sizes, self.dilates = [3, 3, 3], [1, 2, 3]
        self.origin_bn = nn.BatchNorm2d(channels)
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            padding = (r * (k - 1) + 1) // 2
            conv = nn.Conv2d(channels, channels, k, 1, padding, r, groups=channels, bias=False)
            self.__setattr__(f"dil_conv_k{k}_{r}", conv)
            self.__setattr__(f"dil_bn_k{k}_{r}", nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "origin_bn"):
            return self.lk_origin(x)
        out = self.origin_bn(self.lk_origin(x))
        for k, r in zip(self.kernel_sizes, self.dilates, strict=True):
            conv: Any = self.__getattr__(f"dil_conv_k{k}_{r}")
            bn: Any = self.__getattr__(f"dil_bn_k{k}_{r}")
            out = out + bn(conv(x))
        return out


class UniRepSqueeze(nn.Module):
    def __init__(self, input_channels: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(input_channels, 2, 1), nn.Conv2d(2, input_channels, 1)
        self.input_channels, self.nonlinear = input_channels, nn.ReLU(inplace=True)

    def forward(self, inputs: Tensor) -> Tensor:
        x = functional.adaptive_avg_pool2d(inputs, output_size=(1, 1))
        x = self.nonlinear(self.down(x))
        x = torch.sigmoid(self.up(x))
        return inputs * x.view(-1, self.input_channels, 1, 1)


class UniRepLKNetBlock(nn.Module):
    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.with_cp = False
        if kernel_size > 3:
            self.dwconv: nn.Module = DilatedReparamBlock(dim, kernel_size)
        else:
            self.dwconv = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim, bias=True)
        self.norm = nn.BatchNorm2d(dim)
        self.se = UniRepSqueeze(dim)
        self.pwconv1 = nn.Sequential(NCHWtoNHWC(), nn.Linear(dim, 2 * dim))
        self.act = nn.Sequential(nn.GELU(), GRNwithNHWC(2 * dim))
        self.pwconv2 = nn.Sequential(
            nn.Linear(2 * dim, dim, bias=False), NHWCtoNCHW(), nn.BatchNorm2d(dim)
        )
        self.drop_path = nn.Identity()
        self.gamma = nn.Parameter(torch.rand(dim))

    def compute_residual(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma.view(1, -1, 1, 1) * y
        return self.drop_path(y)

    def forward(self, inputs: Tensor) -> Tensor:
        def _f(x: Tensor) -> Tensor:
            return x + self.compute_residual(x)

        if self.with_cp and inputs.requires_grad:
            return checkpoint.checkpoint(_f, inputs, use_reentrant=False)
        return _f(inputs)


class UniRepLKNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(
                    nn.Conv2d(3, 4, 3, 2, 1),
                    LayerNorm(4),
                    nn.GELU(),
                    nn.Conv2d(4, 8, 3, 2, 1),
                    LayerNorm(8),
                ),
                nn.Sequential(nn.Conv2d(8, 12, 3, 2, 1), LayerNorm(12)),
            ]
        )
        self.stages = nn.ModuleList(
            [
                nn.Sequential(UniRepLKNetBlock(8, 3)),
                nn.Sequential(UniRepLKNetBlock(12, 9), UniRepLKNetBlock(12, 3)),
            ]
        )
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        for stage_idx in range(2):
            x = self.downsample_layers[stage_idx](x)
            x = self.stages[stage_idx](x)
        x = self.norm(x.mean([-2, -1]))
        return self.head(x)


class Structure(NamedTuple):
    """A network, and what the authors' own converter makes of it.

    Args:
        build: returns it.
        layers: calls of convolutions and linear layers that the converter leaves in a pass.
        blocks: classes whose `forward` sums branches, which may become something else.
        left: norms that no layer can take in, by name.
        sizes: shapes of the example input and of another one.
    """

    build: Callable[[], nn.Module]
    layers: int
    blocks: tuple[type[nn.Module], ...] = ()
    left: tuple[str, ...] = ()
    sizes: tuple[tuple[int, ...], tuple[int, ...]] = ((2, 3, 32, 32), (3, 3, 40, 56))


SQUARE = ((2, 3, 32, 32), (3, 3, 48, 48))
REP_VGG, MOBILE_ONE = (RepVGGBlock,), (MobileOneBlock,)
FAST_VIT = (MobileOneBlock, RepMixer, ReparamLargeKernelConv, RepCPE)

STRUCTURES = {
    "RepVGG": Structure(RepVGG, 5 + 1, REP_VGG),
    "RepVGG with attention": Structure(
        lambda: RepVGG(use_se=True), 5 * (1 + 2) + 1, REP_VGG, sizes=SQUARE
    ),
    "QARepVGG": Structure(lambda: RepVGG(QARepVGGBlock), 5 + 1, (QARepVGGBlock,)),
    "MobileOne, 4 branches": Structure(lambda: MobileOne(4), 1 + 3 * 2 + 1, MOBILE_ONE),
    "MobileOne with attention": Structure(
        lambda: MobileOne(1, use_se=True), 1 + 3 * 2 + 2 * 2 + 1, MOBILE_ONE
    ),
    "FastViT": Structure(
        FastViT,
        3 + 2 * 4 + 2 + 1 + 5 + 3 + 1,
        FAST_VIT,
        left=("network.3.0.norm",),  # a sum comes before it, attention behind it
    ),
    "DBB ResNet": Structure(DBBResNet, 1 + 2 + 3 + 1 + 1, (DiverseBranchBlock,)),
    "ACNet": Structure(ACNet, 4 + 1, (ACBlock,)),
    # In a detector: the layers of a pass, less one for each block of two convolutions.
    "YOLOv6-n": Structure(YOLOv6, 40 - 9, REP_VGG),
    "YOLOv6-m": Structure(lambda: YOLOv6(csp=True), 52 - 12, REP_VGG),
    "YOLOv6-lite": Structure(YOLOv6Lite, 17),
    "YOLOv9": Structure(yolov9, 58 - 6, (RepConvN,)),
    "RT-DETR": Structure(RTDETR, 27 - 2, (RepConvN,)),
    "RepViT": Structure(RepViT, 2 + 5 + 1 + 6 + 3 + 1, (RepVGGDW, RepViTClassifier)),
    "RepGhost": Structure(RepGhostNet, 1 + 4 + 9 + 1, (RepGhostModule,)),
    "RepLKNet": Structure(
        RepLKNet,
        3 + 5 + 2 + 5 + 1,
        (ReparamLargeKernelConv,),
        left=("norm",),  # a sum comes before it, pooling behind it
    ),
    "UniRepLKNet": Structure(UniRepLKNet, 3 + 3 * 5 + 1, (DilatedReparamBlock,)),
}
