"""The algorithm of Bartels and Stewart: Schur forms once, then as many Sylvester equations as are wanted.

With A = U R Uᵀ and B = V S Vᵀ the equation A X + X B = C is R Y + Y S = UᵀCV for Y = UᵀXV. A real Schur form has
blocks of two rows on its diagonal, wherever they fall. A compiled program needs blocks of fixed size, so that the forms
are padded first: a pair that would straddle two blocks moves into the next one, and the row that it leaves empty gets a
harmless diagonal entry and a zero column in U. Between blocks everything is real and a matrix product; inside a block
pairs are rotated into complex triangular form, and the unknowns are found one antidiagonal after the other.
"""

from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Complex, Float

EXACT = jax.lax.Precision.HIGHEST

# Rows of a block. Measured for n = 500 on CPU: 16 to 32 make no difference, 8 and 64 cost 1.5 to 2 times as much.
_BLOCK = 24

# A relative error that no solution may have: above it the equation is singular to working precision.
_WORST_ERROR = 1e-2


class SchurFactors(eqx.Module):
    """A matrix as U R Uᵀ: R quasi-triangular (N × N) or, as a vector, diagonal; U of n × N with orthonormal rows."""

    basis: Float[Array, "n N"]
    form: Float[Array, "N N"] | Float[Array, " N"]

    @property
    def is_diagonal(self) -> bool:
        """Whether R is kept as a vector."""
        return self.form.ndim == 1

    def transpose(self) -> "SchurFactors":
        """Factors of the transposed matrix, at no cost: R with rows and columns in reverse order, transposed."""
        if self.is_diagonal:
            return self
        return SchurFactors(self.basis[:, ::-1], self.form.T[::-1, ::-1])

    def eigenvalues(self) -> Complex[Array, " N"]:
        """The eigenvalues; that of a row of padding is positive and larger than all others."""
        if self.is_diagonal:
            return _complex(self.form)
        height = jnp.where(_paired(self.form), _pair_height(self.form), 0)
        imaginary = jnp.pad(height, (0, 1)) - jnp.pad(height, (1, 0))
        return jax.lax.complex(jnp.diagonal(self.form), imaginary)


def check_schur(name: str, label: str, x: Array) -> None:
    """Raise `ValueError` unless there is a Schur form where work on `x` runs, as far as that is known in tracing."""
    if isinstance(x, jax.core.Tracer):
        device: Any = jax.config.jax_default_device  # type: ignore[attr-defined]
        if device is None:
            device = jax.default_backend()
        platform = device if isinstance(device, str) else device.platform
    else:
        platform = next(iter(x.devices())).platform
    if platform != "cpu":
        raise ValueError(
            f"`{name}` needs a Schur form of `{label}`, which JAX has on CPU only. Tag it symmetric if it is, with "
            "`lx.MatrixLinearOperator(matrix, lx.symmetric_tag)`, or put the arrays on CPU, under "
            "`jax.default_device(jax.devices('cpu')[0])`."
        )


@partial(jax.jit, static_argnames="symmetric")
def factorise(matrix: Float[Array, "n n"], symmetric: bool) -> SchurFactors:
    """Eigenvectors of a symmetric matrix, the padded real Schur form of any other. Zero where it is not finite."""
    matrix = jnp.where(jnp.all(jnp.isfinite(matrix)), matrix, 0)
    if symmetric:
        values, vectors = jnp.linalg.eigh(matrix)
        return SchurFactors(vectors, values)
    form, basis = jax.lax.linalg.schur(matrix)
    return _padded(form, basis)


@jax.jit
def solve(a: SchurFactors, b: SchurFactors, rhs: Float[Array, "n m"]) -> Float[Array, "n m"]:
    """X with A X + X B = C from the factors of A and B: four matrix products and a triangular solve."""
    return _from_bases(a, b, _solve_forms(a, b, _to_bases(a, b, rhs)))


@jax.jit
def solve_and_check(
    a: SchurFactors, b: SchurFactors, rhs: Float[Array, "n m"]
) -> tuple[Float[Array, "n m"], Bool[Array, ""]]:
    """X, and whether the equation is singular to working precision.

    It is if λ + μ = 0 up to rounding for eigenvalues λ, μ of A and B, and if a perturbation of C of the size of the
    rounding errors moves X by more than a hundredth. The second test is needed where A or B is far from normal: the
    smallest singular value of X ↦ AX + XB can be at rounding level with all λ + μ well away from zero. It is made on
    C itself and on random signs, which are solved for together.
    """
    inside = _to_bases(a, b, rhs)
    eps = jnp.finfo(rhs.dtype).eps
    left, right = a.eigenvalues(), b.eigenvalues()
    closest = jnp.min(jnp.abs(left[:, None] + right))
    distinct = closest > eps * (jnp.linalg.norm(_columns(a)) + jnp.linalg.norm(_columns(b)))
    if a.is_diagonal and b.is_diagonal:
        return _from_bases(a, b, _solve_forms(a, b, inside)), ~distinct
    signs = jax.random.rademacher(jax.random.key(0), inside.shape, inside.dtype)
    real = _real_rows(a)[:, None] & _real_rows(b)
    both = jnp.stack([inside, jnp.where(real, signs, 0)])
    found = jax.vmap(lambda f: _solve_forms(a, b, f))(both)
    size = jnp.sqrt(jnp.sum(both**2, axis=(1, 2)))
    rounding = eps * (jnp.max(_columns(a)) + jnp.max(_columns(b)))
    moved = rounding * jnp.sqrt(jnp.sum(found**2, axis=(1, 2)))
    stable = jnp.all(moved <= _WORST_ERROR * size)
    return _from_bases(a, b, found[0]), ~(distinct & stable)


def product(x: Array, y: Array) -> Array:
    """The matrix product at full precision."""
    return jnp.matmul(x, y, precision=EXACT)


def _to_bases(a: SchurFactors, b: SchurFactors, rhs: Float[Array, "n m"]) -> Float[Array, "N M"]:
    return product(product(a.basis.T, rhs), b.basis)


def _from_bases(a: SchurFactors, b: SchurFactors, inside: Float[Array, "N M"]) -> Float[Array, "n m"]:
    return product(product(a.basis, inside), b.basis.T)


def _real_rows(factors: SchurFactors) -> Bool[Array, " N"]:
    """Which rows of the form are no padding."""
    return jnp.any(factors.basis != 0, axis=0)


def _columns(factors: SchurFactors) -> Float[Array, " N"]:
    """The norms of the columns of the form, padding left out: their largest is close to the spectral norm."""
    real = _real_rows(factors)
    if factors.is_diagonal:
        return jnp.abs(factors.form)
    return jnp.sqrt(jnp.sum(jnp.where(real[:, None] & real, factors.form, 0) ** 2, axis=0))


def _block_shape(size: int) -> tuple[int, int]:
    """Number and size of the blocks. One row of a block may stay empty, but for a single block."""
    return (1, size) if size <= _BLOCK else (-(-size // (_BLOCK - 1)), _BLOCK)


def _paired(form: Float[Array, "N N"]) -> Bool[Array, " N-1"]:
    """Whether rows k and k + 1 belong to a pair of complex eigenvalues: LAPACK leaves exact zeros elsewhere."""
    return jnp.diagonal(form, -1) != 0


def _pair_height(form: Float[Array, "N N"]) -> Float[Array, " N-1"]:
    """The imaginary part of the eigenvalues of [[a, b], [c, a]] with bc < 0, LAPACK's standard form of a pair."""
    return jnp.sqrt(jnp.abs(jnp.diagonal(form, 1))) * jnp.sqrt(jnp.abs(jnp.diagonal(form, -1)))


def _padded(form: Float[Array, "n n"], basis: Float[Array, "n n"]) -> SchurFactors:
    size = form.shape[0]
    number, block = _block_shape(size)
    if number == 1:
        return SchurFactors(basis, form)
    paired = jnp.pad(_paired(form), (0, 2))

    def next_start(start: Array, _: None) -> tuple[Array, Array]:
        last = jnp.minimum(start + block - 1, size)
        return jnp.minimum(start + block - paired[last].astype(start.dtype), size), start

    end, starts = jax.lax.scan(next_start, jnp.asarray(0), None, length=number)
    rows = starts[:, None] + jnp.arange(block)
    real = (rows < jnp.append(starts[1:], end)[:, None]).ravel()
    rows = jnp.where(real, rows.ravel(), size)
    basis = basis.at[:, rows].get(mode="fill", fill_value=0)
    form = form.at[rows[:, None], rows].get(mode="fill", fill_value=0)
    # Above the modulus of every eigenvalue, so that no sum of eigenvalues with it is smaller than one without.
    large = 2 * jnp.linalg.norm(form) + 1
    return SchurFactors(basis, form + jnp.diag(jnp.where(real, 0, large)))


def _solve_forms(a: SchurFactors, b: SchurFactors, rhs: Float[Array, "N M"]) -> Float[Array, "N M"]:
    if a.is_diagonal and b.is_diagonal:
        return rhs / (a.form[:, None] + b.form)
    # A diagonal form beside one that is not is padded to whole blocks.
    left, right = _triangular(a), _triangular(b)
    extra = [(0, form.shape[0] - old) for form, old in zip((left, right), rhs.shape, strict=True)]
    return _solve_triangular(left, right, jnp.pad(rhs, extra))[: rhs.shape[0], : rhs.shape[1]]


def _triangular(factors: SchurFactors) -> Float[Array, "N N"]:
    if not factors.is_diagonal:
        return factors.form
    return _padded(jnp.diag(factors.form), jnp.eye(factors.form.shape[0], dtype=factors.form.dtype)).form


def _solve_triangular(
    left: Float[Array, "N N"], right: Float[Array, "M M"], rhs: Float[Array, "N M"]
) -> Float[Array, "N M"]:
    """R Y + Y S = F for padded quasi-triangular R and S, block by block from the lower left.

    Products run over whole rows and columns, in which the blocks that are still to come are zero: that does twice the
    arithmetic, at many times the speed of products whose sizes change.
    """
    (size, width), (p, q) = rhs.shape, (_num_blocks(left), _num_blocks(right))
    a, b = size // p, width // q
    rows, columns = left.reshape(p, a, size), right.reshape(width, q, b)
    turn_left, upper_left = _complex_blocks(left, p)
    turn_right, upper_right = _complex_blocks(right, q)
    poles_left = jnp.diagonal(upper_left, axis1=1, axis2=2)
    poles_right = jnp.diagonal(upper_right, axis1=1, axis2=2)
    # Strictly triangular, and padded so that the entries of one antidiagonal are a slice.
    upper_left = jnp.pad(jnp.triu(upper_left, 1), [(0, 0), (0, 0), (b - 1, b - 1)])
    upper_right = jnp.pad(jnp.triu(upper_right, 1), [(0, 0), (a - 1, a - 1), (0, 0)])

    def column(j: Array, done: Float[Array, "N q b"]) -> Float[Array, "N q b"]:
        rest = rhs.reshape(size, q, b)[:, j] - product(done.reshape(size, width), columns[:, j])
        turn_j = jax.tree.map(lambda x: x[j], turn_right)

        def block(k: Array, panel: Float[Array, "N b"]) -> Float[Array, "N b"]:
            i = p - 1 - k
            here = jax.lax.dynamic_slice_in_dim(rest, i * a, a) - product(rows[i], panel)
            turn_i = jax.tree.map(lambda x: x[i], turn_left)
            inverse = 1 / (poles_left[i][:, None] + poles_right[j])
            turned = _turn(_turn(_complex(here), turn_i, -1).T, turn_j, 1).T
            solved = _solve_block(upper_left[i], upper_right[j], inverse, turned)
            back = _turn(_turn(solved, turn_i, 1).T, turn_j, -1).T
            return jax.lax.dynamic_update_slice_in_dim(panel, back.real, i * a, 0)

        panel = jax.lax.fori_loop(0, p, block, jnp.zeros_like(rest))
        return done.at[:, j].set(panel)

    start = jnp.zeros((size, q, b), rhs.dtype)
    return jax.lax.fori_loop(0, q, column, start).reshape(size, width)


def _num_blocks(form: Float[Array, "N N"]) -> int:
    return 1 if form.shape[0] <= _BLOCK else form.shape[0] // _BLOCK


def _complex_blocks(form: Float[Array, "N N"], number: int) -> tuple[Any, Complex[Array, "p b b"]]:
    """The diagonal blocks as QᴴRQ, complex and upper triangular, and Q = diag(c) + i diag(s) P of each.

    For a pair [[a, b], [c, a]], w = √(−bc), the unitary Q is [[b, iw], [iw, b]]/√(b² + w²); P swaps the two rows.
    """
    block = form.shape[0] // number
    every = jnp.arange(number)
    blocks = form.reshape(number, block, number, block)[every, :, every]

    def turn(block_form: Float[Array, "b b"]) -> Any:
        paired, height = _paired(block_form), _pair_height(block_form)
        above = jnp.diagonal(block_form, 1)
        length = jnp.hypot(jnp.where(paired, above, 1), jnp.where(paired, height, 0))
        cosine, sine = jnp.where(paired, above / length, 0), jnp.where(paired, height / length, 0)
        ends = lambda x: jnp.pad(x, (0, 1)) + jnp.pad(x, (1, 0))
        step = paired.astype(int)
        partner = jnp.arange(block) + jnp.pad(step, (0, 1)) - jnp.pad(step, (1, 0))
        return jnp.where(ends(step) > 0, ends(cosine), 1), ends(sine), partner

    def triangular(block_form: Float[Array, "b b"], turned: Any) -> Complex[Array, "b b"]:
        return _turn(_turn(_complex(block_form), turned, -1).T, turned, 1).T

    turns = jax.vmap(turn)(blocks)
    return turns, jax.vmap(triangular)(blocks, turns)


def _turn(matrix: Complex[Array, "b c"], turn: Any, sign: int) -> Complex[Array, "b c"]:
    """Q M, or QᴴM for `sign` −1. Q is symmetric: M Q is (Q Mᵀ)ᵀ."""
    cosine, sine, partner = turn
    return _complex(cosine)[:, None] * matrix + _imaginary(sign * sine)[:, None] * matrix[partner]


def _complex(x: Array) -> Complex[Array, "..."]:
    return jax.lax.complex(x, jnp.zeros_like(x))


def _imaginary(x: Array) -> Complex[Array, "..."]:
    return jax.lax.complex(jnp.zeros_like(x), x)


def _solve_block(
    left: Complex[Array, "a w"],
    right: Complex[Array, "v b"],
    inverse: Complex[Array, "a b"],
    rhs: Complex[Array, "a b"],
) -> Complex[Array, "a b"]:
    """T Y + Y Z = G for triangular T and Z; `inverse` holds 1/(tᵢᵢ + zⱼⱼ).

    An antidiagonal of Y is known once those below and to the left of it are subtracted from G. What is subtracted from
    entries that are known already, and for entries outside of Y, is zero by the padding.
    """
    a, b = rhs.shape
    rows, columns = jnp.arange(a), jnp.arange(b)

    def antidiagonal(d: Array, rest: Complex[Array, "a b"]) -> Complex[Array, "a b"]:
        row = jnp.clip(a - 1 - d + columns, 0, a - 1)
        column = jnp.clip(d - (a - 1) + rows, 0, b - 1)
        by_column = rest[row, columns] * inverse[row, columns]
        by_row = rest[rows, column] * inverse[rows, column]
        from_left = jax.lax.dynamic_slice_in_dim(left, a + b - 2 - d, b, 1)
        from_right = jax.lax.dynamic_slice_in_dim(right, d, a, 0)
        return rest - from_left * by_column - by_row[:, None] * from_right

    return jax.lax.fori_loop(0, a + b - 1, antidiagonal, rhs) * inverse
