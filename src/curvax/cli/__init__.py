"""The command line: `curvax tune` and its reports.

Importing this room imports nothing heavy; `main` does, after it has set up the process.
"""

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `curvax` with the given arguments (default: those of the process).

    Args:
        argv: Arguments without the program's name.

    Returns:
        The exit code: 0 success, 1 the tuning failed, 2 wrong use or unusable data, 130 Ctrl-C.

    Example:
        ```python
        from curvax.cli import main

        main(["tune", "wine", "--steps", "5", "--quiet"])
        ```
    """
    from curvax.cli._main import run

    return run(argv)


__all__ = ["main"]
