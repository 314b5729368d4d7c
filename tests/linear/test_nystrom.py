"""Nyström preconditioners against dense eigenvalues and the bounds of the paper."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.linear import NystromPreconditioner, nystrom
from helpers.dense import rotated
from helpers.sweep import sweep

N = 60
PSD = lx.positive_semidefinite_tag
FAST = np.geomspace(1.0, 1e-9, N)


def _tree(vector, dtype=jnp.float64):
    """A vector of N cut into a matrix, a scalar, nothing and an empty leaf."""
    v = jnp.asarray(vector, dtype)
    return {"w": v[1:].reshape(1, N - 1), "b": v[0], "none": None, "empty": jnp.zeros((0, 2), dtype)}


def _flat(tree):
    return jnp.concatenate([tree["b"].reshape(1), tree["w"].reshape(-1)])


def _operator(matrix, dtype=jnp.float64, tags=PSD):
    """Raveled leaves are in the order of the matrix: b, empty, w."""
    matrix = jnp.asarray(matrix, dtype)
    structure = jax.eval_shape(lambda: _tree(matrix[0], dtype))
    return lx.FunctionLinearOperator(lambda v: _tree(matrix @ _flat(v), dtype), structure, tags)


@eqx.filter_jit
def _make(matrix, rank, damping, key, *, tags=PSD, target=None, max_rank=None, power_steps=5):
    """One program for all matrices, and for all targets."""
    options = {"target_condition": target, "max_rank": max_rank, "power_steps": power_steps}
    return nystrom(_operator(matrix, matrix.dtype, tags), rank, damping=damping, key=key, **options)


def _nystrom(matrix, rank, *, damping, key, dtype=jnp.float64, target=None, **options):
    target = None if target is None else jnp.asarray(target, dtype)
    return _make(jnp.asarray(matrix, dtype), rank, jnp.asarray(damping, dtype), key, target=target, **options)


_apply = eqx.filter_jit(lambda preconditioner, vector: _flat(preconditioner.mv(_tree(vector))))
_matrix = eqx.filter_jit(lambda preconditioner: preconditioner.as_matrix())


def _dense(preconditioner):
    return np.asarray(_matrix(preconditioner), np.float64)


def _approximation(preconditioner):
    basis = np.stack([np.asarray(_flat(row)) for row in _rows(preconditioner.basis)])
    return (basis.T * np.asarray(preconditioner.eigenvalues)) @ basis


def _rows(slots):
    return [jax.tree.map(lambda leaf, i=i: leaf[i], slots) for i in range(slots["b"].shape[0])]


def _condition(inverse, matrix):
    """Of P^{-1/2} A P^{-1/2}, from the eigenvalues of P⁻¹."""
    values, vectors = np.linalg.eigh(inverse)
    root = (vectors * np.sqrt(values)) @ vectors.T
    return np.linalg.cond(root @ matrix @ root)


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-9), (jnp.float32, 3e-2)])
@pytest.mark.parametrize("damping", [1e-2, 1e-5])
def test_bounds_of_the_paper(dtype, tol, damping, rng, key):
    """κ ≤ (λ̂_ℓ + μ + ‖E‖)/μ, Â below A, and the inverse as near as the error allows."""
    matrix = rotated(FAST, rng)
    P = _nystrom(matrix, 20, dtype=dtype, damping=damping, key=key)
    inverse, approximation = _dense(P), _approximation(P).astype(np.float64)
    error = np.linalg.norm(matrix - approximation, 2)
    assert np.linalg.eigvalsh(inverse).min() > 0
    np.testing.assert_allclose(inverse, inverse.T, rtol=0, atol=1e-6 * np.abs(inverse).max())
    true = _condition(inverse, matrix + damping * np.eye(N))
    last = float(P.eigenvalues[-1])
    assert true <= (1 + tol) * (last + damping + error) / damping
    # The estimate is from below, by the power method, and not far.
    assert 0.5 * error <= float(P.error) <= (1 + tol) * error + 1e-6
    assert 0.5 * true <= float(P.condition)
    np.testing.assert_allclose(P.condition, (last + damping + float(P.error)) / damping, rtol=1e-5)
    assert np.linalg.eigvalsh(matrix - approximation).min() > -10 * np.finfo(dtype).eps
    if dtype == jnp.float64:
        solved = _dense(P.low_rank_inverse()) - np.linalg.inv(matrix + damping * np.eye(N))
        assert np.linalg.norm(solved, 2) <= (1 + 1e-6) * error / (damping * (error + damping))
    assert int(P.rank) == 20 and int(P.num_products) == 25
    assert P.in_structure() == _operator(matrix, dtype).in_structure()


def test_condition_is_below_28_on_average(rng, key):
    """The theorem of the paper, for a sketch of some three times the effective dimension."""
    damping = 1e-2
    rank = 2 * int(np.ceil(1.5 * np.sum(FAST / (FAST + damping)))) + 1
    assert rank < N
    matrix = rotated(FAST, rng)
    made = [_nystrom(matrix, rank, damping=damping, key=k) for k in jax.random.split(key, 8)]
    conditions = [_condition(_dense(P), matrix + damping * np.eye(N)) for P in made]
    assert np.mean(conditions) < 28


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-10), (jnp.float32, 2e-3)])
def test_exact_at_full_rank_and_for_operators_of_low_rank(dtype, tol, rng, key):
    matrix, damping = rotated(FAST, rng), 1e-3
    low = rotated(np.concatenate([[2.0, 1.0, 0.1], np.zeros(N - 3)]), rng)
    for case, rank in ((matrix, N), (low, 20), (np.zeros((N, N)), 20)):
        truth = np.linalg.inv(case + damping * np.eye(N))
        P = _nystrom(case, rank, dtype=dtype, damping=damping, key=key)
        for inverse in (P, P.low_rank_inverse()):
            np.testing.assert_allclose(_dense(inverse) * damping, truth * damping, atol=tol)
        np.testing.assert_allclose(P.condition, 1.0, atol=tol + 1e-4)
    spectrum = _nystrom(low, 20, dtype=dtype, damping=damping, key=key).eigenvalues
    np.testing.assert_allclose(spectrum[:3], [2.0, 1.0, 0.1], rtol=tol)
    np.testing.assert_allclose(spectrum[3:], 0.0, atol=30 * np.finfo(dtype).eps)


def test_without_damping(rng, key):
    """What is below rounding is floored there: positive definite, and exact where A has full rank."""
    # A damping of A's own, of which nothing is said.
    matrix = rotated(np.maximum(np.geomspace(1.0, 1e-9, N), 1e-4), rng)
    full = _nystrom(matrix, N, damping=0, key=key)
    np.testing.assert_allclose(_dense(full), np.linalg.inv(matrix), rtol=1e-7, atol=1e-6)
    part = _dense(_nystrom(matrix, 30, damping=0, key=key))
    assert _condition(part, matrix) < 0.01 * np.linalg.cond(matrix)
    low = rotated(np.concatenate([[2.0, 1.0], np.zeros(N - 2)]), rng)
    P = _nystrom(low, 30, damping=0, key=key)
    for value, vector in zip(*(part[..., -3:].T for part in np.linalg.eigh(low)), strict=True):
        energy = vector @ _apply(P, vector)
        if value > 0.5:
            np.testing.assert_allclose(energy, 1 / value, rtol=1e-6)
        else:
            assert np.isfinite(energy) and energy > 1e10


def test_rank_for_a_target(rng, key):
    matrix, damping = rotated(FAST, rng), 1e-4
    adapted = lambda m, target: _nystrom(m, 5, damping=damping, key=key, target=target, max_rank=48)  # noqa: E731
    ranks = []
    for target in (1e6, 1000.0, 30.0):
        P = adapted(matrix, target)
        rank = int(P.rank)
        assert float(P.condition) <= target
        assert _condition(_dense(P), matrix + damping * np.eye(N)) <= 1.2 * target
        # Slots that are not in use have no say.
        assert np.all(np.asarray(P.eigenvalues[rank:]) == 0) and np.all(np.asarray(P.basis["w"][rank:]) == 0)
        assert int(P.num_products) == rank + 5 * (1 + np.log2(rank / 5))
        ranks.append(rank)
    assert ranks[0] == 5 < ranks[1] < ranks[2] < 48
    # Out of reach: the largest rank, and an honest estimate.
    P = adapted(rotated(np.geomspace(1.0, 0.5, N), rng), 2.0)
    assert int(P.rank) == 48 and float(P.condition) > 1000


def test_power_steps(rng, key):
    matrix = rotated(FAST, rng)
    P = _nystrom(matrix, 20, damping=1e-3, key=key, power_steps=0)
    assert int(P.num_products) == 20
    np.testing.assert_array_equal(P.error, P.eigenvalues[-1])


SOLVERS = {
    "CG": cx.linear.CG(1e-8),
    "MINRES": cx.linear.MINRES(1e-8),
    "Lineax": lx.CG(1e-8, 1e-8, max_steps=9999),
}


@pytest.mark.parametrize("name", sweep(SOLVERS, always=["CG"]))
def test_fewer_steps_and_the_same_solution(name, rng, key):
    solver = SOLVERS[name]
    values, damping = np.geomspace(1.0, 1e-18, N), 1e-5
    matrix = rotated(values, rng)
    system = _operator(matrix + damping * np.eye(N))
    vector = rng.standard_normal(N)
    P = _nystrom(matrix, 25, damping=damping, key=key)
    plain = lx.linear_solve(system, _tree(vector), solver)
    ours = lx.linear_solve(system, _tree(vector), solver, options={"preconditioner": P})
    truth = np.linalg.solve(matrix + damping * np.eye(N), vector)
    np.testing.assert_allclose(_flat(ours.value), truth, atol=1e-5 * np.linalg.norm(truth))
    assert int(ours.stats["num_steps"]) * 3 < int(plain.stats["num_steps"])


def test_a_curvature_of_gauss_and_newton(rng, key):
    """κ = 1e7, over the pytree of parameters of a network: a fifth of the products, a third with the sketch's."""
    inputs = jnp.asarray(rng.uniform(-1, 1, (40, 2)))
    targets = jnp.sin(3 * inputs[:, 0])
    params = {"a": jnp.asarray(rng.standard_normal((2, 15))), "b": jnp.asarray(rng.standard_normal(15))}
    G = cx.operators.gauss_newton(
        lambda p, x: jnp.sum(jnp.tanh(x @ p["a"] + p["b"])),
        lambda z, y: 0.5 * (z - y) ** 2,
        params,
        inputs,
        targets,
    )
    damping = 1e-7 * np.linalg.eigvalsh(np.asarray(G.as_matrix()))[-1]
    P = nystrom(G, 20, damping=damping, key=key)

    @eqx.filter_jit
    def steps(P):
        system, vector = cx.operators.Damped(G, damping), G.mv(jax.tree.map(jnp.ones_like, params))
        options = {} if P is None else {"preconditioner": P}
        return lx.linear_solve(system, vector, cx.linear.CG(1e-6), options=options).stats["num_steps"]

    plain, ours = int(steps(None)), int(steps(P))
    assert 5 * ours < plain, (plain, ours)
    assert 3 * (ours + int(P.num_products)) < plain, (plain, ours)


def test_gradients_of_a_solve_are_untouched(rng, key):
    """The sketch is a constant, though it is made, in a loop, from what is differentiated."""
    matrix, b = jnp.asarray(rotated(np.geomspace(1, 1e-3, N), rng)), jnp.asarray(rng.standard_normal(N))
    w = jnp.asarray(rng.standard_normal(N))

    @jax.jit
    @jax.value_and_grad
    def value(t):
        P = nystrom(_operator(t * matrix), 8, damping=t, key=key, target_condition=5.0 + t, max_rank=30)
        system = _operator(matrix + t * jnp.eye(N))
        solution = lx.linear_solve(system, _tree(b), cx.linear.CG(1e-10), options={"preconditioner": P})
        return w @ _flat(solution.value) + jnp.sum(P.eigenvalues) + P.error

    inverse = np.linalg.inv(matrix + 0.1 * np.eye(N))
    np.testing.assert_allclose(value(0.1)[1], -w @ inverse @ inverse @ b, rtol=1e-7)


def test_as_preconditioner_of_the_implicit_rule(rng, key):
    """One that is made at the solution, inside of the rule."""
    values = np.concatenate([np.geomspace(1e4, 1.0, 12), np.zeros(N - 12)])
    matrix = jnp.asarray(rotated(values, rng))
    problem = cx.Bilevel(
        inner=lambda w, phi, _: 0.5 * w @ matrix @ w + 0.5 * jnp.exp(phi) * jnp.sum(w**2) - jnp.sum(w),
        outer=lambda w, phi, _: 0.5 * jnp.sum((w - 0.1) ** 2),
    )
    phi = jnp.asarray(-3.0)
    solution = jnp.linalg.solve(matrix + jnp.exp(phi) * jnp.eye(N), jnp.ones(N))

    def preconditioner(theta, args):
        data_term = lambda w: 0.5 * w @ matrix @ w  # noqa: E731
        return nystrom(cx.operators.hessian(data_term, theta), 20, damping=jnp.exp(args[0]), key=key)

    rule = cx.Implicit(rtol=1e-8, recycle=0, preconditioner=preconditioner)
    ours = cx.hypergradient(problem, phi, solution, rule=rule, inner_solver=cx.Steps(optax.sgd(1e-12), 1))
    truth = jax.grad(
        lambda phi: problem.outer(
            jnp.linalg.solve(matrix + jnp.exp(phi) * jnp.eye(N), jnp.ones(N)), phi, None
        )
    )(phi)
    np.testing.assert_allclose(ours.grad, truth, rtol=1e-6)
    # As many products as A has distinct eigenvalues, 13, and more, it would be without.
    assert int(ours.stats.num_matvecs) < 13


def test_indefinite_or_not_a_number_is_never_plausible(rng, key):
    cases = ((0.0, N, True), (-1e-12, N, False), (-0.3, 30, False), (np.nan, 30, False))
    for low, rank, fine in cases:
        matrix = rotated(np.geomspace(1, 1e-8, N), rng)
        direction = rng.standard_normal(N)
        direction /= np.linalg.norm(direction)
        projector = np.eye(N) - np.outer(direction, direction)
        matrix = projector @ matrix @ projector + low * np.outer(direction, direction)
        P = _nystrom(matrix, rank, damping=1e-3, key=key, tags=lx.symmetric_tag)
        for inverse in (P, P.low_rank_inverse()):
            product = _apply(inverse, direction)
            assert np.all(np.isfinite(product) if fine else np.isnan(product)), low
        assert bool(jnp.isfinite(P.condition)) is fine
    # What is too rare for the sketch the power method finds.
    rare = rotated(np.concatenate([np.ones(3), np.zeros(N - 4), [-0.02]]), rng)
    assert np.all(np.isnan(_apply(_nystrom(rare, 5, damping=1e-3, key=key), direction)))
    # NaN ends the growth of the rank.
    P = _nystrom(rare * np.nan, 5, damping=1e-3, key=key, target=10.0, max_rank=48)
    assert np.all(np.isnan(_apply(P, direction))) and int(P.rank) == 5
    # A damping that is traced cannot be checked before.
    assert np.all(np.isfinite(_apply(_nystrom(np.eye(N), 30, damping=0.1, key=key), direction)))
    assert np.all(np.isnan(_apply(_nystrom(np.eye(N), 30, damping=-0.1, key=key), direction)))


def test_noisy_products_pass_for_rounding(rng, key):
    """Products that are wrong by 1e-6 are no sign of an indefinite operator."""
    values = np.concatenate([np.geomspace(1.0, 1e-3, 10), np.zeros(N - 10)])
    noisy = rotated(values, rng) + 1e-6 * rng.standard_normal((N, N)) / np.sqrt(N)
    P = _nystrom(noisy, 20, damping=1e-3, key=key)
    inverse = _dense(P)
    assert _condition(inverse, 0.5 * (noisy + noisy.T) + 1e-3 * np.eye(N)) < 1.5


def test_vmap_and_one_compilation(rng, key):
    matrices = jnp.stack([jnp.asarray(rotated(np.geomspace(1, 10.0**-k, N), rng)) for k in (9, 20, 60)])
    traces = []
    options = {"damping": 1e-4, "target_condition": 30.0, "max_rank": 48}

    @eqx.filter_jit
    def make(matrices, keys, vector):
        traces.append(None)

        def each(matrix, key):
            P = nystrom(_operator(matrix), 5, key=key, **options)
            return P.rank, P.num_products, _flat(P.mv(_tree(vector)))

        return jax.vmap(each)(matrices, keys)

    keys, vector = jax.random.split(key, 3), jnp.asarray(rng.standard_normal(N))
    ranks, spent, products = make(matrices, keys, vector)
    make(2 * matrices, keys, vector)
    assert len(traces) == 1
    for i in range(3):
        alone = _nystrom(matrices[i], 5, damping=1e-4, key=keys[i], target=30.0, max_rank=48)
        assert (int(alone.rank), int(alone.num_products)) == (int(ranks[i]), int(spent[i]))
        np.testing.assert_allclose(products[i], _apply(alone, vector), rtol=1e-5)
    assert len(set(ranks.tolist())) == 3


def test_calls_outside_of_jit_compile_once(rng, key):
    """Of operators that are equal but for their arrays."""
    traces = []

    class Counted(lx.MatrixLinearOperator):
        def mv(self, vector):
            traces.append(None)
            return self.matrix @ vector

    for question in (lx.is_symmetric, lx.is_positive_semidefinite):
        question.register(Counted, lambda operator: True)
    lx.is_negative_semidefinite.register(Counted, lambda operator: False)
    lx.linearise.register(Counted, lambda operator: operator)
    counts = []
    for damping in (0.1, 0.2, 0.3):
        nystrom(Counted(jnp.asarray(rotated(FAST, rng)[:9, :9])), 3, damping=damping, key=key)
        counts.append(len(traces))
    assert counts[0] == counts[1] == counts[2] > 0


def test_it_is_an_operator_like_any_other(rng, key):
    P = _nystrom(rotated(FAST, rng), 20, damping=1e-3, key=key)
    assert isinstance(P, NystromPreconditioner)
    assert lx.is_symmetric(P) and lx.is_positive_semidefinite(P) and not lx.is_diagonal(P)
    for same in (P.T, lx.linearise(P), lx.conj(P), lx.materialise(P)):
        np.testing.assert_allclose(_matrix(same), _dense(P), atol=1e-9)
    np.testing.assert_allclose(lx.diagonal(P), np.diag(_dense(P)))


SYSTEM = lx.MatrixLinearOperator(jnp.eye(4), PSD)
GOOD = {"damping": 0.1, "key": 0}


@pytest.mark.parametrize(
    ("operator", "rank", "changes", "message"),
    [
        (SYSTEM, 0, {}, "`rank` of `nystrom` must be at least 1, found 0"),
        (SYSTEM, 5, {}, "`rank`.*at most the size of the operator, 4.*`cx.linear.Auto`"),
        (SYSTEM, 2.0, {}, "`rank`.*Python integer, found float"),
        (SYSTEM, 2, {"key": None}, r"`key` of `nystrom`.*jax.random.key\(0\).*found None"),
        (SYSTEM, 2, {"key": 3}, "`key`.*found 3"),
        (SYSTEM, 2, {"key": "two"}, r"`key`.*shape \(2,\)"),
        (SYSTEM, 2, {"damping": -1.0}, "`damping` must not be negative, found -1.0"),
        (SYSTEM, 2, {"damping": jnp.ones(2)}, "`damping` must be a scalar"),
        (SYSTEM, 2, {"target_condition": 1.0}, "`target_condition`.*above 1.*found 1.0"),
        (SYSTEM, 2, {"target_condition": 9.0, "damping": 0.0}, "needs a `damping` above 0, found 0"),
        (SYSTEM, 2, {"max_rank": 3}, "`max_rank`.*needs a `target_condition`"),
        (SYSTEM, 2, {"max_rank": 1, "target_condition": 9.0}, "`max_rank`.*2 and 4, found 1"),
        (SYSTEM, 2, {"max_rank": 9, "target_condition": 9.0}, "`max_rank`.*2 and 4, found 9"),
        (SYSTEM, 2, {"power_steps": -1}, "`power_steps`.*at least 1"),
        (lx.MatrixLinearOperator(jnp.ones((3, 4))), 2, {}, "`operator` of `nystrom` must be square"),
        (lx.MatrixLinearOperator(jnp.eye(4)), 2, {}, "`operator`.*must be tagged `lx.symmetric_tag`"),
        (-SYSTEM, 2, {}, "tagged negative semidefinite; pass `-operator`"),
        (
            lx.MatrixLinearOperator(jnp.eye(4, dtype=complex), PSD),
            2,
            {},
            "`operator`.*real.*found complex128",
        ),
    ],
)
def test_wrong_arguments(operator, rank, changes, message):
    arguments = GOOD | changes
    if not {"key"} & set(changes):
        arguments["key"] = jax.random.key(0)
    elif changes["key"] == "two":
        arguments["key"] = jax.random.split(jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        nystrom(operator, rank, **arguments)
