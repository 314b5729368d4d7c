"""Text for people: words from a user's file made harmless, numbers made readable."""

import math


def printable(text: object, limit: int = 60) -> str:
    """One line of at most `limit` characters, without control characters.

    A column name may hold line breaks or terminal escape sequences; neither may reach a terminal.
    """
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def quoted(text: object) -> str:
    """`printable`, in quotes."""
    return f"'{printable(text)}'"


def number(value: float, digits: int = 4) -> str:
    """A number with so many significant digits, without an exponent where a person would write none."""
    if value == 0 or not 1e-4 <= abs(value) < 1e9:
        return f"{value:.{digits}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{round(value, decimals):,.{max(0, decimals)}f}"
