"""Preconditioners from pairs against the update formula of BFGS, dense."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from curvax.linear import lbfgs
from curvax.linear._cg_core import conjugate_gradient
from curvax.linear._recycle import deflated, nothing_recycled
from helpers.dense import rotated
from helpers.sweep import sweep

N, M = 12, 5
PSD = lx.positive_semidefinite_tag


def _tree(rows, dtype=jnp.float64):
    """A vector of N, or rows of N, cut into a matrix, a scalar, nothing and an empty leaf."""
    v = jnp.asarray(rows, dtype)
    front = v.shape[:-1]
    return {
        "w": v[..., 1:].reshape(*front, 1, N - 1),
        "b": v[..., 0],
        "none": None,
        "empty": jnp.zeros((*front, 0, 2), dtype),
    }


def _flat(tree):
    return jnp.concatenate([tree["b"].reshape(1), tree["w"].reshape(-1)])


def _updates(steps, changes, scale):
    """The textbook: one dense update of BFGS a pair."""
    inverse = scale * np.eye(N)
    for s, y in zip(steps, changes, strict=True):
        left = np.eye(N) - np.outer(s, y) / (s @ y)
        inverse = left @ inverse @ left.T + np.outer(s, s) / (s @ y)
    return inverse


def _pairs(rng, condition=100.0):
    matrix = rotated(np.geomspace(1.0, condition, N), rng)
    steps = rng.standard_normal((M, N))
    return matrix, steps, steps @ matrix


@pytest.mark.parametrize(("dtype", "tol"), [(jnp.float64, 1e-11), (jnp.float32, 1e-3)])
def test_against_the_updates(dtype, tol, rng):
    _, steps, changes = _pairs(rng)
    last = steps[-1] @ changes[-1] / (changes[-1] @ changes[-1])
    for scale in (None, 0.3):
        P = lbfgs((_tree(steps, dtype), _tree(changes, dtype)), scale=scale)
        truth = _updates(steps, changes, last if scale is None else scale)
        np.testing.assert_allclose(P.as_matrix(), truth, atol=tol * np.abs(truth).max())
        # The secant equation of the last pair.
        np.testing.assert_allclose(_flat(P.mv(_tree(changes[-1], dtype))), steps[-1], atol=20 * tol)
    np.testing.assert_allclose(P.scale, 0.3, rtol=1e-6)
    assert P.used.tolist() == [True] * M
    assert P.in_structure() == P.out_structure() == jax.eval_shape(lambda: _tree(steps[0], dtype))
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(P.mv(_tree(steps[0], dtype))))
    assert lx.is_symmetric(P) and lx.is_positive_semidefinite(P) and not lx.is_diagonal(P)
    for same in (P.T, lx.linearise(P), lx.conj(P), lx.materialise(P)):
        np.testing.assert_allclose(same.as_matrix(), P.as_matrix(), atol=tol)


def test_which_pairs_are_used(rng):
    """By a mask, by a count, in a ring, and by the curvature condition."""
    _, steps, changes = _pairs(rng)
    stacked = (jnp.asarray(steps), jnp.asarray(changes))

    def check(P, order):
        truth = _updates(steps[order], changes[order], 1.0)
        np.testing.assert_allclose(P.as_matrix(), truth, rtol=1e-9, atol=1e-12)
        assert int(P.used.sum()) == len(order)

    check(lbfgs(stacked, scale=1.0, valid=3), [0, 1, 2])
    check(lbfgs(stacked, scale=1.0, valid=jnp.asarray(0)), [])
    check(lbfgs(stacked, scale=1.0, valid=jnp.asarray([True, False, True, False, True])), [0, 2, 4])
    check(lbfgs(stacked, scale=1.0, oldest=2), [2, 3, 4, 0, 1])
    check(lbfgs(stacked, scale=1.0, oldest=jnp.asarray(M + 2), valid=4), [2, 3, 0, 1])
    # The last pair in use gives the scaling.
    last = steps[1] @ changes[1] / (changes[1] @ changes[1])
    np.testing.assert_allclose(lbfgs(stacked, valid=2).scale, last, rtol=1e-12)
    changes[1] = -changes[1]
    changes[3] = np.linalg.qr(np.stack([steps[3], changes[3]]).T)[0][:, 1]  # orthogonal to the step
    check(lbfgs((jnp.asarray(steps), jnp.asarray(changes)), scale=1.0), [0, 2, 4])


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_positive_definite_whatever_the_pairs_hold(dtype, rng):
    matrix = rotated(np.geomspace(1.0, 1e5, N), rng)
    steps = rng.standard_normal((M, N))
    cases = {
        "random": (steps, rng.standard_normal((M, N))),
        "ill-conditioned": (steps, steps @ matrix),
        "negative": (steps, -steps),
        "zero": (0 * steps, 0 * steps),
        "nan": (np.where(np.arange(N) == 3, np.nan, steps), steps),
        "infinite": (steps, np.where(np.arange(N) == 3, np.inf, steps)),
        "tiny": (1e-30 * steps, 1e-30 * steps @ matrix),
        "huge": (1e25 * steps, 1e15 * steps @ matrix),
        "repeated": (np.ones((M, 1)) * steps[0], np.ones((M, 1)) * (steps[0] @ matrix)),
        "nearly repeated": (steps[0] + 1e-5 * steps, (steps[0] + 1e-5 * steps) @ matrix),
    }
    used = {}
    for name, (s, y) in cases.items():
        P = lbfgs((jnp.asarray(s, dtype), jnp.asarray(y, dtype)))
        inverse = np.asarray(P.as_matrix(), np.float64)
        assert np.all(np.isfinite(inverse)), name
        size = np.abs(inverse).max()
        np.testing.assert_allclose(inverse, inverse.T, atol=20 * jnp.finfo(dtype).eps * size, err_msg=name)
        assert np.linalg.eigvalsh(inverse).min() > -20 * jnp.finfo(dtype).eps * size, name
        # As it is applied, no direction has less than no energy.
        directions = np.concatenate([np.linalg.eigh(inverse)[1].T, steps, y])
        directions = directions[np.isfinite(directions).all(axis=1) & directions.any(axis=1)]
        for d in directions / np.abs(directions).max(axis=1, keepdims=True):
            assert d @ np.asarray(P.mv(jnp.asarray(d, dtype)), np.float64) >= 0, name
        used[name] = int(P.used.sum())
    assert {k: used[k] for k in ("negative", "zero", "nan", "infinite")} == dict.fromkeys(
        ("negative", "zero", "nan", "infinite"), 0
    )
    assert {k: used[k] for k in ("ill-conditioned", "tiny", "huge", "repeated")} == dict.fromkeys(
        ("ill-conditioned", "tiny", "huge", "repeated"), M
    )


def test_what_conjugate_gradients_recycle(rng):
    """Their directions are conjugate pairs: the two preconditioners are one."""
    matrix = jnp.asarray(rotated(np.geomspace(1.0, 1e4, N), rng))
    b, r = (jnp.asarray(rng.standard_normal(N)) for _ in range(2))
    none = nothing_recycled(b, 9)
    _, info = conjugate_gradient(lambda v: matrix @ v, b, rtol=1e-9, max_steps=100, recycled=none)
    kept = info.recycled
    assert 0 < int(kept.count) < 9
    P = lbfgs((kept.directions, kept.products), scale=kept.scale, valid=kept.count)
    np.testing.assert_allclose(P.mv(r), deflated(kept, None, r)[0], rtol=1e-6)


def test_what_optimistix_and_optax_keep(rng):
    """Their memories are rings; what they would do to a gradient is the truth."""
    matrix = jnp.asarray(rotated(np.geomspace(1.0, 50.0, N), rng))
    loss = lambda w, _: 0.5 * w @ matrix @ w + jnp.sum(jnp.cos(w))  # noqa: E731
    start, g = (jnp.asarray(rng.standard_normal(N)) for _ in range(2))

    solver = optx.LBFGS(rtol=1e-14, atol=1e-14, history_length=3)
    for max_steps in range(15, 30):  # until the ring has turned, and not to where it began
        solution = optx.minimise(loss, solver, start, max_steps=max_steps, throw=False)
        memory = solution.state.hessian_update_state
        if int(memory.index_start) > 3 and int(memory.index_start) % 3 != 0:
            break
    assert int(memory.index_start) > 3 and int(memory.index_start) % 3 != 0
    P = lbfgs((memory.y_diff_history, memory.grad_diff_history), oldest=memory.index_start)
    hessian_inverse = solution.state.f_info.hessian_inv
    np.testing.assert_allclose(P.mv(g), hessian_inverse.mv(g), rtol=1e-8)

    transform = optax.scale_by_lbfgs(memory_size=3)
    state, w = transform.init(start), start
    with jax.numpy_dtype_promotion("standard"):  # optax mixes integers
        for _ in range(6):
            gradient = jax.grad(loss)(w, None)
            updates, state = transform.update(gradient, state, w)
            w = w - 0.02 * updates
    assert int(state.count) == 6
    for count, right in ((state.count - 1, True), (state.count, False)):
        P = lbfgs((state.diff_params_memory, state.diff_updates_memory), oldest=count)
        assert np.allclose(P.mv(gradient), updates, rtol=1e-8) is right


SOLVERS = {"CG": cx.linear.CG(1e-9), "MINRES": cx.linear.MINRES(1e-10), "Lineax": lx.CG(1e-10, 1e-12)}


@pytest.mark.parametrize("name", sweep(SOLVERS, always=["MINRES"]))
def test_fewer_steps_and_the_same_solution(name, rng):
    """The outlying eigenvectors as pairs."""
    solver = SOLVERS[name]
    values = np.concatenate([rng.uniform(1.0, 2.0, N - 3), [1e3, 1e4, 1e5]])
    basis = np.linalg.qr(rng.standard_normal((N, N)))[0]
    matrix = (basis * values) @ basis.T
    matrix = 0.5 * (matrix + matrix.T)
    structure = jax.eval_shape(lambda: _tree(matrix[0]))
    operator = lx.FunctionLinearOperator(lambda v: _tree(jnp.asarray(matrix) @ _flat(v)), structure, PSD)
    steps = basis[:, -3:].T
    P = lbfgs((_tree(steps), _tree(steps @ matrix)), scale=0.7)
    vector = rng.standard_normal(N)
    plain, ours = (
        lx.linear_solve(operator, _tree(vector), solver, options=options)
        for options in ({}, {"preconditioner": P})
    )
    np.testing.assert_allclose(_flat(ours.value), np.linalg.solve(matrix, vector), atol=1e-7)
    assert int(ours.stats["num_steps"]) < int(plain.stats["num_steps"])


def test_gradients_vmap_and_one_compilation(rng):
    matrix, steps, changes = (jnp.asarray(x) for x in _pairs(rng))
    b, w = (jnp.asarray(rng.standard_normal(N)) for _ in range(2))
    traces = []

    @jax.jit
    def gradient(t):
        traces.append(None)

        def value(t):
            operator = lx.MatrixLinearOperator(matrix + t * jnp.eye(N), PSD)
            P = lbfgs((steps, changes + t * steps), oldest=jnp.asarray(2))
            return w @ lx.linear_solve(operator, b, cx.linear.CG(1e-11), options={"preconditioner": P}).value

        return jax.grad(value)(t)

    for t in (0.1, 0.2):
        inverse = np.linalg.inv(matrix + t * np.eye(N))
        np.testing.assert_allclose(gradient(t), -w @ inverse @ inverse @ b, rtol=1e-7)
    assert len(traces) == 1
    batch = eqx.filter_vmap(lambda c, k: lbfgs((steps, c * changes), valid=k))(
        jnp.asarray([1.0, 2.0]), jnp.asarray([M, 2])
    )
    products = eqx.filter_vmap(lambda P: P.mv(b))(batch)
    for i, (factor, count) in enumerate(((1.0, M), (2.0, 2))):
        alone = lbfgs((steps, factor * changes), valid=count)
        np.testing.assert_allclose(products[i], alone.mv(b), rtol=1e-10)


def test_a_traced_scale_below_zero_is_not_plausible():
    make = jax.jit(lambda scale: lbfgs((jnp.eye(3), jnp.eye(3)), scale=scale, valid=1).mv(jnp.ones(3)))
    np.testing.assert_allclose(make(0.5), [1.0, 0.5, 0.5])
    assert np.all(np.isnan(make(-0.5)[1:]))


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([(jnp.ones(3), jnp.ones(3))] * 3, {}, r"`pairs` of `lbfgs` must be a tuple.*jnp.stack"),
        ((jnp.ones((2, 3)), jnp.ones((2, 4))), {}, "`pairs`.*same shapes and dtypes"),
        ((jnp.ones((2, 3)), jnp.ones((2, 3), jnp.float32)), {}, "`pairs`.*same shapes and dtypes"),
        (({"a": jnp.ones((2, 3))}, {"b": jnp.ones((2, 3))}), {}, "`pairs`.*another structure"),
        (({"a": jnp.ones((2, 3)), "b": jnp.ones(3)},) * 2, {}, "`pairs`.*leading axis of one length"),
        ((jnp.ones(()), jnp.ones(())), {}, "`pairs`.*leading axis"),
        ((jnp.ones((0, 3)), jnp.ones((0, 3))), {}, "`pairs`.*at least 1"),
        (({}, {}), {}, "`pairs` of `lbfgs` has no array"),
        ((jnp.ones((2, 3), int), jnp.ones((2, 3), int)), {}, "`pairs`.*real floating-point.*int64"),
        ((jnp.ones((2, 3), complex),) * 2, {}, "`pairs`.*real floating-point.*complex128"),
        ((jnp.ones((2, 3)),) * 2, {"scale": 0.0}, "`scale` of `lbfgs` must be above 0, found 0.0"),
        ((jnp.ones((2, 3)),) * 2, {"valid": jnp.ones(3, bool)}, r"`valid`.*shape \(2,\).*found"),
        ((jnp.ones((2, 3)),) * 2, {"oldest": 0.5}, "`oldest`.*one integer.*float"),
    ],
)
def test_wrong_arguments(pairs, options, message):
    with pytest.raises(ValueError, match=message):
        lbfgs(pairs, **options)
