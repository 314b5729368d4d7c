"""What a user may hang into a run: early stopping inside the loop, functions between its chunks."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax.bilevel._history import History, Measurements


class Info(eqx.Module):
    r"""What a callback of `minimise` is told. Everything in it is a copy that may be kept.

    Attributes:
        step: Number of updates of $\varphi$ so far.
        num_steps: Number of updates at which the run ends.
        phi: The hyperparameters now.
        theta: The inner solution at `phi`.
        history: All rows so far (`History`, NumPy arrays); its last row belongs to `phi`.
    """

    step: int
    num_steps: int
    phi: PyTree
    theta: PyTree
    history: History


class Every(eqx.Module):
    """A callback that is called after every `num_steps` updates exactly: at steps 0, n, 2n, ...

    Plain callbacks are called when a chunk of steps ends, and how many steps that is depends on the
    clock. `Every` makes a chunk end where it is needed, so that a run which stops through it can be
    repeated exactly. Small `num_steps` of a fast problem cost speed: about 0.5 ms a call.

    Example:
        ```python
        report = cx.Every(10, lambda info: print(info.step, info.history.value[-1]))
        ```
    """

    num_steps: int
    callback: Callable[[Info], bool | None]

    def __check_init__(self) -> None:
        """Refuse what cannot be called and numbers that are no steps."""
        if not isinstance(self.num_steps, int) or self.num_steps < 1:
            raise ValueError(f"Every: `num_steps` must be a positive int, found {self.num_steps!r}.")
        if not callable(self.callback):
            raise TypeError(f"Every: `callback` must be a function of `Info`, found {self.callback!r}.")

    def __call__(self, info: Info) -> bool | None:
        """Call the function."""
        return self.callback(info)


class _StoppingState(eqx.Module):
    best: Float[Array, ""]
    num_waited: Int[Array, ""]


class EarlyStopping(eqx.Module):
    r"""Stop when the outer loss has not improved for `patience` steps in a row.

    Step $i$ improves if $f_i < f_\text{best} - \texttt{min\_delta}$, where $f_\text{best}$ is the value at
    the last step that improved. Looked at in every outer step inside the compiled loop: where a run
    stops does not depend on the clock, and a resumed run stops where the uninterrupted one does.
    The point of the last step is returned, not the best one. A run that was stopped is finished:
    resuming it returns at once.

    Args:
        patience: Steps without improvement after which the run ends, at least 1.
        min_delta: Smallest decrease of the outer loss that counts, in units of the loss.

    Example:
        ```python
        callbacks = [cx.EarlyStopping(patience=20, min_delta=1e-4)]  # for `cx.minimise(callbacks=...)`
        ```
    """

    patience: int
    min_delta: float = 0.0

    def __check_init__(self) -> None:
        """Refuse numbers that would stop at once or never."""
        if not isinstance(self.patience, int) or self.patience < 1:
            raise ValueError(f"EarlyStopping: `patience` must be a positive int, found {self.patience!r}.")
        if not self.min_delta >= 0:
            raise ValueError(f"EarlyStopping: `min_delta` must be >= 0, found {self.min_delta!r}.")

    def init(self) -> _StoppingState:
        """State before the first step."""
        return _StoppingState(jnp.full((), jnp.inf, float), jnp.zeros((), jnp.int32))

    def update(self, state: _StoppingState, entry: Measurements) -> tuple[_StoppingState, Bool[Array, ""]]:
        """Take in one step; say whether the run is to end."""
        value: Scalar = jnp.asarray(entry.value).astype(state.best.dtype)
        improved = value < state.best - self.min_delta
        best = jnp.where(improved, value, state.best)
        num_waited = jnp.where(improved, 0, state.num_waited + 1)
        return _StoppingState(best, num_waited), num_waited >= self.patience


def split(callbacks: Any) -> tuple[tuple[EarlyStopping, ...], tuple[Callable, ...]]:
    """The callbacks that act inside the compiled loop, and those that act between chunks."""
    if callable(callbacks) or isinstance(callbacks, EarlyStopping):
        callbacks = (callbacks,)
    inside, between = [], []
    for callback in callbacks:
        if isinstance(callback, EarlyStopping):
            inside.append(callback)
        elif callable(callback):
            between.append(callback)
        else:
            raise TypeError(
                "minimise: `callbacks` must hold functions of one argument (`cx.Info`), `cx.Every` or "
                f"`cx.EarlyStopping`; found {callback!r}."
            )
    return tuple(inside), tuple(between)


def wants_stop(callback: Callable, answer: Any) -> bool:
    """Whether the answer of a callback asks for the end of the run."""
    if answer is None:
        return False
    if isinstance(answer, bool | np.bool_) or (
        eqx.is_array(answer) and answer.shape == () and answer.dtype == bool
    ):
        return bool(answer)
    raise TypeError(
        f"minimise: the callback {callback!r} returned {answer!r}; return True to stop the run, None or "
        "False to go on."
    )
