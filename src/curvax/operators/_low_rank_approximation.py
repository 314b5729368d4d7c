"""Low-rank approximations of an operator from its products with a random sketch."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Float, Scalar

from curvax._control import map_in_chunks
from curvax._pytree import tree_dtype
from curvax.operators._damped import check_real, is_square
from curvax.operators._dense import ravel, unravel
from curvax.operators._low_rank import LowRankPlusDiagonal
from curvax.operators._matrix_function import eigen
from curvax.operators._parts import EXACT
from curvax.operators._sketched import CHUNK, check_sketch, cut_columns
from curvax.operators._sketches import check_count
from curvax.operators._structured import is_symmetric

# Negative eigenvalues of the core beyond this multiple of its rounding are none of rounding's.
NEGATIVE = 10


def nystrom_approximation(
    operator: lx.AbstractLinearOperator, sketch: lx.AbstractLinearOperator, *, rank: int | None = None
) -> LowRankPlusDiagonal:
    """Â = (AΩ)(ΩᵀAΩ)⁺(AΩ)ᵀ for a positive semidefinite A, with the columns of the sketch made orthonormal for Ω.

    Â ⪯ A, and of A of rank r it is A itself once the sketch has r columns: the core is then rank-deficient, which it
    may be. A + νI with ν at rounding level is approximated in place of A, and ν subtracted from the eigenvalues.
    `cx.linear.nystrom` makes the same approximation into a preconditioner.

    Args:
        operator: A, positive semidefinite, tagged so or symmetric; real, over vectors of any structure.
        sketch: From vectors of k to those of A, such as `cx.operators.GaussianSketch(operator, k, key=key)`.
        rank: Keep this many of the largest eigenvalues, at most k; by default all. The error of rank r is much nearer
            to the best one for k = 2r than for k = r.

    Returns:
        A `LowRankPlusDiagonal` of diagonal 0, tagged positive semidefinite: its columns are orthogonal and fall in
        norm, the squares of which are the eigenvalues. `damped(λ).inverse()` gives (Â + λI)⁻¹, and
        `approximation_error(operator, Â, key=...)` the error. All NaN where the core shows that A is indefinite,
        or where A has a NaN.

    Raises:
        ValueError: The operator is not square, real and tagged symmetric, or tagged negative; the sketch does not fit
            to it; `rank` out of range.

    Cost: k products, 16 at a time; about 6nk² operations more; memory 4kn while it is built.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.MatrixLinearOperator(jnp.diag(jnp.logspace(0, -8, 50)), lx.positive_semidefinite_tag)
        sketch = cx.operators.GaussianSketch(A, 20, key=jax.random.key(0))
        low_rank = cx.operators.nystrom_approximation(A, sketch)
        error = cx.operators.approximation_error(A, low_rank, key=jax.random.key(1))
        ```

    Source: J. A. Tropp, A. Yurtsever, M. Udell, V. Cevher, "Fixed-rank approximation of a positive-semidefinite matrix
        from streaming data", 2017 (arXiv:1706.05736). The shifted core is inverted by its eigenvalues instead of by
        Cholesky: there a rank-deficient or an indefinite A shows.
    """
    rank = _checked("nystrom_approximation", operator, sketch, rank)
    if not is_symmetric(operator) or lx.is_negative_semidefinite(operator):
        raise ValueError(
            "`operator` of `nystrom_approximation` must be positive semidefinite, and tagged "
            "`lx.positive_semidefinite_tag` or `lx.symmetric_tag`. Pass `-operator` for a negative one; for others "
            "there is `cx.operators.randomised_svd`."
        )
    return _nystrom(operator, sketch, rank)


@eqx.filter_jit
def _nystrom(
    operator: lx.AbstractLinearOperator, sketch: lx.AbstractLinearOperator, rank: int
) -> LowRankPlusDiagonal:
    structure, dtype = operator.in_structure(), tree_dtype(operator.in_structure())
    omega = _orthonormal(_images(sketch, jnp.eye(sketch.in_size(), dtype=dtype)))
    basis, values, _ = nystrom_core(omega, _images(operator, omega))
    columns = cut_columns((basis[:rank] * jnp.sqrt(values[:rank, None])).T, structure)
    return LowRankPlusDiagonal(jnp.zeros((), dtype), columns, tags=lx.positive_semidefinite_tag)


class LowRank(NamedTuple):
    """U Λ̂ Uᵀ with the rows of `basis` for U."""

    basis: Float[Array, "k n"]
    values: Float[Array, " k"]  # falling; NaN where A is seen to be indefinite, and where it has a NaN
    rounding: Scalar  # what a zero of ΩᵀAΩ may have become, and a zero of Λ̂


def nystrom_core(omega: Float[Array, "k n"], image: Float[Array, "k n"]) -> LowRank:
    """The Nyström approximation of A + νI less ν, from orthonormal rows Ωᵀ and their products (AΩ)ᵀ.

    With Y = AΩ + νΩ = QR and the core ΩᵀAΩ = E diag(m) Eᵀ, A + νI ≈ Q T Tᵀ Qᵀ for T = R E (m + ν)^{-1/2}. A core of
    deficient rank has its zeros at ν, which is what rounding makes of them: ε ‖AΩ‖_F, or the asymmetry of the core
    where the products are less accurate. Rows may be zero in both, for vectors that are not in use: they come last.
    """
    eps, tiny = jnp.finfo(image.dtype).eps, jnp.finfo(image.dtype).tiny
    core = jnp.matmul(omega, image.T, precision=EXACT)
    rounding = jnp.maximum(eps * jnp.linalg.norm(image), 0.5 * jnp.linalg.norm(core - core.T))
    zero = rounding < tiny  # A is zero as far as numbers go
    shift = jnp.where(zero, 1, rounding)
    energies, mix = eigen(0.5 * (core + core.T))
    factor, triangle = jnp.linalg.qr((image + shift * omega).T)
    root = jnp.matmul(triangle, mix, precision=EXACT) * jax.lax.rsqrt(jnp.maximum(energies, 0) + shift)
    squares, rotation = eigen(jnp.matmul(root, root.T, precision=EXACT))
    basis = jnp.matmul(rotation[:, ::-1].T, factor.T, precision=EXACT)
    values = jnp.where(zero, 0, jnp.maximum(squares[::-1] - shift, 0))
    # A NaN in A comes through `energies`.
    sound = energies[0] >= -NEGATIVE * rounding
    return LowRank(basis, jnp.where(sound, values, jnp.nan), rounding)


def randomised_svd(
    operator: lx.AbstractLinearOperator,
    sketch: lx.AbstractLinearOperator,
    *,
    power_steps: int = 1,
    rank: int | None = None,
) -> LowRankPlusDiagonal:
    """Q QᵀA, with Q an orthonormal basis of the range of (AAᵀ)^q A S, by its singular values; Q QᵀAQ Qᵀ if symmetric.

    The singular values (eigenvalues, if A is tagged symmetric: it may be indefinite) are never above those of A in
    modulus, and the error is of the order of the first one left out.

    Args:
        operator: A, real and square, over vectors of any structure; differentiable backwards if not symmetric.
        sketch: S, from vectors of k to those of A, such as `cx.operators.GaussianSketch(operator, k, key=key)`.
        power_steps: q ≥ 0: with 0 the error is larger by about √(n/k) where the singular values fall slowly, with 1
            hardly any more.
        rank: Keep this many of the largest singular values, at most k; by default all.

    Returns:
        A `LowRankPlusDiagonal` of diagonal 0, whose `left` is U Σ and `right` is V, in falling order; V Λ and V if A
        is symmetric; and only `left`, V √Λ, if A is tagged positive semidefinite. `approximation_error(operator, Â,
        key=...)` gives the error. All NaN where A has a NaN.

    Raises:
        ValueError: The operator is not square or not real, the sketch does not fit to it; `rank` or `power_steps` out
            of range.

    Cost: k (2 + 2q) products (with Aᵀ every second time), 16 at a time; (6 + 4q) nk² operations more; memory 4kn.

    Example:
        ```python
        import jax, jax.numpy as jnp, lineax as lx, curvax as cx

        A = lx.MatrixLinearOperator(jnp.diag(jnp.logspace(0, -8, 50)) + jnp.diag(jnp.ones(49), 1))
        sketch = cx.operators.HadamardSketch(A, 20, key=jax.random.key(0))
        cx.operators.randomised_svd(A, sketch, rank=10).mv(jnp.ones(50))
        ```

    Source: N. Halko, P.-G. Martinsson, J. A. Tropp, "Finding structure with randomness", 2011 (arXiv:0909.4061),
        algorithms 4.4, 5.1 and 5.3.
    """
    rank = _checked("randomised_svd", operator, sketch, rank)
    if power_steps != 0:
        power_steps = check_count("power_steps", "randomised_svd", power_steps)
    return _randomised_svd(operator, sketch, power_steps, rank)


@eqx.filter_jit
def _randomised_svd(
    operator: lx.AbstractLinearOperator, sketch: lx.AbstractLinearOperator, power_steps: int, rank: int
) -> LowRankPlusDiagonal:
    structure, dtype = operator.in_structure(), tree_dtype(operator.in_structure())
    symmetric = is_symmetric(operator)
    other = operator if symmetric else operator.transpose()
    start = _images(sketch, jnp.eye(sketch.in_size(), dtype=dtype))
    basis = _orthonormal(_images(operator, start))
    for _ in range(power_steps):
        basis = _orthonormal(_images(operator, _orthonormal(_images(other, basis))))
    image = _images(other, basis)  # (Aᵀ Q)ᵀ = Qᵀ A
    nothing = jnp.zeros((), dtype)
    if not symmetric:
        finite = jnp.all(jnp.isfinite(image))
        u, s, vt = jnp.linalg.svd(jnp.where(finite, image, 0), full_matrices=False)
        scaled = u[:, :rank] * jnp.where(finite, s[:rank], jnp.nan)
        left = jnp.matmul(basis.T, scaled, precision=EXACT)
        return LowRankPlusDiagonal(nothing, cut_columns(left, structure), cut_columns(vt[:rank].T, structure))
    core = jnp.matmul(basis, image.T, precision=EXACT)
    values, vectors = eigen(0.5 * (core + core.T))
    order = jnp.argsort(-jnp.abs(values))[:rank]
    values = values[order]
    right = jnp.matmul(basis.T, vectors[:, order], precision=EXACT)
    if lx.is_positive_semidefinite(operator):
        left = right * jnp.sqrt(jnp.maximum(values, 0))
        return LowRankPlusDiagonal(nothing, cut_columns(left, structure), tags=lx.positive_semidefinite_tag)
    tags = {lx.symmetric_tag} | (
        {lx.negative_semidefinite_tag} if lx.is_negative_semidefinite(operator) else set()
    )
    values = jnp.minimum(values, 0) if lx.is_negative_semidefinite(operator) else values
    return LowRankPlusDiagonal(
        nothing, cut_columns(right * values, structure), cut_columns(right, structure), tags
    )


def _checked(
    name: str, operator: lx.AbstractLinearOperator, sketch: lx.AbstractLinearOperator, rank: int | None
) -> int:
    """The number of eigenvalues or singular values to keep."""
    check_real(operator, f"`operator` of `{name}`")
    if not is_square(operator):
        raise ValueError(
            f"`operator` of `{name}` must be square, with one structure for input and output, found "
            f"{operator.out_structure()} from {operator.in_structure()}."
        )
    check_sketch(name, operator, sketch)
    return sketch.in_size() if rank is None else check_count("rank", name, rank, sketch.in_size())


def _images(operator: lx.AbstractLinearOperator, rows: Float[Array, "k m"]) -> Float[Array, "k n"]:
    """The products with the rows, some at a time, raveled."""
    applied, structure = lx.linearise(operator), operator.in_structure()

    def product(row: Array) -> Array:
        return ravel(applied.mv(unravel(row, structure)), rows.dtype)

    return map_in_chunks(product, rows, CHUNK)


def _orthonormal(rows: Float[Array, "k n"]) -> Float[Array, "k n"]:
    """Orthonormal rows whose span holds those given."""
    return jnp.linalg.qr(rows.T)[0].T
