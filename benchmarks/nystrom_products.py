"""Claim: with a Nyström preconditioner a solve takes at most a fifth of the products; eight, with its sketch counted.

Gauss–Newton systems (G + μI) x = b with b in the range of G and a condition number of 1e6 and 1e7, to a relative
forward error of 1e-6. Three curvatures: of a network on two inputs, whose spectrum falls as fast as any; of one on the
ten features of the diabetes data; and of softmax regression on digits, whose spectrum hardly falls. (At weights of zero
that one has few distinct eigenvalues; conjugate gradients need no help there, and low rank gives none.)

One sketch serves one right-hand side, or eight. For one it is dear: at 1e6 plain conjugate gradients need no more than
a few times the rank. Beside ours `lx.CG`, which stops on a residual: its errors stand in the table. The ranks
were fixed beforehand.
"""

from typing import Any

import equinox as eqx
import harness
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import problems
from scipy.linalg import cho_factor, cho_solve
from sklearn.datasets import load_diabetes

import curvax as cx
from curvax._pytree import tree_scale
from curvax.linear import nystrom

RTOL = 1e-6
ATOL = 1e-9  # of lx.CG, whose test is relative to every entry of b by itself; ‖b‖ = 1
RIGHT_HAND_SIDES = 8


def network(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    hidden = jnp.tanh(x @ params["first"] + params["bias"])
    return jnp.tanh(hidden @ params["second"]) @ params["last"]


def weights(rng: np.random.Generator, inputs: int, width: int) -> dict[str, jax.Array]:
    shapes = {"first": (inputs, width), "bias": (width,), "second": (width, width), "last": (width,)}
    return {k: jnp.asarray(rng.standard_normal(s) / np.sqrt(s[0])) for k, s in shapes.items()}


def squared(z: jax.Array, y: jax.Array) -> jax.Array:
    return 0.5 * (z - y) ** 2


def softmax(logits: jax.Array, label: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(logits) - logits[label]


def curvatures() -> dict[str, tuple[lx.AbstractLinearOperator, int]]:
    """Name ↦ Gauss–Newton matrix and the rank of its sketch."""
    rng = np.random.default_rng(0)
    points = jnp.asarray(rng.uniform(-1, 1, (500, 2)))
    features, targets = load_diabetes(return_X_y=True, scaled=True)
    features, targets = jnp.asarray(features / features.std(axis=0)), jnp.asarray(targets / targets.std())
    digits, _ = problems.digits()
    make = cx.operators.gauss_newton
    return {
        "network, 2 inputs (1000 weights)": (
            make(network, squared, weights(rng, 2, 30), points, jnp.sin(3 * points[:, 0]) * points[:, 1]),
            50,
        ),
        "network, diabetes (1260 weights)": (
            make(network, squared, weights(rng, 10, 30), features, targets),
            200,
        ),
        "softmax, digits (640 weights)": (
            make(
                lambda w, x: x @ w,
                softmax,
                0.3 * jnp.asarray(rng.standard_normal((64, 10))),
                digits.images,
                digits.labels,
            ),
            200,
        ),
    }


def right_hand_sides(operator: lx.AbstractLinearOperator) -> list[Any]:
    """In the range of the operator, of length 1."""
    rng, found = np.random.default_rng(1), []
    for _ in range(RIGHT_HAND_SIDES):
        vector = jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape)), operator.in_structure())
        image = operator.mv(vector)
        found.append(tree_scale(1 / np.linalg.norm(flat(image)), image))
    return found


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


@eqx.filter_jit
def solve(
    system: lx.AbstractLinearOperator, rhs: Any, solver: lx.AbstractLinearSolver, options: dict[str, Any]
) -> tuple[Any, jax.Array]:
    solution = lx.linear_solve(system, rhs, solver, options=options, throw=False)
    return solution.value, solution.stats["num_steps"]


def measure() -> harness.Report:
    rows, alone, single, shared = [], {}, {}, {}
    solvers = {"cx.linear.CG": cx.linear.CG(RTOL), "lx.CG": lx.CG(RTOL, ATOL, max_steps=100_000)}
    for name, (operator, rank) in curvatures().items():
        matrix = np.asarray(operator.as_matrix())
        largest = np.linalg.eigvalsh(matrix)[-1]
        right = right_hand_sides(operator)
        for condition in (1e6, 1e7):
            damping = float(largest / condition)
            system = cx.operators.Damped(lx.linearise(operator), damping)
            system = lx.TaggedLinearOperator(system, lx.positive_semidefinite_tag)
            factors = cho_factor(matrix + damping * np.eye(len(matrix)))
            P = nystrom(operator, rank, damping=damping, key=jax.random.key(2))
            sketch = int(P.num_products)
            plain = None
            for label, solver in solvers.items():
                for options, cost in (({}, 0), ({"preconditioner": P}, sketch)):
                    steps, errors = [], []
                    for rhs in right:
                        x, count = solve(system, rhs, solver, options)
                        steps.append(int(count))
                        errors.append(harness.relative_error(flat(x), cho_solve(factors, flat(rhs))))
                    total = cost + sum(steps)
                    if not options and label == "cx.linear.CG":
                        plain = steps
                    elif label == "cx.linear.CG":
                        alone[name, condition] = float(np.mean(plain)) / float(np.mean(steps))
                        single[name, condition] = float(np.mean(plain)) / (cost + float(np.mean(steps)))
                        shared[name, condition] = sum(plain) / total
                    rows.append(
                        {
                            "curvature": name,
                            "κ": f"{condition:.0e}",
                            "solver": label + (f" + Nyström, rank {rank}" if options else ""),
                            "sketch": cost,
                            "products a solve": float(np.mean(steps)),
                            f"products of {RIGHT_HAND_SIDES}": total,
                            "largest error": max(errors),
                        }
                    )
    return harness.Report(
        "Products with a Nyström preconditioner",
        f"Damped Gauss–Newton systems, float64, {RIGHT_HAND_SIDES} right-hand sides, forward error {RTOL:g}.",
        rows,
        [
            harness.Claim("plain ÷ preconditioned, without the sketch", min(alone.values()), at_least=5.0),
            harness.Claim(
                f"plain ÷ preconditioned, {RIGHT_HAND_SIDES} right-hand sides, with it",
                min(shared.values()),
                at_least=5.0,
            ),
            harness.Claim(
                "plain ÷ preconditioned, one right-hand side, with it, κ = 1e7",
                min(ratio for (_, condition), ratio in single.items() if condition == 1e7),
                at_least=3.0,
            ),
            harness.Claim("the same, κ = 1e6", min(single.values()), at_least=1.5),
        ],
    )


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    harness.main(measure)
