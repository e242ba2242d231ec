"""What the models of fuzz_forwards.py are made of: Python as people write it in forwards.

Capitals are filled in: C channels, CONV a random convolution that keeps channels and size, NORM a
batch norm, MARKED one that alone consumes a convolution and so must fold, ACT an activation;
of `[[a||b]]` one is chosen.
"""

HEADER = """
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune, weight_norm
from torch.utils.checkpoint import checkpoint


def randomize(model):
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 2)
            if module.weight is not None:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()
"""

# Classes of other people's code, as one finds them; a script holds those that it uses.
CLASSES = """
class ClampedConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).clamp(-2, 2)

class SizedConv(nn.Conv2d):
    def forward(self, x):
        y = super().forward(x)
        return y if x.shape[-1] <= 9 else F.relu(y)

class ScaledConv(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.randn(self.out_channels, 1, 1))

    def forward(self, x):
        return super().forward(x) * self.gain

class IdentityConv(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 1, bias=False)
        self.id_tensor = torch.eye(channels).reshape(channels, channels, 1, 1)

    def forward(self, x):
        return F.conv2d(x, self.weight + self.id_tensor.to(self.weight.dtype))

class LoraConv(nn.Conv2d):
    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1)
        self.down = nn.Parameter(torch.randn(2, channels * 9))
        self.up = nn.Parameter(torch.randn(channels, 2))

    def forward(self, x):
        weight = self.weight + (self.up @ self.down).view_as(self.weight)
        return self._conv_forward(x, weight, self.bias)

class StandardConv(nn.Conv2d):
    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, training=True
        ).reshape_as(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

class SameConv(nn.Conv2d):
    def forward(self, x):
        pads = [(-(n // -s) - 1) * s + k - n for n, s, k in
                zip(x.shape[2:], self.stride, self.kernel_size)]
        (top, left) = (max(p, 0) for p in pads)
        x = F.pad(x, [left // 2, left - left // 2, top // 2, top - top // 2])
        return F.conv2d(x, self.weight, self.bias, self.stride)

class Frozen(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.register_buffer("weight", torch.randn(channels))
        self.register_buffer("running_var", torch.rand(channels) + 0.5)

    def forward(self, x):
        scale = self.weight.reshape(1, -1, 1, 1) * (self.running_var + 1e-5).rsqrt()[:, None, None]
        return x * scale + 0.5

class ActNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.leaky_relu(super().forward(x))

class CheckedNorm(nn.BatchNorm2d):
    def forward(self, x):
        if x.dim() != 4:
            raise ValueError("not a feature map")
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias,
                            self.training or self.running_mean is None, 0.1, self.eps)

class FlaggedNorm(nn.BatchNorm2d):
    def forward(self, x, relu=False):
        y = super().forward(x)
        return F.relu(y) if relu else y

class ConvNorm(nn.Sequential):
    def __init__(self, channels, kernel_size=3):
        super().__init__()
        self.add_module("c", nn.Conv2d(channels, channels, kernel_size, padding="same", bias=False))
        self.add_module("bn", nn.BatchNorm2d(channels, eps=1e-3))

class ConvNormAct(nn.Module):
    def __init__(self, channels, act=nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.act = act() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.features(x))

    def features(self, x):
        return self.bn(self.conv(x))

class Skip(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x, skip=None):
        y = self.bn(self.conv(x))
        return y if skip is None else y + skip

class PadNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = F.pad(self.bn(x), [1] * 4)
        value = self.bn.bias - self.bn.running_mean * self.bn.weight / torch.sqrt(
            self.bn.running_var + self.bn.eps)
        value = value.view(1, -1, 1, 1)
        y[:, :, 0:1, :] = value
        y[:, :, -1:, :] = value
        y[:, :, :, 0:1] = value
        y[:, :, :, -1:] = value
        return y

class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)

class Chain(nn.Sequential):
    def forward(self, x, times=1):
        for _ in range(times):
            for layer in self:
                x = layer(x)
        return x

class Last(nn.ModuleList):
    def forward(self, x):
        outputs = []
        for layer in self:
            x = layer(x)
            outputs.append(x)
        return outputs[-1]

class Result(OrderedDict):
    logits = property(lambda self: self["logits"])

Named = namedtuple("Named", "logits taps")

@dataclass
class Output:
    logits: Tensor
    taps: list
"""

# A word of PARTS in a statement is a layer or tensor of the module, one of ARGUMENTS an argument
# of forward: `good(conv(x))` reads `self.good7(self.conv7(x))`, and makes both.
PARTS = {
    "conv": "CONV",
    "twin": "CONV",
    "dense": "nn.Conv2d(C, C, 3, padding=1, bias=[[True||False]])",
    "point": "nn.Conv2d(C, C, 1, bias=[[True||False]])",
    "depth": "nn.Conv2d(C, C, 3, padding=1, groups=C)",
    "valid": "nn.Conv2d(C, C, 3, bias=[[True||False]])",
    "left": "nn.Conv2d(C, C // 2, 3, padding=1)",
    "right": "nn.Conv2d(C, C // 2, 1)",
    "widen": "nn.Conv2d(C, 2 * C, 1, bias=False)",
    "narrow": "nn.Conv2d(2 * C, C, 1)",
    "double": "nn.ConvTranspose2d(C, C, 2, stride=2, groups=[[1||2]])",
    "linear": "nn.Linear(C, C)",
    "line": "nn.Conv1d(C, C, 3, padding=1)",
    "gru": "nn.GRU(C, C, batch_first=True)",
    "norm": "NORM",
    "other": "NORM",
    "good": "MARKED",
    "fine": "MARKED",
    "best": "MARKED",
    "halfnorm": "nn.BatchNorm2d(C // 2, eps=1e-3)",
    "widenorm": "nn.BatchNorm2d(2 * C, eps=1e-3)",
    "norm1": "nn.BatchNorm1d(C)",
    "good1": "nn.BatchNorm1d(C, eps=1e-3)",
    "good3": "nn.BatchNorm3d(C, eps=1e-3)",
    "pair3": "nn.BatchNorm3d(2)",
    "batch": "nn.BatchNorm2d(C, track_running_stats=False)",
    "norms": "nn.ModuleList([NORM, NORM])",
    "named": 'nn.ModuleDict({"a": NORM, "b": NORM})',
    "pairs": "nn.ModuleList([nn.Sequential(CONV, MARKED), nn.Sequential(CONV, MARKED)])",
    "flagged": "FlaggedNorm(C)",
    "block": "ConvNormAct(C[[||, act=None]])",
    "skipper": "Skip(C)",
    "padnorm": "PadNorm(C)",
    "drop": "nn.Dropout(0.1)",
    "nothing": "None",
    "gamma": "nn.Parameter(torch.randn(C, 1, 1))",
    "gain": "nn.Parameter(torch.randn(C))",
    "shift": "nn.Parameter(torch.randn(C))",
    "kernel": "nn.Parameter(torch.randn(C, C, 3, 3))",
    "moving_mean": "nn.Buffer(torch.randn(C))",
    "moving_var": "nn.Buffer(torch.rand(C) + 0.5)",
    "calls": "0",
    "mode": '"a"',
    "cache": "None",
    "seen": "",
}
ARGUMENTS = {
    "flag": ("True", "False"),
    "domain": ('"a"', '"b"'),
    "index": ("0", "1"),
    "extra": ("None", "torch.ones(1, C, 1, 1)"),
    "factor": ("1.0", "0.5"),
}
# Statements are separated by "; ". What stands before " -- " belongs to the constructor; "~" says
# that the size changes, "!" that the idiom sees its whole module and so gets one of its own.
IDIOMS = {
    "norm behind convolution": [
        "x = good(conv(x))",
        "y = conv(x); y = good(y); x = ACT(y)",
        "x = ACT(good(conv(input=x)))",
        "x = good(drop(conv(x)))",
        "x = good(conv(x) * 0.5 + 1.0)",
        "x = fine(good(conv(x)))",
        "y = good(conv(x)); x = y * torch.sigmoid(y)",
        "x = block.features(x)",
        "with torch.no_grad(): y = good(conv(x)); x = ACT(y)",
        "~x = good(double(x))",
        "x = F.avg_pool2d(good(double(x)), 2)",
    ],
    "branches": [
        "x = ACT(good(dense(x)) + fine(point(x)) + best(x))",
        "y = good(dense(x)); y = y + fine(point(x)); x = ACT(y)",
        "y = good(dense(x)); y += fine(point(x)); x = ACT(y)",
        "x = ACT(good(dense(x)) + (0 if nothing is None else nothing(x)) + fine(point(x)))",
        "y = 0; for branch in pairs: y [[+= branch(x)||= y + branch(x)]]; x = ACT(y)",
        "x = ACT(sum(branch(x) for branch in pairs))",
        "x = ACT(torch.stack([branch(x) for branch in pairs]).sum(0))",
        "x = ACT(good(dense(x)) - fine(point(x)))",
        "x = ACT(good(dense(x) + point(x)))",
        "y = dense(x); y.add_(point(x)); x = ACT(good(y))",
        "x = ACT(dense(x) + point(x) + x)",
        "x = ACT(good(dense(x)) + F.batch_norm(x, moving_mean, moving_var, gain, shift))",
    ],
    "concatenation": [
        "y = torch.cat([left(x), right(x)], 1); x = ACT(good(y))",
        "x = torch.cat((halfnorm(left(x)), right(x)), dim=1)",
        "a, b = x.chunk(2, 1); x = torch.cat([a, right(torch.cat([b, a], 1))], 1); x = norm(x)",
        "a, b = conv(x).split(C // 2, dim=1); x = norm(torch.cat([b, a], 1))",
        "x = narrow(torch.cat([x, good(conv(x))], 1))",
        "x = conv(x[:, torch.arange(C).flip(0)]); x = norm(x)",
    ],
    "residual": [
        "x = ACT(x + good(conv(x)))",
        "x = x + good(conv(ACT(fine(twin(x)))))",
        "x = x + conv(ACT(norm(x)))",
        "y = x; x = good(conv(x)); x += y",
        "x = x + gamma * good(conv(x))",
        "x = torch.add(x, good(conv(x)), alpha=0.5)",
        "x = x + drop(good(narrow(ACT(widenorm(widen(x))))))",
    ],
    "chain": [
        "x = fine(point(good(depth(x))))",
        "x = ACT(best(point(ACT(fine(depth(x))))))",
        "x = narrow(widen(x))",
        "x = good(dense(point(x)))",
        "x = good(narrow(widenorm(widen(x))))",
    ],
    "arguments": [
        "y = conv(x); x = norm(y) if flag else y",
        "y = conv(x); if flag: y = norm(y); x = ACT(y)",
        "if not flag: x = x * 2; x = good(conv(x))",
        "x = named[domain](conv(x))",
        'x = norm(conv(x)) if domain == "a" else ACT(conv(x))',
        "x = norms[index](conv(x))",
        "for _ in range(index + 1): x = norm(conv(x))",
        "y = conv(x); x = norm(y if extra is None else y + extra)",
        "x = good(conv(x)); if extra is not None: x = x + extra",
        "x = norm(conv(x) * factor)",
        "x = flagged(conv(x), flag)",
        "x = flagged(conv(x), [[bool(x.mean() > 0.1)||relu=x.shape[-1] > 9||relu=flag]])",
        "x = skipper(skipper(x), x)",
        "x = skipper(x[[||, skip=x||, extra]])",
        'y = conv(x); x = norm(y) if mode == "a" else y',
    ],
    "reshape": [
        "y = conv(x); b, c, h, w = y.shape; x = good1(y.[[reshape||view]](b, c, h * w)).view_as(y)",
        "y = conv(x); x = good1(y.flatten(2)).unflatten(2, y.shape[2:])",
        "x = good(conv(x).transpose(2, 3)).transpose(2, 3)",
        "x = good3(conv(x).unsqueeze(2)).squeeze(2)",
        "y = conv(x).permute(0, 2, 3, 1); x = good1(y.reshape(-1, C)).reshape(y.shape)"
        ".permute(0, 3, 1, 2)",
        "y = conv(x); x = norm(y.transpose(0, 1).reshape(y.shape[0], C, *y.shape[2:]))",
        "y = conv(x); x = norm1(y.permute(0, 2, 3, 1).reshape(len(y), C, -1)).reshape(y.shape)",
        "y = conv(x); x = norm(y.mT.reshape(y.shape))",
        "y = conv(x); x = norm1(y.view(len(y), -1, C).transpose(1, 2)).reshape(y.shape)",
        "x = norm(conv(x).[[flip(1)||roll(1, 1)||flip(0)||roll(1, 2)]])",
        "y = conv(x); z = pair3(y.view(len(y), 2, C // 2, *y.shape[2:])); x = z.reshape(y.shape)",
        "y = conv(x); z = y.unflatten(1, (2, -1)).transpose(1, 2); x = norm(z.reshape(y.shape))",
        "y = x.flatten(2).transpose(1, 2); y = linear(y); x = good1(y.transpose(1, 2)).view_as(x)",
        "y = linear(x.flatten(2).mT); x = norm1(y.reshape(len(y), C, -1)).reshape(x.shape)",
        "y = x.mean((2, 3)); x = x * torch.sigmoid(good1(linear(y)))[:, :, None, None]",
        "x = good1(line(x.flatten(2))).reshape(x.shape)",
        "y = good1(linear(x.permute(0, 2, 3, 1).reshape(-1, C))); x = x + y.mean()",
    ],
    "shared": [
        "x = norm(conv(x)) + other(conv(x))",
        "for _ in range(2): x = norm(conv(x))",
        "x = norm(conv(x)) + norm(twin(x))",
        "y = conv(x); x = norm(y) + y",
        "twin = conv -- x = norm(conv(x)) + twin(x)",
        "clone = dense; clone.weight = kernel; dense.weight = kernel -- x = norm(dense(x))",
        "x = norm(F.relu(conv(x))) + norm(conv(x))",
        "x = block(block(x))",
    ],
    "functional": [
        "x = F.batch_norm(conv(x), moving_mean, moving_var, gain, shift, False, 0.1, 1e-3)",
        "x = F.batch_norm(input=conv(x), running_mean=moving_mean, running_var=moving_var, "
        "weight=[[gain||None]], training=self.training, eps=1e-3)",
        "x = F.batch_norm(conv(x), good.running_mean, good.running_var, good.weight, good.bias, "
        "eps=good.eps)",
        "y = F.conv2d([[x||input=x]], weight=kernel, bias=[[shift||None]], padding=1); x = good(y)",
        "x = good(F.conv2d(x, dense.weight[[||* 2||+ kernel]], padding=[[1||'same']]))",
        "x = good(dense._conv_forward(x, dense.weight * kernel, dense.bias))",
        "x = good(F.conv2d(x, kernel.softmax(1), shift, 1, 1))",
        "x = norm(F.conv2d(x, kernel * x.mean(), shift, padding=1))",
        "y = (conv(x) - moving_mean[:, None, None]) / torch.sqrt(moving_var[:, None, None]); "
        "x = y * gain.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)",
        "x = torch.batch_norm(conv(x), gain, shift, moving_mean, moving_var, False, 0.1, 1e-3, "
        "False)",
    ],
    "computed weight": [
        "dense = parametrizations.weight_norm(dense) -- x = good(dense(x))",
        "dense = parametrizations.spectral_norm(dense) -- x = norm(dense(x))",
        "dense = weight_norm(dense) -- x = norm(dense(x))",
        'prune.l1_unstructured(dense, "weight", 0.5) -- x = norm(dense(x))',
    ],
    "in place": [
        "y = conv(x); [[y.relu_()||F.relu_(y)||F.relu(y, inplace=True)]]; x = norm(y)",
        "y = conv(x); z = norm(y); y.mul_(2.0); x = z + y",
        "y = conv(x); y [[*= 2||+= x||-= 1]]; x = norm(y)",
        "y = conv(x); y[:, :1] = 0.0; x = norm(y)",
        "y = conv(x); y.flatten(2).clamp_(min=0); x = norm(y)",
        "y = conv(x); z = y[:, 0]; x = norm(y); z.zero_(); x = x + y",
        "y = conv(x); torch.add(y, 1.0, out=y); x = norm(y)",
        "x *= 0.5; x = good(conv(x))",
        "y = good(conv(x)); y.relu_(); x = y",
        "y = torch.empty_like(x); y[:, :C // 2] = left(x); y[:, C // 2:] = right(x); x = norm(y)",
        "y = x; x = x + 1; y.mul_(2); x = norm(conv(x)) + y",
    ],
    "kept aside": [
        "seen = conv(x); x = ACT(norm(seen))",
        "x = seen = good(conv(x))",
        "y = conv(x); seen = [y.mean(), {'y': y.detach()}]; x = norm(y)",
        "x = good(conv(x)); seen = x.shape[-1]",
        "calls += 1; y = conv(x); x = norm(y) if calls % 2 else y",
        "if cache is None or cache.shape != x.shape: cache = torch.ones_like(x) * 0.1; "
        "x = norm(conv(x) + cache)",
    ],
    "hooks": [
        "conv.register_forward_hook(lambda m, a, y: setattr(m, 'seen', y)) -- x = norm(conv(x))",
        "conv.register_forward_hook(lambda m, a, y: y.abs()) -- x = norm(conv(x))",
        "norm.register_forward_pre_hook(lambda m, a: (a[0] * 2,)) -- x = norm(conv(x))",
        "norm.register_forward_hook(lambda m, a, y: setattr(m, 'seen', y)) -- x = norm(conv(x))",
        "block.register_forward_hook(lambda m, a, y: y * 2) -- x = block(x)",
    ],
    "control flow": [
        "y = conv(x); x = norm(y) if [[x.shape[-1] > 9||x.size(0) == 1||len(x) > 1]] else y",
        "y = conv(x); x = norm(y) if [[x.mean() > 0.1||float(x.sum()) > 0.1||bool((x > 0).any())]] "
        "else y",
        "y = good(conv(x)); x = y if [[y.sum() > 0||y.shape[2] % 2 == 0||x.numel() > 999]] else -y",
        "~while x.shape[-1] > 14: x = F.max_pool2d(x, 2); x = good(conv(x))",
        "for _ in range(x.shape[0]): x = norm(conv(x))",
        "x = torch.cat([norm(conv(image)) for image in x.split(1)])",
        "y = conv(x); x = norm(y) if [[torch.is_grad_enabled()||y.requires_grad]] else y",
        "y = conv(x); x = norm(y) if x.dtype == torch.float64 else y",
        "assert x.dtype == conv.weight.dtype, 'dtype'; x = good(conv(x))",
        "if self.training: raise RuntimeError('training'); x = good(conv(x))",
        "if not isinstance(x, Tensor): raise TypeError('tensor'); x = good(conv(x))",
        "if torch.jit.is_tracing() or x.is_cuda: x = x * 2; x = good(conv(x))",
        "y = good(conv(x)); for i in range(y.shape[1]): y = y + (i - 1) * y.mean(); x = y",
    ],
    "sizes": [
        "y = ACT(good(conv(x))); x = y * F.avg_pool2d(y, kernel_size=y.shape[2:])",
        "y = ACT(good(conv(x))); x = F.interpolate(F.adaptive_avg_pool2d(y, 3), size=y.shape[2:])",
        "y = good(conv(x)); x = y.roll((y.shape[2] // 2,), (2,))",
        "y = good(conv(x)); x = y / y.shape[2] ** 0.5 + torch.arange(y.shape[3]).to(y.dtype)",
        "y = good(conv(x)); x = y + y.new_ones(y.shape[0], 1, *y.shape[2:])",
        "y = good(conv(x)); y = F.pad(y, (0, y.shape[3] % 2)); x = y[..., : x.shape[3]]",
        "y = good(conv(x)).flatten(2); x = (y.mT @ y / y.shape[2]).softmax(1).mean() * x",
        "x = x + gru(x.mean(2).transpose(1, 2))[0].transpose(1, 2).unsqueeze(2)",
    ],
    "borders": [
        "x = norm(valid(F.pad(x, [1, 1, 1, 1])))",
        "x = good(valid(F.pad(x, (1, 1, 1, 1))))",
        "x = dense(norm(x))",
        "~x = valid(good(x))",
        "x = point(good(x))",
        "~x = norm(F.pad(conv(x), (1, 1, 1, 1)))",
        "~x = norm(valid(x) + point(x[:, :, 1:-1, 1:-1]))",
        "~x = padnorm(x)",
        "x = good(valid(padnorm(point(x))))",
        "x = good(valid(F.pad(x, (1, 1, 1, 1), [['reflect'||'replicate']])))"
        " if min(x.shape[2:]) > 1 else x",
    ],
    "norms of the batch": [
        "x = batch(conv(x))",
        "x = F.batch_norm(conv(x), None, None, training=True)",
        "x = F.instance_norm(conv(x))",
        "x = F.layer_norm(conv(x), x.shape[1:])",
    ],
    "reads its parts": [
        "x = good(conv(x)) / good.num_features",
        "y = good(conv(x)); x = y * (1 if conv.bias is None else 2) + conv.out_channels",
        "!x = norm(conv(x)); seen = sum(p.pow(2).sum() for p in self.parameters())",
        "!conv; norm -- for layer in self.children(): x = layer(x)",
        "!x = norm(conv(x)); x = x * sum(isinstance(m, nn.BatchNorm2d) for m in self.children())",
        "x = norm(conv(x)) + norm.weight.view(1, -1, 1, 1)",
        "x = norm(conv(x)) - norm.running_mean.mean()",
        "x = good(conv(x.to(conv.weight.dtype)))",
        "!x = x.to(next(self.parameters()).device); x = norm(conv(x))",
        "x = block(x) * block.bn.eps + block.conv.kernel_size[0]",
        "for name, layer in named.items(): x = layer(conv(x)) if name == 'a' else ACT(layer(x))",
        "x = norms[-1](conv(x)); x = x * len(norms)",
    ],
}
TAP = "taps.append(x)"  # of the outermost forward only, which returns them
LAYERS = [
    *["CONV"] * 8,
    *["NORM"] * 5,
    *["nn.Sequential(CONV, MARKED)", "nn.Sequential(CONV, MARKED, nn.ReLU())", "ConvNorm(C)"] * 2,
    "ConvNormAct(C[[||, None]])",
    "nn.Sequential(OrderedDict(conv=CONV, norm=MARKED))",
    "nn.[[ReLU||SiLU||GELU||PReLU||Identity||Tanh]]()",
    "nn.ReLU(inplace=True)",
    "nn.[[Dropout||Dropout2d]](0.2)",
    "nn.[[AvgPool2d||MaxPool2d]](3, 1, 1)",
    "nn.GroupNorm(2, C)",
    "nn.InstanceNorm2d(C, affine=True, track_running_stats=[[True||False]])",
    "nn.BatchNorm2d(C, track_running_stats=False)",
    "nn.SyncBatchNorm(C)",
    "nn.ChannelShuffle(2)",
    "~nn.[[ZeroPad2d||ReflectionPad2d]](1)",
    "~nn.Conv2d(C, C, 3, stride=2, padding=1)",
    "~nn.ConvTranspose2d(C, C, 3, stride=2, padding=1)",
    "~nn.AvgPool2d(2)",
    "~SameConv(C, C, 3, stride=2)",
    "[[ClampedConv||SizedConv||ScaledConv||StandardConv]](C, C, 3, padding=1)",
    "nn.Sequential(SameConv(C, C, 3), MARKED)",
    "nn.Sequential([[ScaledConv||StandardConv]](C, C, 3, padding=1), MARKED)",
    "nn.Sequential([[IdentityConv||LoraConv]](C), MARKED)",
    "nn.Sequential(CONV, [[CheckedNorm||FlaggedNorm]](C, eps=1e-3))",
    "[[IdentityConv||LoraConv||Frozen||ActNorm||CheckedNorm||FlaggedNorm||Skip]](C)",
]
# ITEMS are the children; a BLOCK is a class of its own, whose forward holds their statements.
HOLDERS = {
    "nn.Sequential(ITEMS)": ["x = HELD(x)", "x = HELD(input=x)", "x = HELD[1:](HELD[:1](x))"],
    "nn.ModuleList([ITEMS])": [
        "for layer in HELD: x = layer(x)",
        "for i in range(len(HELD)): x = HELD[i](x)",
        "for i, layer in enumerate(HELD): x = layer(x) if i else layer(x) * 2",
        "y = [x]; y.extend(layer(y[-1]) for layer in HELD); x = y[-1]",
    ],
    "nn.ModuleDict({NAMED})": ["for layer in HELD.values(): x = layer(x)"],
    "Chain(ITEMS)": ["x = HELD(x)", "x = HELD(x, times=2)"],
    "Last([ITEMS])": ["x = HELD(x)"],
}
CALLS = [  # of a BLOCK, which takes arguments
    *["x = HELD(xGIVEN)"] * 3,
    "x = HELD(HELD(xGIVEN)GIVEN)",
    "x = checkpoint(HELD, xGIVEN, use_reentrant=False)",
    "x = HELD.forward(xGIVEN)",
]

# What forward takes and how it is unpacked, what it is called with, and what it returns.
TAKES = {
    "x": ("", {"x": "x"}),
    "x, z": ("x = x + z", {"x": "x", "z": "0.5 * x"}),
    "batch": ("x = batch['image']", {"batch": "{'image': x}"}),
    "images": ("x = torch.cat(images)", {"images": "[x, x + 1]"}),
}
GIVES = [
    *["x"] * 3,
    *["x, taps", "[x, {'taps': taps, 'none': None}]", "{'logits': x, 'taps': taps}"],
    *["OrderedDict(logits=x, taps=taps)", "Named(x, taps)", "Output(x, taps)"],
    *["Result(logits=x, taps=taps)", "x.mean((2, 3)), x.shape"],
]
