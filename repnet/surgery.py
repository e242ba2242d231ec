"""`overparameterize`: plain convolutions of any model become multi-branch modules."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from repnet.blocks import Block
from repnet.equivalence import FoldMismatchError, Inputs
from repnet.fold.rewrite import with_attributes
from repnet.kernel import ConvKernel, NotFoldableError
from repnet.spec import build, load_choice
from repnet.symbolic import evaluating, kernel_of

MakeBlock = Callable[..., nn.Module]
Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]

# Each branch beside the one that takes over the old weight starts with this share of its norm.
SHARE = 0.1
# Of the largest value that enters the folded kernel, in roundings of the stored dtype.
ROUNDINGS = 8


def overparameterize(
    model: nn.Module,
    block: str | MakeBlock = "repvgg",
    *,
    where: Where | Sequence[Where] | None = None,
    init: Literal["preserve", "paper"] = "preserve",
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Return a copy of `model` in which plain convolutions are sums of branches, to be trained.

    The inverse of `reparameterize`: each convolution that `where` selects is replaced, under its
    own name, by the affine part of a block, which folds back into a convolution of the same shape.
    `reparameterize(trained, x, norms="keep")` then returns the old architecture, key for key.
    Over-parameterizing a model twice changes nothing the second time.

    With `init="preserve"` the folded kernels are the old ones: the branch with the largest kernel
    takes over the old weight, minus what the others contribute, and each other branch that ends
    with a norm starts with a tenth of the old kernel's size. This holds in evaluation mode. In
    training mode each new norm divides by the statistics of its batch, so the first steps see a
    different function unless you pass `batches`, from which the norms learn their statistics.

    A frozen convolution becomes frozen branches. As with every frozen norm, their running
    statistics still move in training mode: put them into evaluation mode, or skip frozen
    convolutions with `where=lambda name, conv: conv.weight.requires_grad`.

    Args:
        model: any module; hyper-parameters, dtypes, devices and memory formats are kept.
        block: a name in `configs/block`, or a callable as in `repnet.blocks`; `kernel_size`,
            `padding` and `dilation` are passed if its signature names them. If the module that it
            returns is not affine as a whole, only its submodule `conv` is used.
        where: a glob for names (`*` also matches dots), a predicate of `(name, module)`, a type (of
            the convolution, or of a module around it), or a list of these, one of which must hold.
            None selects every convolution larger than 1x1, grouped and depthwise ones included.
            With None or a type, a convolution stays as it is if the block cannot represent it, or
            if it shares a parameter with another module. With a name or a predicate, that is an
            error.
        init: "preserve" for further training; "paper" leaves the branches at their own
            initialization, for training from scratch.
        batches: with "preserve", a few inputs or `(input, target)` pairs, on the model's device,
            which give the new norms their statistics. All are kept in memory and run twice.

    Raises:
        ValueError: no convolution can be replaced, or one that was selected by name or predicate
            cannot.
        FoldMismatchError: a block does not fold to its convolution.

    Example:
        >>> model = overparameterize(torchvision.models.resnet18(weights="DEFAULT"), "dbb")
    """
    model = deepcopy(model)
    parent = nn.ModuleDict({"model": model})  # so that the model itself may be replaced
    insert_blocks(model, block, where=where, init=init, batches=batches, parent=parent)
    return parent["model"]


def insert_blocks(
    model: nn.Module,
    block: str | MakeBlock = "repvgg",
    *,
    where: Where | Sequence[Where] | None = None,
    init: Literal["preserve", "paper"] = "preserve",
    batches: Iterable[Any] | None = None,
    excluded: Iterable[nn.Module] = (),
    parent: nn.Module | None = None,
) -> list[str]:
    """Over-parameterize `model` in place; if an error is raised, the model is unchanged.

    Args:
        model: changed.
        block: see `overparameterize`.
        where: see `overparameterize`.
        init: see `overparameterize`.
        batches: see `overparameterize`.
        excluded: modules within which nothing is replaced.
        parent: a module around `model`, which may be a convolution itself; modules and parameters
            that the parent shares with `model` stay shared.

    Returns:
        The names of the new modules.

    Raises:
        ValueError: see `overparameterize`.
        FoldMismatchError: see `overparameterize`.
    """
    if init not in ("preserve", "paper"):
        raise ValueError(f"init='{init}': choose 'preserve' or 'paper'")
    make = build(load_choice("block", block)) if isinstance(block, str) else block
    convolutions, inserted = _convolutions(model, excluded)
    selected = _select(model, convolutions, inserted, where)
    swaps: dict[int, _Swap] = {}
    known: dict[Any, _Roles | None] = {}
    whole = model if parent is None else parent
    holders = _holders(model, whole)
    reasons: dict[str, str] = {}
    for name, (conv, explicit) in selected.items():
        if id(conv) in swaps:
            continue
        try:
            _check_untied(conv, holders)
            swaps[id(conv)] = _Swap(name, conv, make, init, known)
        except ValueError as error:
            if explicit:
                raise ValueError(f"cannot over-parameterize '{name}': {error}") from error
            reasons[name] = str(error)
    if not swaps and not inserted:
        listed = [f"'{n}' {_describe(c)}: {reasons.get(n, 'not selected')}"
                  for n, c in convolutions.items()]  # fmt: skip
        raise ValueError(
            "no convolution was selected and can be replaced; the model has "
            + ("; ".join(listed) or "none")
        )
    if swaps and init == "preserve":
        _preserve(model, list(swaps.values()), None if batches is None else list(batches))
    for home in whole.modules():
        for key, child in home._modules.items():
            if id(child) in swaps:
                home._modules[key] = swaps[id(child)].new
    return [name for name, conv in convolutions.items() if id(conv) in swaps]


def inserted_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks that `overparameterize` has put into `model`, by name."""
    return {n: m for n, m in model.named_modules() if "original_bias" in m.__dict__}


def _convolutions(
    model: nn.Module, excluded: Iterable[nn.Module]
) -> tuple[dict[str, nn.Conv2d], list[str]]:
    """Return the convolutions outside of inserted blocks under all their names, and those blocks.

    A subclass may do anything in its forward, and so is not a plain convolution.
    """
    skipped = {id(m) for root in excluded for m in root.modules()}
    inserted = inserted_blocks(model)
    inside = skipped | {id(m) for block in inserted.values() for m in block.modules()}
    every = model.named_modules(remove_duplicate=False)
    found = {name: m for name, m in every if isinstance(m, nn.Conv2d) and id(m) not in inside}
    return found, [name for name, m in inserted.items() if id(m) not in skipped]


def _select(
    model: nn.Module,
    convolutions: dict[str, nn.Conv2d],
    inserted: list[str],
    where: Where | Sequence[Where] | None,
) -> dict[str, tuple[nn.Conv2d, bool]]:
    """Return the selected convolutions, each with whether it was named rather than only found."""
    if where is None:
        return {n: (conv, False) for n, conv in convolutions.items() if conv.kernel_size != (1, 1)}
    selected: dict[str, tuple[nn.Conv2d, bool]] = {}
    for condition in (
        where if isinstance(where, Sequence) and not isinstance(where, str) else [where]
    ):
        if isinstance(condition, type):
            homes = [m for m in model.modules() if isinstance(m, condition)]
            inside = {id(m) for home in homes for m in home.modules()}
            names = [name for name, conv in convolutions.items() if id(conv) in inside]
        elif isinstance(condition, str):
            names = [name for name in convolutions if fnmatchcase(name, condition)]
            if not names and not any(fnmatchcase(name, condition) for name in inserted):
                raise ValueError(
                    f"where='{condition}' matches no convolution; there are "
                    + (", ".join(convolutions) or "none")
                )
        else:
            names = [name for name, conv in convolutions.items() if condition(name, conv)]
        explicit = not isinstance(condition, type)
        for name in names:
            conv, before = selected.get(name, (convolutions[name], False))
            selected[name] = (conv, before or explicit)
    return selected


def _describe(conv: nn.Conv2d) -> str:
    height, width = conv.kernel_size
    return f"({height}x{width}, {conv.in_channels} to {conv.out_channels})"


@dataclass(frozen=True)
class _Roles:
    """What the layers of a block do in its kernel, by name.

    Args:
        main: the convolution that takes over the old weight.
        path: the norms behind it.
        ends: the norms at the end of the other branches.
        bias: the layer whose bias takes over the old one, if there is one.
    """

    main: str
    path: list[str]
    ends: list[str]
    bias: str | None


class _Swap:
    """A convolution, and the module that takes its place.

    Nothing is known of the block but its kernel, and how the kernel depends on the parameters.

    Args:
        name: of the convolution.
        old: the convolution.
        make: the block.
        init: of the branches.
        known: roles of the layers by shape, each found once; new shapes are added.

    Raises:
        ValueError: the block cannot represent the convolution.
    """

    def __init__(
        self, name: str, old: nn.Conv2d, make: MakeBlock, init: str, known: dict[Any, _Roles | None]
    ) -> None:
        if type(old) is not nn.Conv2d:
            raise ValueError(f"{type(old).__name__} has a forward of its own")
        if old._forward_hooks or old._forward_pre_hooks:
            raise ValueError("it has a forward hook; remove it first")
        self.name, self.old = name, old
        with torch.no_grad():
            self.target = kernel_of(old, old.in_channels, dtype=torch.float64)
        self.new = new = _build(old, make, self.target.padding)
        new.original_bias = old.bias is not None  # type: ignore[assignment]
        with_attributes(new, old)  # a forward may ask for its stride
        shape = (repr(old), repr(new), *((n, p.shape) for n, p in new.named_parameters()))
        if shape not in known:
            meta = kernel_of(deepcopy(new).to("meta"), old.in_channels)
            _check_geometry(meta, self.target)
            known[shape] = self._analyze() if init == "preserve" else None
        if (roles := known[shape]) is not None:
            layers: dict[str, Any] = dict(new.named_modules())
            self.main: nn.Conv2d = layers[roles.main]
            self.path: list[_BatchNorm] = [layers[name] for name in roles.path]
            self.ends: list[_BatchNorm] = [layers[name] for name in roles.ends]
            self.bias = None if roles.bias is None else layers[roles.bias].bias

    def _probe(
        self, *free: Tensor | None, dtype: torch.dtype = torch.float64
    ) -> tuple[ConvKernel, list[Tensor]]:
        """Return the kernel, and the leaves on which it depends in place of `free`."""
        twin = deepcopy(self.new).to(dtype).requires_grad_(False)
        pairs = zip(self.new.parameters(), twin.parameters(), strict=True)
        copies = {id(parameter): leaf for parameter, leaf in pairs}
        leaves = [copies[id(p)].requires_grad_() for p in free if p is not None]
        with torch.enable_grad():
            return kernel_of(twin, self.old.in_channels), leaves

    @torch.no_grad()
    def _analyze(self) -> _Roles:
        """Find the convolution that can take over the old weight, the norms behind it, and a bias.

        Raises:
            ValueError: there is none.
        """
        twin = _randomized(deepcopy(self.new).double()).requires_grad_()
        with torch.enable_grad():
            kernel = kernel_of(twin, self.old.in_channels)
        layers: dict[str, Any] = dict(twin.named_modules())
        norms = {n: m for n, m in layers.items() if isinstance(m, _BatchNorm) and m.affine}
        convs = {n: m for n, m in layers.items() if type(m) is nn.Conv2d}
        mains = (name for name, conv in convs.items() if _answers(kernel.weight, conv.weight))
        if (main := next(mains, None)) is None:
            raise ValueError("no branch of the block has a convolution that can take its weight")
        # A norm follows it if its weight scales what the kernel owes to the main weight.
        with torch.enable_grad():
            (owed,) = torch.autograd.grad(
                kernel.weight.sum(), [convs[main].weight], create_graph=True
            )
        scales = _gradients(owed, [norm.weight for norm in norms.values()])
        path = [name for name, scale in zip(norms, scales, strict=True) if scale.any()]
        biases = [
            name
            for name in (*reversed(path), main, *reversed(norms), *convs)
            if layers[name].bias is not None
            and kernel.bias is not None
            and _answers(kernel.bias, layers[name].bias)
        ]
        if not biases and self.target.bias is not None:
            raise ValueError("no branch of the block has a bias")
        ends = [name for name in norms if name in biases and name not in path]
        return _Roles(main, path, ends, biases[0] if biases else None)

    def start(self) -> None:
        """Make what follows the main convolution the identity, and the other branches small."""
        for norm in self.path:
            norm.reset_running_stats()
            norm.weight.fill_((1 + norm.eps) ** 0.5)
            norm.bias.zero_()
        rough = torch.promote_types(self.old.weight.dtype, torch.float32)  # twice as fast
        kernel, leaves = self._probe(self.main.weight, dtype=rough)
        scale = self._scale(kernel, leaves[0])
        weights = [norm.weight.clone() for norm in self.ends]
        for norm in self.ends:
            norm.weight.zero_()
        rest = kernel_of(self.new, self.old.in_channels)
        size = _norms(kernel.weight - rest.weight)
        wanted = SHARE * _norms(self.target.weight)
        factor = torch.where(size > wanted, wanted / size, 1.0)
        for norm, weight in zip(self.ends, weights, strict=True):
            norm.weight.copy_(weight * factor)
            norm.bias.mul_(factor)
        if self.path and self.path[-1].num_features == len(scale):
            self.path[-1].weight.div_(scale)  # so that the old learning rate fits the new weight

    def _scale(self, kernel: ConvKernel, leaf: Tensor) -> Tensor:
        """Return the factor of each output channel of the main weight in the kernel.

        Raises:
            ValueError: a factor is zero, because a scale of the block is zero in the stored dtype.
        """
        scale = _slope(kernel.weight, leaf)
        if not scale.abs().min() > 1e-9 * scale.abs().max():
            raise ValueError(
                f"cannot over-parameterize '{self.name}': a scale of the block is zero, perhaps "
                f"only in {self.old.weight.dtype}; do it in float32"
            )
        return scale

    def solve(self) -> None:
        """Set the main weight, and the bias, so that the kernel is that of the convolution."""
        kernel, leaves = self._probe(self.main.weight, self.bias)
        scale = self._scale(kernel, leaves[0]).reshape(-1, 1, 1, 1)
        self.main.weight.copy_(leaves[0] + (self.target.weight - kernel.weight) / scale)
        if self.bias is not None:
            assert kernel.bias is not None
            target = 0.0 if self.target.bias is None else self.target.bias
            slope = _slope(kernel.bias, leaves[1])
            self.bias.copy_(leaves[1] + (target - kernel.bias) / slope)

    def check(self) -> None:
        """Do nothing if the kernel is that of the convolution, up to rounding.

        Raises:
            FoldMismatchError: it is not.
        """
        kernel = kernel_of(self.new, self.old.in_channels, dtype=torch.float64)
        pairs = [(self.target.weight, kernel.weight, self.main.weight)]
        if kernel.bias is not None:
            zero = torch.zeros_like(kernel.bias)
            target = zero if self.target.bias is None else self.target.bias
            pairs.append((target, kernel.bias, zero if self.bias is None else self.bias))
        for expected, actual, parameter in pairs:
            scale = max(expected.abs().max().item(), parameter.abs().max().item())
            error = (expected - actual).abs().max().item()
            if not error <= ROUNDINGS * torch.finfo(self.old.weight.dtype).eps * scale:
                raise FoldMismatchError(
                    f"the block that replaces '{self.name}' does not fold to it: the kernels "
                    f"differ by {error:.1e} at values up to {scale:.1e}",
                    self.name,
                )


def _holders(model: nn.Module, whole: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the modules that hold each parameter, by its identity, and its name in each."""
    names = {m: name for root in (whole, model) for name, m in root.named_modules()}
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for m, name in names.items():
        for key, parameter in m._parameters.items():
            found.setdefault(id(parameter), []).append((m, f"{name}.{key}"))
    return found


def _check_untied(conv: nn.Conv2d, holders: dict[int, list[tuple[nn.Module, str]]]) -> None:
    for key, parameter in conv.named_parameters(recurse=False):
        for other, name in holders[id(parameter)]:
            if other is not conv:
                raise ValueError(f"its {key} is also '{name}', and a block would untie the two")


def _check_geometry(kernel: ConvKernel, target: ConvKernel) -> None:
    for what in ("kernel_size", "stride", "padding", "dilation", "upsample", "groups"):
        ours, theirs = getattr(kernel, what), getattr(target, what)
        if ours != theirs:
            raise ValueError(f"the block has {what} {ours}, the convolution has {theirs}")
    if kernel.weight.shape != target.weight.shape:
        raise ValueError(
            f"the block maps {kernel.in_channels} to {kernel.out_channels} channels, the "
            f"convolution {target.in_channels} to {target.out_channels}"
        )


def _randomized(module: nn.Module) -> nn.Module:
    """Return `module` without any zero or one by which its branches only happen to be alike."""
    for parameter in module.parameters():
        parameter.uniform_(0.5, 1.5)
    for m in module.modules():
        if isinstance(m, _BatchNorm) and m.running_mean is not None and m.running_var is not None:
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 1.5)
    return module


def _answers(output: Tensor, leaf: Tensor) -> bool:
    """Return whether `output` is `a * leaf + constant`, one nonzero number a per channel."""
    if output.shape != leaf.shape:
        return False
    direction = torch.rand_like(output)
    slope = _slope(output, leaf)
    (along,) = _gradients(output, [leaf], direction)
    error = along - slope.reshape(-1, *[1] * (output.ndim - 1)) * direction
    tolerance = 1e-9 * slope.abs().max()
    return bool(slope.abs().min() > tolerance and error.abs().max() <= 9 * tolerance)


def _slope(output: Tensor, leaf: Tensor) -> Tensor:
    """Return the a of `output = a * leaf + constant`, one number per channel."""
    return _gradients(output, [leaf])[0].reshape(len(leaf), -1)[:, 0]


def _gradients(output: Tensor, leaves: list[Tensor], factor: Tensor | None = None) -> list[Tensor]:
    """Return the gradients of the sum of `output`, weighted with `factor`."""
    factor = torch.ones_like(output) if factor is None else factor
    if not (leaves and output.requires_grad):
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(output, leaves, factor, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]


def _norms(weight: Tensor) -> Tensor:
    """Return the length of each output channel's part of a weight."""
    return weight.flatten(1).norm(dim=1)


def _build(conv: nn.Conv2d, make: MakeBlock, padding: tuple[tuple[int, int], ...]) -> nn.Module:
    """Return the affine part of a block of the convolution's shape, dtype, device and state."""
    if conv.stride[0] != conv.stride[1]:
        raise ValueError(f"blocks have one stride, the convolution has {conv.stride}")
    settings: dict[str, Any] = {"stride": conv.stride[0], "groups": conv.groups}
    known = inspect.signature(make).parameters
    before, after = zip(*padding, strict=True)
    for what, value, default in (
        ("kernel_size", conv.kernel_size, None),
        ("padding", before, before if before != after else None),
        ("dilation", conv.dilation, (1, 1)),
    ):
        if what in known and value != default:
            settings[what] = value[0] if value[0] == value[1] else value
    try:
        new = make(conv.in_channels, conv.out_channels, **settings)
    except TypeError as error:  # most blocks have one number for both sides
        raise ValueError(f"the block cannot be built: {error}") from error
    if isinstance(new, Block) or not _is_affine(new, conv.in_channels):
        new = getattr(new, "conv", new)
    weight = conv.weight
    channels_last = weight.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not weight.is_contiguous():
        new = new.to(memory_format=torch.channels_last)
    new = new.to(device=weight.device, dtype=weight.dtype).train(conv.training)
    return new if weight.requires_grad else new.requires_grad_(False)


def _is_affine(module: nn.Module, channels: int) -> bool:
    try:
        kernel_of(module, channels)
    except NotFoldableError:
        return False
    return True


@torch.no_grad()
def _preserve(model: nn.Module, swaps: list[_Swap], batches: list[Any] | None) -> None:
    """Give every new module the kernel of its convolution."""
    if batches is not None:
        with _averaging([m for swap in swaps for m in swap.new.modules()]):
            _run(model, swaps, batches)
    for swap in swaps:
        swap.start()
        swap.solve()
    if batches is not None:
        # What the norms behind a main convolution receive depends on the weight found above.
        with _observing(swaps):
            _run(model, swaps, batches)
        for swap in swaps:
            swap.solve()
    for swap in swaps:
        swap.check()


def _run(model: nn.Module, swaps: list[_Swap], batches: list[Any]) -> None:
    """Feed each new module what its convolution receives in the old model, in evaluation mode."""

    def feed(swap: _Swap) -> Any:
        def hook(conv: nn.Module, args: Any, kwargs: Any) -> None:
            swap.new(*args, **kwargs)

        return swap.old.register_forward_pre_hook(hook, with_kwargs=True)

    handles = [feed(swap) for swap in swaps]
    try:
        with evaluating(model):
            for batch in batches:
                Inputs.of(batch)(model)
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _averaging(modules: list[nn.Module]) -> Iterator[None]:
    """Let the statistics of all norms become the averages over what comes, in training mode."""
    modes = [module.training for module in modules]
    norms = [m for m in modules if isinstance(m, _BatchNorm)]
    momentums = [norm.momentum for norm in norms]
    for module in modules:
        module.training = True
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for norm, momentum in zip(norms, momentums, strict=True):
            norm.momentum = momentum


@contextmanager
def _observing(swaps: list[_Swap]) -> Iterator[None]:
    """Give the norms of the main paths the statistics of what comes; their maps stay as they are.

    In evaluation mode, in which each norm receives what the final module will give it.
    """
    modules = [m for swap in swaps for m in swap.new.modules()]
    modes = [module.training for module in modules]
    observers: dict[_BatchNorm, nn.BatchNorm2d] = {}
    handles = []
    for norm in (n for swap in swaps for n in swap.path):
        observer = nn.BatchNorm2d(norm.num_features, momentum=None, affine=False)
        observers[norm] = observer.to(norm.weight)
        handles.append(norm.register_forward_pre_hook(lambda n, args: _see(observers[n], args)))
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
    for norm, observer in observers.items():
        mean, variance = observer.running_mean, observer.running_var
        assert mean is not None
        assert variance is not None
        norm.running_mean, norm.running_var = mean, variance
        factor = norm.weight / (1 + norm.eps) ** 0.5  # its statistics were 0 and 1
        norm.weight.copy_(factor * (variance + norm.eps).sqrt())
        norm.bias.add_(factor * mean)


def _see(observer: nn.Module, args: Any) -> None:
    observer(*args)
