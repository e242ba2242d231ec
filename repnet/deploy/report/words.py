"""Numbers as people read them; what is missing is a dash, never an error."""

from __future__ import annotations

import math
from typing import Any

MISSING, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
FORMATS = {
    "onnx": "ONNX",
    "openvino": "OpenVINO",
    "torch_export": "torch.export",
    "aot_inductor": "AOTInductor",
    "executorch": "ExecuTorch",
    "tensorrt": "TensorRT",
    "coreml": "Core ML",
}


def finite(value: Any) -> float | None:
    """Return a number, None for what is not one: missing, text, NaN and infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def number(value: Any, style: str = "{:g}") -> str:
    """Return a number in a format string's style."""
    if isinstance(value, float) and math.isnan(value):
        return "NaN"
    if isinstance(value, float) and math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    known = finite(value)
    return MISSING if known is None else style.format(known).replace("-", MINUS)


def count(value: Any) -> str:
    """Return a count with its thousands apart."""
    return number(value, "{:,.0f}")


def percent(value: Any, digits: int = 2) -> str:
    """Return a fraction in percent."""
    return number(value, f"{{:.{digits}%}}")


def points(value: Any, digits: int = 2) -> str:
    """Return a difference of two fractions in percentage points."""
    known = finite(value)
    if known is None:
        return number(value)
    known = round(100 * known, digits)
    return number(known, f"{{:+.{digits}f}}") if known else "±0"


def scientific(value: Any, digits: int = 1) -> str:
    """Return a number with its power of ten, without the zeros of a C program."""
    text = "0" if value == 0 else number(value, f"{{:.{digits}e}}")
    return text.replace(".0e", "e").replace(f"e{MINUS}0", f"e{MINUS}").replace("e+0", "e+")


def milliseconds(value: Any) -> str:
    """Return a time with three digits or so."""
    known = finite(value)
    if known is None:
        return number(value)
    return f"{number(known, '{:.3f}' if known < 1 else '{:.2f}' if known < 100 else '{:,.0f}')} ms"


def times(value: Any) -> str:
    """Return a ratio, as in "1.45 times"."""
    known = finite(value)
    if known is None:
        return number(value)
    style = "{:.2f}" if known < 10 else "{:.1f}" if known < 100 else "{:,.0f}"
    return number(known, style) + TIMES


def amount(value: Any) -> str:
    """Return a count in millions or the like, with three digits."""
    known = finite(value)
    if known is None:
        return number(value)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(known) >= size:
            scaled = known / size
            return f"{scaled:.{max(0, 2 - int(math.log10(abs(scaled))))}f} {unit}"
    return f"{known:,.0f}"


def size(value: Any) -> str:
    """Return bytes in decimal units."""
    known = finite(value)
    return number(value) if known is None else f"{amount(known)}{'B' if known >= 1e3 else ' B'}"


def form(name: Any) -> str:
    """Return the name of a form or export: `train_form`, `openvino bf16`."""
    text = str(name)
    kind, _, precision = text.partition(" ")
    return f"{FORMATS[kind]} {precision}".strip() if kind in FORMATS else text.replace("_", " ")


def short(value: Any) -> str:
    """Return a count in at most four characters, for the cells of a matrix."""
    known = finite(value)
    if known is None or abs(known) < 1e4:
        return number(value, "{:.0f}")
    unit, size = next(
        ((u, s) for u, s in (("k", 1e3), ("M", 1e6)) if known < 999.5 * s), ("G", 1e9)
    )
    return f"{known / size:.0f}{unit}"


FILTERS = {
    f.__name__: f
    for f in (
        number,
        count,
        percent,
        points,
        scientific,
        milliseconds,
        times,
        amount,
        size,
        form,
        short,
    )
}
