"""Circulant matrices: periodic convolutions in one or several dimensions."""

import abc
from collections.abc import Iterable

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, ArrayLike, Bool, Complex, Float, Inexact, Scalar

from curvax.operators._base import as_tags
from curvax.operators._dense import check_dense_size
from curvax.operators._parts import tags_of
from curvax.operators._structured import AbstractStructuredOperator, check_power, is_symmetric


class AbstractCirculant(AbstractStructuredOperator):
    """A circulant matrix, given by its first column or by its spectrum."""

    column: eqx.AbstractVar[Float[Array, "..."]]

    @abc.abstractmethod
    def in_structure(self) -> jax.ShapeDtypeStruct:
        """An array of the shape of `column`."""

    @abc.abstractmethod
    def spectrum(self) -> Complex[Array, "..."]:
        """The eigenvalues of the non-negative frequencies of the last axis: the others are their conjugates."""

    def mv(self, vector: Float[Array, "..."]) -> Float[Array, "..."]:
        """C ∗ v."""
        check_shape(vector, self.in_structure())
        return column_of(self.spectrum() * jnp.fft.rfftn(vector), self.in_structure().shape)

    def out_structure(self) -> jax.ShapeDtypeStruct:
        """An array of the shape of `column`."""
        return self.in_structure()

    def as_matrix(self) -> Float[Array, "N N"]:
        """The matrix over raveled entries, gathered from `column`. Raises `ValueError` above a size limit."""
        # Not in products: XLA on CPU refuses a Fourier transform whose result a LAPACK call wants column by column.
        check_dense_size(self)
        places = [axis.ravel() for axis in jnp.indices(self.column.shape)]
        lengths = self.column.shape
        return self.column[tuple((i[:, None] - i) % n for i, n in zip(places, lengths, strict=True))]

    def inverse(self) -> "AbstractCirculant":
        """C⁻¹, again circulant, with eigenvalues 1/λ."""
        spectrum = self.spectrum()
        # NaN as a factor, not as a constant: the derivative is NaN too.
        honest = jnp.where(self._vanishing(spectrum), jnp.nan, 1).astype(spectrum.dtype)
        return OfSpectrum(1 / (spectrum * honest), self.in_structure().shape, tags_of(self))

    def power(self, exponent: float) -> "AbstractCirculant":
        """Cᵖ with eigenvalues λᵖ, for a positive semidefinite C; rounding around zero is taken as zero."""
        check_power(self, exponent)
        spectrum, structure = self.spectrum(), self.in_structure()
        known = jnp.where(self._vanishing(spectrum), 0, 1).astype(structure.dtype)
        values = jnp.maximum(spectrum.real, 0) * known
        powered = (values**exponent).astype(spectrum.dtype)
        return OfSpectrum(powered, structure.shape, tags_of(self) - {lx.negative_semidefinite_tag})

    def eigenvalues(self) -> Complex[Array, "..."] | Float[Array, "..."]:
        """The eigenvalues, in the order and shape of `jnp.fft.fftn(column)`; real where C is tagged symmetric."""
        values = jnp.fft.fftn(self.column)
        return values.real if is_symmetric(self) else values

    def trace(self) -> Scalar:
        """N c₀."""
        return self.column.size * self.column.ravel()[0]

    def logdet(self) -> Scalar:
        """Σ log |λ|."""
        values = jnp.fft.fftn(self.column)
        known = jnp.where(self._vanishing(values), 0, 1).astype(self.column.dtype)
        return jnp.sum(jnp.log(jnp.abs(values) * known))

    def diagonal(self) -> Float[Array, " N"]:
        """N times c₀."""
        return jnp.full((self.column.size,), self.column.ravel()[0])

    def _vanishing(self, values: Inexact[Array, "..."]) -> Bool[Array, "..."]:
        """Where an eigenvalue cannot be told from zero.

        The transform's error is at most about log₂ N · ε in the 2-norm. The usual bound N ε for dense matrices would
        call every float32 matrix with N = 10⁵ and a condition number over 100 singular.
        """
        sizes = jnp.abs(jax.lax.stop_gradient(values))
        doublings = (self.in_size() - 1).bit_length()
        return sizes <= 4 * (1 + doublings) * jnp.finfo(self.in_structure().dtype).eps * jnp.max(sizes)


class Circulant(AbstractCirculant):
    r"""C with C_ij = c_{(i − j) mod n}: the periodic convolution C v = c ∗ v, never formed.

    With a `column` of shape (n₁, n₂, …) indices are tuples and each is taken modulo its own length: a convolution
    that is periodic in every axis, over arrays of that shape (raveled, a block circulant matrix with circulant
    blocks). The Fourier basis diagonalises every one of them; the eigenvalues are the Fourier transform of c.

    Args:
        column: c, the first column of the matrix: a real float32 or float64 array of at least one axis.
        tags: Lineax tags that you know to hold. C is symmetric where c_{−i} = c_i, positive semidefinite where besides
            all eigenvalues are ≥ 0; neither is looked for in the numbers.

    Raises:
        ValueError: `column` is not a real float32 or float64 array, or has no axis or no entry; a vector has another
            shape than `column`; `power` without `lx.positive_semidefinite_tag`.

    Cost: a product, `inverse`, `power` and `logdet` a few Fourier transforms each, O(N log N) for N entries; memory
        O(N). An eigenvalue below about 4 (1 + log₂ N) ε max |λ|, the rounding of the transforms, counts as zero: then
        products with the inverse are NaN and `logdet` is −∞. The last digits of `inverse` are lost with the condition
        number, as there is no refinement.

    Example:
        ```python
        import jax.numpy as jnp, lineax as lx, curvax as cx

        laplacian = cx.operators.Circulant(
            jnp.array([2.0, -1.0, 0.0, 0.0, -1.0]), lx.positive_semidefinite_tag
        )
        smooth = laplacian.damped(0.5).inverse().mv(jnp.arange(5.0))
        ```

    Source: P. J. Davis, "Circulant Matrices", 1979; R. M. Gray, "Toeplitz and circulant matrices: a review", 2006.
    """

    column: Float[Array, "..."]
    tags: frozenset[object] = eqx.field(static=True)

    def __init__(self, column: ArrayLike, tags: object | Iterable[object] = ()) -> None:
        self.column = as_real(column, "column")
        if self.column.ndim == 0 or self.column.size == 0:
            raise ValueError(
                "`column` must be an array of at least one axis with at least one entry, found shape "
                f"{self.column.shape}."
            )
        self.tags = as_tags(tags)

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """An array of the shape of `column`."""
        return jax.ShapeDtypeStruct(self.column.shape, self.column.dtype)

    def spectrum(self) -> Complex[Array, "..."]:
        """The real Fourier transform of `column`, in the shape of `jnp.fft.rfftn(column)`."""
        return jnp.fft.rfftn(self.column)

    def transpose(self) -> "Circulant":
        """Cᵀ, with the column c_{−i}."""
        if is_symmetric(self):
            return self
        reflected = jnp.roll(jnp.flip(self.column), (1,) * self.column.ndim, tuple(range(self.column.ndim)))
        return Circulant(reflected, lx.transpose_tags(self.tags))

    def damped(self, damping: Scalar | float) -> "Circulant":
        """C + damping · I. A positive semidefinite matrix stays so: damping must not be negative."""
        first = (0,) * self.column.ndim
        damped = self.column.at[first].add(jnp.asarray(damping, self.column.dtype))
        return Circulant(damped, _damped_tags(self))


class OfSpectrum(AbstractCirculant):
    """A circulant matrix given by its spectrum: inverses and powers, which go on without further transforms.

    Args:
        values: λ, in the shape of `jnp.fft.rfftn(column)`.
        shape: That of the column.
        tags: Lineax tags that hold.
        given: The column, where it is known to all digits.
    """

    values: Complex[Array, "..."]
    shape: tuple[int, ...] = eqx.field(static=True)
    tags: frozenset[object] = eqx.field(static=True)
    given: Float[Array, "..."] | None = None

    @property
    def column(self) -> Float[Array, "..."]:  # type: ignore[override]
        """The first column of the matrix."""
        return column_of(self.values, self.shape) if self.given is None else self.given

    def in_structure(self) -> jax.ShapeDtypeStruct:
        """An array of the shape of `column`."""
        return jax.ShapeDtypeStruct(self.shape, self.values.real.dtype)

    def spectrum(self) -> Complex[Array, "..."]:
        """`values`."""
        return self.values

    def transpose(self) -> "OfSpectrum":
        """Cᵀ, with the conjugate spectrum."""
        return (
            self
            if is_symmetric(self)
            else OfSpectrum(self.values.conj(), self.shape, lx.transpose_tags(self.tags))
        )

    def damped(self, damping: Scalar | float) -> "OfSpectrum":
        """C + damping · I."""
        shift = jnp.asarray(damping, self.values.real.dtype)
        return OfSpectrum(self.values + shift, self.shape, _damped_tags(self))


def _damped_tags(operator: AbstractCirculant) -> frozenset[object]:
    return (tags_of(operator) - {lx.negative_semidefinite_tag}) | (operator.tags & {lx.tridiagonal_tag})


def column_of(spectrum: Complex[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """The column of this shape with this real Fourier transform."""
    return jnp.fft.irfftn(spectrum, s=shape, axes=tuple(range(len(shape))))


@lx.linearise.register(Circulant)
def _linearise(operator: Circulant) -> OfSpectrum:
    """With the transform of the column taken once."""
    return OfSpectrum(operator.spectrum(), operator.column.shape, operator.tags, operator.column)


def as_real(array: ArrayLike, name: str) -> Float[Array, "..."]:
    """A JAX array that the Fourier transforms take.

    Raises:
        ValueError: It is complex, integer or of half precision.
    """
    array = jnp.asarray(array)
    if array.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"`{name}` must be real and float32 or float64 (what the fast Fourier transform takes), found "
            f"{array.dtype}. Convert it with `.astype(jnp.float32)`; a complex matrix has no operator here."
        )
    return array


def check_shape(vector: Array, column: Array | jax.ShapeDtypeStruct) -> None:
    """Raise unless the shapes agree: a wrong one would broadcast and come back as a plausible answer."""
    if vector.shape != column.shape:
        raise ValueError(
            f"`vector` must have the shape of `column`, {column.shape}, found {vector.shape}. For several vectors "
            "use `jax.vmap(operator.mv)`."
        )
