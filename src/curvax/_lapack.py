"""Factorisations that XLA on CPU makes one after the other, also under `vmap`."""

import jax
import jax.numpy as jnp
from jax.custom_batching import sequential_vmap
from jaxtyping import Array, Float


@jax.custom_jvp
def eigh(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues and eigenvectors of a symmetric matrix, as `jnp.linalg.eigh` has them.

    jaxlib's LAPACK kernels (0.10) hand the members of a batch to the pool of threads that they run in, and wait: as
    many batches at a time as there are threads wait for ever. One matrix at a time does not go through the pool.
    """
    if jax.default_backend() != "cpu":
        values, vectors = jnp.linalg.eigh(matrix)
        return values, vectors
    return _one_by_one(matrix)


@sequential_vmap
def _one_by_one(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


@eigh.defjvp
def _(
    primals: tuple[Float[Array, "n n"]], tangents: tuple[Float[Array, "n n"]]
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, vectors = eigh(*primals)
    tangent = 0.5 * (tangents[0] + tangents[0].T)
    exact = jax.lax.Precision.HIGHEST
    turned = jnp.matmul(jnp.matmul(vectors.T, tangent, precision=exact), vectors, precision=exact)
    eye = jnp.eye(len(values), dtype=values.dtype)
    # Of equal eigenvalues the vectors have no derivative: not finite, as JAX has it.
    gaps = values[None, :] - values[:, None] + eye
    turn = (1 / gaps - eye) * turned
    return (values, vectors), (jnp.diagonal(turned), jnp.matmul(vectors, turn, precision=exact))
