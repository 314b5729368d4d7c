"""How reports are printed."""

import io

from rich.console import Console

_WIDTH, _LEAST_WIDTH = 110, 100


class Printed:
    """What a class with `__rich__` gives as text, and prints; a dataclass needs `repr=False`."""

    def __str__(self) -> str:
        """The same as `print` shows, in plain text, 110 columns wide."""
        buffer = io.StringIO()
        Console(file=buffer, width=_WIDTH, color_system=None).print(self)
        return buffer.getvalue().rstrip()

    def __repr__(self) -> str:
        """As text."""
        return str(self)

    def print(self) -> None:
        """Print to standard output, in colour where that is a terminal."""
        console = Console()
        # Anything narrower would cut the figures off; a file or pipe gets what `str` gives.
        Console(width=max(console.width, _LEAST_WIDTH) if console.is_terminal else _WIDTH).print(self)
