"""Programs in fresh interpreters, forked from one that has imported already what they import."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import runpy
import traceback
from collections.abc import Iterator
from pathlib import Path

# No thread is started and no device looked for by an import, so that a fork of it is a new interpreter.
IMPORTED = ["curvax", "matplotlib.pyplot", "sklearn.datasets"]


@contextlib.contextmanager
def without_settings_of_jax() -> Iterator[None]:
    """No environment variable `JAX_...`: the processes that are started meanwhile have JAX's defaults."""
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("JAX_")}
    try:
        yield
    finally:
        os.environ |= kept


def run(program: Path) -> str:
    """Execute a program as `python program` in its folder would; the empty string, or how it failed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    said = program.with_suffix(".err")
    with without_settings_of_jax():
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=_execute, args=(program, said))
    process.start()
    process.join()
    return "" if process.exitcode == 0 else said.read_text() or f"exit status {process.exitcode}"


def _execute(program: Path, said: Path) -> None:
    os.chdir(program.parent)
    with said.open("w") as file, open(os.devnull, "w") as silent:
        os.dup2(file.fileno(), 2)
        os.dup2(silent.fileno(), 1)
        try:
            runpy.run_path(str(program), run_name="__main__")
        except BaseException:
            traceback.print_exc(file=file)
            raise
