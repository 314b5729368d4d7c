"""A curvature seen in a random subspace, and what can be said of its error."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Scalar

from curvax._control import map_in_chunks
from curvax._pytree import tree_dtype, tree_sub
from curvax.operators._approximation_error import ApproximationError, approximation_error
from curvax.operators._damped import check_damping, check_real, is_square, known_tags, signature
from curvax.operators._dense import ravel, unravel
from curvax.operators._low_rank import LowRankPlusDiagonal
from curvax.operators._parts import EXACT
from curvax.operators._structured import AbstractStructuredOperator, is_symmetric

_KEPT = frozenset([lx.symmetric_tag, lx.positive_semidefinite_tag, lx.negative_semidefinite_tag])
# Columns pushed through the operator at once: each carries its own copy of the activations.
CHUNK = 16


class Sketched(AbstractStructuredOperator):
    """S (SᵀHS) Sᵀ: the curvature H as it is seen in the range of a tall S of k columns.

    The core SᵀHS (k × k) is formed when the operator is made. As an approximation of H this is biased even for
    E[S Sᵀ] = I: with a `GaussianSketch` its mean is (1 + 1/k) H + (tr H / k) · I for a symmetric H. What it is for is
    the step in the subspace, which depends on the range of S alone; to approximate H itself use
    `nystrom_approximation` or `randomised_svd`, which are far nearer for the same k products.

    The rank is at most k, so that there is no `inverse()`. There is `subspace_step`, S (SᵀHS)⁺ Sᵀ b, and
    `damped(λ)`, which has an inverse. (`H⁻¹b` with a small core in place of H is none of these: the dimensions do not
    fit.)

    Args:
        operator: H, real and square, over vectors of any structure.
        sketch: S, from vectors of k to those of H: `GaussianSketch`, `SparseSketch`, `HadamardSketch`, or any Lineax
            operator, such as an orthonormal basis of your own.

    Raises:
        ValueError: H is not square or not real; S does not fit to it; `inverse` or `power` of it.

    Cost: k products with H, 16 at a time, and as many with S and Sᵀ, when it is made; then a product one with S,
        one with Sᵀ and k² more. `trace` and `diagonal` k products with S; memory k² and that of S.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        H = lx.MatrixLinearOperator(jnp.diag(jnp.arange(1.0, 41.0)), lx.positive_semidefinite_tag)
        S = cx.operators.HadamardSketch(H, 10, key=jax.random.key(0))
        sketched = cx.operators.Sketched(H, S)
        step = sketched.subspace_step(-jnp.ones(40))  # the best step within the range of S
        sketched.error(key=jax.random.key(1)).relative  # of the matrix, against H: large
        ```

    Source: M. Pilanci and M. Wainwright, "Newton sketch", 2017 (arXiv:1505.02250) sketch the square root of H from the
        other side; steps in a random subspace are in R. Gower, D. Kovalev, F. Lieder, P. Richtárik, "RSN: randomized
        subspace Newton", 2019 (arXiv:1905.10874).
    """

    operator: lx.AbstractLinearOperator
    sketch: lx.AbstractLinearOperator
    core: Float[Array, "k k"]
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, operator: lx.AbstractLinearOperator, sketch: lx.AbstractLinearOperator) -> None:
        check_real(operator, "`operator` of `Sketched`")
        if not is_square(operator):
            raise ValueError(
                "`operator` of `Sketched` must be square, with one structure for input and output, found "
                f"{operator.out_structure()} from {operator.in_structure()}."
            )
        check_sketch("Sketched", operator, sketch)
        self.operator, self.sketch = operator, sketch
        self.tags = known_tags(operator) & _KEPT
        core = _core(operator, sketch)
        self.core = 0.5 * (core + core.T) if is_symmetric(self) else core

    @property
    def size(self) -> int:
        """The number of columns of S, k."""
        return len(self.core)

    def mv(self, vector: PyTree[Array]) -> PyTree[Array]:
        """S (C (Sᵀ v)), C = SᵀHS."""
        inside = self.sketch.transpose().mv(vector)
        return self.sketch.mv(jnp.matmul(self.core, inside, precision=EXACT))

    def transpose(self) -> "Sketched":
        """S (SᵀHᵀS) Sᵀ."""
        if is_symmetric(self):
            return self
        parts = (self.operator.transpose(), self.core.T)
        return eqx.tree_at(lambda sketched: (sketched.operator, sketched.core), self, parts)

    def in_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of H."""
        return self.operator.in_structure()

    def out_structure(self) -> PyTree[jax.ShapeDtypeStruct]:
        """That of H."""
        return self.operator.in_structure()

    def subspace_step(self, vector: PyTree[Array], *, rcond: float | None = None) -> PyTree[Array]:
        """x = S (SᵀHS)⁺ Sᵀ b: for a positive semidefinite H the minimiser of ½xᵀHx − bᵀx over the range of S.

        For a descent step pass b = −g; it has gᵀx ≤ 0 there, and for an indefinite H need not have. It is no
        approximation of H⁻¹b: b − Hx is orthogonal to the range of S, and large outside of it.

        Args:
            vector: b.
            rcond: Singular values of the core at most `rcond` times its largest count as zero, and nothing is
                done in their directions; by default 10 k ε.

        Returns:
            x; NaN where the core has one.
        """
        return self.subspace_inverse(rcond=rcond).mv(vector)

    def subspace_inverse(self, *, rcond: float | None = None) -> lx.AbstractLinearOperator:
        """S (SᵀHS)⁺ Sᵀ as an operator, factorised once: `subspace_step` for many vectors. No inverse of anything.

        Args:
            rcond: As for `subspace_step`.

        Returns:
            An operator over the vectors of H, symmetric and definite where H is tagged so.

        Raises:
            ValueError: `rcond` is a number that is not in [0, 1).
        """
        if isinstance(rcond, int | float) and not 0 <= rcond < 1:
            raise ValueError(f"`rcond` must be at least 0 and below 1, found {rcond}.")
        finite = jnp.all(jnp.isfinite(self.core))
        safe = jnp.where(finite, self.core, 0)
        pseudo = jnp.linalg.pinv(safe, rtol=rcond, hermitian=is_symmetric(self))
        middle = lx.MatrixLinearOperator(jnp.where(finite, pseudo, jnp.nan), self.tags)
        return lx.TaggedLinearOperator(self.sketch @ middle @ self.sketch.transpose(), self.tags)

    def inverse(self) -> lx.AbstractLinearOperator:
        """Raises: the rank is at most k."""
        raise ValueError(
            f"`Sketched` has rank {self.size} or less in {self.in_size()} dimensions and no inverse. For the step "
            "within the subspace call `subspace_step(vector)`, for a matrix that has one `damped(damping).inverse()`."
        )

    def damped(self, damping: Scalar | float) -> LowRankPlusDiagonal:
        """S (SᵀHS) Sᵀ + damping · I, with S written out (nk numbers)."""
        check_damping(damping)
        columns = _written(self.sketch)
        shift = jnp.asarray(damping, self.core.dtype)
        kept = self.tags - {lx.negative_semidefinite_tag}
        if not lx.is_positive_semidefinite(self):
            return LowRankPlusDiagonal(shift, _mixed(columns, self.core), columns, kept)
        finite = jnp.all(jnp.isfinite(self.core))
        values, vectors = jnp.linalg.eigh(jnp.where(finite, self.core, 0))
        root = jnp.where(finite, vectors * jnp.sqrt(jnp.maximum(values, 0)), jnp.nan)
        return LowRankPlusDiagonal(shift, _mixed(columns, root), tags=kept)

    def trace(self) -> Scalar:
        """Tr C SᵀS."""
        return jnp.sum(self.core * _core(None, self.sketch))

    def logdet(self) -> Scalar:
        """−∞, or log |det C| + log |det SᵀS| where S is square."""
        if self.size < self.in_size():
            return jnp.full((), -jnp.inf, self.core.dtype)
        return jnp.linalg.slogdet(self.core)[1] + jnp.linalg.slogdet(_core(None, self.sketch))[1]

    def diagonal(self) -> Float[Array, " n"]:
        """Σ over columns of (S C) ∘ S, raveled, a column at a time."""
        dtype = self.core.dtype

        def add(total: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
            mixed, single = (ravel(self.sketch.mv(weights), dtype) for weights in pair)
            return total + mixed * single, None

        zero = jnp.zeros(self.in_size(), dtype)
        return jax.lax.scan(add, zero, (self.core.T, jnp.eye(self.size, dtype=dtype)))[0]

    def error(
        self, *, key: PRNGKeyArray, num_probes: int = 10, confidence: float = 0.99
    ) -> ApproximationError:
        """How far this is from H as a matrix, from `num_probes` more products with H: see `approximation_error`."""
        return approximation_error(self.operator, self, key=key, num_probes=num_probes, confidence=confidence)

    def residual(self, vector: PyTree[Array], step: PyTree[Array]) -> Scalar:
        """‖b − Hx‖ / ‖b‖ of a step, with the true H, in one product; NaN for b = 0."""
        dtype = tree_dtype(self.in_structure())
        left = ravel(tree_sub(vector, self.operator.mv(step)), dtype)
        return jnp.linalg.norm(left) / jnp.linalg.norm(ravel(vector, dtype))


def check_sketch(name: str, operator: lx.AbstractLinearOperator, sketch: Any) -> None:
    """Raise unless a sketch takes vectors of k to those of an operator."""
    if not isinstance(sketch, lx.AbstractLinearOperator):
        raise ValueError(
            f"`sketch` of `{name}` must be a Lineax operator, such as `cx.operators.GaussianSketch(operator, 20, "
            f"key=key)`, found {type(sketch).__name__}. Wrap a matrix in `lx.MatrixLinearOperator`."
        )
    space = sketch.in_structure()
    vector = isinstance(space, jax.ShapeDtypeStruct) and len(space.shape) == 1 and space.shape[0] > 0
    if not vector or signature(sketch.out_structure()) != signature(operator.in_structure()):
        raise ValueError(
            f"`sketch` of `{name}` must take vectors of k to those of `operator`, {operator.in_structure()}; found one "
            f"from {space} to {sketch.out_structure()}. Make it with the operator as `like`."
        )
    if sketch.in_size() > sketch.out_size():
        raise ValueError(
            f"`sketch` of `{name}` has {sketch.in_size()} columns in {sketch.out_size()} dimensions: more than there "
            "is room for. With so few rows write the matrix out."
        )


@eqx.filter_jit
def _core(
    operator: lx.AbstractLinearOperator | None, sketch: lx.AbstractLinearOperator
) -> Float[Array, "k k"]:
    """SᵀHS, or SᵀS for None, some columns at a time."""
    back = sketch.transpose()
    product = (lambda vector: vector) if operator is None else lx.linearise(operator).mv
    return _columns(lambda weights: back.mv(product(sketch.mv(weights))), sketch).T


def _columns(product: Any, sketch: lx.AbstractLinearOperator) -> Float[Array, "k m"]:
    """The images of the basis vectors of the small space, one a row."""
    basis = jnp.eye(sketch.in_size(), dtype=sketch.in_structure().dtype)
    return map_in_chunks(product, basis, CHUNK)


@eqx.filter_jit
def _written(sketch: lx.AbstractLinearOperator) -> PyTree[Array]:
    """S with its columns along the last axis of every leaf, in nk numbers."""
    rows = _columns(lambda weights: ravel(sketch.mv(weights), weights.dtype), sketch)
    return cut_columns(rows.T, sketch.out_structure())


def cut_columns(columns: Float[Array, "n r"], structure: PyTree[jax.ShapeDtypeStruct]) -> PyTree[Array]:
    """Columns over raveled vectors, cut into leaves with the columns along a last axis."""
    return jax.vmap(lambda column: unravel(column, structure), in_axes=1, out_axes=-1)(columns)


def _mixed(columns: PyTree[Array], weights: Float[Array, "k r"]) -> PyTree[Array]:
    """Every leaf times a small matrix on the right."""
    return jax.tree.map(lambda leaf: jnp.matmul(leaf, weights.astype(leaf.dtype), precision=EXACT), columns)
