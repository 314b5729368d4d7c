"""How good a model is, and how well weights find wrong labels. NumPy only."""

from typing import Any

import numpy as np


def measure(outputs: np.ndarray, y: np.ndarray, scale: float) -> dict[str, Any]:
    """Quality of predictions.

    Args:
        outputs: (n, classes) scores, or (n, 1) standardised values.
        y: (n,) class numbers (integers), or standardised values.
        scale: Standard deviation by which the values were divided.

    Returns:
        For classes `accuracy`, `standard_error` of it, `log_loss`; for values `rmse`, `standard_error` of it (both in
        the target's units) and `r2`.
    """
    n = len(y)
    if np.issubdtype(y.dtype, np.integer):
        accuracy = float(np.mean(outputs.argmax(axis=1) == y))
        shifted = outputs - outputs.max(axis=1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(n), y]
        return {
            "accuracy": accuracy,
            "standard_error": float(np.sqrt(accuracy * (1 - accuracy) / n)),
            "log_loss": float(losses.mean()),
        }
    squares = (outputs[:, 0] - y) ** 2
    mean, spread = squares.mean(), np.var(y)
    rmse = float(np.sqrt(mean))
    # Delta method: the error of a square root.
    error = float(squares.std() / np.sqrt(n) / (2 * rmse)) if rmse > 0 else 0.0
    return {
        "rmse": scale * rmse,
        "standard_error": scale * error,
        "r2": float(1 - mean / spread) if spread > 0 else None,
    }


def compare(first: np.ndarray, second: np.ndarray, y: np.ndarray) -> dict[str, int] | None:
    """Test examples on which exactly one of two classifiers is right.

    Args:
        first: (n, classes) scores.
        second: (n, classes) scores.
        y: (n,) class numbers, or values.

    Returns:
        `better`: the first alone is right; `worse`: the second alone. None for values.
    """
    if not np.issubdtype(y.dtype, np.integer):
        return None
    right, other = first.argmax(axis=1) == y, second.argmax(axis=1) == y
    return {"better": int(np.sum(right & ~other)), "worse": int(np.sum(other & ~right))}


def auc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Probability that a positive has a higher score than a negative; ties count half.

    Args:
        scores: (n,) numbers.
        positive: (n,) booleans.

    Returns:
        The area under the ROC curve, None if there is no pair.
    """
    num_positive = int(positive.sum())
    num_negative = len(scores) - num_positive
    if not num_positive or not num_negative:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # ties share the mean of their ranks
    rank_sum = float(ranks[positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)
