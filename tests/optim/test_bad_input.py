"""What is wrong is named, with the remedy, while tracing."""

import functools as ft

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax as cx
from curvax.optim import Damping, Factors, Momentum, Schedule
from helpers.training import SQUARED

W, X, Y = np.ones((2, 3)), np.ones((4, 3)), np.ones((4, 2))
linear = lambda w, x: jax.tree.leaves(w)[0] @ x
kfac = ft.partial(cx.optim.kfac, linear, SQUARED, example=X[0])
KEY = jax.random.key(0)


def update(optimiser, params=W, **extra):
    """One step of it, from its first state."""
    return optimiser.update(params, optimiser.init(jnp.asarray(W)), jnp.asarray(params), **extra)


BAD = {
    "params": (lambda: kfac().update(W, kfac().init(jnp.asarray(W)), inputs=X, targets=Y), "`params`"),
    "inputs": (lambda: update(kfac(), targets=Y, key=KEY), "`inputs`"),
    "key": (lambda: update(kfac(), inputs=X, targets=Y), "`key`"),
    "sizes": (lambda: update(kfac(), inputs=X, targets=Y[:3], key=KEY), "leading axis"),
    "no parameters": (lambda: kfac().init({}), "no floating-point"),
    "integers": (lambda: kfac().init(jnp.ones((2, 3), jnp.int32)), "no floating-point"),
    "rate": (lambda: kfac(-1.0), "`learning_rate`"),
    "rate type": (lambda: kfac("fast"), "`learning_rate`"),
    "momentum": (lambda: kfac(0.1, momentum=1.0), "`decay`"),
    "momentum type": (lambda: kfac(0.1, momentum="nesterov"), "`momentum`"),
    "place": (lambda: Momentum(0.9, "between"), "`place`"),
    "damping type": (lambda: kfac(damping=0.1), "`damping`"),
    "damping": (lambda: Damping(0.0), "`initial`"),
    "limits": (lambda: Damping(limits=(1.0, 0.1)), "`limits`"),
    "every": (lambda: Damping(every=0), "`every`"),
    "factor": (lambda: Damping(factor=1.5), "`factor`"),
    "penalty": (lambda: Damping(penalty=-1.0), "`penalty`"),
    "clip": (lambda: Damping(kl_clip=0.0), "`kl_clip`"),
    "share": (lambda: Damping(share=0.0), "`share`"),
    "share by name": (lambda: Damping(share="all"), "`share`"),
    "kind": (lambda: Factors("full"), "`kind`"),
    "sharing": (lambda: Factors(sharing="some"), "`sharing`"),
    "decay": (lambda: Factors(decay=1.0), "`decay`"),
    "fraction": (lambda: Factors(fraction=0.0), "`fraction`"),
    "dtype": (lambda: Factors(dtype=jnp.int32), "`dtype`"),
    "period": (lambda: Schedule(inverses=0), "`inverses`"),
    "drift": (lambda: Schedule(drift=0.1, staggered=False), "`drift`"),
    "class": (lambda: cx.optim.kfac(linear, cx.operators.SquaredError, example=X[0]), "instance"),
    "model": (lambda: cx.optim.kfac(W, SQUARED, example=X[0]), "`model_fn`"),
    "exact": (
        lambda: cx.optim.kbfgs(linear, SQUARED, example=X[0], damping=Damping(exact=True)),
        "`damping.exact`",
    ),
    "radius": (lambda: cx.optim.kf_trust_region(linear, SQUARED, 0.0, example=X[0]), "`radius`"),
    "damping of the region": (
        lambda: cx.optim.kf_trust_region(linear, SQUARED, example=X[0], damping=Damping()),
        "`damping`",
    ),
    "gradients": (
        lambda: kfac().update(
            W[:1], kfac().init(jnp.asarray(W)), jnp.asarray(W), inputs=X, targets=Y, key=KEY
        ),
        "`updates`",
    ),
    "state": (
        lambda: kfac().update(W, kfac().init([jnp.asarray(W)]), jnp.asarray(W), inputs=X, targets=Y, key=KEY),
        "another model",
    ),
    "other widths": (
        lambda: update(kfac(), params=W[:, :2], inputs=X[:, :2], targets=Y, key=KEY),
        "another model",
    ),
    "masked": (
        lambda: optax.masked(kfac(), {"w": True, "v": False}).init(
            {"w": jnp.asarray(W), "v": jnp.asarray(W)}
        ),
        "masked",
    ),
    "a batch as example": (lambda: kfac(example=X).init(jnp.asarray(W)), "ONE example"),
    "one example as a batch": (lambda: update(kfac(), inputs=X[0], targets=Y, key=KEY), "`inputs`"),
    "lists": (lambda: update(kfac(), inputs=X.tolist(), targets=Y, key=KEY), "`inputs`"),
    "a number as key": (lambda: update(kfac(), inputs=X, targets=Y, key=3), "`key`"),
    "several keys": (lambda: update(kfac(), inputs=X, targets=Y, key=jax.random.split(KEY)), "`key`"),
    "a loss for each output": (
        lambda: update(
            cx.optim.kfac(linear, lambda z, y: (z - y) ** 2, example=X[0]), inputs=X, targets=Y, key=KEY
        ),
        "scalar",
    ),
    "report": (lambda: cx.optim.report(()), "`state`"),
    "report inside of jit": (
        lambda: jax.jit(lambda s: cx.optim.report(s).steps)(kfac().init(jnp.asarray(W))),
        "outside of `jit`",
    ),
    "report of several runs": (
        lambda: cx.optim.report(jax.vmap(kfac().init)(jnp.ones((5, 2, 3)))),
        "`vmap`",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    call, message = BAD[case]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_inputs_of_another_width_are_named():
    """The model raises, and is not told apart from its own mistakes; a note says what came in."""
    with pytest.raises(TypeError) as caught:
        update(kfac(), inputs=np.ones((4, 5)), targets=Y, key=KEY)
    assert any("`inputs`" in note and "(5,)" in note for note in caught.value.__notes__)
