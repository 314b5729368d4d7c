"""What a run found, in plain values: `result.json`, the hyperparameters, the suspicious examples."""

import dataclasses
from typing import Any

import jax
import numpy as np

from curvax.cli._baselines import Row
from curvax.cli._hyperparameters import Layers, Phi, count, example_weights, penalties
from curvax.cli._measures import auc
from curvax.cli._plan import Plan, describe
from curvax.cli._text import number

_NUM_LOWEST = 40


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        plan: What was done.
        rows: The compared methods: untuned, grid, tuned.
        references: Rows that are no competitors.
        against_grid: Test examples on which only one of tuned and grid is right.
        phi: Tuned hyperparameters.
        theta: The model trained with them.
        outputs: Its outputs on the training examples.
        history: Of the outer loop, name to array.
        stopping: Loss on the stopping part of the validation split at each step.
        step: The step that was chosen by it: `phi` and `theta` are those there.
        stopped: Why the run ended before its last step, None if it did not.
        resumed: Whether the run was interrupted and gone on with: its seconds are then those since.
    """

    plan: Plan
    rows: list[Row]
    references: list[Row]
    against_grid: dict[str, int] | None
    phi: Phi
    theta: Layers
    outputs: np.ndarray
    history: dict[str, np.ndarray]
    stopping: np.ndarray
    step: int
    stopped: str | None
    resumed: bool

    def weights(self) -> np.ndarray | None:
        """Weight of each training example (mean 1), if they were tuned."""
        if "sample-weights" not in self.phi:
            return None
        return np.asarray(
            example_weights({"sample-weights": self.phi["sample-weights"]}, None, len(self.outputs))
        )

    def input_penalties(self) -> np.ndarray | None:
        """Penalty of each input (geometric mean over its weights), if inputs differ."""
        if not {"l2-per-feature", "l2-per-weight"} & set(self.phi):
            return None
        return np.exp(np.log(np.asarray(penalties(self.phi, self.theta)[0])).mean(axis=1))


def _finite(value: Any) -> Any:
    """A float that JSON can hold, else None."""
    return float(value) if np.isfinite(value) else None


def target_text(plan: Plan, value: Any) -> str:
    """A target as a person writes it: class name, or number."""
    return plan.data.classes[int(value)] if plan.data.classes else number(float(value), 6)


def predictions(outcome: Outcome) -> np.ndarray:
    """Predicted targets of the training examples: class numbers, or values in the target's units."""
    plan = outcome.plan
    if plan.data.classes:
        return outcome.outputs.argmax(axis=1)
    return outcome.outputs[:, 0] * plan.scale + plan.shift


def lowest(outcome: Outcome, number: int = _NUM_LOWEST) -> list[dict[str, Any]]:
    """The training examples with the lowest weights, lowest first.

    Args:
        outcome: The run.
        number: How many.

    Returns:
        Place, target as given and as predicted, weight, and whether it was made wrong (None if nothing was).
    """
    weights = outcome.weights()
    if weights is None or outcome.step == 0:
        return []  # nothing was learned about any of them
    data, predicted = outcome.plan.data, predictions(outcome)
    result = []
    for i in np.argsort(weights, kind="stable")[:number]:
        result.append(
            {
                "index": int(i),
                "place": data.places[data.train[i]],
                "given": target_text(outcome.plan, data.given[i]),
                "predicted": target_text(outcome.plan, predicted[i]),
                "weight": float(weights[i]),
                "wrong": None if data.corrupted is None else bool(data.corrupted[i]),
            }
        )
    return result


def as_dict(outcome: Outcome) -> dict[str, Any]:
    """Everything in `result.json`.

    Args:
        outcome: The run.

    Returns:
        Plain values, without NaN.
    """
    from importlib.metadata import version

    counts, history, data = count(outcome.phi), outcome.history, outcome.plan.data
    weights = outcome.weights()
    errors = history["relative_error"]
    errors = errors[np.isfinite(errors)]
    noise = None
    if weights is not None and data.corrupted is not None:
        number = int(data.corrupted.sum())
        first = np.argsort(weights, kind="stable")[:number]
        noise = {
            "wrong_labels": number,
            "auc": auc(-weights, data.corrupted),
            "found_among_as_many": int(data.corrupted[first].sum()),
        }
    return {
        "curvax": version("curvax"),
        **describe(outcome.plan),
        "steps": len(history["value"]) - 1,
        "chosen_step": outcome.step,
        "steps_asked": outcome.plan.options.steps,
        "stopped": outcome.stopped,
        "resumed": outcome.resumed,
        "hyperparameters": {**counts, "total": sum(counts.values())},
        "methods": [_row(row) for row in outcome.rows],
        "references": [_row(row) for row in outcome.references],
        "tuned_against_grid": outcome.against_grid,
        "hypergradient": {
            "relative_error_median": _finite(np.median(errors)) if errors.size else None,
            "relative_error_largest": _finite(errors.max()) if errors.size else None,
            "products": int(history["num_matvecs"].sum()),
            "retries": int(history["num_retries"].sum()),
        },
        "label_noise": noise,
        "lowest_weights": lowest(outcome),
        "history": {name: [_finite(x) for x in values] for name, values in history.items()}
        | {"stopping_loss": [_finite(x) for x in outcome.stopping]},
    }


def _row(row: Row) -> dict[str, Any]:
    return {
        "key": row.key,
        "label": row.label,
        "hyperparameters": row.num_hyperparameters,
        "inner_solves": row.num_solves,
        "setting": row.setting,
        "validation": row.validation,
        "test": row.test,
        "seconds": round(row.seconds, 3),
    }


def hyperparameters_json(outcome: Outcome) -> dict[str, Any]:
    """The tuned hyperparameters with their names and natural values.

    Args:
        outcome: The run.

    Returns:
        Group name to values.
    """
    data, phi = outcome.plan.data, outcome.phi
    result: dict[str, Any] = {}
    weights, by_input = outcome.weights(), outcome.input_penalties()
    if weights is not None:
        rows = [data.places[i] for i in data.train]
        result["sample-weights"] = [
            {"place": place, "weight": float(w)} for place, w in zip(rows, weights, strict=True)
        ]
    if "class-weights" in phi:
        factors = np.exp(np.asarray(phi["class-weights"]))
        result["class-weights"] = [
            {"class": name, "weight": float(w)}
            for name, w in zip(data.classes, factors / factors.mean(), strict=True)
        ]
    if by_input is not None:
        key = "l2-per-feature" if "l2-per-feature" in phi else "l2-per-weight"
        result[f"{key}, mean of each input"] = [
            {"input": name, "penalty": float(p)} for name, p in zip(data.inputs, by_input, strict=True)
        ]
    if {"l2", "l2-per-layer"} & set(phi):
        result["l2, mean of each layer"] = [
            float(np.exp(np.log(np.asarray(p)).mean())) for p in penalties(phi, outcome.theta)
        ]
    return result


def hyperparameters_arrays(outcome: Outcome) -> dict[str, np.ndarray]:
    """The tuned hyperparameters and the model as plain arrays, for `hyperparameters.npz`.

    Args:
        outcome: The run.

    Returns:
        Name to array: `phi…` are the raw values, `theta…` the parameters, `penalty_k` and `weights` the natural
        values, `train_rows` the row number of each training example.
    """
    arrays: dict[str, Any] = {"train_rows": outcome.plan.data.train}
    for name, tree in (("phi", outcome.phi), ("theta", outcome.theta)):
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
            arrays["/".join([name, *(_key(entry) for entry in path)])] = np.asarray(leaf)
    for k, penalty in enumerate(penalties(outcome.phi, outcome.theta)):
        arrays[f"penalty_{k}"] = np.asarray(penalty)
    weights = outcome.weights()
    if weights is not None:
        arrays["weights"] = weights
    return arrays


def _key(entry: Any) -> str:
    return str(getattr(entry, "key", getattr(entry, "idx", "")))
