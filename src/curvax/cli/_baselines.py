"""What the tuned model is compared with: the untuned one, a grid search, and references.

All use the same inner solver, the same splits and the same measure. The grid has as many inner solves as the
tuned run, from large penalties to small ones, each started from the one before, and chooses by the
whole validation split.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import optimistix as optx
from jaxtyping import Array

from curvax.cli._hyperparameters import START_PENALTY, Layers, Phi
from curvax.cli._measures import measure
from curvax.cli._model import inner, predict

# Larger penalties predict the mean; smaller ones are no penalties, and an mlp then takes all the steps there are.
_GRID, _MLP_GRID = (10.0, 1e-6), (10.0, 1e-4)
_MAX_STEPS = 5_000
_FOLDS = 5


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    key: str
    label: str
    num_hyperparameters: int
    num_solves: int
    seconds: float
    validation: dict[str, Any] | None
    test: dict[str, Any]
    setting: str
    theta: Layers


def score(measures: dict[str, Any]) -> tuple[float, float]:
    """What a choice maximises: the accuracy, then the likelihood; or minus the error."""
    if "accuracy" in measures:
        return measures["accuracy"], -measures["log_loss"]
    return -measures["rmse"], 0.0


_predict = eqx.filter_jit(predict)


def _objective(theta: Layers, args: tuple[Phi, dict[str, Any]]) -> Array:
    return inner(theta, *args)


@eqx.filter_jit
def _solve(solver: Any, theta: Layers, phi: Phi, batch: dict[str, Any]) -> Layers:
    solution = optx.minimise(_objective, solver, theta, (phi, batch), max_steps=_MAX_STEPS, throw=False)
    return solution.value


class Trainer:
    """Trains with given hyperparameters, by the inner solver of the run."""

    def __init__(self, solver: optx.AbstractMinimiser, scale: float, check: Callable[[], None]) -> None:
        """Keep what every call needs.

        Args:
            solver: The inner solver.
            scale: Standard deviation of the target, 1 for classes.
            check: Called after each solve; may raise `KeyboardInterrupt`.
        """
        self._check = check
        self._solver = solver
        self.compiling = 0.0  # seconds, known once `untuned` has run
        self._scale = scale

    def solve(self, theta: Layers, phi: Phi, batch: dict[str, Any]) -> Layers:
        """The model trained on `batch` from `theta`."""
        solution = _solve(self._solver, theta, phi, batch)
        self._check()
        return solution

    def outputs(self, theta: Layers, batch: dict[str, Any]) -> np.ndarray:
        """Predictions of a model."""
        return np.asarray(_predict(theta, batch["x"]))

    def measure(self, theta: Layers, batch: dict[str, Any]) -> dict[str, Any]:
        """Quality of a model on `batch`."""
        return measure(self.outputs(theta, batch), np.asarray(batch["y"]), self._scale)


def grid_range(theta: Layers) -> tuple[float, float]:
    """Largest and smallest penalty of the grid for a model."""
    return _GRID if len(theta) == 1 else _MLP_GRID


def _phi(penalty: float) -> Phi:
    return {"l2": jnp.log(jnp.asarray(penalty, float) / START_PENALTY)}


def untuned(trainer: Trainer, theta0: Layers, batches: dict[str, Any]) -> Row:
    """The hyperparameters at the start: weights 1, one fixed penalty."""

    def run() -> tuple[Layers, dict[str, Any], float]:
        begin = time.perf_counter()
        theta = trainer.solve(theta0, _phi(START_PENALTY), batches["train"])
        validation = trainer.measure(theta, batches["validation"])
        return theta, validation, time.perf_counter() - begin

    theta, validation, seconds = run()
    # The other rows use the programs that were compiled here: a second run tells what that took.
    trainer.compiling = max(0.0, seconds - run()[2])
    return Row(
        key="untuned",
        label="untuned",
        num_hyperparameters=0,
        num_solves=1,
        seconds=seconds,
        validation=validation,
        test=trainer.measure(theta, batches["test"]),
        setting=f"one L2 of {START_PENALTY:g}",
        theta=theta,
    )


def grid(trainer: Trainer, theta0: Layers, batches: dict[str, Any], num_solves: int, **names: str) -> Row:
    """Grid search over one L2 penalty.

    Args:
        trainer: The trainer.
        theta0: Start of the first inner solve.
        batches: `train`, `validation`, `test`.
        num_solves: Number of penalties.
        **names: `key` and `label` of the row.

    Returns:
        The row of the penalty that is best on the validation split.
    """
    begin = time.perf_counter()
    best: tuple[tuple[float, float], float, Layers] | None = None
    theta = theta0
    for penalty in np.geomspace(*grid_range(theta0), num_solves):
        theta = trainer.solve(theta, _phi(float(penalty)), batches["train"])
        reached = score(trainer.measure(theta, batches["validation"]))
        if best is None or reached > best[0]:
            best = (reached, float(penalty), theta)
    assert best is not None
    seconds = trainer.compiling + time.perf_counter() - begin  # as if it were the only one to run
    return Row(
        key=names.get("key", "grid"),
        label=names.get("label", "grid search"),
        num_hyperparameters=1,
        num_solves=num_solves,
        seconds=seconds,
        validation=trainer.measure(best[2], batches["validation"]),
        test=trainer.measure(best[2], batches["test"]),
        setting=f"one L2 of {best[1]:.2g}",
        theta=best[2],
    )


def references(
    trainer: Trainer, theta0: Layers, batches: dict[str, Any], corrupted: np.ndarray, num_solves: int
) -> list[Row]:
    """What clean labels alone would give: knowledge that the methods of the table do not have, or do not use.

    Args:
        trainer: The trainer.
        theta0: Start of the first inner solve.
        batches: `train`, `validation`, `test`.
        corrupted: Which training labels are wrong.
        num_solves: Number of penalties of each grid.

    Returns:
        The row of a model trained without the wrong labels (known only because we made them wrong), and that of one
        trained on the validation split alone, its penalty chosen by cross-validation within it.
    """
    mask = jnp.asarray(1.0 - corrupted)
    clean = {**batches, "train": {**batches["train"], "mask": mask}}
    oracle = grid(trainer, theta0, clean, num_solves, key="oracle", label="clean rows only")
    return [oracle, _validation_only(trainer, theta0, batches, num_solves)]


def _validation_only(trainer: Trainer, theta0: Layers, batches: dict[str, Any], num_solves: int) -> Row:
    begin = time.perf_counter()
    data = batches["validation"]
    n = data["y"].shape[0]
    fold = np.arange(n) % _FOLDS
    values = np.geomspace(*grid_range(theta0), max(2, num_solves // 2))
    totals = np.zeros((len(values), 2))
    for k in range(_FOLDS):
        left_out = {name: data[name][fold == k] for name in ("x", "y")}
        part = {**data, "mask": jnp.asarray((fold != k).astype(np.float64))}
        theta = theta0
        for i, value in enumerate(values):
            theta = trainer.solve(theta, _phi(float(value)), part)
            totals[i] += score(trainer.measure(theta, left_out))
    value = float(max(zip(map(tuple, totals), values, strict=True))[1])
    theta = trainer.solve(theta0, _phi(value), data)
    return Row(
        key="validation-only",
        label="validation only",
        num_hyperparameters=1,
        num_solves=_FOLDS * len(values) + 1,
        seconds=time.perf_counter() - begin,
        validation=None,
        test=trainer.measure(theta, batches["test"]),
        setting=f"one L2 of {value:.2g}",
        theta=theta,
    )
