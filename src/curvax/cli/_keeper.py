"""Keeps the best point of a tuning run, judged by validation rows that the hypergradient does not see."""

import math
import pathlib
import zipfile
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import numpy as np

import curvax as cx
from curvax.cli._errors import UsageError
from curvax.cli._folder import CHECKPOINT, write_npz
from curvax.cli._model import outer
from curvax.cli._text import quoted

_FILE = "best.npz"
_loss = eqx.filter_jit(outer)


class Keeper:
    """A callback for every outer step; writes what it knows to the report folder each time.

    The driver calls it before it saves a checkpoint, so that what is on the disk never lags behind the
    checkpoint: a resumed run chooses the same step as an uninterrupted one.
    """

    def __init__(
        self, folder: pathlib.Path, batch: dict[str, Any], start: Any, check: Callable[[], None]
    ) -> None:
        """Start anew, or with what a run that is gone on with has written.

        Args:
            folder: The report folder.
            batch: The stopping part of the validation split.
            start: Hyperparameters and parameters, for their structure.
            check: Called when a step is kept; may raise `KeyboardInterrupt`.
        """
        self._path = folder / _FILE
        self._batch = batch
        self._structure = jax.tree.structure(start)
        self._shapes = [leaf.shape for leaf in jax.tree.leaves(start)]
        self._check = check
        self.losses = np.zeros((0,))
        self._best: tuple[int, list[np.ndarray]] | None = None
        if any(entry.name.isdigit() for entry in (folder / CHECKPOINT).glob("*")):
            self._load()

    def _load(self) -> None:
        try:
            with self._path.open("rb") as file, np.load(file, allow_pickle=False) as content:
                leaves = [content[f"leaf_{i}"] for i in range(len(self._shapes))]
                self.losses, self._best = content["losses"], (int(content["step"]), leaves)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise UsageError(f"{quoted(self._path)} is missing or cannot be read: start a new run") from None
        if [leaf.shape for leaf in leaves] != self._shapes or self.losses.ndim != 1:
            raise UsageError(f"{quoted(self._path)} belongs to another run: start a new one")

    def __call__(self, info: cx.Info) -> None:
        """Take in a step."""
        loss = float(_loss(info.theta, info.phi, self._batch))
        # After a crash the steps since the last checkpoint are made a second time. They are the same, so
        # that a best one among them is kept until it is reached again.
        self.losses = np.append(self.losses[: info.step], loss)
        if self._best is None or (self._best[0] < info.step and self._is_better(loss, self._best[0])):
            leaves = jax.tree.leaves((info.phi, info.theta))
            self._best = (info.step, [np.asarray(leaf) for leaf in leaves])
        step, leaves = self._best
        arrays = {f"leaf_{i}": leaf for i, leaf in enumerate(leaves)}
        write_npz(self._path, {"losses": self.losses, "step": np.asarray(step), **arrays})
        self._check()

    def _is_better(self, loss: float, step: int) -> bool:
        """Whether a loss is below that of a step; any finite one is if that of the step is not finite."""
        return math.isfinite(loss) and not loss >= self.losses[step]

    def best(self) -> tuple[int, Any, Any]:
        """Step, hyperparameters and parameters of the lowest finite loss; those of the start if there is none."""
        assert self._best is not None
        step, leaves = self._best
        phi, theta = jax.tree.unflatten(self._structure, [jax.numpy.asarray(leaf) for leaf in leaves])
        return step, phi, theta
