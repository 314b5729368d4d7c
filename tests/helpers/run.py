"""Calling the library on a `Case`, so that equal shapes share one compilation."""

import functools

import jax
import numpy as np
import optimistix as optx

import curvax as cx

_WRAP = {"minimum": lambda fn: fn, "fixed_point": cx.FixedPoint, "root": cx.Root}


@functools.cache
def problem(kind, inner, outer):
    """One `cx.Bilevel` per pair of functions: building it anew would compile anew."""
    return cx.Bilevel(inner=_WRAP[kind](inner), outer=outer)


@functools.cache
def inner_solver(kind, single=False):
    """A solver of the right sort, as tight as the precision makes sense of.

    With x64 enabled, Optimistix 0.1.0 runs neither `LBFGS` nor `FixedPointIteration` on float32 values
    (a float64 scalar enters their loops), hence the other two.
    """
    if single:
        solvers = {"minimum": optx.BFGS, "fixed_point": optx.Newton, "root": optx.Newton}
        return solvers[kind](rtol=1e-5, atol=1e-5)
    solvers = {"minimum": optx.LBFGS, "fixed_point": optx.FixedPointIteration, "root": optx.Newton}
    return solvers[kind](rtol=1e-10, atol=1e-10)


def hypergradient(case, rule, *, solver=None, **kwargs):
    """`cx.hypergradient` of a case."""
    single = _is_single(case)
    return cx.hypergradient(
        problem(case.kind, case.inner, case.outer),
        case.phi,
        case.theta0,
        inner_solver=inner_solver(case.kind, single) if solver is None else solver,
        rule=rule,
        inner_data=case.inner_data,
        outer_data=case.outer_data,
        **kwargs,
    )


def _is_single(case):
    return any(leaf.dtype == np.float32 for leaf in jax.tree.leaves(case.theta0))
