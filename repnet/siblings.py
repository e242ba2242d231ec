"""`find_chains`: norms that alone consume a convolution, though no module holds just the two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from repnet.kernel import NotFoldableError
from repnet.symbolic import kernel_of

Convolution = nn.Conv2d | nn.ConvTranspose2d


@dataclass(frozen=True)
class Chain:
    """A convolution and what follows it.

    Args:
        names: of the convolution and of the channelwise layers that each alone consume what comes
            before; the last one holds parameters or buffers.
        shared: the first of them that `forward` also uses in another way, None where none is.
    """

    names: tuple[str, ...]
    shared: str | None


def find_chains(model: nn.Module, name: str = "") -> Iterator[Chain]:
    """Yield the chains in all parts of `model` that torch.fx can trace, in order of execution.

    Args:
        model: in evaluation mode.
        name: prefix of the yielded names.
    """
    if not any(isinstance(m, Convolution) for m in model.modules()):
        return
    prefix = f"{name}." if name else ""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # forward is anyone's code; where it branches, its parts are tried
        for child_name, child in model.named_children():
            yield from find_chains(child, prefix + child_name)
        return
    calls = Counter(str(n.target) for n in graph.nodes if n.op == "call_module")
    read = [str(n.target) for n in graph.nodes if n.op == "get_attr"]
    for node in graph.nodes:
        names = _chain(model, node)
        if len(names) > 1:
            uses = {n: calls[n] + sum(r.startswith(f"{n}.") for r in read) for n in names}
            shared = next((prefix + n for n in names if uses[n] > 1), None)
            yield Chain(tuple(prefix + n for n in names), shared)


def _chain(model: nn.Module, node: fx.Node) -> list[str]:
    """Return the names of the chain that begins at `node`; empty if no convolution is called."""
    conv = model.get_submodule(str(node.target)) if node.op == "call_module" else None
    if not isinstance(conv, Convolution):
        return []
    names, length = [str(node.target)], 1
    while len(node.users) == 1:
        (user,) = node.users
        if user.op != "call_module" or user.args != (node,) or user.kwargs:
            break
        layer = model.get_submodule(str(user.target))
        try:
            if not kernel_of(layer, conv.out_channels).is_channelwise:
                break
        except NotFoldableError:
            break
        names.append(str(user.target))
        if next(layer.parameters(), None) is not None or next(layer.buffers(), None) is not None:
            length = len(names)  # a dropout or a fixed number at the end stays
        node = user
    return names[:length]


class _Tracer(fx.Tracer):
    """Stops at every layer without children, also at those of other libraries."""

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        no_children = next(module.children(), None) is None
        return no_children or super().is_leaf_module(module, qualified_name)
