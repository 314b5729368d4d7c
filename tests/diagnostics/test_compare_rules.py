"""Rules against one another on a problem with a closed form."""

import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from curvax.diagnostics import compare_rules
from helpers import compare
from helpers.quadratics import conditioned, quadratic_inner, quadratic_outer

PROBLEM = cx.Bilevel(inner=quadratic_inner, outer=quadratic_outer)
RULES = {"implicit": cx.Implicit(), "unrolled": cx.Unrolled()}


def rules(case, solver, **kwargs):
    return compare_rules(
        PROBLEM,
        case.phi,
        case.theta0,
        inner_solver=solver,
        rules=kwargs.pop("rules", RULES),
        inner_data=case.inner_data,
        outer_data=case.outer_data,
        printed=kwargs.pop("printed", False),
        **kwargs,
    )


def test_rules_agree_where_the_steps_converge(capsys):
    case = conditioned(1e1)
    found = rules(case, cx.Steps(optax.sgd(1.0), 400), printed=True)
    assert found.names == ("implicit", "unrolled")
    np.testing.assert_allclose(found.cosine, 1.0, atol=1e-10)
    assert found.relative_error[0, 0] == 0 and found.relative_error[1, 0] < 1e-8
    assert found.norms[0] == pytest.approx(np.linalg.norm(case.truth.grad))
    out = capsys.readouterr().out
    assert "In pairs" in out and "unrolled" in out and "failed" not in out
    assert str(found) == out.rstrip()


def test_short_paths_differ_by_what_is_measured_by_hand():
    case = conditioned(1e1)
    found = rules(case, {"implicit": optx.BFGS(1e-10, 1e-10), "unrolled": cx.Steps(optax.sgd(0.5), 5)})
    a, b = (compare.flat(found.hypergradients[name].grad) for name in found.names)
    assert found.relative_error[1, 0] == pytest.approx(np.linalg.norm(b - a) / np.linalg.norm(a))
    assert found.cosine[0, 1] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert 1e-3 < found.relative_error[1, 0]
    np.testing.assert_allclose(a, case.truth.grad, rtol=1e-6)


def test_a_failure_is_reported_in_the_table():
    case = conditioned(1e1)
    found = rules(case, cx.Steps(optax.sgd(0.5), 2))
    assert found.messages["implicit"] and not found.messages["unrolled"]
    assert "failed" in str(found) and found.messages["implicit"].split()[0] in str(found)


def test_wrong_arguments():
    case = conditioned(1e1)
    with pytest.raises(ValueError, match="at least two"):
        rules(case, cx.Steps(optax.sgd(0.5), 2), rules={"one": cx.Unrolled()})
    with pytest.raises(ValueError, match=r"without an entry for \['unrolled'\]"):
        rules(case, {"implicit": optx.BFGS(1e-6, 1e-6)})
    with pytest.raises(ValueError, match="Steps"):
        rules(case, optx.BFGS(1e-6, 1e-6))
