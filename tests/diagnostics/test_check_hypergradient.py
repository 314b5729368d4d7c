"""The gradient check: right problems pass, planted errors are found in the right part."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optimistix as optx
import pytest

import curvax as cx
from curvax.diagnostics import check_hypergradient
from helpers import compare, problems, run
from helpers.quadratics import conditioned, quadratic_outer
from helpers.sweep import sweep

BFGS = optx.BFGS(rtol=1e-9, atol=1e-9)
TRACES = []  # grows whenever Python runs the outer function: while tracing


@jax.custom_jvp
def lying(x, factor):
    """The identity, whose derivative claims to be `factor`: 1 is the truth, 0 a `stop_gradient`."""
    del factor
    return x


@lying.defjvp
def _(primals, tangents):
    return lying(*primals), primals[1] * tangents[0]


def inner(theta, phi, batch):
    """The inner quadratic of `helpers.quadratics`, with two places where a derivative may lie."""
    right = batch["B"] @ lying(phi, batch["cross"]) + batch["b"]
    return 0.5 * theta @ (batch["H"] @ theta) - lying(theta, batch["gradient"]) @ right


def outer(theta, phi, batch):
    """The outer quadratic, with two places."""
    TRACES.append(theta.shape)
    return quadratic_outer(lying(theta, batch["theta"]), lying(phi, batch["phi"]), batch)


# One problem for all minima: a planted error is data, so that everything below compiles once.
QUADRATIC = cx.Bilevel(inner=inner, outer=outer)


def honest(case, **lies):
    """A quadratic case as data of `QUADRATIC`, all derivatives true but those in `lies`."""
    dtype = case.theta0.dtype
    places = {"cross": 1.0, "gradient": 1.0, "theta": 1.0, "phi": 1.0} | lies
    places = {name: jnp.asarray(value, dtype) for name, value in places.items()}
    return dataclasses.replace(
        case,
        inner=inner,
        outer=outer,
        inner_data=case.inner_data | places,
        outer_data=case.outer_data | places,
    )


def check(case, rule=None, solver=BFGS, **kwargs):
    """`check_hypergradient` of a case, not printed."""
    return check_hypergradient(
        QUADRATIC if case.inner is inner else run.problem(case.kind, case.inner, case.outer),
        case.phi,
        case.theta0,
        inner_solver=solver,
        rule=cx.Implicit() if rule is None else rule,
        inner_data=case.inner_data,
        outer_data=case.outer_data,
        **{"printed": False, **kwargs},
    )


def verdicts(report, part):
    return {getattr(row, part).verdict for row in report.rows}


def by_name(report, text):
    return [item.comparison.verdict for item in report.ingredients if text in item.name]


GOOD = {
    "benign": (lambda: honest(conditioned(1e2)), BFGS),
    "badly conditioned": (lambda: honest(conditioned(1e6)), optx.BFGS(rtol=1e-12, atol=1e-12)),
    "sloppy solver": (lambda: honest(conditioned(1e2)), optx.LBFGS(rtol=1e-6, atol=1e-6)),
    "pytree": (problems.MINIMA["awkward tree"], BFGS),
    "fixed point": (problems.FIXED_POINTS["tanh layer"], optx.FixedPointIteration(rtol=1e-10, atol=1e-10)),
    "root": (problems.ROOTS["non-symmetric"], optx.Newton(rtol=1e-10, atol=1e-10)),
}


@pytest.mark.parametrize("name", sweep(GOOD, always=list(GOOD)[::2]))
def test_right_problems_pass_and_differences_are_true(name):
    """The table agrees, and its differences are within their uncertainty of the closed-form gradient."""
    build, solver = GOOD[name]
    case = build()
    report = check(case, solver=solver, coordinates="all", num_directions=1)
    assert report.ok, report
    assert report.cosine > 1 - 1e-6 and report.relative_error < 1e-3
    truth = compare.flat(case.truth.grad)
    rows = [row for row in report.rows if row.name.startswith("phi")]
    assert len(rows) == truth.size
    for row, true in zip(rows, truth, strict=True):
        # Truth and differences share their input, which is rounded: eps times the condition.
        slack = 1e-15 * case.condition * np.linalg.norm(truth)
        assert abs(row.total.difference - true) <= 3 * row.total.uncertainty + slack, (row, true)


def test_small_uncertainties_where_the_problem_is_benign():
    report = check(honest(conditioned(1e2)))
    for row in report.rows:
        assert row.total.uncertainty < 1e-7 * abs(row.total.difference)
    assert report.num_solves < 120 and report.noise < 1e-8 * abs(report.value)


def test_float32_passes_with_larger_uncertainties():
    TRACES.clear()
    single = check(honest(conditioned(1e1, dtype=np.float32)), solver=optx.BFGS(rtol=1e-5, atol=1e-5))
    assert single.ok, single
    assert TRACES  # another dtype is another program: the control of the test that nothing is compiled
    double = check(honest(conditioned(1e1)))
    spread = lambda report: np.median([r.total.uncertainty / abs(r.total.difference) for r in report.rows])
    assert spread(double) < 1e-3 * spread(single) < 1e-3


def test_wrong_direct_part_is_located():
    report = check(honest(conditioned(1e1), phi=1.01))
    assert not report.ok
    assert "disagrees" in verdicts(report, "direct") and "disagrees" not in verdicts(report, "implicit")
    assert "direct part" in report.summary[0] and "`outer`" in report.summary[0]
    assert not any(item.comparison.verdict == "disagrees" for item in report.ingredients)


@pytest.mark.parametrize(
    ("lies", "blamed"),
    [({"cross": 0.99}, "cross"), ({"cross": 0.0}, "cross"), ({"theta": 1.01}, "∂f/∂θ")],
    ids=["wrong cross derivative", "no cross derivative", "wrong outer"],
)
def test_wrong_implicit_part_is_located(lies, blamed):
    report = check(honest(conditioned(1e1), **lies), cx.Implicit(rtol=1e-4))
    assert not report.ok
    assert "disagrees" in verdicts(report, "implicit") and "disagrees" not in verdicts(report, "direct")
    assert by_name(report, blamed) == ["disagrees"]
    assert sum(item.comparison.verdict == "disagrees" for item in report.ingredients) == 1
    assert any(blamed in line and "implicit part" in line for line in report.summary), report.summary


def test_wrong_inner_gradient_is_found_though_the_hypergradient_is_consistent():
    """The solver finds a root of the wrong gradient, so that differences agree; only ∂g/∂θ itself tells."""
    report = check(honest(conditioned(1e1), gradient=1.03), cx.Implicit(rtol=None), optx.LBFGS(1e-6, 1e-6))
    assert not report.ok and by_name(report, "∂g/∂θ") == ["disagrees"]
    assert "∂g/∂θ" in " ".join(report.summary)
    assert by_name(report, "cross") == ["agrees"]


def test_control_without_planted_error():
    assert check(honest(conditioned(1e1)), cx.Implicit(rtol=1e-4)).ok


def test_inaccurate_inner_solution_is_told_from_a_wrong_formula():
    """No estimate, a solver that stops early: the formulas are right, the point is not."""
    report = check(honest(conditioned(1e1)), cx.Implicit(rtol=None), optx.BFGS(rtol=0.3, atol=0.3))
    assert not report.ok and report.theta_error > 1e-4
    assert all(item.comparison.verdict == "agrees" for item in report.ingredients)
    assert any("not accurate enough" in line for line in report.summary), report.summary


@pytest.mark.parametrize("smallest", [-0.4, 0.4])
def test_failed_hypergradient_is_reported_not_raised(smallest):
    """A saddle, and the same problem with the sign of its negative eigenvalue turned."""
    case = honest(conditioned(1e1))
    values, vectors = np.linalg.eigh(np.asarray(case.inner_data["H"]))
    values[0] = smallest
    curvature = jnp.asarray((vectors * values) @ vectors.T)
    case = dataclasses.replace(case, inner_data=case.inner_data | {"H": curvature})
    report = check(case)
    assert report.ok == (smallest > 0)
    assert report.summary[0].startswith("the hypergradient failed") == (smallest < 0)
    if smallest < 0:
        assert report.message in report.summary[0] and "NOT OK" in str(report)
        with pytest.raises(RuntimeError, match="check failed"):
            check(case, throw=True)
    else:
        check(case, throw=True)


def test_no_tight_solution_is_said_and_costs_nothing():
    """A singular curvature with the right-hand side out of its range: there is no solution at all."""
    case = honest(conditioned(1e1))
    values, vectors = np.linalg.eigh(np.asarray(case.inner_data["H"]))
    values[0] = 0.0
    curvature = jnp.asarray((vectors * values) @ vectors.T)
    report = check(dataclasses.replace(case, inner_data=case.inner_data | {"H": curvature}))
    assert not report.ok and report.message and report.num_solves == 0
    assert any("could not be solved tightly" in line for line in report.summary)
    assert verdicts(report, "total") <= {"unclear", "not finite"}


# --- unrolled paths ---


def path_inner(theta, phi, batch):
    return 0.5 * jnp.sum(jnp.exp(phi["l2"]) * theta**2) + 0.5 * jnp.sum((batch @ theta - 1.0) ** 2)


def path_outer(theta, phi, batch):
    return 0.5 * jnp.mean((batch @ theta - 0.3) ** 2) + 0.1 * jnp.sum(phi["l2"] ** 2)


def sgd_of(phi):
    """Momentum SGD with a learned rate, whose derivative is true for `phi["truth"]` = 1."""
    return optax.sgd(lying(phi["lr"], phi["truth"].astype(float)), momentum=0.5)


PATH = cx.Bilevel(inner=path_inner, outer=path_outer)
DATA = jnp.asarray(np.random.default_rng(0).standard_normal((8, 3)))


@pytest.mark.parametrize("truth", [1, 0])
def test_unrolled_path_with_minibatches_and_a_learned_rate(truth):
    """Ten stochastic steps, far from the solution: what is checked is the path, with the same batches each time."""
    report = check_hypergradient(
        PATH,
        {"l2": jnp.array([-1.0, 0.0, 0.5]), "lr": jnp.array(0.05), "truth": jnp.array(truth)},
        jnp.zeros(3),
        inner_solver=cx.Steps(sgd_of, 10),
        rule=cx.Unrolled(),
        inner_data=cx.Minibatches(DATA, 4),
        outer_data=cx.Minibatches(DATA, 5),
        key=jax.random.key(3),
        printed=False,
    )
    assert report.noise < 1e-13
    assert report.ok == bool(truth), report
    rate = [row for row in report.rows if row.name == "phi['lr']"]
    others = [row for row in report.rows if row.name.startswith("phi['l2']")]
    assert [row.total.verdict for row in rate] == ["agrees" if truth else "disagrees"]
    assert {row.total.verdict for row in others} == {"agrees"} and len(others) == 2
    assert all(row.total.uncertainty < 1e-8 for row in report.rows)
    if not truth:
        assert any("look at the optimiser" in line for line in report.summary)


# --- shapes of use ---


def test_many_hyperparameters_are_sampled():
    one = check(honest(conditioned(1e1)), coordinates=1, num_directions=0)
    assert len(one.rows) == 2 and one.rows[1].name.startswith("phi[")
    largest = int(np.argmax(np.abs(conditioned(1e1).truth.grad)))
    assert one.rows[1].name == f"phi[{largest}]"
    assert len(check(honest(conditioned(1e1)), coordinates=0, num_directions=3).rows) == 4


def test_printed_table_and_text(capsys):
    report = check(honest(conditioned(1e1)), printed=True)
    out = capsys.readouterr().out
    for text in ("Hypergradient against finite differences", "implicit part", "cross derivative", "OK: "):
        assert text in out
    assert str(report) == out.rstrip() and "…" not in out
    assert max(map(len, out.splitlines())) <= 110
    check(honest(conditioned(1e1)))
    assert capsys.readouterr().out == ""


def test_another_tolerance_or_direction_compiles_nothing():
    check(honest(conditioned(1e1)))
    TRACES.clear()
    check(honest(conditioned(1e2)), num_directions=4, solver=optx.BFGS(rtol=1e-8, atol=1e-7))
    assert not TRACES


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_directions": -1}, "num_directions"),
        ({"coordinates": "some"}, "coordinates"),
        ({"rtol": 0.0}, "rtol"),
    ],
)
def test_wrong_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        check(honest(conditioned(1e1)), **kwargs)


# --- unusual points ---


def cubic_inner(theta, phi, batch):
    """θ* = φ, in the dtype of θ."""
    return jnp.sum((theta - phi["a"].astype(theta.dtype)) ** 2)


def cubic_outer(theta, phi, batch):
    """Σ (θ − 1)³ √(θ + batch): not finite where θ < −batch."""
    return jnp.sum((theta - 1.0) ** 3 * jnp.sqrt(theta + batch))


CUBIC = cx.Bilevel(inner=cubic_inner, outer=cubic_outer)


def check_cubic(phi, offset=2.0, dtype=float, **kwargs):
    tolerance = 1e-9 if dtype is float else 1e-5
    return check_hypergradient(
        CUBIC,
        {"a": phi},
        jnp.zeros(3, dtype),
        inner_solver=optx.BFGS(rtol=tolerance, atol=tolerance),
        rule=cx.Implicit(atol=1e-4),
        outer_data=jnp.asarray(offset, dtype),
        printed=False,
        **kwargs,
    )


def test_hyperparameters_that_are_all_zero():
    """Nothing says how far to step, and what the slopes should be compared with."""
    report = check_cubic(jnp.zeros(3))
    assert report.ok and verdicts(report, "total") == {"agrees"}
    truth = 3.0 * np.sqrt(2.0) - 0.5 / np.sqrt(2.0)
    assert report.rows[-1].total.difference == pytest.approx(truth, abs=3 * report.rows[-1].total.uncertainty)
    assert all(row.total.uncertainty < 1e-8 for row in report.rows)


def test_at_an_outer_optimum_nothing_can_be_confirmed():
    report = check_cubic(jnp.ones(3))
    assert not report.ok and "outer optimum" in report.summary[0]
    assert "disagrees" not in verdicts(report, "total")


def test_not_finite_outer_loss():
    report = check_cubic(jnp.array([1.5, 2.0, 0.0]), offset=-0.1)
    assert not report.ok and report.message
    assert verdicts(report, "implicit") == {"not finite"}
    assert any("not finite" in line and "root" in line for line in report.summary), report.summary


def test_hyperparameters_in_bfloat16():
    report = check_cubic(jnp.asarray([1.5, 2.0, 3.0], jnp.bfloat16), dtype=jnp.float32)
    assert report.ok, report
