"""Dense blocks of layers against the dense Gauss–Newton and Fisher matrix, in float64."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax.operators as ops
from helpers.quick import quick
from operators.test_kfac import SOFTMAX, SQUARED, N, _mlp, _mlp_case, _normal, block_part, dense

CASES = {
    "a weight twice, and transposed": (
        lambda p, x: p["w"] @ jnp.tanh(p["w"] @ x) + p["w"].T @ x + p["b"],
        dict(w=(3, 3), b=(3,)),
        (N, 3),
        SOFTMAX,
    ),
    "shared over time": (
        lambda p, x: jax.lax.scan(lambda h, z: (jnp.tanh(p["w"] @ h + z + p["b"]), None), jnp.zeros(3), x)[0],
        dict(w=(3, 3), b=(3,)),
        (N, 4, 3),
        SQUARED,
    ),
    "stacked": (
        lambda p, x: jax.lax.scan(lambda h, w: (jnp.tanh(h @ w) * p["s"], None), x, p["w"])[0],
        dict(w=(2, 3, 3), s=(3,)),
        (N, 5, 3),
        lambda z, y: jnp.sum(jnp.cosh(z - y.astype(z.dtype)[None])),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_exact(name, key):
    """Whatever the uses of a weight are, its block is that of the Gauss–Newton matrix."""
    model_fn, shapes, inputs, loss = CASES[name]
    params, x = _normal(key, **shapes), 0.7 * jax.random.normal(key, inputs)
    y = jnp.zeros((N, 3)) if loss is SQUARED else jnp.arange(N) % 3
    if name == "stacked":
        y = jnp.zeros((N, 3))
    exact, (blocks, matrix) = dense(model_fn, loss, params, x, y, ops.layer_blocks)
    truth = block_part(blocks, np.asarray(exact))
    np.testing.assert_allclose(matrix, truth, atol=1e-12 * np.abs(truth).max())


def test_empirical_blocks_and_their_structure(key):
    params, x, y = _mlp_case(key)
    v = params

    @quick
    def everything(params):
        blocks = ops.layer_blocks(_mlp, SOFTMAX, params, x, y, kind="empirical")
        fisher = ops.fisher(_mlp, SOFTMAX, params, x, y, kind="empirical").as_matrix()
        damped = blocks.damped(0.1)
        scalars = damped.trace(), damped.logdet()
        root = damped.power(0.5)
        return (
            blocks,
            blocks.as_matrix(),
            fisher,
            damped.inverse().mv(v),
            root.mv(root.mv(v)),
            scalars,
            damped.diagonal(),
        )

    blocks, matrix, fisher, solved, rooted, (trace, logdet), diagonal = everything(params)
    truth = block_part(blocks, np.asarray(fisher))
    np.testing.assert_allclose(matrix, truth, atol=1e-13)
    damped = truth + 0.1 * np.eye(len(truth))
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])
    np.testing.assert_allclose(flat(solved), np.linalg.solve(damped, flat(v)), rtol=1e-10)
    np.testing.assert_allclose(flat(rooted), damped @ flat(v), rtol=1e-10)
    np.testing.assert_allclose([trace, logdet], [np.trace(damped), np.linalg.slogdet(damped)[1]], rtol=1e-10)
    np.testing.assert_allclose(diagonal, np.diag(damped), rtol=1e-12)


def test_nearest_kronecker_products_of_layers(key):
    """No farther than K-FAC, nearer with every term, and exact with all of them; of rank 1 as K-FAC is."""
    params, x, y = _mlp_case(key)

    @quick
    def everything(params):
        blocks = ops.layer_blocks(_mlp, SOFTMAX, params, x, y)
        found = [ops.nearest_kronecker_layers(blocks, rank=rank) for rank in (1, 2, 16)]
        kfac, first = ops.kfac(_mlp, SOFTMAX, params, x, y), found[0]
        back = first.damped(0.1).inverse().mv(first.damped(0.1).mv(params))
        return blocks.as_matrix(), kfac.as_matrix(), [f.as_matrix() for f in found], first, back

    exact, kfac, (one, two, every), first, back = everything(params)
    distances = [np.linalg.norm(np.asarray(found) - exact) for found in (kfac, one, two, every)]
    assert distances[0] > 1.01 * distances[1] > 1.01 * distances[2] and distances[3] < 1e-12
    assert np.linalg.eigvalsh(one)[0] > -1e-12 and lx.is_positive_semidefinite(first)
    for name in params:
        np.testing.assert_allclose(back[name], params[name], rtol=1e-9)
    with pytest.raises(ValueError, match="layer_blocks"):
        ops.nearest_kronecker_layers(first)
    with pytest.raises(ValueError, match="rank"):
        ops.nearest_kronecker_layers(first, rank=0)


def test_large_layers_are_refused(key):
    with pytest.raises(ValueError, match="too many"):
        ops.layer_blocks(
            lambda w, x: w @ x, SQUARED, jnp.ones((70, 70)), jnp.ones((2, 70)), jnp.ones((2, 70))
        )
