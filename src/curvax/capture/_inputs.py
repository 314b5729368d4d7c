"""What flows into a site, in the one form that statistics see."""

from abc import abstractmethod

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvax.capture._second_moment import at_least_float32, second_moment

EXACT = jax.lax.Precision.HIGHEST


class AbstractInputs(eqx.Module):
    """Inputs x of a site for B examples at T shared positions each: an array (B, T, in) that need not be written out.

    Shared positions are tokens, pixels or whatever else the same weight meets within one example. A bias that is folded
    into its weight is one more input, the last, which is always 1.
    """

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """(B, T, in), the bias included."""

    @abstractmethod
    def array(self) -> Float[Array, "B T in"]:
        """The inputs written out: patches of a convolution, rows of zeros and a one of an embedding."""

    def mask(self, cotangents: Float[Array, "B T out"]) -> Bool[Array, "B T"]:
        """Which positions count: those whose cotangent is not exactly zero (NaN counts).

        Masked tokens, branches not taken and empty slots of experts do not. For a convolution whole examples do or do
        not.
        """
        # XLA on CPU reads the rows once for a maximum; for `any` it writes out what is zero.
        return ~(jnp.max(jnp.abs(cotangents), axis=-1, initial=0) == 0)

    @abstractmethod
    def second_moment(self, mask: Bool[Array, "B T"]) -> Float[Array, "in in"] | Float[Array, " in"]:
        """Σ x xᵀ, SUMMED over the examples and positions that count; its diagonal if `diagonal`."""

    @abstractmethod
    def mean(self, mask: Bool[Array, "B T"]) -> Float[Array, "B in"]:
        """The mean over the positions of each example that count, zero if none does."""

    @abstractmethod
    def project(self, basis: Float[Array, "in k"]) -> Float[Array, "B T k"]:
        """x V, the inputs in the coordinates of the columns of a matrix."""

    def outer(self, cotangents: Float[Array, "B T out"]) -> Float[Array, "B out in"]:
        """Σ_T g xᵀ: the gradient of each example."""
        return jnp.einsum("bto,bti->boi", cotangents, self.array(), precision=EXACT)


def accumulation_dtype(array: Array) -> jnp.dtype:
    """What sums over many entries are kept in: at least float32."""
    return at_least_float32(array.dtype)


def counted(mask: Bool[Array, "B T"], dtype: jnp.dtype) -> Float[Array, " B"]:
    """Positions that count, example by example, at least 1."""
    return jnp.maximum(jnp.sum(mask, axis=1, dtype=dtype), 1)


def any_position(mask: Bool[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B 1"]:
    """1 for examples of which any position counts: the mean of a bias."""
    return jnp.any(mask, axis=1, keepdims=True).astype(dtype)


def bordered(
    moment: Float[Array, "n n"], total: Float[Array, " n"], count: Float[Array, ""]
) -> Float[Array, "m m"]:
    """The second moment with a constant input 1 appended."""
    return jnp.block([[moment, total[:, None]], [total[None], count[None, None]]])


class DenseInputs(AbstractInputs):
    """Inputs that are there as an array."""

    values: Float[Array, "B T n"]
    bias: bool = eqx.field(static=True)
    diagonal: bool = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, in)."""
        examples, shared, size = self.values.shape
        return examples, shared, size + self.bias

    def array(self) -> Float[Array, "B T in"]:
        """With a column of ones if there is a bias."""
        return jnp.pad(self.values, ((0, 0), (0, 0), (0, 1)), constant_values=1) if self.bias else self.values

    def second_moment(self, mask: Bool[Array, "B T"]) -> Array:
        """Σ x xᵀ."""
        dtype = accumulation_dtype(self.values)
        # Rows first, then zeros: what has one use in this shape is written once.
        counts, rows = mask.reshape(-1), self.values.reshape(-1, self.values.shape[-1])
        rows = jnp.where(counts[:, None], rows, 0)
        count = jnp.sum(mask, dtype=dtype)
        if self.diagonal:
            squares = jnp.sum(jnp.square(rows.astype(dtype)), axis=0)
            return jnp.append(squares, count) if self.bias else squares
        moment = second_moment(rows)
        if not self.bias:
            return moment
        # As a product, which reads the rows as they are: for a sum the compiler would write them out once more.
        total = jnp.matmul(counts.astype(rows.dtype), rows, precision=EXACT, preferred_element_type=dtype)
        return bordered(moment, total, count)

    def mean(self, mask: Bool[Array, "B T"]) -> Float[Array, "B in"]:
        """Over positions that count."""
        dtype = accumulation_dtype(self.values)
        kept = jnp.where(mask[..., None], self.values, 0)
        if self.values.shape[1] == 1:
            mean = kept[:, 0].astype(dtype)
        else:
            mean = jnp.sum(kept, axis=1, dtype=dtype) / counted(mask, dtype)[:, None]
        return jnp.concatenate([mean, any_position(mask, dtype)], axis=1) if self.bias else mean

    def project(self, basis: Float[Array, "in k"]) -> Float[Array, "B T k"]:
        """x V."""
        size = self.values.shape[-1]
        out = jnp.matmul(self.values, basis[:size].astype(self.values.dtype), precision=EXACT)
        return out + basis[size].astype(out.dtype) if self.bias else out


class LookupInputs(AbstractInputs):
    """Rows of a table that are looked up: each input is zero but for a one. An index outside of the table is none."""

    indices: Int[Array, "B T"]
    size: int = eqx.field(static=True)
    dtype: jnp.dtype = eqx.field(static=True)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, size of the table)."""
        examples, shared = self.indices.shape
        return examples, shared, self.size

    def array(self) -> Float[Array, "B T in"]:
        """One-hot rows."""
        return jax.nn.one_hot(self.indices, self.size, dtype=self.dtype)

    def _added(self, values: Array, dtype: jnp.dtype) -> Array:
        inside = jnp.where((self.indices >= 0) & (self.indices < self.size), self.indices, self.size)
        return (
            jnp.zeros((self.size, *values.shape[2:]), dtype).at[inside].add(values.astype(dtype), mode="drop")
        )

    def second_moment(self, mask: Bool[Array, "B T"]) -> Float[Array, " in"]:
        """How often each row is looked up."""
        dtype = at_least_float32(self.dtype)
        return self._added(mask, dtype)

    def mean(self, mask: Bool[Array, "B T"]) -> Float[Array, "B in"]:
        """How often each row is looked up, over the number of lookups."""
        dtype = at_least_float32(self.dtype)
        one_example = lambda indices, mask: LookupInputs(indices[None], self.size, self.dtype)._added(
            mask[None], dtype
        )
        return jax.vmap(one_example)(self.indices, mask) / counted(mask, dtype)[:, None]

    def project(self, basis: Float[Array, "in k"]) -> Float[Array, "B T k"]:
        """The rows of V that are looked up."""
        return basis.at[self.indices].get(mode="fill", fill_value=0, wrap_negative_indices=False)

    def outer(self, cotangents: Float[Array, "B T out"]) -> Float[Array, "B out in"]:
        """The cotangents, each in its row."""

        def one_example(indices: Array, cotangents: Array) -> Array:
            inputs = LookupInputs(indices[None], self.size, self.dtype)
            return inputs._added(cotangents[None], cotangents.dtype).T

        return jax.vmap(one_example)(self.indices, cotangents)


class NoInputs(AbstractInputs):
    """Of a site whose cotangent is the gradient of each example itself: one position with the input 1."""

    ones: Float[Array, " B"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, 1, 1)."""
        return self.ones.shape[0], 1, 1

    def array(self) -> Float[Array, "B 1 1"]:
        """Ones."""
        return self.ones[:, None, None]

    def second_moment(self, mask: Bool[Array, "B 1"]) -> Float[Array, "1 1"]:
        """The number of examples that count."""
        return jnp.sum(mask, dtype=accumulation_dtype(self.ones))[None, None]

    def mean(self, mask: Bool[Array, "B 1"]) -> Float[Array, "B 1"]:
        """Ones."""
        return any_position(mask, accumulation_dtype(self.ones))

    def project(self, basis: Float[Array, "1 k"]) -> Float[Array, "B 1 k"]:
        """V, for every example."""
        return self.array() * basis.astype(self.ones.dtype)
