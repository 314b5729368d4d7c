"""The progress line of a run, on the standard error."""

import sys
import time

import numpy as np

from curvax.bilevel._history import History

_PLAIN_SECONDS = 10.0


def _format(entry: History) -> str:
    relative = float(entry.relative_error)
    accuracy = f" · rel. error {relative:.1e}" if np.isfinite(relative) else ""
    return f"loss {float(entry.value):.6g} · ‖∇‖ {float(entry.grad_norm):.2e}{accuracy}"


def _duration(seconds: float) -> str:
    seconds = int(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class Progress:
    """A bar in a terminal, a plain line every ten seconds elsewhere, nothing if not wanted.

    Written only between chunks, from numbers that are on the host already: it costs the loop nothing.
    """

    def __init__(self, wanted: bool | None, num_steps: int, first_step: int) -> None:
        """`wanted=None` shows the bar only if the standard error is a terminal."""
        is_terminal = sys.stderr.isatty()
        self._wanted = is_terminal if wanted is None else wanted
        self._bar = None
        self._num_steps = num_steps
        self._start: tuple[float, int] | None = None
        self._last_line = time.monotonic()
        if self._wanted and is_terminal:
            from rich.console import Console  # 0.1 s: only who sees it pays for it
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("outer steps"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                console=Console(stderr=True),
                auto_refresh=False,
            )
            self._task = self._bar.add_task("", total=num_steps, completed=first_step, text="compiling …")
            self._bar.start()
            self._bar.refresh()

    def update(self, step: int, entry: History | None, *, last: bool = False) -> None:
        """Show where the run stands."""
        if not self._wanted:
            return
        now = time.monotonic()
        if self._start is None:
            self._start = (now, step)  # the time before holds the compilation
        text = _format(entry) if entry is not None else "no good step yet"
        passed, done = now - self._start[0], step - self._start[1]
        if done > 0 and passed > 0:
            rate = done / passed
            shown = f"{rate:.1f} step/s" if rate >= 1 else f"{1 / rate:.1f} s/step"
            text += f" · {shown} · {_duration((self._num_steps - step) / rate)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text, refresh=True)
        elif last or now - self._last_line >= _PLAIN_SECONDS:
            self._last_line = now
            print(f"step {step}/{self._num_steps} · {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last state of the bar on the screen."""
        if self._bar is not None:
            self._bar.stop()
