"""`freeze`: parts of a network that stay as they are, which makes sense of trained weights only."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from repnet.errors import InputError
from repnet.spec import is_own

REQUIRED = "required"  # what a recipe for trained weights says in place of `pretrained`


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Stop the training of parts of a network; return their names, those of parts within left out.

    Args:
        model: its parameters are changed.
        patterns: globs for names of modules (`*` matches dots, too).

    Raises:
        InputError: one selects nothing, or nothing is left to train.
    """
    names = [name for name, _ in model.named_modules() if name]
    frozen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            children = ", ".join(name for name, _ in model.named_children())
            raise InputError(
                f"freeze: '{pattern}' is no part of {type(model).__name__}, which has {children} "
                "and parts within, such as " + (names[-2] if len(names) > 1 else "none")
            )
        frozen |= found
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    if frozen and not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(
            f"freeze={list(patterns)} leaves nothing to train; leave out the head, at least"
        )
    return [n for n in names if n in frozen and not any(n.startswith(f"{f}.") for f in frozen)]


def refuse_frozen_noise(config: dict[str, Any]) -> None:
    """Refuse to hold random weights as they are.

    Args:
        config: of a run that starts anew.

    Raises:
        InputError: parts are frozen, or the recipe wants trained weights, and there are none.
    """
    remedy = "add pretrained=PATH: a run, a checkpoint, or weights of another library"
    if config["pretrained"] == REQUIRED:
        raise InputError(f"this recipe fine-tunes trained weights; {remedy}")
    if config["pretrained"] or not is_own({"_target_": config["model"]["_target_"]}):
        return  # a model of one's own may bring its weights
    norms = "repnet.callbacks.FreezeBatchNorm"
    if any(spec and spec.get("_target_") == norms for spec in config["callbacks"].values()):
        raise InputError(f"freeze_norms holds norms that have not seen an image; {remedy}")
    if config["freeze"]:
        raise InputError(f"freeze={config['freeze']} holds random weights; {remedy}")
