"""What `Auto` goes by: prices of products and factorisations, and methods that are given up when they are slow."""

import functools

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax.linear import Auto, Method, Reason
from curvax.linear._auto_dense import factors, has_entries, solve, written_out
from curvax.linear._auto_phases import Terms, in_phases
from curvax.linear._auto_price import prices
from curvax.linear._auto_stages import Marks, after_stage, begin, failed
from helpers.matrices import definite, rotation_and_decay

PSD = lx.positive_semidefinite_tag


def _function(product, n, dtype=np.float64, tags=PSD):
    return lx.FunctionLinearOperator(product, jax.ShapeDtypeStruct((n,), dtype), tags)


def _priced(product, n=1000, dtype=np.float64):
    return prices(lx.linearise(_function(product, n, dtype)))


def test_prices_follow_the_program():
    """Ratios alone matter, and a factor of two in them hardly."""
    small, large = (_priced(functools.partial(jnp.matmul, jnp.ones((n, n))), n) for n in (1000, 4000))
    assert 14 < large.product / small.product < 17
    assert 40 < large.lu / small.lu < 64 and large.cholesky < large.lu
    # Entry by entry: next to nothing beside a matrix.
    stencil = _priced(lambda v: 2 * v - jnp.roll(v, 1) - jnp.roll(v, -1))
    assert stencil.product < 0.1 * small.product
    # What does not depend on the vector is done once, outside of the loop.
    weights = jnp.ones((1000, 1000))
    once = _priced(lambda v: jnp.sum(jnp.tanh(weights @ weights)) * v)
    assert once.product < 0.01 * small.product
    # Loops count as often as they run, or ten times.
    many = _priced(lambda v: jax.lax.scan(lambda c, _: (weights @ c, None), v, length=50)[0])
    assert 40 < many.product / small.product < 60
    unknown = _priced(
        lambda v: jax.lax.while_loop(lambda c: c[0] < 0.5, lambda c: (c[0] + 1, weights @ c[1]), (v[0], v))[1]
    )
    assert 8 < unknown.product / small.product < 12
    assert small.widest == 1000
    assert _priced(lambda v: jnp.sum(v[:, None] * weights, 0)).widest == 10**6
    half = _priced(lambda v: weights.astype(np.float32) @ v, dtype=np.float32)
    assert 0.4 < half.product / small.product < 0.6


def test_exchange_rates():
    price = _priced(lambda v: jnp.ones((1000, 1000)) @ v)
    rate = functools.partial(price.exchange, 1000, turn=price.turn)
    with_products, with_entries = (
        rate(definite=True, has_entries=False),
        rate(definite=True, has_entries=True),
    )
    assert 2 * with_entries < with_products < 1000
    assert rate(definite=False, has_entries=True) > with_entries


def _stage(rate):
    """Reduces the residual by `rate` a product."""

    def stage(p, budget):
        r = p.r * rate ** budget.astype(p.r.dtype)
        told = lambda marks, _: failed(marks, (jnp.asarray(True), Reason.budget))  # noqa: E731
        return after_stage(p, p.x, r, budget, Method.minres, told)

    return stage


@functools.partial(jax.jit, static_argnums=(1, 2))
def _phased(rate, exchange, budget):
    r = jnp.ones(4)
    end = in_phases(
        _stage(rate), begin(jnp.zeros(4), r), Terms(jnp.asarray(1e-8), jnp.asarray(1e-8), budget, exchange)
    )
    return end.packed.tree


@pytest.mark.parametrize(
    ("steps", "exchange", "reason"),
    [
        (50, 100.0, Reason.budget),
        (50, 1000.0, Reason.budget),
        (90, 100.0, Reason.budget),
        (1000, 100.0, Reason.slow),
        (10_000, 1000.0, Reason.slow),
    ],
)
def test_a_method_is_given_up_where_a_factorisation_is_nearer(steps, exchange, reason):
    """A residual that needs so many products, against a factorisation worth so many."""
    marks: Marks = _phased(jnp.asarray(1e-8 ** (1 / steps)), exchange, 100_000)
    spent = int(marks.num_matvecs)
    assert Reason(int(marks.failure)) == reason
    if reason == Reason.slow:
        assert 0.1 * exchange <= spent <= 0.2 * exchange
    else:
        assert steps <= spent <= max(1.4 * steps, 0.5 * exchange)
        assert marks.residual_norm <= 1e-8


def test_phases_keep_to_the_budget_and_give_up_standstills():
    assert int(_phased(jnp.asarray(0.99), 1e4, 300).num_matvecs) == 300
    still = _phased(jnp.asarray(1.0), 1e3, 100_000)
    assert (Reason(int(still.failure)), int(still.num_matvecs)) == (Reason.slow, 120)
    alone = _phased(jnp.asarray(0.9), float("inf"), 77)  # no factorisation: one phase
    assert (Reason(int(alone.failure)), int(alone.num_matvecs)) == (Reason.budget, 77)


@functools.cache
def _program(tags, dtype, given, **options):
    @jax.jit
    def solve(matrix, vector):
        if given:
            operator = lx.MatrixLinearOperator(matrix, tags)
        else:
            operator = _function(lambda v: matrix @ v, len(vector), dtype, tags)
        solution = lx.linear_solve(
            operator, vector, Auto(rtol=1e-8 if dtype == np.float64 else 1e-4), throw=False
        )
        return solution.value, solution.result, solution.stats

    return solve


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_slow_is_said(dtype, rng):
    n, condition = 300, (1e6 if dtype == np.float64 else 1e3)
    vector = rng.standard_normal(n).astype(dtype)
    solve = _program(PSD, dtype, True)
    for matrix, expected in (
        (definite(n, 3.0).astype(dtype), (Method.cg, Reason.first_choice)),
        (definite(n, condition).astype(dtype), (Method.cholesky_fallback, Reason.slow)),
    ):
        value, result, stats = solve(jnp.asarray(matrix), jnp.asarray(vector))
        assert result == lx.RESULTS.successful
        assert (Method(int(stats["method"])), Reason(int(stats["reason"]))) == expected
        residual = matrix.astype(float) @ np.asarray(value, float) - vector
        assert np.linalg.norm(residual) <= (2e-8 if dtype == np.float64 else 2e-4) * np.linalg.norm(vector)
        assert int(stats["num_steps"]) < n / 3
    assert solve._cache_size() == 1  # noqa: SLF001


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_variables_in_different_units(dtype, rng):
    """The diagonal as a preconditioner: found out at run time, and far fewer products than without."""
    n, solve = 300, _program(PSD, dtype, True)
    scale = rng.permutation(np.geomspace(0.03, 1.0, n))
    graded = scale[:, None] * definite(n, 3.0) * scale
    vector = (scale * rng.standard_normal(n)).astype(dtype)
    value, result, stats = solve(jnp.asarray(graded.astype(dtype)), jnp.asarray(vector))
    assert (Method(int(stats["method"])), Reason(int(stats["reason"]))) == (
        Method.cg_jacobi,
        Reason.first_choice,
    )
    assert result == lx.RESULTS.successful
    truth = np.linalg.solve(graded, vector)
    assert np.linalg.norm(np.asarray(value, float) - truth) <= (
        1e-7 if dtype == np.float64 else 1e-3
    ) * np.linalg.norm(truth)
    assert 3 <= int(stats["num_steps"]) <= 40
    assert stats["condition"] < 10
    # The same through products: nothing is known of the diagonal.
    _, result, stats = _program(PSD, dtype, False)(jnp.asarray(graded.astype(dtype)), jnp.asarray(vector))
    assert result == lx.RESULTS.successful
    assert Method(int(stats["method"])) == Method.cholesky_fallback


def test_given_up_under_vmap_and_in_derivatives(rng):
    """One example by conjugate gradients, one by the factorisation; and d/db ⟨t, A⁻¹b⟩ = A⁻ᵀt."""
    n = 300
    matrices = np.stack([definite(n, 2.0), definite(n, 1e6)])
    vectors, other = rng.standard_normal((2, n)), rng.standard_normal(n)

    @jax.jit
    @jax.vmap
    def both(matrix, vector):
        def loss(vector):
            operator = lx.MatrixLinearOperator(matrix, PSD)
            solution = lx.linear_solve(operator, vector, Auto(rtol=1e-10))
            return jnp.dot(solution.value, other), solution.stats["method"]

        return jax.value_and_grad(loss, has_aux=True)(vector)

    (_, methods), gradients = both(matrices, vectors)
    assert methods.tolist() == [Method.cg, Method.cholesky_fallback]
    for matrix, gradient in zip(matrices, gradients, strict=True):
        np.testing.assert_allclose(gradient, np.linalg.solve(matrix, other), rtol=1e-5, atol=1e-7)


def test_written_out_in_either_way(rng):
    """As rows or as those of the transpose, factors read both ways; entries are seen behind tags."""
    n = 40
    matrix, vector = rotation_and_decay(n), rng.standard_normal(n)
    given = lx.MatrixLinearOperator(jnp.asarray(matrix))
    products = lx.linearise(_function(lambda v: jnp.asarray(matrix) @ v, n, tags=()))
    assert has_entries(lx.TaggedLinearOperator(given, lx.symmetric_tag)) and not has_entries(products)
    for operator in (given, products):
        written = written_out(operator, 10**7)
        np.testing.assert_allclose(written.matrix, matrix, rtol=1e-15)
        f = factors(written, 0)
        for g, dense in ((f, matrix), (f.transpose(), matrix.T)):
            b, zero = jnp.asarray(vector), jnp.zeros(n)
            found = solve(g, b, zero, b, jnp.asarray(1e-10))
            np.testing.assert_allclose(found.x, np.linalg.solve(dense, vector), rtol=1e-10)
            np.testing.assert_allclose(found.r, vector - dense @ found.x, atol=1e-12)
            assert not found.singular
