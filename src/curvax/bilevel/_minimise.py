"""`minimise`: the outer loop of a bilevel problem, from the first hypergradient to the tuned numbers."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import optax
from jaxtyping import Array, PyTree

from curvax._results import RESULTS, describe
from curvax.bilevel._arguments import as_jax, check_arguments, check_schedule, check_state
from curvax.bilevel._callbacks import split
from curvax.bilevel._checkpoint import Checkpoint, Store
from curvax.bilevel._descent import HypergradientDescent
from curvax.bilevel._door import check_inner_solver, tolerances_as_arrays
from curvax.bilevel._driver import MIN_SCALE, Carry, initial, own
from curvax.bilevel._history import History
from curvax.bilevel._problem import Bilevel
from curvax.bilevel._progress import Progress
from curvax.bilevel._run import Run, execute, load, revive
from curvax.implicit._rule import AbstractRule


class Solution(eqx.Module):
    r"""Where a run of `minimise` ended. All of it belongs to one point, the last good one.

    Attributes:
        phi: The hyperparameters, like `phi0`. Never NaN: a point is taken over only when the outer
            loss and the hypergradient there are finite and accurate.
        theta: The inner solution at `phi`, like `theta0`.
        value: The outer loss at `(theta, phi)`; `nan` if already the start failed.
        history: One row for each good point (`History`, NumPy arrays); its last row is this one.
        result: `cx.RESULTS.successful`, or why the run gave up.
        num_steps: Number of updates made, those before a resume included.
        state: To go on from here: `cx.minimise(..., state=solution.state)`.
    """

    phi: PyTree
    theta: PyTree
    value: Array
    history: History
    result: RESULTS
    num_steps: int
    state: Carry


def minimise(
    problem: Bilevel,
    phi0: PyTree,
    theta0: PyTree,
    *,
    inner_solver: Any,
    rule: AbstractRule,
    optimizer: optax.GradientTransformation,
    num_steps: int,
    inner_data: Any = None,
    outer_data: Any = None,
    key: PyTree = None,
    rtol_schedule: Callable | None = None,
    callbacks: Sequence[Callable] = (),
    checkpoint: Checkpoint | None = None,
    progress: bool | None = None,
    state: Carry | None = None,
    throw: bool = True,
) -> Solution:
    r"""Minimise the outer loss over the hyperparameters by descent on the hypergradient.

    $$\min_\varphi f(\theta^*(\varphi), \varphi), \qquad \theta^*(\varphi) \in \arg\min_\theta g(\theta, \varphi),
    \qquad \varphi_{i+1} = \varphi_i + s_i\, u_i,$$

    with $u_i$ the update of the optax optimiser for the hypergradient at $\varphi_i$ and $s_i = 1$ unless a
    step failed. `num_steps` updates take `num_steps + 1` hypergradients: the last one measures the
    point that is returned, so that `phi`, `theta`, `value` and the last row of `history` belong together.
    Each hypergradient starts from the one before (inner solution, adjoint).

    *Accuracy.* A rule with `rtol` (`cx.Implicit`) asks for a relative accuracy, which near an optimum nothing
    can meet. After the first hypergradient $h_0$ its `atol` is raised to $0.01\,\texttt{rtol}\,\|h_0\|$ if it is
    smaller. `rtol_schedule` asks for less at first, where a rough direction will do, and for more as the run goes on
    (HOAG: F. Pedregosa, "Hyperparameter optimization with approximate gradient", 2016, arXiv 1602.02355; with summable
    errors the iterates converge); the absolute accuracy follows it.

    *Failures.* A step that leads to a point where the outer loss or the hypergradient is not finite,
    or where the hypergradient has a failed `result`, is taken back and repeated with half the length, down to
    1/1024 of the optimiser's. The second repetition sets the floats of the optimiser's state (momentum) back to
    their start. After 5 good steps in a row the length doubles again, up to the full one. A start that
    fails is not repeated.

    *Speed.* One program is compiled for a problem, inner solver, rule, optimiser and shapes of the
    arrays; a second call with the same objects compiles nothing. Steps run in chunks of about 0.3 s
    in that program; progress, callbacks and checkpoints act between chunks.

    Args:
        problem: A `cx.Bilevel`.
        phi0: Hyperparameters at the start, a pytree; its floating-point arrays are tuned.
        theta0: Inner parameters at the start, a pytree.
        inner_solver: An Optimistix solver or `cx.Steps`.
        rule: `cx.Implicit(...)` or `cx.Unrolled()`.
        optimizer: An optax optimiser for `phi`; `value=` and `grad=` are passed to its update.
        num_steps: Number of updates, in all: a resumed run makes those that are missing.
        inner_data: Third argument of the inner problem: a pytree of arrays or a sampler `key -> batch`.
        outer_data: The same for the outer loss.
        key: A JAX PRNG key; needed by samplers.
        rtol_schedule: Number of points measured so far ↦ `rtol` of the next hypergradient, in (0, 1), in place of
            that of `rule`, which must have one. An optax schedule will do, as
            `optax.exponential_decay(0.3, 1, 0.9, end_value=1e-4)`. Build it once: another one compiles anew. Give the
            rule the `max_sweeps` that its smallest value needs.
        callbacks: Functions of `cx.Info`, called when a chunk ends; `cx.Every` to be called at given
            steps; `cx.EarlyStopping`. A function that returns True ends the run.
        checkpoint: A `cx.Checkpoint`, to save the run and to go on from what was saved.
        progress: Show a progress bar on the standard error; None: only if that is a terminal.
        state: `solution.state` of a run to be continued for `num_steps` more; `phi0`, `theta0` and
            `key` then only give structure, and `history` has the new rows alone.
        throw: Raise if the run gives up. With False, look at `solution.result`.

    Returns:
        A `Solution`.

    Raises:
        ValueError: An argument that cannot work, or a checkpoint of another problem.
        TypeError: An argument of the wrong kind.
        RuntimeError: The run gave up and `throw=True`.
        KeyboardInterrupt: On Ctrl-C, after the checkpoint was written.

    Cost: a chunk costs about 0.5 ms on the host. The state holds `phi`, its hypergradient, the
    optimiser's state, `theta`, and the warm starts of the hypergradient.

    Example:
        ```python
        import curvax as cx, jax.numpy as jnp, optax, optimistix as optx

        x, y = jnp.array([[1.0], [2.0], [3.0]]), jnp.array([2.2, 3.8, 6.3])
        problem = cx.Bilevel(
            inner=lambda w, log_l2, _: jnp.mean((x @ w - y) ** 2) + jnp.exp(log_l2) * jnp.sum(w**2),
            outer=lambda w, log_l2, _: jnp.sum((w - 1.9) ** 2),
        )
        solution = cx.minimise(
            problem, jnp.array(-3.0), jnp.zeros(1), inner_solver=optx.BFGS(rtol=1e-6, atol=1e-6),
            rule=cx.Implicit(), optimizer=optax.adam(0.1), num_steps=100,
        )
        solution.value  # nearly 0
        ```
    """
    num_steps = check_arguments(
        phi0, theta0, optimizer, num_steps, key, inner_data=inner_data, outer_data=outer_data
    )
    if not isinstance(problem, Bilevel):
        raise TypeError(f"minimise: `problem` must be a `cx.Bilevel`, found {type(problem).__name__}.")
    if not isinstance(rule, AbstractRule):
        raise TypeError(f"minimise: `rule` must be `cx.Implicit(...)` or `cx.Unrolled()`, found {rule!r}.")
    check_inner_solver(problem, inner_solver)
    check_schedule(rtol_schedule, rule)
    if state is not None and not isinstance(state, Carry):
        raise TypeError(f"minimise: `state` must be the `state` of a `Solution`, found {state!r}.")
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"minimise: `checkpoint` must be a `cx.Checkpoint(directory)`, found {checkpoint!r}.")
    stopping, between = split(callbacks)
    phi0, theta0, inner_data, outer_data, key = as_jax((phi0, theta0, inner_data, outer_data, key))
    phi, phi_rest = eqx.partition(phi0, eqx.is_inexact_array)
    inner_solver, rule = tolerances_as_arrays(inner_solver), tolerances_as_arrays(rule)
    algorithm = HypergradientDescent(problem, inner_solver, rule, optimizer, phi_rest, theta0, rtol_schedule)
    constants = (algorithm, stopping, (inner_data, outer_data))
    if state is not None:
        check_state(state, eqx.filter_eval_shape(initial, constants, phi, key))
    carry = initial(constants, phi, key) if state is None else revive(own(state))
    target_rows = max(1, int(carry.num_rows)) + num_steps
    with contextlib.ExitStack() as stack:
        store, history = None, None
        if checkpoint is not None:
            inputs = {
                "phi0": phi0,
                "theta0": theta0,
                "inner_data": inner_data,
                "outer_data": outer_data,
                "key": key,
            }
            store = Store(checkpoint, inputs)
            stack.callback(store.close)
            carry, history = load(store, carry)
            if int(carry.num_rows) > target_rows:
                warnings.warn(
                    f"minimise: the checkpoint in {checkpoint.directory} is {int(carry.num_rows) - 1} steps old, more "
                    f"than `num_steps={num_steps}`: its point is returned as it is. For another run use another "
                    "directory.",
                    stacklevel=2,
                )
        run = Run(constants, carry, history)
        shown = Progress(progress, target_rows - 1, run.step)
        stack.callback(shown.close)
        execute(run, target_rows=target_rows, callbacks=between, store=store, progress=shown)
        shown.update(run.step, run.recorder.last(), last=True)
    phi, theta = run.point()
    solution = Solution(
        phi=phi,
        theta=theta,
        value=jnp.copy(run.carry.state.value),
        history=run.recorder.history(),
        result=run.carry.result,
        num_steps=run.step,
        state=run.carry,
    )
    if throw and solution.result != RESULTS.successful:
        raise RuntimeError(_explain(solution, target_rows - 1, checkpoint))
    return solution


def _explain(solution: Solution, num_steps: int, checkpoint: Checkpoint | None) -> str:
    """What happened, where, and what to do about it."""
    reason = describe(solution.result)
    if len(solution.history) == 0:
        return (
            f"minimise: the hypergradient at the start, `phi0`, failed: {reason} `cx.hypergradient` with the same "
            "arguments shows the figures."
        )
    text = (
        f"minimise gave up after step {solution.num_steps} of {num_steps}: the next one failed even at "
        f"1/{1 / MIN_SCALE:.0f} of "
        f"its length. The last attempt: {reason} "
        f"The outer loss was {float(solution.value):.6g} at the last good point; `throw=False` returns it. "
        "If the losses blow up, take a smaller learning rate or bound the hyperparameters (exp, softplus)."
    )
    if checkpoint is not None:
        text += f" The run up to there is kept in {checkpoint.directory}; the same call tries again from it."
    return text
