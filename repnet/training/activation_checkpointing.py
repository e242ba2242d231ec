"""Activation checkpointing: less memory for more computation, in any model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

from repnet.errors import InputError

Where = str | type[nn.Module]


def checkpoint_activations(model: nn.Module, where: Where | Sequence[Where]) -> list[str]:
    """Let parts of a model keep only their inputs in training, and compute the rest a second time.

    Gradients are those of the plain model, bit by bit where the operations are deterministic, and
    so are buffers: the second computation starts from the buffers (running statistics) and the
    random numbers (dropout) of the first, and leaves none of its own. Names, keys and types of the
    modules stay, copies and folded models work, and evaluation is as before.

    Args:
        model: changed in place; not for compiled models, where torch.compile decides this itself.
        where: names of submodules, in which `*` and `?` stand for any characters (`stages.*` is
            each stage), or classes such as `repnet.blocks.Block`. Of parts inside one another the
            outer one is taken.

    Returns:
        The names of the parts.

    Raises:
        InputError: nothing in the model is meant.

    Example:
        >>> checkpoint_activations(repnet.create_model("repvgg_b1"), "stages.*")
        ['stages.0', 'stages.1', 'stages.2', 'stages.3']
    """
    wanted = [where] if isinstance(where, str | type) else list(where)
    modules = dict(model.named_modules())
    chosen: set[str] = set()
    for what in wanted:
        names = [name for name in modules if _means(what, name, modules[name])]
        if not names:
            children = ", ".join(name for name, _ in model.named_children())
            raise InputError(
                f"cannot checkpoint '{what if isinstance(what, str) else what.__name__}': "
                f"{type(model).__name__} has no such part; it has {children or 'no parts'}, "
                "and what is inside them"
            )
        chosen.update(names)
    outer = [n for n in modules if n in chosen and not any(_inside(n, other) for other in chosen)]
    for name in outer:
        module = modules[name]
        forward = vars(module).get("forward")
        if forward is not None and getattr(forward, "func", None) is not _forward:
            raise InputError(
                f"cannot checkpoint '{name}': something has replaced its forward already"
            )
        # A partial is copied together with its module, a bound method or a closure is not.
        module.forward = functools.partial(_forward, module)
    return outer


def _means(what: Where, name: str, module: nn.Module) -> bool:
    if isinstance(what, str):
        return bool(name) and fnmatchcase(name, what)
    return isinstance(module, what)


def _inside(name: str, other: str) -> bool:
    return name != other and (not other or name.startswith(f"{other}."))


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    run: Callable[..., Any] = functools.partial(type(module).forward, module)
    if not torch.is_grad_enabled() or not module.training:
        return run(*args, **kwargs)
    before = [
        (part, name, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None and part.training
    ]
    modes = _get_current_function_mode_stack()  # the backward pass runs outside of them
    contexts = lambda: (nullcontext(), _Again(before, modes))
    return checkpoint(run, *args, use_reentrant=False, context_fn=contexts, **kwargs)


class _Again:
    """Gives modules copies of these buffers, and torch these modes, while it is entered.

    It can be entered again.
    """

    def __init__(
        self, buffers: list[tuple[nn.Module, str, Tensor]], modes: Sequence[TorchFunctionMode]
    ) -> None:
        self.buffers, self.modes = buffers, modes

    def __enter__(self) -> None:
        self.entered = ExitStack()
        for mode in self.modes:
            self.entered.enter_context(mode)
        self.own = [part._buffers[name] for part, name, _ in self.buffers]
        for part, name, buffer in self.buffers:
            part._buffers[name] = buffer.clone()

    def __exit__(self, *exception: object) -> None:
        for (part, name, _), own in zip(self.buffers, self.own, strict=True):
            part._buffers[name] = own
        self.entered.close()
