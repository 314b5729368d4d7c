"""Averages of operators over time: factors of many batches."""

from typing import Generic, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
from jaxtyping import Scalar

_Operator = TypeVar("_Operator", bound=lx.AbstractLinearOperator)


class MovingAverage(eqx.Module, Generic[_Operator]):
    """The exponential moving average of the arrays of operators of one kind, without the bias of its start.

    For operators held as factors or eigenvalues: `kfac` of batch after batch (each factor is averaged, which is
    what K-FAC does; not their product), or `eigenvalue_correction` in one basis. All arrays have fixed shapes, so that
    an average can be carried by `jax.lax.scan`.

    Args:
        like: An operator of that kind, which is NOT added.
        decay: From 0 (the last one alone) to below 1.

    Attributes:
        sums: Σ decayᵗ⁻ˢ (1 − decay) of the arrays.
        total: Σ decayᵗ⁻ˢ (1 − decay): 1 − decayᵗ after t operators.

    Raises:
        ValueError: The decay is out of range; an operator of another structure is added.

    Cost: memory of one operator; `add` one multiplication an entry.

    Example:
        ```python
        import jax.numpy as jnp, curvax as cx

        x, y = jnp.eye(4, 2), jnp.ones((4, 3))
        batch = lambda x: cx.operators.kfac(lambda w, x: w @ x, cx.operators.SquaredError(), jnp.ones((3, 2)), x, y)
        average = cx.operators.MovingAverage(batch(x), 0.95).add(batch(x)).add(batch(2 * x))
        average.operator.damped(1e-3).inverse().mv(jnp.ones((3, 2)))
        ```

    Source: J. Martens and R. Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015,
        arXiv 1503.05671, section 5; the correction of the bias is that of D. Kingma and J. Ba, "Adam", 2014.
    """

    sums: _Operator
    total: Scalar
    decay: float = eqx.field(static=True)

    def __init__(self, like: _Operator, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"`decay` of `MovingAverage` must be from 0 to below 1, found {decay}.")
        arrays, rest = eqx.partition(like, eqx.is_inexact_array)
        self.sums = eqx.combine(jax.tree.map(jnp.zeros_like, arrays), rest)
        self.total = jnp.zeros(())
        self.decay = decay

    def add(self, operator: _Operator) -> "MovingAverage[_Operator]":
        """One more, the last one.

        Args:
            operator: Of the kind of the others.

        Raises:
            ValueError: It is not.
        """
        old, rest = eqx.partition(self.sums, eqx.is_inexact_array)
        new = eqx.filter(operator, eqx.is_inexact_array)
        found, wanted = jax.tree.structure(new), jax.tree.structure(old)
        shapes = [[leaf.shape for leaf in jax.tree.leaves(tree)] for tree in (new, old)]
        if found != wanted or shapes[0] != shapes[1]:
            raise ValueError(
                f"`operator` must be like those before, {wanted} of {shapes[1]}; found {found} of {shapes[0]}."
            )
        mixed = jax.tree.map(lambda a, b: (self.decay * a + (1 - self.decay) * b).astype(a.dtype), old, new)
        total = self.decay * self.total + (1 - self.decay)
        return eqx.tree_at(lambda m: (m.sums, m.total), self, (eqx.combine(mixed, rest), total))

    @property
    def operator(self) -> _Operator:
        """The average; NaN before anything is added."""
        arrays, rest = eqx.partition(self.sums, eqx.is_inexact_array)
        return eqx.combine(jax.tree.map(lambda a: a / self.total.astype(a.dtype), arrays), rest)
