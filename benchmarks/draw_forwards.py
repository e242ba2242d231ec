"""Draws small models and writes them down as Python source.

A model is a tree of steps (lines of a forward) and nests (modules that hold steps), each of which
takes a feature map of C channels to one of C channels, so that any can be left out again.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import count
from random import Random

import torch
from forward_idioms import (
    ARGUMENTS,
    CALLS,
    CLASSES,
    GIVES,
    HEADER,
    HOLDERS,
    IDIOMS,
    LAYERS,
    PARTS,
    TAKES,
    TAP,
)

MARK = 1e-3  # eps of the norms that are foldable by construction; no other norm has it
WORD = r"(?<![\w.'\"])[A-Za-z_]\w*"
LIBRARY = {
    re.findall(r"class (\w+)|^(\w+) =", text)[0][0] or text.split()[0]: text
    for text in re.split(r"\n\n(?=\S)", CLASSES.strip())
}
Values = dict[str, tuple[str, ...]]  # of arguments, by name


@dataclass(frozen=True)
class Step:
    """Lines of a forward, or a layer.

    Args:
        forward: these lines.
        init: lines of the constructor.
        arguments: taken from the forward around it, with the values that they can have.
        layer: an expression that makes the layer, if it is one.
        number: in all its names.
        keeps: the size of the feature map.
    """

    forward: tuple[str, ...]
    init: tuple[str, ...] = ()
    arguments: tuple[tuple[str, tuple[str, ...]], ...] = ()
    layer: str = ""
    number: int = 0
    keeps: bool = True


@dataclass(frozen=True)
class Nest:
    """A module that holds others.

    Args:
        holder: what makes it, "BLOCK" for a class whose forward is its children's lines.
        call: how it is called.
        passing: how arguments are handed on.
        children: what it holds.
        number: in all its names.
    """

    holder: str
    call: str
    passing: str
    children: tuple[Step | Nest, ...]
    number: int

    @property
    def keeps(self) -> bool:
        return all(child.keeps for child in self.children)


Node = Step | Nest


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Args:
        shape: of x.
        values: of further arguments, as source; those left out have their defaults.
        positional: whether arguments are passed by position as far as possible.
        offset: added to x, so that the sign of its values differs.
        grad: whether gradients are enabled.
    """

    shape: tuple[int, ...]
    values: tuple[tuple[str, str], ...] = ()
    positional: bool = False
    offset: float = 0.0
    grad: bool = False

    def source(self, takes: str, names: Iterable[str]) -> str:
        """Return what stands between the parentheses, for arguments of these names."""
        parts, by_position, values = [*TAKES[takes][1].values()], self.positional, dict(self.values)
        for name in names:
            by_position = by_position and name in values
            if name in values:
                parts.append(values[name] if by_position else f"{name}={values[name]}")
        return ", ".join(parts)

    def example(self, takes: str, names: Iterable[str]) -> str:
        """Return the same as an expression for the example of a fold."""
        text, own, values = self.source(takes, names), TAKES[takes][1], dict(self.values)
        if text == "x":
            return "x"
        if not any(f"{name}=" in text for name in names):
            return f"({text},)"
        given = {**own, **{name: values[name] for name in names if name in values}}
        return "{" + ", ".join(f'"{name}": {value}' for name, value in given.items()) + "}"


@dataclass(frozen=True)
class Case:
    """A model, the call at which it is folded, and those at which it is compared.

    Args:
        seed: of its weights and inputs.
        nodes: what its forward does.
        calls: the first that runs is the example.
        takes: of TAKES.
        gives: of GIVES.
        dtype: of weights and inputs.
        warm: it has run once before it is folded.
        training: it is in training mode when it is folded.
    """

    seed: int
    nodes: tuple[Node, ...]
    calls: tuple[Call, ...]
    takes: str = "x"
    gives: str = "x"
    dtype: torch.dtype = torch.float64
    warm: bool = False
    training: bool = False

    def written(self) -> tuple[str, list[str]]:
        """Return the source of all classes, and the names of the arguments of `Net`."""
        writer = Writer()
        unpack = TAKES[self.takes][0].splitlines()
        values = writer.write("Net", self.nodes, self.takes, [*unpack, "taps = []"], self.gives)
        text = "\n\n\n".join(writer.classes)
        library = [c for name, c in LIBRARY.items() if re.search(rf"\b{name}\b", text)]
        return "\n\n\n".join([HEADER.strip(), *library, text]) + "\n", list(values)


class Writer:
    """Writes nodes down as classes, inner ones first."""

    def __init__(self) -> None:
        self.classes: list[str] = []

    def write(
        self, name: str, nodes: Iterable[Node], takes: str, first: list[str], gives: str
    ) -> Values:
        """Add a class; return the arguments that its forward has besides `takes`.

        Args:
            name: of the class.
            nodes: what its forward does.
            takes: what forward is given.
            first: the first lines of forward.
            gives: what it returns.
        """
        init, forward, values = ["super().__init__()"], list(first), Values()
        for node in nodes:
            more = self.lines(node)
            init, forward, values = init + more[0], forward + more[1], values | more[2]
        arguments = ["self", takes, *(f"{name}={value[0]}" for name, value in values.items())]
        lines = [f"class {name}(nn.Module):", "    def __init__(self):"]
        lines += [f"        {line}" for line in init]
        lines += ["", f"    def forward({', '.join(arguments)}):"]
        lines += [f"        {line}" for line in [*forward, f"return {gives}"]]
        self.classes.append("\n".join(lines))
        return values

    def lines(self, node: Node) -> tuple[list[str], list[str], Values]:
        """Return lines of the constructor, lines of the forward, and arguments."""
        if isinstance(node, Step):
            return list(node.init), list(node.forward), dict(node.arguments)
        maker, values = self.held(node)
        passed = {name: name for name in values} if node.passing != "default" else {}
        if node.passing == "decided":
            passed |= {n: "bool(x.mean() > 0.1)" for n in passed if n.startswith("flag")}
        pattern = ", {1}" if node.passing == "positional" else ", {0}={1}"
        given = "".join(pattern.format(*item) for item in passed.items())
        call = node.call.replace("GIVEN", given).replace("HELD", f"self.nest{node.number}")
        asked = {n: v for n, v in values.items() if passed.get(n) == n}
        return [f"self.nest{node.number} = {maker}"], [call], asked

    def held(self, node: Nest) -> tuple[str, Values]:
        """Return an expression that makes what the node holds, and the arguments it takes."""
        if node.holder == "BLOCK":
            values = self.write(f"Block{node.number}", node.children, "x", [], "x")
            return f"Block{node.number}()", values
        items = [self.maker(child) for child in node.children]
        named = ", ".join(f'"part{n}": {item}' for n, item in enumerate(items))
        return node.holder.replace("ITEMS", ", ".join(items)).replace("NAMED", named), {}

    def maker(self, node: Node) -> str:
        """Return an expression that makes the node as a module of one argument."""
        if isinstance(node, Step) and node.layer:
            return node.layer
        if isinstance(node, Nest) and node.call in (CALLS[0], "x = HELD(x)"):
            return self.held(node)[0]
        self.write(f"Part{node.number}", [node], "x", [], "x")
        return f"Part{node.number}()"


class Draw:
    """Draws a case; the same seed draws the same."""

    def __init__(self, seed: int) -> None:
        self.seed, self.random, self.numbers = seed, Random(seed), count()
        self.channels = self.random.choice([4, 4, 6])

    def case(self) -> Case:
        r = self.random
        nodes = [self.node(depth=2) for _ in range(r.randint(1, 3))]
        if r.random() < 0.2:
            nodes.insert(r.randint(0, len(nodes)), Step((TAP,)))
        case = Case(
            self.seed,
            tuple(nodes),
            (),
            takes="x" if r.random() < 0.7 else r.choice(list(TAKES)),
            gives=r.choice(GIVES),
            dtype=torch.float32 if r.random() < 0.2 else torch.float64,
            warm=r.random() < 0.1,
            training=r.random() < 0.1,
        )
        values = Writer().write("Net", case.nodes, "x", [], "x")
        return replace(case, calls=tuple(self.call(n, values) for n in range(5)))

    def call(self, n: int, values: Values) -> Call:
        """Return call `n`; the first is meant as the example, the second runs nearly always."""
        r, side = self.random, lambda: r.choice([self.channels, 8, 8, 9, 10, 12, 13])
        height, width = r.choice([(side(), side()), (8, 8)]) if n != 1 else (16, 16)
        if n > 1 and r.random() < 0.1:
            height = width = 1
        batch = r.choice([1, 1, 2, self.channels]) if n == 0 else r.choice([1, 2, 3])
        given = {k: r.choice(v) if n else v[0] for k, v in values.items() if r.random() < 0.8}
        return Call(
            (batch, self.channels, height, width),
            tuple(given.items()),
            positional=r.random() < 0.5,
            offset=r.choice([-1.0, 0.0, 1.0]),
            grad=r.random() < 0.3,
        )

    def node(self, depth: int, keeps: bool = False) -> Node:
        r = self.random
        if depth and r.random() < 0.3:
            return self.nest(depth - 1, keeps)
        return self.layer(keeps) if r.random() < 0.45 else self.idiom(keeps)

    def nest(self, depth: int, keeps: bool) -> Node:
        r, call = self.random, "x = HELD(x)"
        residual = r.random() < 0.15
        children = tuple(self.node(depth, keeps or residual) for _ in range(r.randint(1, 3)))
        if residual:
            holder, call = r.choice([("Residual(ITEMS)", call), ("BLOCK", "x = x + HELD(xGIVEN)")])
        elif r.random() < 0.5:
            holder, call = "BLOCK", r.choice(CALLS)
        else:
            holder, calls = r.choice(list(HOLDERS.items()))
            call = r.choice(calls)
        passing = r.choice(["keyword", "positional", "decided", "default"])
        return Nest(holder, call, passing, children, next(self.numbers))

    def layer(self, keeps: bool) -> Step:
        return self.layer_of(self.random.choice([t for t in LAYERS if not keeps or t[0] != "~"]))

    def layer_of(self, text: str) -> Step:
        """Return an entry of LAYERS."""
        number, maker = next(self.numbers), self.expand(text.lstrip("~"))
        line = f"x = self.layer{number}(x)"
        return Step((line,), (f"self.layer{number} = {maker}",), (), maker, number, text[0] != "~")

    def idiom(self, keeps: bool) -> Node:
        variants = self.random.choice(list(IDIOMS.values()))
        return self.idiom_of(self.random.choice([v for v in variants if not keeps or v[0] != "~"]))

    def idiom_of(self, text: str) -> Node:
        """Return an entry of IDIOMS."""
        number, init = next(self.numbers), list[str]()
        body = self.expand(text.lstrip("~!"))
        words = re.findall(WORD, body)
        for name in dict.fromkeys(w for w in words if PARTS.get(w)):
            init.append(f"self.{name}{number} = {self.expand(PARTS[name])}")
        own = {name: f"self.{name}{number}" for name in PARTS}
        own |= {name: f"{name}{number}" for name in ARGUMENTS}
        body = re.sub(WORD, lambda m: own.get(m[0], m[0]), body)
        before, _, lines = body.rpartition(" -- ")
        init += before.split("; ") if "=" in before or "(" in before else []
        arguments = {f"{n}{number}": ARGUMENTS[n] for n in words if n in ARGUMENTS}
        values = tuple((n, tuple(map(self.expand, v))) for n, v in arguments.items())
        step = Step(tuple(lines.split("; ")), tuple(init), values, "", number, text[0] != "~")
        if text[0] != "!":
            return step
        return Nest("BLOCK", CALLS[0], "keyword", (step,), next(self.numbers))

    def expand(self, text: str) -> str:
        """Return `text` with its alternatives chosen and its capitals filled in."""
        r, c, before = self.random, self.channels, ""
        while before != text:
            before = text
            text = re.sub(
                r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", lambda m: r.choice(m[1].split("||")), text
            )
        fill = {
            "CONV": self.convolution,
            "NORM": lambda: r.choice(
                [
                    f"nn.BatchNorm2d({c})",
                    f"nn.BatchNorm2d({c}, eps=1e-4)",
                    f"nn.BatchNorm2d({c}, affine=False)",
                ]
            ),
            "MARKED": lambda: f"nn.BatchNorm2d({c}, eps={MARK})",
            "ACT": lambda: r.choice(["F.relu", "F.silu", "F.gelu", "torch.tanh", "F.hardswish"]),
            "C": lambda: str(c),
        }
        return re.sub(WORD, lambda m: fill[m[0]]() if m[0] in fill else m[0], text)

    def convolution(self) -> str:
        """Return a convolution that keeps channels and size."""
        r, c = self.random, self.channels
        size, dilation = r.choice([1, 3, 3, 5, (1, 3), (3, 1)]), r.choice([1, 1, 1, 2])
        sizes = size if isinstance(size, tuple) else (size, size)
        padding = tuple(dilation * (k - 1) // 2 for k in sizes)
        options = f", dilation={dilation}" if dilation > 1 else ""
        options += f", groups={r.choice([2, c])}" if r.random() < 0.3 else ""
        options += ", bias=False" if r.random() < 0.5 else ""
        options += ", padding_mode='circular'" if r.random() < 0.05 else ""
        return f"nn.Conv2d({c}, {c}, {size}, padding={padding}{options})"
