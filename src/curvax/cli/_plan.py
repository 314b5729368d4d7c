"""From options to everything a run needs: data, model, groups, batches."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from curvax.cli._bundled import DIGITS_CORRUPTION, load_bundled
from curvax.cli._dataset import Dataset, from_table, generators
from curvax.cli._errors import UsageError
from curvax.cli._hyperparameters import Layers
from curvax.cli._options import BUNDLED, Options
from curvax.cli._table import read_table

# One weight for each training example is more than a small validation split can tell apart: on clean tables with
# 100 validation rows they did harm.
_ENOUGH_VALIDATION_ROWS = 200
_DEFAULT_HIDDEN = 16
# Which of ten validation rows, in the order of their targets, do not enter the hypergradient.
_STOPPING_TENTHS = (1, 4, 8)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be done, with nothing left open.

    Attributes:
        options: As given.
        data: The data set.
        model: "logistic", "ridge" or "mlp".
        groups: What is tuned.
        sizes: Number of inputs, hidden units, outputs.
        shift: Subtracted from a numeric target.
        scale: By which a numeric target is then divided.
    """

    options: Options
    data: Dataset
    model: str
    groups: tuple[str, ...]
    sizes: tuple[int, ...]
    shift: float
    scale: float

    def batches(self, theta0: Layers) -> dict[str, dict[str, Any]]:
        """The splits as `x`, `y`, `mask` and `start` (see `_model.inner`); the training labels are those given.

        Args:
            theta0: Parameters to start from.

        Returns:
            `train`, `validation`, `test`; and the two parts of the validation split: `tuning` for
            hypergradients, `stopping` for choosing the step.
        """
        data = self.data
        tuning, stopping = self._parts()
        rows = {
            "train": data.train,
            "validation": data.validation,
            "tuning": data.validation[tuning],
            "stopping": data.validation[stopping],
            "test": data.test,
        }
        start = [layer["weight"] for layer in theta0[:-1]]
        result = {}
        for name, index in rows.items():
            y = data.given if name == "train" else data.y[index]
            if data.task == "regression":
                y = (y - self.shift) / self.scale
            ones = jnp.ones((len(y),))
            result[name] = {
                "x": jnp.asarray(data.x[index]),
                "y": jnp.asarray(y),
                "mask": ones,
                "start": start,
            }
        return result

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the validation split of its tuning part and of its stopping part, alike in their targets."""
        y = self.data.y[self.data.validation]
        shuffle = generators(self.options.seed)[2].permutation(len(y))
        place = np.empty(len(y), int)
        place[np.lexsort((shuffle, y))] = np.arange(len(y))
        is_stopping = np.isin(place % 10, _STOPPING_TENTHS)
        return np.flatnonzero(~is_stopping), np.flatnonzero(is_stopping)


def load(options: Options) -> Dataset:
    """The data set that the options name.

    Args:
        options: The options.

    Returns:
        The data set.

    Raises:
        UsageError: If it cannot be used.
    """
    if options.data in BUNDLED:
        if options.data == "digits" and options.corrupt is None:
            options = dataclasses.replace(options, corrupt=DIGITS_CORRUPTION)
        return load_bundled(options)
    return from_table(read_table(options.data), options)


def make(options: Options) -> Plan:
    """Load the data and decide what the options left open.

    Args:
        options: The options.

    Returns:
        The plan.

    Raises:
        UsageError: If data and options do not go together.
    """
    data = load(options)
    is_regression = data.task == "regression"
    model = options.model or ("ridge" if is_regression else "logistic")
    groups = options.tune
    if groups is None:
        groups = ("sample-weights", "l2-per-feature")
        if len(data.validation) < _ENOUGH_VALIDATION_ROWS and data.corrupted is None:
            groups = ("l2-per-feature",)
            note = (
                f"Not tuned: sample-weights, since there are fewer than {_ENOUGH_VALIDATION_ROWS} validation rows; "
                "--tune sample-weights,l2-per-feature asks for them."
            )
            data = dataclasses.replace(data, notes=(*data.notes, note))
    if model == "logistic" and is_regression:
        raise UsageError(
            f"--model logistic is for classification, and {data.name} is regression: take ridge or mlp"
        )
    if model == "ridge" and not is_regression:
        raise UsageError(
            f"--model ridge is for regression, and {data.name} is classification: take logistic or mlp"
        )
    if "class-weights" in groups and is_regression:
        raise UsageError(f"--tune class-weights is for classification, and {data.name} is regression")
    if "l2-per-layer" in groups and model != "mlp":
        raise UsageError("--tune l2-per-layer is for --model mlp: the other models have one layer, take l2")
    hidden = (options.hidden or _DEFAULT_HIDDEN,) if model == "mlp" else ()
    sizes = (data.x.shape[1], *hidden, 1 if is_regression else len(data.classes))
    # As much as the training rows know.
    shift, scale = (float(np.mean(data.given)), float(np.std(data.given))) if is_regression else (0.0, 1.0)
    return Plan(options, data, model, groups, sizes, shift, scale)


def describe(plan: Plan) -> dict[str, Any]:
    """The plan in plain values, for `result.json`."""
    data = plan.data
    return {
        "data": {
            "name": data.name,
            "digest": data.digest,
            "target": data.target,
            "task": data.task,
            "rows": len(data.y),
            "inputs": data.x.shape[1],
            "classes": list(data.classes) or None,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
            "wrong_labels": None if data.corrupted is None else int(data.corrupted.sum()),
            "notes": list(data.notes),
        },
        "model": {"name": plan.model, "sizes": list(plan.sizes)},
        "groups": list(plan.groups),
        "seed": plan.options.seed,
    }
