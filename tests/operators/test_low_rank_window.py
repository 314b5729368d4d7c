"""The low-rank window against dense moving averages and their eigenvalues."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

from curvax.operators import Damped, LowRankPlusDiagonal, LowRankWindow

PSD = lx.positive_semidefinite_tag
N, SLOTS = 9, 4


@jax.jit
def _run(window, vectors, decay, weights):
    """All vectors in order, one compiled `add`."""
    add = lambda w, row: (w.add(row[0], decay=decay, weight=row[1]), None)
    return jax.lax.scan(add, window, (vectors, weights))[0]


def _dense(vectors, decay, weights):
    total = np.zeros((vectors.shape[1],) * 2)
    for v, w in zip(np.asarray(vectors, np.float64), weights, strict=True):
        total = decay * total + w * np.outer(v, v)
    return total


def _matrix(window):
    return np.asarray((window.basis.T * window.values) @ window.basis)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exact_while_the_rank_fits(dtype, rng):
    """Vectors of a subspace of `slots` dimensions, repeated, zero and parallel ones too."""
    tolerance = 1e-12 if dtype == np.float64 else 1e-5
    vectors = rng.standard_normal((60, SLOTS)) @ rng.standard_normal((SLOTS, N))
    vectors[5] = vectors[4]
    vectors[7], vectors[9] = 0, 3 * vectors[8]
    weights = rng.uniform(0, 1, 60)
    window = _run(
        LowRankWindow(jnp.zeros(N, dtype), SLOTS), jnp.asarray(vectors, dtype), 0.9, jnp.asarray(weights)
    )
    truth = _dense(vectors, 0.9, weights)
    scale = np.linalg.norm(truth, 2)
    np.testing.assert_allclose(_matrix(window), truth, atol=tolerance * scale)
    np.testing.assert_allclose(
        window.values, np.linalg.eigvalsh(truth)[: -SLOTS - 1 : -1], atol=tolerance * scale
    )
    assert window.values.dtype == window.rest.dtype == dtype
    assert 0 <= float(window.rest) < 10 * tolerance * scale
    operator = window.operator()
    assert isinstance(operator, LowRankPlusDiagonal) and lx.is_positive_semidefinite(operator)
    np.testing.assert_allclose(operator.as_matrix(), truth, atol=10 * tolerance * scale)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("decay", [0.0, 0.8, 1.0])
def test_basis_trace_and_bounds_over_a_long_run(decay, dtype, rng):
    """The basis stays orthonormal, the trace is exact, what is kept is below M and its values below M's."""
    tolerance = 1e-11 if dtype == np.float64 else 1e-4
    vectors = rng.standard_normal((1500, N)) * np.geomspace(3, 0.01, N)
    weights = np.ones(1500)
    window = _run(
        LowRankWindow(jnp.zeros(N, dtype), SLOTS), jnp.asarray(vectors, dtype), decay, jnp.asarray(weights)
    )
    truth = _dense(vectors, decay, weights)
    scale = np.linalg.norm(truth, 2)
    basis = np.asarray(window.basis, np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(SLOTS), atol=tolerance)
    np.testing.assert_allclose(window.trace(), np.trace(truth), rtol=tolerance)
    assert np.linalg.eigvalsh(truth - _matrix(window)).min() > -tolerance * scale
    assert (np.diff(window.values) <= 0).all() and (window.values >= 0).all()
    # The leading direction and its eigenvalue are right though most of the others were discarded on the way.
    values, vectors = np.linalg.eigh(truth)
    assert abs(vectors[:, -1] @ basis[0]) > 0.999
    np.testing.assert_allclose(window.values[0], values[-1], rtol=0.01)


def test_one_update_keeps_the_best_pairs(rng):
    """Of slots + 1 eigenpairs the largest: the singular values decide, not the age."""
    vectors = np.linalg.qr(rng.standard_normal((N, N)))[0][:, : SLOTS + 1].T * [
        [2.0],
        [0.5],
        [3.0],
        [1.0],
        [0.7],
    ]
    window = LowRankWindow(jnp.zeros(N), SLOTS)
    for v in vectors:
        window = window.add(jnp.asarray(v))
    np.testing.assert_allclose(window.values, [9, 4, 1, 0.49], atol=1e-13)
    np.testing.assert_allclose(window.rest, 0.25)
    # Faded like the rest, a small new one wins in the end.
    window = window.add(jnp.asarray(vectors[1]), decay=0.1, weight=2.0)
    np.testing.assert_allclose(window.values, [0.9, 0.5, 0.4, 0.1], atol=1e-13)
    np.testing.assert_allclose(window.rest, 0.025 + 0.049)


def _known(values, rest):
    """A window of given content, in the coordinate directions."""
    window = LowRankWindow(jnp.zeros(N), len(values))
    return eqx.tree_at(lambda w: (w.values, w.rest), window, (jnp.asarray(values), jnp.asarray(rest)))


@pytest.mark.parametrize("rank", [0, 1, 2, 6])
def test_tail_values_are_those_of_the_spectrum(rank):
    values, rest = [10.0, 8.0, 4.0, 3.0, 2.0, 1.0], 0.6
    window = _known(values, rest)
    tail = np.r_[values[rank:], np.full(N - 6, rest / (N - 6))]
    truths = {"mean": tail.mean(), "median": np.median(tail), "harmonic": 1 / np.mean(1 / tail)}
    for name, truth in truths.items():
        np.testing.assert_allclose(window.tail_value(rank, tail=name), truth, rtol=1e-14)
        traced = jax.jit(lambda r, t=name: window.tail_value(r, tail=t))(jnp.asarray(rank))
        np.testing.assert_allclose(traced, truth)
        operator = window.operator(rank, tail=name)
        diagonal = np.r_[np.maximum(values[:rank], truth), np.full(N - rank, truth)]
        np.testing.assert_allclose(operator.as_matrix(), np.diag(diagonal), atol=1e-14)
        np.testing.assert_allclose(operator.power(-0.5).as_matrix(), np.diag(diagonal**-0.5), rtol=1e-12)
    spectrum = np.r_[values, np.full(N - 6, rest / (N - 6))]
    # Which one is best for what: the nearest to M, and the nearest to its inverse.
    for name, exponent in (("mean", 1), ("harmonic", -1)):
        best = lambda d, p=exponent: np.sum((spectrum[rank:] ** p - d**p) ** 2)
        level = float(window.tail_value(rank, tail=name))
        assert all(best(level) <= best(level * factor) for factor in (0.97, 1.03))


def test_tails_of_zeros_and_of_nothing():
    window = _known([3.0, 1.0], 0.0)
    assert float(window.tail_value(1, tail="harmonic")) == 0 == float(window.tail_value(1, tail="median"))
    np.testing.assert_allclose(window.tail_value(1), 1 / (N - 1))
    assert not np.isfinite(window.operator(tail="median").inverse().mv(jnp.ones(N))).all()
    whole = _known(np.arange(N, 0.0, -1), 0.0)
    for tail in ("mean", "median", "harmonic"):
        assert float(whole.tail_value(tail=tail)) == 0
        np.testing.assert_allclose(
            whole.operator(tail=tail).as_matrix(), np.diag(np.arange(N, 0.0, -1)), atol=1e-14
        )


def test_fold_moves_the_trace_and_forgets_the_directions():
    window = _known([5.0, 3.0, 2.0], 0.5)
    folded = jax.jit(lambda w, r: w.fold(r))(window, jnp.asarray(1))
    np.testing.assert_allclose(folded.values, [5, 0, 0])
    np.testing.assert_allclose(folded.rest, 5.5)
    np.testing.assert_allclose(folded.trace(), window.trace())
    np.testing.assert_allclose(folded.operator(1).as_matrix(), window.operator(1).as_matrix())
    new = folded.add(jnp.eye(N)[7], weight=2.0)
    np.testing.assert_allclose(new.values, [5, 2, 0])
    np.testing.assert_allclose(new.rest, 5.5)


def test_ranks_by_tail_and_by_gradient(rng):
    values, rest = np.array([8.0, 4.0, 2.0, 1.0]), 1.0
    window = _known(values, rest)
    for fraction, rank in ((1.0, 0), (0.5, 1), (0.26, 2), (0.24, 3), (0.1, 4), (0.0, 4)):
        assert int(window.rank_by_tail(fraction)) == rank
    level = rest / (N - 4)
    truth = np.diag(np.r_[values, np.full(N - 4, level)])
    g, damping = rng.standard_normal(N), 0.1
    system = Damped(lx.MatrixLinearOperator(jnp.asarray(truth), PSD), damping)
    found = jax.jit(lambda rtol: window.rank_by_gradient(system, jnp.asarray(g), rtol=rtol, damping=damping))
    rank, residuals = found(1e-10)
    for r in range(5):
        step = np.linalg.solve(np.asarray(window.operator(r).as_matrix()) + damping * np.eye(N), g)
        residual = np.linalg.norm(g - (truth + damping * np.eye(N)) @ step) / np.linalg.norm(g)
        np.testing.assert_allclose(residuals[r], residual, atol=1e-12)
    assert int(rank) == 4 and residuals[4] < 1e-12 < 0.1 < residuals[0]
    assert int(found(float(residuals[2]) * 1.001)[0]) <= 2
    # 10 I is met by rank 0, though ‖g − H⁻¹g‖ would be 0.9.
    ten = lx.MatrixLinearOperator(10 * jnp.eye(N), PSD)
    flat = _known([10.0], 10.0 * (N - 1))
    assert int(flat.rank_by_gradient(ten, jnp.asarray(g), rtol=1e-8, damping=0.0)[0]) == 0
    rank, residuals = window.rank_by_gradient(ten, jnp.zeros(N), rtol=1e-8, damping=0.0)
    assert int(rank) == 0 and not np.any(residuals)
    # Nothing is enough, or nothing is a number: all slots.
    assert int(window.rank_by_gradient(ten, jnp.full(N, jnp.nan), rtol=0.5, damping=0.1)[0]) == 4


def test_it_is_a_constant_and_its_inverse_is_accurate_in_single_precision(rng):
    """Equal eigenvalues, as zeros are, have no derivatives; the inverse has its digits below a small damping too."""
    vectors = jnp.asarray(rng.standard_normal((3, N)), jnp.float32)

    def window(scale):
        window = LowRankWindow(vectors[0], 4)
        for v in vectors:
            window = window.add(scale * v)
        return window

    def step(scale):
        return jnp.sum(window(scale).operator().damped(0.1).inverse().mv(vectors[0]))

    assert float(jax.grad(step)(jnp.float32(1.0))) == 0.0
    operator = window(1.0).operator().damped(1e-6)
    x = operator.inverse().mv(vectors[0])
    left = jnp.linalg.norm(operator.mv(x) - vectors[0])
    assert left <= 1e-5 * jnp.linalg.norm(vectors[0])


def test_trees_vmap_nan_and_one_compilation(rng):
    like = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(()), "e": jnp.zeros((0, 2)), "c": jnp.zeros(2)}
    tree = lambda v: {"a": v[:6].reshape(2, 3), "b": v[6], "e": jnp.zeros((0, 2)), "c": v[7:]}
    traces = []

    @jax.jit
    @jax.vmap
    def operator(vectors):
        traces.append(None)
        window = LowRankWindow(like, 3)
        window = jax.lax.scan(lambda w, v: (w.add(tree(v), decay=0.9), None), window, vectors)[0]
        return window.operator(2).mv(tree(vectors[0])), window.trace()

    for _ in range(2):
        vectors = rng.standard_normal((2, 5, N))
        out, trace = operator(jnp.asarray(vectors))
        np.testing.assert_allclose(trace, [np.trace(_dense(v, 0.9, np.ones(5))) for v in vectors])
    assert len(traces) <= 1
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(lambda x: (2, *x.shape), like)
    flat = lambda v: np.concatenate([v[:6], v[6:7], v[7:]])
    plain = LowRankWindow(jnp.zeros(N), 3)
    for v in vectors[1]:
        plain = plain.add(jnp.asarray(flat(v)), decay=0.9)
    truth = np.asarray(plain.operator(2).as_matrix()) @ flat(vectors[1, 0])
    found = np.concatenate([np.ravel(out[name][1]) for name in ("a", "b", "c")])
    np.testing.assert_allclose(found, truth, atol=1e-10)
    bad = plain.add(jnp.zeros(N).at[2].set(jnp.nan))
    assert np.isnan(bad.values).all() and np.isnan(bad.operator().mv(jnp.ones(N))).all()
    assert np.isnan(bad.add(jnp.ones(N)).trace())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: LowRankWindow(jnp.zeros(3), 4), "`slots` of `LowRankWindow`.*from 1 to 3, found 4"),
        (lambda w: LowRankWindow({}, 1), "`like` of `LowRankWindow`.*0 elements"),
        (lambda w: w.add(jnp.ones(4)), "`vector` must have the structure"),
        (lambda w: w.add(jnp.ones(3), decay=-0.1), "`decay`.*found -0.1"),
        (lambda w: w.add(jnp.ones(3), weight=float("nan")), "`weight`.*found nan"),
        (lambda w: w.operator(3), "`rank` must be an integer from 0 to the number of slots, 2, found 3"),
        (lambda w: w.operator(tail="mode"), "`tail`.*found 'mode'"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(LowRankWindow(jnp.zeros(3), 2))
