"""Ctrl-C in a process of its own: exit code 130, a hint, and nothing lost."""

import os
import signal
import subprocess
import sys
import time

import pytest

from curvax.cli import main
from helpers.reports import assert_same, comparable

SECONDS = 240


def start(*argv, cwd):
    """`python -m curvax` with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "curvax", *argv],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )


def wait_for(path, process):
    """Until the file is there."""
    deadline = time.monotonic() + SECONDS
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def finish(process):
    """Exit code, output, errors."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, out, err


ARGV = ["tune", "digits", "--corrupt", "0", "--tune", "l2-per-feature"]
STEPS = ["--steps", "100", "--quiet"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main([*ARGV, *STEPS, "--out", str(folder)]) == 0
    return comparable(folder)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_resume_after(stop, whole, tmp_path):
    # Enough steps not to be finished before the signal; the resumed run is told to make as many as the whole one.
    process = start(*ARGV, "--steps", "400", "--out", "run", cwd=tmp_path)
    wait_for(tmp_path / "run/best.npz", process)
    process.send_signal(stop)
    code, _, err = finish(process)
    if stop == signal.SIGINT:
        assert code == 130
        assert "curvax tune --resume run" in err
        assert "Traceback" not in err
        assert list((tmp_path / "run/checkpoint").glob("[0-9]*")), "a checkpoint was left"
    else:
        assert code == -signal.SIGKILL
    assert not (tmp_path / "run/report.html").exists()
    assert main(["tune", "--resume", str(tmp_path / "run"), *STEPS]) == 0
    assert_same(comparable(tmp_path / "run"), whole)


def test_before_anything_was_made(tmp_path):
    process = start("tune", "digits", "--out", "run", cwd=tmp_path)
    wait_for(tmp_path / "run/run.json", process)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130
    assert "curvax tune --resume run" in err
    assert "Traceback" not in err
