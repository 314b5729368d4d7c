"""Stochastic Lanczos quadrature against dense eigenvalues, and its error bars against true errors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

from curvax.diagnostics._quadrature import kernel_truncation, one_signed_truncation, smooth, weight_at_zero
from curvax.diagnostics._spectral_density import spectrum
from curvax.linear._quadrature import Rule, gauss, gauss_rule, radau
from curvax.operators import Circulant, hessian
from curvax.operators._lanczos import lanczos
from helpers.dense import rotated
from helpers.dense import spectrum as shaped
from helpers.sweep import sweep

PSD = lx.positive_semidefinite_tag
NAMES = ("trace", "inverse_trace", "log_determinant", "effective_dimension", "num_negative")


def truth(values, damping):
    """The five traces from all eigenvalues."""
    return {
        "trace": values.sum(),
        "inverse_trace": np.sum(1 / (values + damping)),
        "log_determinant": np.sum(np.log(values + damping)),
        "effective_dimension": np.sum(values / (values + damping)),
        "num_negative": float(np.sum(values < 0)),
    }


def eigenvalues(n=120, low=-0.5):
    """A bulk around zero, and outliers."""
    return np.concatenate([np.linspace(low, 1.0, n - 4), [2.0, 4.0, 4.5, 9.0]])


def over_tree(matrix, dtype=jnp.float64, tags=lx.symmetric_tag):
    """The matrix as an operator over a pytree with a scalar, a matrix, an empty leaf and None."""
    matrix = jnp.asarray(matrix, dtype)
    n = matrix.shape[0] - 1
    like = {
        "w": jnp.zeros((n // 2, 2), dtype),
        "b": jnp.zeros((), dtype),
        "e": jnp.zeros((0, 3), dtype),
        "n": None,
    }
    flat, unravel = jax.flatten_util.ravel_pytree(like)
    del flat

    def product(tree):
        return unravel(matrix @ jax.flatten_util.ravel_pytree(tree)[0])

    return lx.FunctionLinearOperator(product, jax.eval_shape(lambda: like), tags)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_written_out_is_exact(dtype):
    """Up to `dense_size` all numbers are those of the dense matrix, with errors at rounding level."""
    values = np.sort(eigenvalues(121))
    operator = over_tree(rotated(values, np.random.default_rng(0)), dtype)
    found = spectrum(operator, key=jr.key(0), damping=0.8)
    rtol = 1e-11 if dtype == jnp.float64 else 2e-4
    assert found.exact and found.num_matvecs == 121 and found.nodes.dtype == dtype
    np.testing.assert_allclose(found.nodes[0], values, rtol=rtol, atol=rtol)
    assert found.smallest.value == pytest.approx(-0.5, rel=rtol)
    assert found.largest.value == pytest.approx(9.0, rel=rtol)
    assert found.condition.value == pytest.approx(9.8 / 0.3, rel=10 * rtol)
    for name, value in truth(values, 0.8).items():
        estimate = getattr(found, name)
        assert float(estimate.value) == pytest.approx(value, rel=rtol, abs=10 * rtol), name
        assert estimate.standard_error == 0 and float(estimate.truncation) <= 10 * rtol * (1 + abs(value))


@eqx.filter_jit
def many(operator, keys):
    """The traces by 20 steps of 8 probes, for every key."""

    def one(key):
        found = spectrum(operator, key=key, num_steps=20, damping=0.05, dense_size=0)
        return {name: getattr(found, name) for name in NAMES}

    return jax.vmap(one)(keys)


@pytest.mark.parametrize("kind", ["log-uniform", "uniform", "outlier-low", "clusters"])
def test_estimates_lie_within_their_errors(kind):
    """Over 24 keys: within two standard errors plus truncation in nearly all, and right on average."""
    values = shaped(kind, 150, 1e3, np.random.default_rng(1))
    operator = lx.MatrixLinearOperator(jnp.asarray(rotated(values, np.random.default_rng(2))), PSD)
    estimates = many(operator, jr.split(jr.key(3), 24))
    for name, value in truth(values, 0.05).items():
        found = estimates[name]
        error = np.abs(found.value - value)
        inside = error <= 2 * found.standard_error + found.truncation + 1e-9 * abs(value)
        assert np.mean(inside) >= 0.8, name
        spread = np.std(found.value) / 24**0.5
        assert abs(np.mean(found.value) - value) <= 4 * spread + np.mean(found.truncation) + 1e-9, name
        # An error bar that is always right because it is huge would be no use.
        assert np.median(found.error) <= 0.1 * max(abs(value), 150), name


@pytest.mark.parametrize("outliers", [[1000.0], [300.0, 1000.0, 2000.0]], ids=["one", "three"])
def test_errors_where_few_eigenvalues_dominate(outliers):
    """Eight probes may all miss an outlier: their spread alone would be too small in one run of fifteen."""
    values = np.append(np.linspace(0.1, 1.0, 300), outliers)
    operator = lx.DiagonalLinearOperator(jnp.asarray(values))
    one = lambda key: spectrum(operator, key=key, num_steps=12, dense_size=0).trace
    found = jax.jit(jax.vmap(one))(jr.split(jr.key(5), 300))
    score = np.asarray((found.value - values.sum()) / found.standard_error)
    assert np.mean(np.abs(score) > 3) <= 0.035
    assert 0.7 <= np.std(score) <= 1.3


def rules(matrix, num_steps, num_probes=3):
    """Rules of fixed probes, and the probes' weights on the eigenvectors."""
    starts = np.random.default_rng(7).standard_normal((num_probes, matrix.shape[0]))
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    product = jnp.asarray(matrix)
    one = lambda v: gauss_rule(lanczos(lambda x: product @ x, v, num_steps))
    values, vectors = np.linalg.eigh(matrix)
    return jax.jit(jax.vmap(one))(jnp.asarray(starts)), values, (starts @ vectors) ** 2


def test_products_by_fourier_transforms():
    """XLA's CPU compiler fails where a Fourier transform feeds a factorisation: something stands between them."""
    found = spectrum(Circulant(jnp.array([4.0, 1.0, 0.0, 0.0, 1.0])), key=jr.key(0))
    np.testing.assert_allclose(
        found.nodes[0], np.sort(4 + 2 * np.cos(2 * np.pi * np.arange(5) / 5)), rtol=1e-13
    )


@pytest.mark.parametrize("num_steps", sweep([4, 20], always=[4]))
def test_truncation_bounds_hold_for_every_probe(num_steps):
    """Each probe's quadrature error, known from the dense matrix, is inside the bounds, and not far inside."""
    values = np.concatenate([np.geomspace(0.01, 1.0, 60), [5.0, 20.0]])
    matrix = rotated(values, np.random.default_rng(5))
    rule, values, weights = rules(matrix, num_steps)
    rule, weights = Rule(*(x[:1] for x in rule)), weights[:1]
    functions = (lambda x: 1 / x, jnp.log)
    points, width = np.linspace(-5.0, 25.0, 40), 3.0

    @jax.jit
    def computed(rule):
        signed = one_signed_truncation(rule, jnp.asarray(0.009), functions)
        unbounded = one_signed_truncation(rule, jnp.asarray(0.0), functions)
        moved = Rule(rule.nodes - 0.3, rule.first, rule.last)
        density = smooth(rule, jnp.asarray(points), jnp.asarray(width), jnp.asarray(60.0))[0]
        limit = kernel_truncation(jnp.asarray(10.0), jnp.asarray(width), num_steps)
        values = [gauss(rule, fn)[0] for fn in functions]
        below = gauss(moved, lambda x: (x < 0).astype(x.dtype))
        return values, signed, unbounded, (below, weight_at_zero(moved, jnp.asarray(1e-12))), density, limit

    found, signed, unbounded, (count, unresolved), density, limit = computed(rule)
    for fn, value, bound in zip((lambda x: 1 / x, np.log), found, signed, strict=True):
        error = abs(float(value) - weights[0] @ fn(values))
        assert error <= bound <= 60 * error
    assert np.all(np.isinf(unbounded))  # the spectrum may reach zero
    # With a node at zero: Chebyshev, Markov and Stieltjes.
    assert abs(float(count[0]) - weights[0] @ (values < 0.3)) <= unresolved
    kernel = np.exp(-(((points[:, None] - values) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    assert np.max(np.abs(density - kernel @ weights[0])) <= limit + 1e-13


def test_radau_rule_has_its_node_and_its_degree():
    """A node where it is wanted, and moments up to 2m exact."""
    rule, values, weights = rules(rotated(eigenvalues(40), np.random.default_rng(1)), 4)
    nodes, found, usable = jax.jit(radau)(rule, jnp.asarray(0.2))
    assert np.all(usable)
    np.testing.assert_allclose(np.min(np.abs(nodes - 0.2), axis=1), 0, atol=1e-12)
    for degree in range(9):
        np.testing.assert_allclose(np.sum(found * nodes**degree, axis=1), weights @ values**degree, rtol=1e-9)


def test_negative_outlier_is_counted():
    """A converged negative outlier leaves no doubt: the truncation error of the count is tiny."""
    values = np.concatenate([[-3.0, -2.0], np.linspace(1.0, 5.0, 148)])
    operator = lx.MatrixLinearOperator(
        jnp.asarray(rotated(values, np.random.default_rng(0))), lx.symmetric_tag
    )
    found = spectrum(operator, key=jr.key(0), num_steps=20, dense_size=0)
    assert found.num_negative.truncation < 1e-3
    assert abs(found.num_negative.value - 2) <= 4 * found.num_negative.standard_error
    assert found.smallest.value == pytest.approx(-3, abs=1e-6) and np.isnan(found.log_determinant.value)
    text = str(found)
    assert "not defined" in text and "raise `damping` above 3" in text
    assert "not defined" not in str(
        spectrum(operator, key=jr.key(0), num_steps=20, damping=3.5, dense_size=0)
    )


def test_exhausted_space_has_no_truncation_error():
    """Three distinct eigenvalues, one of them zero: after three steps nothing is left to truncate."""
    values = np.repeat([0.0, 1.0, 4.0], [50, 30, 20])
    operator = lx.DiagonalLinearOperator(jnp.asarray(values))
    found = spectrum(operator, key=jr.key(1), num_steps=10, damping=0.5, dense_size=0)
    assert found.smallest.value == pytest.approx(0, abs=1e-12) and found.smallest.truncation < 1e-12
    assert found.condition.value == pytest.approx(9.0)
    assert found.num_negative.value == 0 and found.num_negative.truncation == 0
    for name, value in truth(values, 0.5).items():
        estimate = getattr(found, name)
        assert (
            estimate.truncation <= 1e-9 and abs(estimate.value - value) <= 4 * estimate.standard_error + 1e-9
        )
    without = spectrum(operator, key=jr.key(1), num_steps=10, dense_size=0)
    assert np.isinf(without.condition.value) and np.isnan(without.inverse_trace.value)


def test_unresolved_definiteness_is_told():
    """Few steps on an ill-conditioned matrix: no bound without the tag, a true one with it."""
    values = np.geomspace(1e-10, 1.0, 150)
    matrix = jnp.asarray(rotated(values, np.random.default_rng(4)))
    plain = spectrum(
        lx.MatrixLinearOperator(matrix, lx.symmetric_tag), key=jr.key(0), num_steps=20, dense_size=0
    )
    assert np.isinf(plain.log_determinant.truncation) and np.isinf(plain.condition.truncation)
    tagged = spectrum(
        lx.MatrixLinearOperator(matrix, PSD), key=jr.key(0), num_steps=20, damping=1e-3, dense_size=0
    )
    assert np.isfinite(tagged.log_determinant.truncation) and tagged.num_negative.error == 0
    assert abs(tagged.log_determinant.value - truth(values, 1e-3)["log_determinant"]) <= (
        4 * tagged.log_determinant.standard_error + tagged.log_determinant.truncation
    )


def test_density_is_that_of_the_eigenvalues():
    """Mass one; the smoothed histogram of the true eigenvalues within truncation and four standard errors."""
    values = eigenvalues(150)
    operator = lx.MatrixLinearOperator(jnp.diag(jnp.asarray(values)), lx.symmetric_tag)
    found = spectrum(operator, key=jr.key(0), num_steps=20, dense_size=0)
    density = found.density()
    width = float(density.kernel_width)
    assert width == pytest.approx(1.25 * 9.5 / 20, rel=1e-2)
    assert np.trapezoid(density.values, density.points) == pytest.approx(1, abs=2e-3)
    kernel = np.exp(-(((np.asarray(density.points)[:, None] - values) / width) ** 2) / 2)
    true = kernel.mean(1) / (width * np.sqrt(2 * np.pi))
    assert np.all(np.abs(density.values - true) <= 5 * density.standard_error + density.truncation)
    assert density.truncation < 5e-3 * np.max(true)
    exact = spectrum(operator, key=jr.key(0)).density(density.points, kernel_width=width)
    np.testing.assert_allclose(exact.values, true, rtol=1e-9, atol=1e-12)
    assert exact.truncation == 0 and np.all(exact.standard_error == 0)
    assert found.density(kernel_width=1e-3).truncation == pytest.approx(1 / (1e-3 * np.sqrt(2 * np.pi)))


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize(
    ("n", "dense_size"), sweep([(1, 0), (1, 512), (5, 0), (5, 512)], always=[(1, 512), (5, 0)])
)
def test_multiples_of_the_identity(n, value, dense_size):
    operator = lx.DiagonalLinearOperator(jnp.full(n, value))
    found = spectrum(operator, key=jr.key(0), damping=1.0, dense_size=dense_size)
    assert found.trace.value == pytest.approx(n * value) and found.trace.error < 1e-12
    assert found.condition.value == pytest.approx(1.0)
    assert found.log_determinant.value == pytest.approx(n * np.log(1 + value), abs=1e-12)
    density = found.density()
    assert np.all(np.isfinite(density.values))
    assert np.trapezoid(density.values, density.points) == pytest.approx(1, abs=1e-3)
    assert np.isfinite(found.num_negative.error) and "size" in str(found)


SKEW = np.array([[1.0, 5.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 3.0]])


@pytest.mark.parametrize("dense_size", [0, 512])
def test_what_is_wrong_raises(dense_size):
    """In the open and inside jit; the control passes."""
    run = lambda op: spectrum(op, key=jr.key(0), dense_size=dense_size)
    bad = {
        "not symmetric": lx.MatrixLinearOperator(jnp.asarray(SKEW)),
        "not finite": lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, jnp.nan, 2.0]))),
        "tagged positive": lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, -1e-3, 2.0])), PSD),
    }
    with pytest.raises(ValueError, match="`damping` of `spectrum` must be at least 0, found -1"):
        spectrum(lx.DiagonalLinearOperator(jnp.ones(3)), key=jr.key(0), damping=-1.0)
    inside = eqx.filter_jit(lambda op: run(op).trace.value)
    for message, operator in bad.items():
        with pytest.raises(ValueError, match=message):
            run(operator)
        if message != "tagged positive":  # the tag would be another program
            with pytest.raises(RuntimeError, match=message):
                inside(operator).block_until_ready()
    assert np.isfinite(inside(lx.MatrixLinearOperator(jnp.asarray(SKEW + SKEW.T))))
    infinite = lx.MatrixLinearOperator(jnp.diag(jnp.array([1.0, jnp.inf, 2.0])))
    with pytest.raises(ValueError, match="not finite"):
        run(infinite)
    with pytest.raises(ValueError, match="damping"):
        spectrum(lx.MatrixLinearOperator(jnp.eye(3)), key=jr.key(0), damping=jnp.nan, dense_size=dense_size)


@pytest.mark.parametrize("kind", ["shift", "skew", "slightly"])
def test_asymmetry_is_seen_by_lanczos(kind):
    """Permutations and skew matrices, and a relative asymmetry of 1e-4."""
    rng = np.random.default_rng(0)
    random = rng.standard_normal((600, 600))
    matrix = {
        "shift": np.roll(np.eye(600), 1, axis=0),
        "skew": random - random.T,
        "slightly": random + random.T + 1e-3 * random,
    }[kind]
    with pytest.raises(ValueError, match="not symmetric"):
        spectrum(lx.MatrixLinearOperator(jnp.asarray(matrix)), key=jr.key(0), num_probes=2, num_steps=5)
    symmetric = lx.MatrixLinearOperator(jnp.asarray(matrix + matrix.T))
    assert spectrum(symmetric, key=jr.key(0), num_probes=2, num_steps=5).asymmetry < 1e-13


def test_wrong_arguments():
    operator = lx.DiagonalLinearOperator(jnp.ones(3))
    with pytest.raises(TypeError, match="Lineax operator"):
        spectrum(jnp.eye(2), key=jr.key(0))
    with pytest.raises(TypeError, match="real"):
        spectrum(lx.DiagonalLinearOperator(jnp.ones(3, jnp.complex128)), key=jr.key(0))
    with pytest.raises(ValueError, match="square"):
        spectrum(lx.MatrixLinearOperator(jnp.ones((2, 3))), key=jr.key(0))
    with pytest.raises(ValueError, match="no elements"):
        spectrum(lx.DiagonalLinearOperator(jnp.ones(0)), key=jr.key(0))
    for name in ("num_probes", "num_steps"):
        with pytest.raises(ValueError, match=name):
            spectrum(operator, key=jr.key(0), **{name: 1})
    found = spectrum(operator, key=jr.key(0))
    with pytest.raises(ValueError, match="kernel_width"):
        found.density(kernel_width=0.0)
    with pytest.raises(ValueError, match="points"):
        found.density(jnp.zeros((2, 2)))


def test_one_program_for_the_same_shapes():
    """Other data, keys and dampings trace nothing anew."""
    calls = []

    def loss(theta, scale):
        calls.append(1)
        return scale * jnp.sum(theta**2)

    counts = []
    for scale in (1.0, 2.0):
        operator = hessian(loss, jnp.ones(30), jnp.asarray(scale))
        before = len(calls)
        found = spectrum(operator, key=jr.key(int(scale)), damping=scale, dense_size=0)
        assert found.trace.value == pytest.approx(60 * scale)
        counts.append(len(calls) - before)
    assert counts[0] <= 4 and counts[1] == 0


def test_half_precision_leaves():
    """Products rounded to bfloat16 are neither refused nor believed further than that."""
    values = np.linspace(1.0, 4.0, 80)
    matrix = jnp.asarray(rotated(values, np.random.default_rng(0)), jnp.bfloat16)
    found = spectrum(lx.MatrixLinearOperator(matrix, lx.symmetric_tag), key=jr.key(0), dense_size=0)
    assert found.nodes.dtype == jnp.float32
    assert abs(float(found.largest.value) - 4) <= found.largest.truncation < 1.0
    assert (
        abs(float(found.trace.value) - values.sum())
        <= 4 * float(found.trace.standard_error) + 0.05 * values.sum()
    )
