"""`minimise`: the outer loop of a bilevel problem, from the first hypergradient to the tuned numbers."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from curvax._pytree import tree_all_finite
from curvax._results import RESULTS, describe
from curvax.bilevel._callbacks import split
from curvax.bilevel._checkpoint import Checkpoint, Store
from curvax.bilevel._descent import HypergradientDescent
from curvax.bilevel._door import check_finite, check_inner_solver, tolerances_as_arrays
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
    smaller.

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
    num_steps = _check(phi0, theta0, optimizer, num_steps, key, inner_data=inner_data, outer_data=outer_data)
    if not isinstance(problem, Bilevel):
        raise TypeError(f"minimise: `problem` must be a `cx.Bilevel`, found {type(problem).__name__}.")
    if not isinstance(rule, AbstractRule):
        raise TypeError(f"minimise: `rule` must be `cx.Implicit(...)` or `cx.Unrolled()`, found {rule!r}.")
    check_inner_solver(problem, inner_solver)
    if state is not None and not isinstance(state, Carry):
        raise TypeError(f"minimise: `state` must be the `state` of a `Solution`, found {state!r}.")
    if checkpoint is not None and not isinstance(checkpoint, Checkpoint):
        raise TypeError(f"minimise: `checkpoint` must be a `cx.Checkpoint(directory)`, found {checkpoint!r}.")
    stopping, between = split(callbacks)
    phi0, theta0, inner_data, outer_data, key = _as_jax((phi0, theta0, inner_data, outer_data, key))
    phi, phi_rest = eqx.partition(phi0, eqx.is_inexact_array)
    inner_solver, rule = tolerances_as_arrays(inner_solver), tolerances_as_arrays(rule)
    algorithm = HypergradientDescent(problem, inner_solver, rule, optimizer, phi_rest, theta0)
    constants = (algorithm, stopping, (inner_data, outer_data))
    if state is not None:
        _check_state(state, eqx.filter_eval_shape(initial, constants, phi, key))
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


def _check(phi0: PyTree, theta0: PyTree, optimizer: Any, num_steps: Any, key: PyTree, **data: Any) -> int:
    """Refuse arguments that cannot work; the number of steps as an int."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((phi0, theta0, data, key))):
        raise ValueError(
            "minimise: called inside `jit`, `vmap` or `grad`. It is a loop on the host: call it outside, or "
            "differentiate one solve with `cx.hypergradient` or `cx.solution_map`."
        )
    if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
        raise ValueError(f"minimise: `num_steps` must be a positive int, found {num_steps!r}.")
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"minimise: `optimizer` must be an optax transformation such as `optax.adam(1e-2)`, found {optimizer!r}."
        )
    for name, tree in (("phi0", phi0), ("theta0", theta0)):
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if eqx.is_array(leaf)]
        leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
        if not leaves:
            raise ValueError(
                f"minimise: `{name}` holds no floating-point array, so there is nothing to optimise; wrap Python "
                f"numbers in `jnp.asarray(..., float)`. Found {name} = {tree!r}."
            )
        if not bool(tree_all_finite(leaves)):
            raise ValueError(f"minimise: `{name}` holds NaN or infinity; start from finite numbers.")
    check_finite(**{name: batch for name, batch in data.items() if not callable(batch)})
    for name, batch in data.items():
        if callable(batch) and key is None:
            raise ValueError(
                f"minimise: `{name}` is a sampler, which draws from a key; pass `key=jax.random.key(0)`."
            )
    return int(num_steps)


def _as_jax(tree: PyTree) -> PyTree:
    """NumPy arrays as JAX arrays, transferred once and not in every chunk; weak types, which recompile, as strong."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic) or getattr(leaf, "weak_type", False):
            return jnp.asarray(leaf, dtype=leaf.dtype)
        return leaf

    return jax.tree.map(convert, tree)


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


def _check_state(state: Carry, expected: Carry) -> None:
    """A state goes on only with the kind of run that it came from."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree.leaves_with_path(
            eqx.filter(tree, lambda x: eqx.is_array(x) or isinstance(x, jax.ShapeDtypeStruct))
        )
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}

    found, wanted = shapes(state), shapes(expected)
    other = sorted(k for k in found.keys() | wanted.keys() if found.get(k) != wanted.get(k))
    if other:
        raise ValueError(
            "minimise: `state` belongs to a run with another `phi0`, `theta0`, `optimizer` or `rule` (its `recycle`, "
            f"say): they differ in {', '.join(other[:3])}. Go on with what that run was given, or start with "
            "`phi0=solution.phi` and no `state`."
        )
