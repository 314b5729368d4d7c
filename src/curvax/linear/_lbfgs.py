"""Pairs of steps and changes of the gradient as a preconditioner: the inverse that L-BFGS keeps."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Int, PyTree, Scalar

from curvax._pytree import stop_gradient, tree_add, tree_dtype, tree_scale, tree_sub
from curvax.linear._slots import EXACT, along, flat, mixed
from curvax.operators._base import as_arrays
from curvax.operators._dense import dense_matrix
from curvax.operators._dispatch import register


class LBFGSPreconditioner(lx.AbstractLinearOperator):
    r"""H = Wᵀ (scale · I) W + Z Zᵀ with W = I − Y R⁻¹ Sᵀ and Z = S R⁻ᵀ; made by `lbfgs`.

    The columns of S and Y are the pairs, scaled to sᵀy = 1, and R is the upper triangle of SᵀY. Both terms are
    semidefinite as they are computed: no rounding makes H indefinite.

    Attributes:
        steps: S, leaves of shape (m, \*leaf.shape), oldest first, zero where a pair was skipped.
        changes: Y, likewise.
        mix: R⁻¹.
        scale: The initial scaling.
        used: Which pairs are in use.
    """

    steps: PyTree[Array]
    changes: PyTree[Array]
    mix: Float[Array, "m m"]
    scale: Scalar
    used: Bool[Array, " m"]
    tags: frozenset[object] = eqx.field(static=True, default=frozenset({lx.positive_semidefinite_tag}))

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """H v, in four passes over the pairs."""
        inside = jnp.matmul(self.mix, along(self.steps, vector), precision=EXACT)
        rest = tree_scale(self.scale, tree_sub(vector, mixed(inside, self.changes)))
        back = jnp.matmul(inside - along(self.changes, rest), self.mix, precision=EXACT)
        return tree_add(rest, mixed(back, self.steps))

    def as_matrix(self) -> Float[Array, "n n"]:
        """H over raveled leaves. Raises `ValueError` above a size limit."""
        return dense_matrix(self)

    def transpose(self) -> "LBFGSPreconditioner":
        """H itself."""
        return self

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.steps)

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of the vectors."""
        return self.in_structure()


register(LBFGSPreconditioner)


def lbfgs(
    pairs: tuple[PyTree[Array], PyTree[Array]],
    *,
    scale: Scalar | float | None = None,
    valid: Bool[Array, " m"] | Int[Array, ""] | int | None = None,
    oldest: Int[Array, ""] | int = 0,
) -> LBFGSPreconditioner:
    r"""The inverse curvature that m pairs (s, y ≈ A s) determine by the updates of L-BFGS, as a preconditioner.

    H ← (I − ρ s yᵀ) H (I − ρ y sᵀ) + ρ s sᵀ with ρ = 1/sᵀy, from scale · I, oldest pair first. H y = s for the last
    pair. Where the steps are conjugate, sᵢᵀyⱼ = 0, it is so for every pair, and their span has the eigenvalue 1 in HA.

    Positive definite whatever the pairs hold: one with sᵀy ≤ √ε ‖s‖‖y‖ is skipped, ε the unit of rounding, and so is
    one with an entry that is not finite. Pairs s, As of a positive definite A with a condition number below 4/ε are
    never skipped.

    Pairs are at hand in many places:

    - Optimistix: `memory = solution.state.hessian_update_state` of `optx.LBFGS`, with
      `lbfgs((memory.y_diff_history, memory.grad_diff_history), oldest=memory.index_start)`.
    - optax: of the state of `optax.scale_by_lbfgs`,
      `lbfgs((state.diff_params_memory, state.diff_updates_memory), oldest=state.count - 1)`.
    - Your own products: s random or a step, y = As.

    Args:
        pairs: S and Y, two pytrees like the vectors with a leading axis of m ≥ 1 in every leaf.
        scale: The scaling of the identity to begin with, above 0, in units of A⁻¹; by default sᵀy/yᵀy of the last pair
            in use, 1 if there is none.
        valid: Which slots hold a pair: booleans of shape (m,), or how many from the first slot on. All by default;
            empty slots, zeros, are skipped in any case.
        oldest: Slot of the oldest pair, modulo m, where the slots are a ring; pairs follow in slot order.

    Returns:
        An `LBFGSPreconditioner`, tagged `lx.positive_semidefinite_tag`. It is a constant: no derivative flows through
        it. A traced `scale` that is not above 0 makes its products NaN.

    Raises:
        ValueError: The two trees differ, have no array or one that is not real and floating-point, or no common
            leading axis; a known `scale` is not above 0; `valid` or `oldest` has another shape.

    Cost: a product 8mn operations in 4 passes over the pairs; 2mn to build R, and m³/3; memory 2mn.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, 2.0, 1e4])), lx.positive_semidefinite_tag)
        steps = jnp.eye(3)[2:]
        options = {"preconditioner": cx.linear.lbfgs((steps, steps @ A.matrix))}
        lx.linear_solve(A, jnp.ones(3), cx.linear.CG(rtol=1e-5), options=options)
        ```

    Source: J. Nocedal, "Updating quasi-Newton matrices with limited storage", 1980; R. H. Byrd, J. Nocedal,
        R. B. Schnabel, "Representations of quasi-Newton matrices and their use in limited memory methods", 1994,
        (3.1), which is factored here so that it stays definite; J. L. Morales, J. Nocedal, "Automatic
        preconditioning by limited memory quasi-Newton updating", 2000.
    """
    steps, changes = _checked(pairs)
    num_slots = jax.tree.leaves(steps)[0].shape[0]
    mask = _mask(valid, num_slots)
    if jnp.shape(oldest) != () or not jnp.issubdtype(jnp.result_type(oldest), jnp.integer):
        raise ValueError(
            f"`oldest` of `lbfgs` must be one integer, found shape {jnp.shape(oldest)} and dtype "
            f"{jnp.result_type(oldest)}."
        )
    if isinstance(scale, int | float) and not scale > 0:
        raise ValueError(f"`scale` of `lbfgs` must be above 0, found {scale}. None takes it from the pairs.")
    dtype = tree_dtype(steps)
    steps, changes = stop_gradient((steps, changes))
    if not (isinstance(oldest, int) and oldest % num_slots == 0):
        shift = -jnp.asarray(oldest).astype(int)
        steps, changes, mask = jax.tree.map(
            lambda leaf: jnp.roll(leaf, shift, axis=0), (steps, changes, mask)
        )

    # (αs, αy) is the same pair: the largest entry of s is brought to 1, far from overflow, and then sᵀy.
    largest = _total(lambda s: jnp.max(jnp.abs(s), axis=1, initial=0), steps, dtype=dtype, by=jnp.maximum)
    mask &= (largest > 0) & jnp.isfinite(largest)
    steps, changes = _scaled((steps, changes), mask, 1 / jnp.where(mask, largest, 1))
    curvature, length, stretch = (
        _total(lambda a, b: jnp.sum(a * b, axis=1), a, b, dtype=dtype)
        for a, b in ((steps, changes), (steps, steps), (changes, changes))
    )
    # NaN is never used.
    used = mask & (curvature > jnp.finfo(dtype).eps ** 0.5 * jnp.sqrt(length) * jnp.sqrt(stretch))
    used &= jnp.isfinite(stretch)
    steps, changes = _scaled((steps, changes), used, jax.lax.rsqrt(jnp.where(used, curvature, 1)))

    products = _total(lambda s, y: jnp.matmul(s, y.T, precision=EXACT), steps, changes, dtype=dtype)
    eye = jnp.eye(num_slots, dtype=dtype)
    mix = jax.scipy.linalg.solve_triangular(jnp.triu(products, 1) + eye, eye, lower=False)
    if scale is None:
        last = jnp.max(jnp.where(used, jnp.arange(num_slots), -1))
        scale = jnp.where(last < 0, 1, curvature[last] / jnp.where(last < 0, 1, stretch[last]))
    scale = jax.lax.stop_gradient(jnp.asarray(scale, dtype))
    return LBFGSPreconditioner(steps, changes, mix, jnp.where(scale > 0, scale, jnp.nan), used)


def _total(leaf: Callable[..., Array], *trees: PyTree[Array], dtype: Any, by: Any = jnp.add) -> Array:
    """What `leaf` says of flattened slots, over all leaves."""
    terms = jax.tree.leaves(jax.tree.map(lambda *a: leaf(*(flat(x).astype(dtype) for x in a)), *trees))
    total = terms[0]
    for term in terms[1:]:
        total = by(total, term)
    return total


def _scaled(slots: PyTree[Array], used: Bool[Array, " m"], factors: Float[Array, " m"]) -> PyTree[Array]:
    """Every slot times its factor, and zeros for those that are not in use, whatever they hold."""

    def leaf(a: Array) -> Array:
        shape = (-1, *[1] * (a.ndim - 1))
        return jnp.where(used.reshape(shape), factors.astype(a.dtype).reshape(shape) * a, 0)

    return jax.tree.map(leaf, slots)


def _mask(valid: Any, num_slots: int) -> Bool[Array, " m"]:
    if valid is None:
        return jnp.ones(num_slots, bool)
    array = jnp.asarray(valid)
    if array.dtype == bool and array.shape == (num_slots,):
        return array
    if jnp.issubdtype(array.dtype, jnp.integer) and array.shape == ():
        return jnp.arange(num_slots) < array.astype(int)
    raise ValueError(
        f"`valid` of `lbfgs` must be booleans of shape ({num_slots},) or one integer, the number of pairs; found "
        f"dtype {array.dtype} and shape {array.shape}."
    )


def _checked(pairs: Any) -> tuple[PyTree[Array], PyTree[Array]]:
    if not (isinstance(pairs, tuple | list) and len(pairs) == 2):
        raise ValueError(
            f"`pairs` of `lbfgs` must be a tuple (steps, changes) of two stacked pytrees, found "
            f"{type(pairs).__name__}. Stack a list of pairs with `jax.tree.map(lambda *x: jnp.stack(x), *pairs)`."
        )
    steps, changes = (as_arrays(tree) for tree in pairs)
    leaves = jax.tree.leaves(steps)
    if not leaves:
        raise ValueError("`pairs` of `lbfgs` has no array.")
    for leaf in [*leaves, *jax.tree.leaves(changes)]:
        if not (eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            found = leaf.dtype if eqx.is_array(leaf) else type(leaf).__name__
            raise ValueError(
                f"`pairs` of `lbfgs` must hold real floating-point arrays, found {found}. Filter other leaves out "
                "with `eqx.filter(tree, eqx.is_inexact_array)`."
            )
    kinds = [[(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree)] for tree in (steps, changes)]
    if jax.tree.structure(steps) != jax.tree.structure(changes) or kinds[0] != kinds[1]:
        raise ValueError(
            "`pairs` of `lbfgs` must be two trees of one structure, with the same shapes and dtypes; found "
            f"{kinds[0]} and {kinds[1]} (or another structure)."
        )
    sizes = {leaf.shape[0] if leaf.ndim else None for leaf in leaves}
    if len(sizes) != 1 or sizes & {None, 0}:
        raise ValueError(
            "Every leaf of `pairs` of `lbfgs` needs a leading axis of one length, the number of pairs, at least 1; "
            f"found shapes {[leaf.shape for leaf in leaves]}."
        )
    return steps, changes
