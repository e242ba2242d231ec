"""`Graph`: what quantization has to know of an exported file, the same for every format."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from repnet.errors import InputError

# layer: convolution or matrix with a constant weight; affine: a scale, shift or norm of one tensor;
# sum: of two tensors; quantizer: of an int8 file.
Kind = Literal["layer", "affine", "norm", "sum", "quantizer", "other"]

# In front of a module's name: of TorchScript, and of `repnet.deploy.preprocess.Preprocessed`.
_PREFIXES = ("self.", "__module.")
_PREPROCESSED = "model."

REMEDY = (
    "fold first, then quantize: python deploy.py ckpt=RUN/checkpoints/best.ckpt, or "
    "repnet.reparameterize(model, images) before the export"
)


@dataclass(frozen=True)
class Node:
    """One operation.

    Args:
        name: unique in the file.
        kind: see `Kind`.
        inputs: names of the operations whose results it takes, without constants; "" for the input
            of the graph.
        modules: names in the file that tell which torch module it was.
        kernel: of a layer: groups, height, width; None for a matrix.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    modules: tuple[str, ...] = ()
    kernel: tuple[int, int, int] | None = None


class Graph:
    """The operations of an exported file, in the order in which they run.

    Args:
        file: for messages.
        nodes: of the file.
    """

    def __init__(self, file: str, nodes: Iterable[Node]) -> None:
        self.file = file
        self.nodes = {node.name: node for node in nodes}

    def check(self) -> None:
        """Do nothing if the file is a folded network in float.

        Raises:
            InputError: it is in int8 already, or in train form.
        """
        for node in self.nodes.values():
            if node.kind == "quantizer":
                raise InputError(
                    f"'{self.file}' is in int8 form already; quantize the fp32 file beside it"
                )
            if node.kind == "norm":
                raise InputError(
                    f"'{self.file}' is in train form: it holds the batch norm '{node.name}'; "
                    + REMEDY
                )
            if node.kind == "sum" and self._is_one_convolution(node):
                raise InputError(
                    f"'{self.file}' is in train form: '{node.name}' adds branches that are one "
                    f"convolution; {REMEDY}"
                )

    def layers_of(self, modules: Sequence[str]) -> list[str]:
        """Return the names of the operations that torch modules became.

        Args:
            modules: names of convolutions or linear layers of the folded model.

        Raises:
            InputError: the file does not tell which operation a module is.
        """
        layers = [node for node in self.nodes.values() if node.kind == "layer"]
        names = []
        for module in modules:
            wanted = (module, f"{_PREPROCESSED}{module}")
            for name in wanted:
                found = [n.name for n in layers if name in map(_without_prefix, n.modules)]
                if found:
                    break
            else:
                known = sorted({_without_prefix(m) for node in layers for m in node.modules})
                raise InputError(
                    f"'{self.file}': no operation is the module '{module}', which is to stay in "
                    f"float; the file names {', '.join(known[:6]) or 'none'}"
                    + (f" and {len(known) - 6} more" if len(known) > 6 else "")
                )
            names += found
        return names

    def before_layers(self) -> list[str]:
        """Return the names of the operations between the input and the first layers."""
        reached = {""}
        for node in self.nodes.values():
            if node.kind != "layer" and any(name in reached for name in node.inputs):
                reached.add(node.name)
        return [name for name in self.nodes if name in reached]

    def _is_one_convolution(self, node: Node) -> bool:
        """Return whether a sum is of branches that a fold would have merged."""
        branches = self._branches(node)
        kernels = [kernel for _, kernel in branches if kernel is not None]
        if len({root for root, _ in branches}) > 1 or not kernels:
            return False
        groups, heights, widths = zip(*kernels, strict=True)
        area = sum(height * width for _, height, width in kernels)
        # Nothing is folded that would grow: other groups, or 1x3 with 3x1.
        return len(set(groups)) == 1 and max(heights) * max(widths) <= area

    def _branches(self, node: Node) -> list[tuple[str, tuple[int, int, int] | None]]:
        """Return what a sum adds: the tensor where each branch begins, and its only convolution."""
        branches = []
        for name in node.inputs:
            kernel = None
            while (inner := self.nodes.get(name)) is not None:
                if inner.kind == "layer" and inner.inputs and inner.kernel and not kernel:
                    kernel = inner.kernel
                elif inner.kind not in ("affine", "norm") or not inner.inputs:
                    break
                name = inner.inputs[0]
            if inner is not None and inner.kind == "sum" and kernel is None:
                branches += self._branches(inner)
            else:
                branches.append((name, kernel))
        return branches


def _without_prefix(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name
