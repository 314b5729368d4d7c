"""What a run of `minimise` remembers of each outer step."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Scalar


class Measurements(NamedTuple):
    """What one step of an algorithm reports about the point at which it stands: scalars."""

    value: Scalar
    grad_norm: Scalar
    error_estimate: Scalar
    relative_error: Scalar
    num_matvecs: Scalar
    num_inner_steps: Scalar


class History(eqx.Module):
    r"""The course of a run, one row for each hypergradient that counted.

    Row $i$ is measured at $\varphi$ after $i$ updates: row 0 at the start, the last row at the point
    that is returned. Attempts that were thrown away (non-finite, or a failed hypergradient) have no
    row; their number stands in `num_retries` of the row that followed. Floats are kept in the
    widest float of the session (float64 under x64), which holds every narrower one exactly.

    Attributes:
        value: Outer loss.
        grad_norm: Euclidean norm of the hypergradient.
        error_estimate: Estimated norm of the error of the hypergradient (`nan` with `rtol=None`).
        relative_error: `error_estimate / grad_norm`.
        num_matvecs: Products with the inner curvature.
        num_inner_steps: Steps of the inner solver.
        step_scale: Factor on the optimiser's update that led to this row: 1 but after a failure.
        num_retries: Attempts that failed before this row.
    """

    value: Float[Array | np.ndarray, " rows"]
    grad_norm: Float[Array | np.ndarray, " rows"]
    error_estimate: Float[Array | np.ndarray, " rows"]
    relative_error: Float[Array | np.ndarray, " rows"]
    num_matvecs: Int[Array | np.ndarray, " rows"]
    num_inner_steps: Int[Array | np.ndarray, " rows"]
    step_scale: Float[Array | np.ndarray, " rows"]
    num_retries: Int[Array | np.ndarray, " rows"]

    def __len__(self) -> int:
        """Number of rows."""
        return self.value.shape[0]


def empty(num_rows: int) -> History:
    """Buffers for `num_rows` rows on the device: NaN and -1 where nothing was written yet."""
    real = jnp.full((num_rows,), jnp.nan, float)
    count = jnp.full((num_rows,), -1, jnp.int32)
    return History(real, real, real, real, count, count, real, count)


def write(buffers: History, row: Scalar, entry: Measurements, scale: Scalar, num_retries: Scalar) -> History:
    """`buffers` with one row written."""
    values = History(*entry, step_scale=scale, num_retries=num_retries)
    return jax.tree.map(
        lambda buffer, x: buffer.at[row].set(jnp.asarray(x).astype(buffer.dtype)), buffers, values
    )


class Recorder:
    """Collects on the host the rows that the compiled chunks return."""

    def __init__(self, history: History | None = None) -> None:
        """Start empty, or with the rows of a run that goes on."""
        self._parts = [] if history is None else [history]

    def append(self, buffers: History, num_rows: int) -> None:
        """Add the first `num_rows` rows of `buffers` (host arrays)."""
        if num_rows:
            self._parts.append(jax.tree.map(lambda x: np.array(x[:num_rows]), buffers))

    def history(self) -> History:
        """All rows so far, as NumPy arrays."""
        if not self._parts:
            return jax.tree.map(np.asarray, empty(0))
        if len(self._parts) > 1:
            self._parts = [jax.tree.map(lambda *xs: np.concatenate(xs), *self._parts)]
        return self._parts[0]

    def last(self) -> History | None:
        """The newest row as scalars, `None` if there is none."""
        return jax.tree.map(lambda x: x[-1], self._parts[-1]) if self._parts else None


def to_dict(history: History) -> dict[str, Any]:
    """Field name to array."""
    return {name: getattr(history, name) for name in History.__dataclass_fields__}
