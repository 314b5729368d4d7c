"""Solution maps inside solution maps, and one map used twice: quadratic, so solved by hand.

Three levels: `z*(y, x) = argmin_z ½ zᵀRz − zᵀ(Py + Qx)`,
`y*(x) = argmin_y ½ yᵀSy − yᵀCx + ½ ‖z*(y, x) − t‖²`, outer `F(x) = ½ ‖z*(y*, x)‖² + ½ ‖y* − s‖²`.
With `G = R⁻¹P`, `K = R⁻¹Q`: `y* = (S + GᵀG)⁻¹ (Cx + Gᵀ(t − Kx))`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from helpers.dense import refined_solve, rotated


class Chain(NamedTuple):
    """The matrices of the three levels."""

    R: object
    P: object
    Q: object
    S: object
    C: object
    t: object
    s: object


def chain(n=3, seed=0) -> Chain:
    """A well-conditioned three-level problem in NumPy float64."""
    rng = np.random.default_rng(seed + 9000)
    return Chain(
        R=rotated(rng.uniform(1.0, 3.0, n), rng),
        P=rng.standard_normal((n, n)),
        Q=rng.standard_normal((n, n)),
        S=rotated(rng.uniform(1.0, 3.0, n), rng),
        C=rng.standard_normal((n, n)),
        t=rng.standard_normal(n),
        s=rng.standard_normal(n),
    )


def lowest(z, upper, data):
    """Level 3; `upper` is the pair (y, x)."""
    y, x = upper
    return 0.5 * z @ (data.R @ z) - z @ (data.P @ y + data.Q @ x)


def middle(y, x, data, z):
    """Level 2 given `z = z*(y, x)`."""
    return 0.5 * y @ (data.S @ y) - y @ (data.C @ x) + 0.5 * jnp.sum((z - data.t) ** 2)


def top(x, y, z, data):
    """Level 1."""
    return 0.5 * jnp.sum(z**2) + 0.5 * jnp.sum((y - data.s) ** 2)


def chain_truth(x, data: Chain):
    """(value, gradient, Hessian) of the outer loss: everything is affine in x."""
    n = len(data.t)
    down = refined_solve(data.R, data.P)
    across = refined_solve(data.R, data.Q)
    matrix = data.S + down.T @ down
    slope = refined_solve(matrix, data.C - down.T @ across)  # dy*/dx
    y = slope @ x + refined_solve(matrix, down.T @ data.t)
    z_slope = down @ slope + across
    z = down @ y + across @ x
    value = 0.5 * z @ z + 0.5 * np.sum((y - data.s) ** 2)
    assert slope.shape == (n, n)
    return float(value), z_slope.T @ z + slope.T @ (y - data.s), z_slope.T @ z_slope + slope.T @ slope


def twice_truth(phi, inner, a):
    """`F(φ) = ½ ‖w(φ) − a‖² + w(φ) · w(w(2φ))` for `w(φ) = H⁻¹(Bφ + b)`, with its gradient."""
    slope = refined_solve(inner["H"], inner["B"])

    def solution(point):
        return refined_solve(inner["H"], inner["B"] @ point + inner["b"])

    first, second = solution(phi), solution(2.0 * phi)
    third = solution(second)
    value = 0.5 * np.sum((first - a) ** 2) + first @ third
    # d third / dφ = 2 · slope · slope.
    grad = slope.T @ (first - a + third) + 2.0 * slope.T @ (slope.T @ first)
    return float(value), grad
