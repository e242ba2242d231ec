"""Draws `fold_walk.svg`, the walk that one block takes through the fold engine.

    python docs/pictures/fold_walk.py

All coordinates are pixels of a picture of 960 x 750.
"""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

INK, PALE, LINE = "#1f2933", "#52606d", "#9aa5b1"
BLUE, GREEN, RED, YELLOW = "#dbeafe", "#dcfce7", "#fee2e2", "#fef9c3"

FORWARD = """\
def forward(self, x):
    return torch.relu(
        self.norm3(self.conv3(x))
        + self.norm1(self.conv1(x))
        + self.norm0(x)
    )"""


def text(
    x: float, y: float, words: str, *, size: int = 14, anchor: str = "start", style: str = ""
) -> str:
    """Return one line of text."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {style} '
        f'xml:space="preserve">{escape(words)}</text>'
    )


def lines(x: float, y: float, words: str, **options: Any) -> str:
    """Return lines of text, 19 pixels apart."""
    return "".join(text(x, y + 19 * n, line, **options) for n, line in enumerate(words.split("\n")))


def box(
    x: float, y: float, width: float, height: float, fill: str = "white", extra: str = ""
) -> str:
    """Return a box with its upper left corner at `(x, y)`."""
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" '
        f'stroke="{LINE}" {extra}/>'
    )


def node(x: float, y: float, words: str, *, width: float = 76, fill: str = "white") -> str:
    """Return a node of a graph with its center at `(x, y)`."""
    label = text(x, y + 5, words, size=13, anchor="middle", style='font-family="monospace"')
    return box(x - width / 2, y - 14, width, 28, fill) + label


def arrow(*points: tuple[float, float], color: str = PALE) -> str:
    """Return a line through points, with a head at the last one."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5" '
        'marker-end="url(#head)"/>'
    )


def panel(x: float, y: float, width: float, height: float, title: str, subtitle: str) -> str:
    """Return a box with a title and a sentence in it."""
    return (
        box(x, y, width, height, "#f8fafc")
        + text(x + 14, y + 26, title, size=16, style='font-weight="bold"')
        + lines(x + 14, y + 48, subtitle, style=f'fill="{PALE}"')
    )


def recorded() -> str:
    """Return step 1: the forward and what is noted of it."""
    code = lines(34, 136, FORWARD, size=13, style='font-family="monospace"')
    return (
        panel(
            20,
            20,
            300,
            340,
            "1. Record",
            "The model runs once. Every call that\nyour forward makes is written down.",
        )
        + code
        + lines(
            34,
            280,
            "Sizes and decisions are followed.\nA second run has other sizes,\n"
            "another dtype and gradients.",
            style=f'fill="{PALE}"',
        )
    )


def found() -> str:
    """Return step 2: the graph, with the part that is one convolution."""
    return (
        panel(
            350,
            20,
            290,
            340,
            "2. Find",
            "Which part of this graph is one\nconvolution of one tensor?",
        )
        + box(362, 136, 266, 160, BLUE, 'stroke-dasharray="5 4"')
        + arrow((485, 122), (405, 150))
        + arrow((495, 122), (495, 150))
        + arrow((505, 122), (585, 202))
        + node(495, 110, "x")
        + node(407, 166, "conv3")
        + node(495, 166, "conv1")
        + arrow((407, 180), (407, 201))
        + arrow((495, 180), (495, 201))
        + node(407, 217, "norm3")
        + node(495, 217, "norm1")
        + node(583, 217, "norm0")
        + arrow((407, 231), (474, 264))
        + arrow((495, 231), (495, 260))
        + arrow((583, 231), (516, 264))
        + node(495, 275, "+", width=38)
        + arrow((495, 289), (495, 313))
        + node(495, 328, "relu")
    )


def written() -> str:
    """Return step 3: the graph with the convolution in the place of that part."""
    return (
        panel(
            670,
            20,
            270,
            340,
            "3. Write",
            "Its kernel is computed in\nfloat64, in a copy of the model.",
        )
        + node(805, 110, "x")
        + arrow((805, 124), (805, 198))
        + node(805, 215, "conv3", width=96, fill=BLUE)
        + text(864, 212, "3x3,", size=12, style=f'fill="{PALE}"')
        + text(864, 227, "with bias", size=12, style=f'fill="{PALE}"')
        + arrow((805, 229), (805, 311))
        + node(805, 328, "relu")
    )


def checked() -> str:
    """Return what leads from one step to the next, and out of them."""
    bold = 'font-weight="bold"'
    return (
        arrow((320, 190), (347, 190))
        + arrow((640, 190), (667, 190))
        + text(653, 181, "yes", size=13, anchor="middle")
        + arrow((495, 360), (495, 387))
        + text(506, 378, "no", size=13)
        + box(350, 390, 290, 98, RED)
        + text(364, 414, "Left alone", style=bold)
        + lines(
            364,
            436,
            "It holds only for some inputs, or\nsomething else reads a part of it, or it\n"
            "would grow. The report says why.",
            size=13,
        )
        + arrow((805, 360), (805, 387))
        + box(670, 390, 270, 98, GREEN)
        + text(684, 414, "4. Prove", style=bold)
        + lines(
            684,
            436,
            "Same output as the original?\nYes: stored in the model's dtype.\n"
            "No: put back, and reported.",
            size=13,
        )
    )


def ways() -> str:
    """Return the three ways of writing a fold."""

    def way(x: float, width: float, title: str, before: str, after: str) -> str:
        return (
            box(x, 540, width, 190, YELLOW)
            + lines(x + 14, 564, title, style='font-weight="bold"')
            + lines(x + 14, 616, before, size=13, style='font-family="monospace"')
            + arrow((x + 30, 650), (x + 30, 676))
            + lines(x + 14, 696, after, size=13, style='font-family="monospace"')
        )

    return (
        text(
            20,
            522,
            "The three ways in which step 3 writes a fold",
            size=16,
            style='font-weight="bold"',
        )
        + way(
            20,
            300,
            "The whole forward is one\nconvolution: it is replaced",
            "block: Branches\n  conv3, norm3, conv1, ...",
            "block: Conv2d",
        )
        + way(
            350,
            290,
            "A norm follows a convolution:\nonly these two layers change",
            "conv: Conv2d\nnorm: BatchNorm2d",
            "conv: Conv2d\nnorm: Identity",
        )
        + way(
            670,
            270,
            "A forward adds branches:\na small graph replaces it",
            "block: RepVGGBlock\n  (the block above)",
            "block: GraphModule\n  conv3, then relu",
        )
    )


def draw() -> str:
    """Return the whole picture."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{PALE}"/></marker></defs>'
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 960 750" '
        f'font-family="Helvetica, Arial, sans-serif" fill="{INK}">{head}'
        '<rect width="960" height="750" fill="white"/>'
        f"{recorded()}{found()}{written()}{checked()}{ways()}</svg>\n"
    )


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
