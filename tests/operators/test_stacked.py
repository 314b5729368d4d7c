"""Stacks of operators against `BlockDiagonal` of their members."""

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import curvax.operators as ops
from helpers.quick import quick


def _spd(key, n):
    root = jax.random.normal(key, (n, n))
    return lx.MatrixLinearOperator(root @ root.T + jnp.eye(n), lx.positive_semidefinite_tag)


MAKERS = {
    "matrix": lambda key: _spd(key, 3),
    "diagonal": lambda key: lx.TaggedLinearOperator(
        lx.DiagonalLinearOperator(1.0 + jax.random.uniform(key, (3,))), lx.positive_semidefinite_tag
    ),
    "kronecker": lambda key: ops.Kronecker(_spd(key, 2), _spd(jax.random.fold_in(key, 1), 3)),
    "eigen": lambda key: ops.Kronecker(_spd(key, 2), _spd(jax.random.fold_in(key, 1), 3)).eigen(),
    "eigen of a diagonal": lambda key: ops.Kronecker(_spd(key, 2), MAKERS["diagonal"](key)).eigen(),
}


def _both(name, key):
    keys = jax.random.split(key, 3)
    stacked = ops.Stacked(eqx.filter_vmap(MAKERS[name])(keys))
    return stacked, ops.BlockDiagonal([MAKERS[name](k) for k in keys])


@pytest.mark.parametrize("name", MAKERS)
def test_all_methods_are_those_of_the_members(name, key):
    @quick
    def everything(key):
        found = []
        for operator in _both(name, key):
            made = {
                "itself": operator,
                "transpose": operator.transpose(),
                "inverse": operator.inverse(),
                "damped": operator.damped(0.3),
                "both": operator.damped(0.3).inverse(),
                "power": operator.power(0.5),
            }
            assert all(lx.is_positive_semidefinite(m) and lx.is_symmetric(m) for m in made.values())
            matrices = {label: m.as_matrix() for label, m in made.items()}
            found.append((matrices, operator.trace(), operator.logdet(), operator.diagonal()))
        return found

    found, truth = everything(key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10), found, truth)


def test_rectangular_stacks_have_products_alone(key):
    matrices = jax.random.normal(key, (2, 3, 4))
    stacked = ops.Stacked(eqx.filter_vmap(lx.MatrixLinearOperator)(matrices))
    v = jax.random.normal(key, (2, 4))
    np.testing.assert_allclose(stacked.mv(v), jnp.einsum("sij,sj->si", matrices, v), atol=1e-13)
    assert stacked.transpose().mv(stacked.mv(v)).shape == (2, 4)
    with pytest.raises(ValueError, match="square"):
        stacked.inverse()


def test_bad_stacks(key):
    with pytest.raises(ValueError, match="leading axis"):
        ops.Stacked(ops.Kronecker(jnp.eye(2), jnp.eye(3)))
    with pytest.raises(ValueError, match="array"):
        ops.Stacked(eqx.filter_vmap(lambda m: ops.BlockDiagonal([m]))(jnp.ones((2, 3, 3))))
