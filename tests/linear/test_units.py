"""Right-hand sides so small or so large that their squares have no floating-point number."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax._pytree import tree_unit
from curvax.linear import CG, FGMRES, MINRES, Auto, Neumann, Refined
from helpers.matrices import definite

N = 12
SOLVERS = {
    "CG": CG(rtol=1e-4),
    "MINRES": MINRES(rtol=1e-5),
    "FGMRES": FGMRES(rtol=1e-5),
    "Neumann": Neumann(rtol=1e-5),
    "Auto": Auto(rtol=1e-5),
    "Auto CG": Auto(rtol=1e-4, dense_size=0),
    "Refined": Refined(lx.Cholesky(), rtol=1e-5),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_tiny_and_huge_right_hand_sides(name, rng):
    matrix = jnp.asarray(definite(N, 10.0), jnp.float32)
    operator = lx.MatrixLinearOperator(matrix, lx.positive_semidefinite_tag)
    vector = jnp.asarray(rng.standard_normal(N), jnp.float32)
    solve = jax.jit(lambda b, y0: lx.linear_solve(operator, b, SOLVERS[name], options={"y0": y0}))
    usual = solve(vector, jnp.zeros_like(vector))
    for factor in (2.0**-100, 2.0**100):
        scaled = solve(vector * jnp.float32(factor), jnp.zeros_like(vector))
        assert scaled.result == lx.RESULTS.successful
        # A power of two changes no digit.
        np.testing.assert_array_equal(scaled.value / jnp.float32(factor), usual.value)
        assert int(scaled.stats["num_steps"]) == int(usual.stats["num_steps"])
        if "residual_norm" in usual.stats and name != "CG":
            np.testing.assert_allclose(
                scaled.stats["residual_norm"], np.float32(factor) * usual.stats["residual_norm"], rtol=1e-5
            )


def test_absolute_tolerance_keeps_its_unit(rng):
    """atol = 1e-3 is reached from 1e3 by a few steps, from 1e-4 by none."""
    matrix = jnp.asarray(definite(N, 100.0))
    operator = lx.MatrixLinearOperator(matrix, lx.symmetric_tag)
    vector = rng.standard_normal(N)
    vector = jnp.asarray(vector / np.linalg.norm(vector))
    for scale, least, most in ((1e3, 5, 40), (1e-4, 0, 0)):
        solution = lx.linear_solve(operator, scale * vector, MINRES(rtol=0.0, atol=1e-3))
        assert least <= int(solution.stats["num_steps"]) <= most
        assert np.linalg.norm(matrix @ solution.value - scale * vector) <= 1e-3


def test_unit():
    for dtype in (np.float32, np.float64):
        info = np.finfo(dtype)
        for size, most in ((info.max, 2**33), (1e28, 8), (3.0, 8), (1.0, 8), (1e-30, 8), (info.tiny, 8)):
            unit = tree_unit(
                {"a": jnp.asarray([size, 0.0], dtype), "none": None, "empty": jnp.zeros((0,), dtype)}
            )
            assert unit.dtype == dtype and 0.2 <= float(unit) * float(size) < most
            assert np.log2(float(unit)) == round(np.log2(float(unit)))
        for nothing in (0.0, np.nan):
            assert tree_unit(jnp.asarray(nothing, dtype)) == 1
        assert 0 < tree_unit(jnp.asarray(np.inf, dtype)) < 1e-20
        # Many entries: their sum is near one, and squares are far from vanishing.
        many = tree_unit(jnp.full(10**6, info.max / 2, dtype)) * info.max
        assert 1e-6 < many < 2**33
    mixed = tree_unit({"low": jnp.float32(1e-44), "high": jnp.float64(1e-200)})
    assert float(mixed) < float(np.finfo(np.float32).max)
