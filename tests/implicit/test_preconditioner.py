"""A preconditioner that the solver cannot use is refused by name while tracing; nothing here is compiled."""

import equinox as eqx
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
import pytest

import curvax as cx
from curvax.linear import CG, MINRES, Upkeep

SIZE = 40
THETA, PHI = jnp.zeros(SIZE), jnp.ones(SIZE)
MATRIX = jnp.eye(SIZE) + 0.1 * jnp.eye(SIZE, k=1)
PLAIN = lx.MatrixLinearOperator(MATRIX)
TAGGED = lx.TaggedLinearOperator(PLAIN, lx.positive_semidefinite_tag)
SYMMETRIC = lx.TaggedLinearOperator(PLAIN, lx.symmetric_tag)
NEGATIVE = lx.TaggedLinearOperator(PLAIN, lx.negative_semidefinite_tag)
SOLVER = optx.BFGS(1e-6, 1e-6)
MESSAGE = r"`preconditioner` of `Implicit` must be symmetric positive definite for {}.*TaggedLinearOperator"

PROBLEM = cx.Bilevel(
    inner=lambda w, phi, _: jnp.sum((w - phi) ** 2) + jnp.sum(w**4), outer=lambda w, phi, _: jnp.sum(w**2)
)
ROOT = cx.Bilevel(inner=cx.Root(lambda w, phi, _: w**3 + w - phi), outer=PROBLEM.outer)


def trace(rule, problem=PROBLEM, solver=SOLVER):
    call = lambda phi: cx.hypergradient(problem, phi, THETA, inner_solver=solver, rule=rule, throw=False)  # noqa: E731
    return eqx.filter_eval_shape(call, PHI)


def trace_map(rule):
    theta_star = cx.solution_map(PROBLEM, SOLVER, rule)
    return eqx.filter_eval_shape(eqx.filter_grad(lambda phi: jnp.sum(theta_star(phi, THETA))), PHI)


REFUSED = {
    "default": (None, PLAIN, 1e-2, "curvax's CG"),
    "no estimate": (None, PLAIN, None, "curvax's CG"),
    "function": (None, lambda theta, args: PLAIN, 1e-2, "curvax's CG"),
    "Upkeep": (None, Upkeep(lambda theta, args: PLAIN), 1e-2, "curvax's CG"),
    "negative": (CG(1e-3), NEGATIVE, 1e-2, "curvax's CG"),
    "Lineax's CG": (lx.CG(1e-3, 1e-3), SYMMETRIC, None, "lineax's CG"),
    "MINRES": (MINRES(1e-3), PLAIN, None, "curvax's MINRES"),
    "the judge of another solver": (lx.GMRES(1e-3, 1e-3), PLAIN, 1e-2, "curvax's CG"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    solver, operator, rtol, who = REFUSED[name]
    with pytest.raises(ValueError, match=MESSAGE.format(who)):
        trace(cx.Implicit(rtol=rtol, linear_solver=solver, preconditioner=operator))


def test_refused_in_a_solution_map():
    for solver, who in ((None, "curvax's CG"), (lx.CG(1e-3, 1e-3), "lineax's CG")):
        with pytest.raises(ValueError, match=MESSAGE.format(who)):
            trace_map(cx.Implicit(linear_solver=solver, preconditioner=PLAIN))
    trace_map(cx.Implicit(preconditioner=TAGGED))


def test_taken():
    """Tagged, symmetric for our own, of any kind for solvers of any matrix, and what is diagonal."""
    trace(cx.Implicit(preconditioner=TAGGED))
    trace(cx.Implicit(preconditioner=SYMMETRIC))
    trace(cx.Implicit(preconditioner=lx.DiagonalLinearOperator(PHI)))
    trace(cx.Implicit(rtol=None, linear_solver=lx.CG(1e-3, 1e-3), preconditioner=TAGGED))
    trace(cx.Implicit(rtol=None, linear_solver=lx.GMRES(1e-3, 1e-3), preconditioner=PLAIN))
    trace(
        cx.Implicit(linear_solver=lx.GMRES(1e-3, 1e-3), preconditioner=PLAIN), ROOT, optx.Newton(1e-6, 1e-6)
    )
