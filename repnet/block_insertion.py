"""`overparameterize`: plain convolutions of any model become multi-branch blocks."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import nn

from repnet.blocks import Block
from repnet.fold.rewrite import with_attributes
from repnet.kernel import NotFoldableError
from repnet.kernel_transfer import KernelTransfer, Roles, transfer_kernels
from repnet.spec import build, load_choice
from repnet.symbolic import kernel_of

MakeBlock = Callable[..., nn.Module]
Where = str | type[nn.Module] | Callable[[str, nn.Module], bool]

GEOMETRY = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "upsample",
    "groups",
)  # fmt: skip


def overparameterize(
    model: nn.Module,
    block: str | MakeBlock = "repvgg",
    *,
    where: Where | Sequence[Where] | None = None,
    init: Literal["preserve", "paper"] = "preserve",
    batches: Iterable[Any] | None = None,
) -> nn.Module:
    """Return a copy of `model` in which plain convolutions are multi-branch blocks, for training.

    This is the inverse of `reparameterize`: each convolution that `where` selects is replaced,
    under its own name, by the affine part of a block, which folds back into a convolution of the
    same shape. After training, `reparameterize(trained, x, norms="keep")` returns the old
    architecture, key for key. Over-parameterizing a model twice changes nothing the second time.

    With `init="preserve"` the folded kernels equal the old ones: the branch with the largest kernel
    takes over the old weight, minus what the other branches contribute. Branches that end with a
    norm are scaled down so that together they contribute at most a tenth of the old kernel's size.
    The outputs are then the same in evaluation mode. In training mode each new norm divides by the
    statistics of its batch, so the first steps see a different function unless you pass `batches`,
    from which the norms learn their statistics.

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
    """Over-parameterize `model` in place, and return the names of the new modules.

    If an error is raised, the model is unchanged. Nothing inside the `excluded` modules is
    replaced. `parent` is a module around `model`: what the two share stays shared, and if `model`
    is a convolution itself, it is replaced there. All else is as for `overparameterize`.
    """
    if init not in ("preserve", "paper"):
        raise ValueError(f"init='{init}': choose 'preserve' or 'paper'")
    make = build(load_choice("block", block)) if isinstance(block, str) else block
    skipped = {id(m) for root in excluded for m in root.modules()}
    inserted = {n: m for n, m in inserted_blocks(model).items() if id(m) not in skipped}
    skipped |= {id(m) for new in inserted.values() for m in new.modules()}
    convolutions = {
        name: m
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, nn.Conv2d) and id(m) not in skipped
    }
    whole = model if parent is None else parent
    names = {m: name for root in (whole, model) for name, m in root.named_modules()}
    blocks: dict[int, nn.Module] = {}
    transfers: list[KernelTransfer] = []
    known: dict[Any, Roles] = {}  # blocks of equal shape share their analysis
    reasons = dict.fromkeys(convolutions, "not selected")
    for name, explicit in _select(model, convolutions, inserted, where).items():
        conv = convolutions[name]
        if id(conv) in blocks:
            continue
        try:
            _check_plain(conv, names)
            new = _build(conv, make)
            if init == "preserve":
                transfers.append(KernelTransfer(name, conv, new, known))
            blocks[id(conv)] = new
        except ValueError as error:
            if explicit:
                raise ValueError(f"cannot over-parameterize '{name}': {error}") from error
            reasons[name] = str(error)
    if not blocks and not inserted:
        listed = [f"'{name}' {conv}: {reasons[name]}" for name, conv in convolutions.items()]
        raise ValueError(
            "no convolution was selected and can be replaced; the model has "
            + ("; ".join(listed) or "none")
        )
    if transfers:
        transfer_kernels(model, transfers, None if batches is None else list(batches))
    for home in whole.modules():
        for key, child in home._modules.items():
            home._modules[key] = blocks.get(id(child), child)
    return [name for name, conv in convolutions.items() if id(conv) in blocks]


def inserted_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the blocks that `overparameterize` has put into `model`, by name."""
    return {n: m for n, m in model.named_modules() if "original_bias" in m.__dict__}


def conditions_of(where: Where | Sequence[Where]) -> list[Where]:
    """Return the conditions of a `where`, one of which must hold."""
    return list(where) if isinstance(where, Sequence) and not isinstance(where, str) else [where]


def matches(condition: Where, name: str, model: nn.Module) -> bool:
    """Return whether one condition of a `where` holds for the submodule of this name."""
    if isinstance(condition, str):
        return fnmatch.fnmatchcase(name, condition)
    if isinstance(condition, type):
        path = name.split(".")
        homes = (model.get_submodule(".".join(path[:i])) for i in range(len(path) + 1))
        return any(isinstance(home, condition) for home in homes)
    return condition(name, model.get_submodule(name))


def _select(
    model: nn.Module,
    convolutions: Mapping[str, nn.Conv2d],
    inserted: Mapping[str, nn.Module],
    where: Where | Sequence[Where] | None,
) -> dict[str, bool]:
    """Return the selected names, each with whether a name or a predicate selected it."""
    if where is None:
        return {name: False for name, conv in convolutions.items() if conv.kernel_size != (1, 1)}
    selected: dict[str, bool] = {}
    for condition in conditions_of(where):
        names = [name for name in convolutions if matches(condition, name, model)]
        if isinstance(condition, str) and not names and not fnmatch.filter(inserted, condition):
            raise ValueError(
                f"where='{condition}' matches no convolution; there are "
                + (", ".join(convolutions) or "none")
            )
        for name in names:
            selected[name] = selected.get(name, False) or not isinstance(condition, type)
    return selected


def _check_plain(conv: nn.Conv2d, names: Mapping[nn.Module, str]) -> None:
    if type(conv) is not nn.Conv2d:
        raise ValueError(f"{type(conv).__name__} has a forward of its own")
    if conv._forward_hooks or conv._forward_pre_hooks:
        raise ValueError("it has a forward hook; remove it first")
    for key, parameter in conv.named_parameters(recurse=False):
        for other, name in names.items():
            ties = [f"{name}.{k}" for k, p in other._parameters.items() if p is parameter]
            if ties and other is not conv:
                raise ValueError(f"its {key} is also '{ties[0]}', and a block would untie the two")


def _build(conv: nn.Conv2d, make: MakeBlock) -> nn.Module:
    """Return the affine part of a block of the convolution's shape, dtype, device and state."""
    if conv.stride[0] != conv.stride[1]:
        raise ValueError(f"blocks have one stride, the convolution has {conv.stride}")
    target = kernel_of(deepcopy(conv).to("meta"), conv.in_channels)
    settings: dict[str, Any] = {"stride": conv.stride[0], "groups": conv.groups}
    taken = inspect.signature(make).parameters
    for what, (vertical, horizontal) in (
        ("kernel_size", conv.kernel_size),
        ("padding", [before for before, after in target.padding]),
        ("dilation", conv.dilation),
    ):
        if what in taken:
            settings[what] = vertical if vertical == horizontal else (vertical, horizontal)
    try:
        new = make(conv.in_channels, conv.out_channels, **settings)
    except TypeError as error:  # most blocks have one number for both sides
        raise ValueError(f"the block cannot be built: {error}") from error
    if isinstance(new, Block) or not _is_affine(new, conv.in_channels):
        new = getattr(new, "conv", new)
    kernel = kernel_of(deepcopy(new).to("meta"), conv.in_channels)
    for what in GEOMETRY:
        ours, theirs = getattr(kernel, what), getattr(target, what)
        if ours != theirs:
            raise ValueError(f"the block has {what} {ours}, the convolution has {theirs}")
    weight = conv.weight
    if weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous():
        new = new.to(memory_format=torch.channels_last)
    new = new.to(device=weight.device, dtype=weight.dtype).train(conv.training)
    if not weight.requires_grad:
        new.requires_grad_(False)
    new.original_bias = conv.bias is not None  # type: ignore[assignment]
    return with_attributes(new, conv)  # a forward may ask for its stride


def _is_affine(module: nn.Module, in_channels: int) -> bool:
    try:
        kernel_of(module, in_channels)
    except NotFoldableError:
        return False
    return True
