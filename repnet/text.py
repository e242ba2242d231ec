"""`printable`: text of any origin, as it can be shown."""

from __future__ import annotations

import re

# Control characters, line separators and marks that turn the direction of what follows; surrogates,
# which stand for the bytes of a file name that are not UTF-8.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]|([\ud800-\udfff])"
)


def printable(text: str) -> str:
    r"""Return text without what a terminal or a page would obey instead of showing it.

    Control characters become their escapes, such as `\x1b`, and surrogates U+FFFD.
    """
    return _UNPRINTABLE.sub(
        lambda found: "\ufffd" if found[1] else found[0].encode("unicode_escape").decode("ascii"),
        text,
    )
