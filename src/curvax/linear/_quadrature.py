"""Gauss quadrature of quadratic forms uᵀ f(A) u from a few Lanczos steps.

For a unit vector u the measure Σ_i (q_iᵀu)² δ(λ − λ_i) has uᵀf(A)u as its integral of f. m Lanczos steps from u give
its Gauss rule: nodes are the Ritz values, weights the squared first entries of the eigenvectors of the tridiagonal
matrix.

Source: G. H. Golub, G. Meurant, "Matrices, moments and quadrature with applications", 2010.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Array, Bool, Float, Scalar

from curvax.operators._dense import ravel, unravel
from curvax.operators._lanczos import Krylov, ritz
from curvax.operators._written_out import written_out

EXACT = jax.lax.Precision.HIGHEST
# A Radau node further out than this multiple of the spectrum would cost the others that many digits.
_FAR = 1e3


class Rule(NamedTuple):
    """Gauss rules uᵀ f(A) u ≈ Σ first² f(nodes) of unit vectors u, exact for polynomials f of degree 2m − 1."""

    nodes: Float[Array, "*probes m"]  # Ritz values, rising
    first: Float[Array, "*probes m"]  # first entries of the eigenvectors: the weights are their squares
    last: Float[
        Array, "*probes m"
    ]  # last entries times β_m: an eigenvalue is that near; zero for an exact rule


def gauss_rule(krylov: Krylov, count: int | None = None) -> Rule:
    """The rule of all steps or of the first `count`: for A ≥ 0 a bound from below of uᵀ(A + c)⁻ᵏ u."""
    nodes, vectors = ritz(krylov, count)
    return Rule(nodes, vectors[0], krylov.off_diagonal[len(nodes) - 1] * vectors[-1])


def gauss(rule: Rule, fn: Callable[[Array], Array]) -> Float[Array, "*probes"]:
    """uᵀ f(A) u for every u."""
    return jnp.sum(rule.first**2 * fn(rule.nodes), axis=-1)


class Radau(NamedTuple):
    """Rules with a prescribed node; `usable` where there is one."""

    nodes: Float[Array, "*probes m+1"]
    weights: Float[Array, "*probes m+1"]
    usable: Bool[Array, "*probes"]


def radau(rule: Rule, node: Scalar) -> Radau:
    """The rules with one node at `node` and m free ones, exact up to degree 2m.

    In the basis of Ritz vectors the enlarged tridiagonal matrix is an arrowhead, diag(θ) bordered by the last
    entries r; its corner α = node + Σ r_k²/(θ_k − node) puts an eigenvalue at `node`. Where a Ritz value is so close
    to `node` that the corner lies far outside of the spectrum the Gauss rule stays, with a node of weight 0.
    """
    corner = node + jnp.sum(_quotient(rule.last**2, rule.nodes - node), axis=-1)
    scale = jnp.maximum(jnp.max(jnp.abs(rule.nodes), axis=-1), jnp.abs(node))
    usable = jnp.abs(corner) <= _FAR * scale
    corner = jnp.where(usable, corner, node)
    border = jnp.where(usable[..., None], rule.last, 0)
    inner = rule.nodes[..., None] * jnp.eye(rule.nodes.shape[-1], dtype=rule.nodes.dtype)
    matrix = jnp.block([[inner, border[..., :, None]], [border[..., None, :], corner[..., None, None]]])
    # `eigh` of a matrix with a NaN may hang or lie.
    finite = jnp.all(jnp.isfinite(matrix))
    nodes, vectors = jnp.linalg.eigh(jnp.where(finite, matrix, 0))
    first = jnp.einsum("...k,...kj->...j", rule.first, vectors[..., :-1, :], precision=EXACT)
    return Radau(jnp.where(finite, nodes, jnp.nan), first**2, usable)


def _quotient(a: Array, b: Array) -> Array:
    """a / b with 0 / 0 = 0."""
    return jnp.where(a == 0, 0, a / jnp.where(b == 0, jnp.finfo(b.dtype).tiny, b))


def entries_of(operator: lx.AbstractLinearOperator, dtype: Any) -> tuple[Float[Array, "m n"], Scalar]:
    """The matrix, and 1; zeros and NaN where it is not finite: decompositions may hang on a NaN, or lie."""
    matrix = jax.lax.stop_gradient(written_out(operator).astype(dtype))
    finite = jnp.all(jnp.isfinite(matrix))
    return jnp.where(finite, matrix, 0), jnp.where(finite, 1, jnp.nan).astype(dtype)


def product_of(
    operator: lx.AbstractLinearOperator, dtype: Any, normal: bool = False
) -> Callable[[Float[Array, " m"]], Float[Array, " m"]]:
    """v ↦ A v, or v ↦ J Jᵀ v, over raveled leaves, as a constant."""
    applied, structure = lx.linearise(operator), operator.out_structure()
    back = lx.linearise(operator.transpose()) if normal else None

    def product(vector: Float[Array, " m"]) -> Float[Array, " m"]:
        tree = unravel(vector, structure)
        tree = applied.mv(tree if back is None else back.mv(tree))
        return jax.lax.stop_gradient(ravel(tree, dtype))

    return product
