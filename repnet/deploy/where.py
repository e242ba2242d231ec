"""Where the parameters and the multiplications of a network are, in both of its forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from repnet.complexity import count_macs_by_part, count_parameters

MOST = 40  # parts into which a sequence of stages is divided
REST = "(outside these)"


def where(
    train_form: nn.Module, deploy_form: nn.Module, input_shape: Sequence[int]
) -> list[dict[str, Any]]:
    """Return parameters and multiply-adds of each stage, a part of the network, in both forms.

    Args:
        train_form: its children are the parts; a sequence of stages among them is divided.
        deploy_form: has the same parts under the same names; one that it lacks counts nothing.
        input_shape: `(channels, height, width)` of the image.

    Returns:
        `{name, parameters, macs}` by part, in the order of the network, the last two as
        `{train_form, deploy_form}`. What lies outside of all parts is a row of its own, so that
        each column adds up to the whole.
    """
    names = parts(train_form)
    forms = {"train_form": train_form, "deploy_form": deploy_form}
    counts = {form: _count(model, input_shape, names) for form, model in forms.items()}
    rows = []
    for position, name in enumerate((*names, REST)):
        row: dict[str, Any] = {"name": name}
        for index, kind in enumerate(("parameters", "macs")):
            row[kind] = {form: counts[form][position][index] for form in forms}
        if any((*row["parameters"].values(), *row["macs"].values())):
            rows.append(row)
    return rows


def parts(model: nn.Module) -> list[str]:
    """Return the names of the parts that a reader thinks of: the stem, each stage, the head."""
    prefix = ""
    children = dict(model.named_children())
    while len(weighty := [n for n, m in children.items() if count_parameters(m)]) == 1:
        name = weighty[0]  # a wrapper
        if not dict(children[name].named_children()):
            break
        prefix += f"{name}."
        children = dict(children[name].named_children())
    staged = [name for name, child in children.items() if _is_staged(child)]
    names = []
    for name, child in children.items():
        if staged == [name] and len(child) <= MOST:  # type: ignore[arg-type]
            names += [f"{prefix}{name}.{inner}" for inner, _ in child.named_children()]
        else:
            names.append(prefix + name)
    return names


def _is_staged(module: nn.Module) -> bool:
    """Whether a module is a sequence of sequences of blocks, or of blocks that have branches."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and any(
        dict(inner.named_children()) for child in module for inner in child.children()
    )


def _count(
    model: nn.Module, input_shape: Sequence[int], names: Sequence[str]
) -> list[tuple[int, int]]:
    """Return parameters and multiply-adds of each part, and last of the rest."""
    modules = dict(model.named_modules(remove_duplicate=False))
    macs = count_macs_by_part(model, input_shape, [n for n in names if n in modules])
    counted: set[int] = set()
    counts = []
    for name in names:
        mine = modules[name].parameters() if name in modules else ()
        new = {id(p): p.numel() for p in mine if id(p) not in counted}
        counted |= new.keys()
        counts.append((sum(new.values()), macs.get(name, 0)))
    rest = count_parameters(model) - sum(parameters for parameters, _ in counts)
    return [*counts, (rest, macs[""])]
