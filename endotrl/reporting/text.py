# SPDX-License-Identifier: Apache-2.0
"""Plain text for pages and terminals: number formatting, and hidden characters made visible."""

import unicodedata


# Characters that join their neighbours (emoji families, Persian, Indic scripts). Kept unless alone.
JOINERS = "\u200c\u200d"


def plain(text: str, newline: str = "\n") -> str:
    """
    Text without characters that affect their surroundings: control characters, direction overrides, zero-width and
    unassigned characters are written by name, such as `‹U+202E›`. Escapes nothing: that is left to `Markup`.
    """
    return "".join(newline if c == "\n" else f"‹U+{ord(c):04X}›" if is_hidden(c) else c for c in text)


def number(value: float | None, decimals: int = 3, sign: bool = False) -> str:
    """A number as text, with a real minus sign; a dash for `None`."""
    if value is None:
        return "–"
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    return (f"{0:.{decimals}f}" if float(text) == 0 else text).replace("-", "−")


def interval_text(low: float | None, high: float | None, sign: bool = False) -> str:
    """An interval as text; a dash if it is unknown."""
    if low is None or high is None:
        return number(None)
    return f"{number(low, sign=sign)} to {number(high, sign=sign)}"


def counted(count: int, noun: str) -> str:
    """A count with its noun: `1 row`, `1,200 rows`, `2 entries`."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def is_number(cell: object) -> bool:
    """Whether a cell of a table is a number (`True` and `False` are not)."""
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def cell_text(cell: object, decimals: int = 3) -> str:
    """A cell of a table as text: floats rounded, a dash for `None`."""
    if cell is None or isinstance(cell, float):
        return number(cell, decimals)
    return str(cell)


def is_hidden(character: str) -> bool:
    """Whether a character is invisible, but may affect its surroundings."""
    # Cc control, Cf format (direction, zero width), Cs surrogate, Co private, Cn unassigned, Zl and Zp separators.
    if character in "\n\t" or character in JOINERS:
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
