"""Which training points a prediction rests on: influence functions of a small network, with K-FAC.

Leaving out training point i changes the optimum by H⁻¹∇ℓᵢ/N to first order, and so the loss of a test point by
∇ℓ_testᵀH⁻¹∇ℓᵢ/N: one solve with the curvature H for a test point gives the influence of ALL training points on it.
Here H is the Gauss–Newton matrix of the mean loss and its penalty. It is inverted once by conjugate gradients,
preconditioned by K-FAC, and once by EKFAC alone, which costs no product with H; both are compared with what really
happens when the network is trained again without a point.

P. W. Koh and P. Liang, "Understanding black-box predictions via influence functions", 2017, arXiv 1703.04730;
R. Grosse et al., "Studying large language model generalization with influence functions", 2023, arXiv 2308.03296.
"""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
from sklearn.datasets import load_wine

import curvax as cx

PENALTY = 1e-2
LOSS = cx.operators.SoftmaxCrossEntropy()
DTYPE = jnp.result_type(float)


def network(params, x):
    return params["v"] @ jnp.tanh(params["w"] @ x + params["b"]) + params["c"]


def start(features, classes, hidden=8):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((hidden, features)) / features**0.5
    v = rng.standard_normal((classes, hidden)) / hidden**0.5
    params = {"w": w, "b": np.zeros(hidden), "v": v, "c": np.zeros(classes)}
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, DTYPE), params)


def losses(params, x, y):
    return jax.vmap(lambda x, y: LOSS(network(params, x), y))(x, y)


def objective(params, data):
    """The mean loss over the N points of the data set, those of weight 0 left out, and a penalty."""
    x, y, weights = data
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return jnp.mean(weights * losses(params, x, y)) + 0.5 * PENALTY * squares


@jax.jit
def train(params, data):
    solver = optx.BFGS(rtol=1e-6, atol=1e-6)
    return optx.minimise(objective, solver, params, data, max_steps=2000, throw=False).value


@jax.jit
def influences(params, x, y, test_x, test_y):
    """How much the loss of the test point rises if a point is left out, for all points; by CG, and by EKFAC alone."""
    gradient = jax.grad(lambda p: LOSS(network(p, test_x), test_y))(params)
    curvature = cx.operators.Damped(cx.operators.gauss_newton(network, LOSS, params, x, y), PENALTY)
    rough = cx.operators.kfac(network, LOSS, params, x, y).damped(PENALTY).inverse()
    solver = cx.linear.CG(rtol=1e-4, max_steps=500)
    solution = lx.linear_solve(curvature, gradient, solver, options={"preconditioner": rough})
    ekfac = cx.operators.ekfac(network, LOSS, params, x, y).damped(PENALTY).inverse()

    def along(direction):
        """∇ℓᵢ · direction, for every point: one tangent."""
        return jax.jvp(lambda p: losses(p, x, y), (params,), (direction,))[1] / len(x)

    return along(solution.value), along(ekfac.mv(gradient)), solution.stats["num_steps"]


def main(retrained: int = 6) -> dict[str, float]:
    """Returns the correlations with what retraining gives, and the number of products that CG took."""
    table = load_wine()
    x, y = (table.data - table.data.mean(0)) / table.data.std(0), table.target
    order = np.random.default_rng(1).permutation(len(x))
    x, y = jnp.asarray(x[order], DTYPE), jnp.asarray(y[order])
    train_x, train_y, others_x, others_y = x[:120], y[:120], x[120:], y[120:]
    ones = jnp.ones(120, DTYPE)
    params = train(start(x.shape[1], 3), (train_x, train_y, ones))
    worst = int(jnp.argmax(losses(params, others_x, others_y)))
    test = others_x[worst], others_y[worst]
    by_cg, by_ekfac, products = influences(params, train_x, train_y, *test)
    # Train again without the points that matter most, and some that do not.
    ranked = np.argsort(-np.abs(by_cg))
    chosen = np.concatenate(
        [ranked[: retrained // 2 + retrained % 2], ranked[10 :: 110 // (retrained // 2)]]
    )[:retrained]
    before = LOSS(network(params, test[0]), test[1])
    truth = []
    for i in chosen:
        without = train(params, (train_x, train_y, ones.at[i].set(0)))
        truth.append(float(LOSS(network(without, test[0]), test[1]) - before))
    print(f"test point {worst}: loss {before:.3f}; {int(products)} products by CG with K-FAC")
    print(f"{'left out':>9} {'retrained':>11} {'by CG':>11} {'by EKFAC':>11}")
    for i, change in zip(chosen, truth, strict=True):
        print(f"{i:>9} {change:>11.5f} {float(by_cg[i]):>11.5f} {float(by_ekfac[i]):>11.5f}")
    correlation = lambda found: float(np.corrcoef(np.asarray(found)[chosen], truth)[0, 1])
    result = {"CG": correlation(by_cg), "EKFAC": correlation(by_ekfac), "products": int(products)}
    print(f"correlation with retraining: CG {result['CG']:.3f}, EKFAC {result['EKFAC']:.3f}")
    return result


if __name__ == "__main__":
    main()
