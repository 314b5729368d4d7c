"""Ctrl-C at a moment of our choosing."""

import signal
import sys
import threading
from types import FrameType
from typing import Any


class Interrupt:
    """While the block runs, Ctrl-C is remembered, and raised where `check` is called; a second one acts at once.

    An exception that is raised in the midst of a compilation may be swallowed by a callback of the
    compiler, or end the interpreter with a segmentation fault; both were seen.
    """

    def __init__(self) -> None:
        """Nothing pressed yet."""
        self._pressed = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> "Interrupt":
        """Take over Ctrl-C, where that is possible."""
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *error: object) -> None:
        """Give it back."""
        if self._installed:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
        print("\ncurvax: stopping after this step; once more stops at once.", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise the Ctrl-C that came since the last call.

        Raises:
            KeyboardInterrupt: If there was one.
        """
        if self._pressed:
            raise KeyboardInterrupt
