"""How the command line says no, and how it prints text that comes from a user's file."""


class UsageError(Exception):
    """Something the user can put right: one line on the standard error and exit code 2."""


class TuningError(Exception):
    """The numerics gave up although data and options are fine: one line and exit code 1."""


def printable(text: object, limit: int = 60) -> str:
    """One line of at most `limit` characters, without control characters.

    A column name may hold line breaks or terminal escape sequences; neither may reach a terminal.
    """
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return line if len(line) <= limit else line[: limit - 1] + "…"


def quoted(text: object) -> str:
    """`printable`, in quotes."""
    return f"'{printable(text)}'"
