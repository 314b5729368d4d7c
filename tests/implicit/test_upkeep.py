"""Preconditioners that are kept from call to call, and built anew when they have aged."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from curvax.linear import Upkeep

SIZE, RANK = 90, 40
SPECTRUM = jnp.geomspace(1.0, 1e-5, SIZE)


def _inner(w, lam, rotation):
    v = rotation @ w["a"]
    energy = 0.5 * jnp.sum(SPECTRUM.astype(v.dtype) * (v - 1) ** 2)
    return energy + 0.5 * jnp.sum(jnp.exp(lam) * w["a"] ** 2)


PROBLEM = cx.Bilevel(inner=_inner, outer=lambda w, lam, _: jnp.sum((w["a"] - 0.1) ** 2))
SOLVER = optx.BFGS(1e-5, 1e-5)
PHI, THETA = jnp.full(SIZE, -12.0), {"a": jnp.zeros(SIZE), "name": "not an array"}


def nystrom(theta, args):
    theta = eqx.filter(theta, eqx.is_inexact_array)
    curvature = cx.operators.hessian(_inner, theta, *args)
    return cx.linear.nystrom(curvature, RANK, damping=1e-6, key=jax.random.key(0))


@pytest.fixture(scope="module")
def rotation():
    return jnp.asarray(np.linalg.qr(np.random.default_rng(3).normal(size=(SIZE, SIZE)))[0])


def truth(phi, rotation):
    curvature = rotation.T @ (SPECTRUM[:, None] * rotation) + jnp.diag(jnp.exp(phi))
    theta = jnp.linalg.solve(curvature, rotation.T @ SPECTRUM)
    return -jnp.exp(phi) * theta * jnp.linalg.solve(curvature, 2 * (theta - 0.1))


def walk(rule, rotation, steps=8, move=0.05, after=None):
    """Calls along a path of φ: products, how often the operator was built, and the worst error."""
    phi, state, seen = PHI, None, []
    for k in range(steps):
        data = rotation if after is None or k < after else rotation[::-1]
        hg = cx.hypergradient(
            PROBLEM, phi, THETA, inner_solver=SOLVER, rule=rule, inner_data=data, state=state, throw=False
        )
        assert hg.result == cx.RESULTS.successful
        error = jnp.linalg.norm(hg.grad - truth(phi, data)) / jnp.linalg.norm(hg.grad)
        assert error <= jnp.maximum(2 * hg.stats.relative_error, 1e-4)
        state = hg.state
        built = 0 if state.preconditioner is None else int(state.preconditioner.num_built)
        seen.append((int(hg.stats.num_matvecs), built))
        phi = phi + move * jnp.sin(jnp.arange(SIZE) + k)
    return np.array(seen)


RULE = cx.Implicit(rtol=1e-4, max_sweeps=4, preconditioner=Upkeep(nystrom))


@pytest.fixture(scope="module")
def kept(rotation):
    return walk(RULE, rotation)


def test_built_once_for_many_calls_and_saves_products(kept, rotation):
    assert kept[-1, 1] == 1
    without = walk(cx.Implicit(rtol=1e-4, max_sweeps=4, recycle=0), rotation)
    assert 3 * kept[1:, 0].sum() < without[1:, 0].sum()


def test_every(rotation):
    rule = cx.Implicit(rtol=1e-4, max_sweeps=4, preconditioner=Upkeep(nystrom, every=3, growth=None))
    np.testing.assert_array_equal(walk(rule, rotation)[:, 1], [1, 1, 1, 2, 2, 2, 3, 3])


def test_renewed_when_the_curvature_has_turned(rotation):
    """Rows reversed: stiff directions become soft ones and the other way round."""
    seen = walk(RULE, rotation, after=3, steps=6)
    assert seen[2, 1] == 1
    assert seen[3, 0] > 2 * seen[2, 0]
    # Noticed in that call or in the next, and paid back by the one after.
    assert seen[5, 1] >= 2
    assert seen[5, 0] < seen[3, 0] / 2


def test_without_an_estimate(rotation):
    rule = cx.Implicit(rtol=None, preconditioner=Upkeep(nystrom, every=2, growth=None))
    call = lambda state: cx.hypergradient(  # noqa: E731
        PROBLEM, PHI, THETA, inner_solver=optx.BFGS(1e-7, 1e-7), rule=rule, inner_data=rotation, state=state
    )
    state, built = None, []
    for _ in range(4):
        hg = call(state)
        state = hg.state
        built.append(int(state.preconditioner.num_built))
    assert built == [1, 1, 2, 2]
    np.testing.assert_allclose(hg.grad, truth(PHI, rotation), rtol=1e-2, atol=1e-4)


def test_inside_jit_vmap_and_the_driver(rotation):
    method = {"inner_solver": SOLVER, "rule": RULE}
    state = cx.bilevel.initial_state(PROBLEM, PHI, THETA, inner_data=rotation, **method)

    @jax.jit
    def two(phi, state):
        for _ in range(2):
            hg = cx.hypergradient(PROBLEM, phi, THETA, inner_data=rotation, state=state, **method)
            state = hg.state
        return hg.grad, state.preconditioner.num_built

    phis = PHI + jnp.array([[0.0], [0.5]])
    grads, built = jax.vmap(two, (0, None))(phis, state)
    np.testing.assert_array_equal(built, 1)
    for phi, grad in zip(phis, grads, strict=True):
        np.testing.assert_allclose(grad, truth(phi, rotation), rtol=1e-2, atol=1e-5)

    solution = cx.minimise(
        PROBLEM, PHI, THETA, optimizer=optax.sgd(1e-3), num_steps=3, inner_data=rotation, **method
    )
    assert np.all(np.isfinite(solution.history.value))


def test_for_every_derivative_where_there_is_no_state(rotation):
    def build(w, lam):
        return lx.DiagonalLinearOperator(1 / (jnp.mean(SPECTRUM) + jnp.exp(lam)))

    def outer(lam):
        rule = cx.Implicit(rtol=1e-3, preconditioner=Upkeep(build))
        loss = lambda w, lam: _inner({"a": w}, lam, rotation)  # noqa: E731
        solver = optx.BFGS(1e-6, 1e-6)
        solution = optx.minimise(loss, solver, jnp.zeros(SIZE), lam, adjoint=rule, max_steps=5000)
        return jnp.sum((solution.value - 0.1) ** 2)

    np.testing.assert_allclose(jax.grad(outer)(PHI), truth(PHI, rotation), rtol=1e-2, atol=1e-4)


def test_state_of_another_rule(rotation):
    """From no upkeep to one and back; another rank is refused by name."""
    method = {"inner_solver": SOLVER, "inner_data": rotation}
    plain = cx.Implicit(rtol=1e-2, recycle=0)
    first = cx.hypergradient(PROBLEM, PHI, THETA, rule=plain, **method)
    second = cx.hypergradient(PROBLEM, PHI, THETA, rule=RULE, state=first.state, **method)
    assert int(second.state.preconditioner.num_built) == 1
    third = cx.hypergradient(PROBLEM, PHI, THETA, rule=plain, state=second.state, **method)
    assert third.state.preconditioner is None
    diagonal = Upkeep(lambda w, args: lx.DiagonalLinearOperator({"a": jnp.ones(SIZE)}))
    with pytest.raises(ValueError, match=r"`state` keeps a preconditioner of other shapes"):
        rule = cx.Implicit(rtol=1e-2, preconditioner=diagonal)
        cx.hypergradient(PROBLEM, PHI, THETA, rule=rule, state=second.state, **method)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="`every` or `growth`"):
        Upkeep(nystrom, growth=None)
    with pytest.raises(ValueError, match="`every` of `Upkeep`"):
        Upkeep(nystrom, every=0)
    with pytest.raises(ValueError, match="`growth` of `Upkeep`"):
        Upkeep(nystrom, growth=1.0)
    with pytest.raises(TypeError, match="`build` of `Upkeep` must be a function"):
        Upkeep(lx.IdentityLinearOperator(jax.ShapeDtypeStruct((3,), float)))
    with pytest.raises(ValueError, match="needs `every` here"):
        rule = cx.Implicit(linear_solver=lx.GMRES(1e-6, 1e-6), preconditioner=Upkeep(nystrom))
        cx.hypergradient(PROBLEM, PHI, THETA, inner_solver=SOLVER, rule=rule, inner_data=jnp.eye(SIZE))
    with pytest.raises(TypeError, match="must return a Lineax operator"):
        rule = cx.Implicit(preconditioner=Upkeep(lambda w, args: w))
        cx.hypergradient(PROBLEM, PHI, THETA, inner_solver=SOLVER, rule=rule, inner_data=jnp.eye(SIZE))
