"""Contractions over rows that are put in another order: the same numbers, whatever the program around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax._contractions import with_fast_contractions


def loss(w, x, y):
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def data(rng, rows=30, features=12, outputs=3, dtype=np.float64):
    shapes = (features, outputs), (rows, features), (rows, outputs)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def contractions(fn, *args):
    """How the matrix products of a program contract: dimensions of the first factor."""
    equations = jax.make_jaxpr(fn)(*args).jaxpr.eqns
    dots = [e for e in equations if e.primitive.name == "dot_general"]
    return [e.params["dimension_numbers"][0][0] for e in dots]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_gradient_in_another_order(rng, dtype):
    w, x, y = data(rng, dtype=dtype)
    fast = with_fast_contractions(jax.grad(loss))
    if jax.default_backend() == "cpu":
        assert (0,) in contractions(jax.grad(loss), w, x, y)
        assert (0,) not in contractions(fast, w, x, y)
    eps = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(fast(w, x, y), jax.grad(loss)(w, x, y), rtol=eps, atol=eps)
    assert fast(w, x, y).dtype == dtype


@pytest.mark.parametrize(
    ("features", "outputs"),
    [(12, 7), (200, 65), (3, 12)],
    ids=["not narrow", "too many columns", "the wide one"],
)
def test_left_alone_where_it_does_not_pay(rng, features, outputs):
    args = data(rng, features=features, outputs=outputs)
    fast = with_fast_contractions(jax.grad(loss))
    assert contractions(fast, *args) == contractions(jax.grad(loss), *args)
    np.testing.assert_array_equal(fast(*args), jax.grad(loss)(*args))


def test_transforms(rng):
    w, x, y = data(rng)
    fast = with_fast_contractions(jax.grad(loss))
    plain = jax.grad(loss)
    np.testing.assert_allclose(jax.jit(fast)(w, x, y), plain(w, x, y), rtol=1e-13)
    stacked = jnp.stack([w, 2 * w, -w])
    over = (0, None, None)
    np.testing.assert_allclose(jax.vmap(fast, over)(stacked, x, y), jax.vmap(plain, over)(stacked, x, y))
    inside = with_fast_contractions(jax.vmap(plain, over))
    np.testing.assert_allclose(inside(stacked, x, y), jax.vmap(plain, over)(stacked, x, y))
    np.testing.assert_allclose(jax.jacfwd(fast)(w, x, y), jax.jacfwd(plain)(w, x, y), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(jax.jacrev(fast)(w, x, y), jax.jacrev(plain)(w, x, y), rtol=1e-12, atol=1e-15)
    outer = lambda grad: jax.grad(lambda w: jnp.sum(jnp.sin(grad(w, x, y))))  # noqa: E731
    twice = jax.grad(lambda w, grad: jnp.sum(jnp.cos(outer(grad)(w))))
    np.testing.assert_allclose(twice(w, fast), twice(w, plain), rtol=1e-10, atol=1e-13)


def test_trees_nested_jit_and_control_flow(rng):
    """Programs inside `jit` are reached, those inside loops and branches kept as they are."""
    w, x, y = data(rng)

    def program(tree, flag):
        grad = jax.jit(jax.grad(loss))(tree["w"], x, y)
        steps = jax.lax.fori_loop(0, 3, lambda _, w: w - 0.1 * jax.grad(loss)(w, x, y), tree["w"])
        either = jax.lax.cond(flag, lambda: grad, lambda: -grad)
        count = tree["n"] + 1
        return {"grad": grad, "steps": steps, "either": either, "n": count, "none": None, "same": tree["w"]}

    tree = {"w": w, "n": jnp.arange(3)}
    fast, plain = with_fast_contractions(program)(tree, True), program(tree, True)
    assert jax.tree.structure(fast) == jax.tree.structure(plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), fast, plain)
    np.testing.assert_array_equal(fast["n"], [1, 2, 3])


def test_custom_derivatives_survive(rng):
    """A function that has a derivative rule of its own keeps it when what is returned is differentiated."""
    _, x, y = data(rng)

    @jax.custom_jvp
    def act(z):
        return jnp.tanh(z)

    act.defjvp(lambda primals, tangents: (act(*primals), 7.0 * tangents[0]))

    def program(w):
        return act(x @ w), jax.grad(loss)(w, x, y)

    w = jnp.asarray(rng.normal(size=(12, 3)))
    fast = jax.jvp(with_fast_contractions(program), (w,), (w,))
    plain = jax.jvp(program, (w,), (w,))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), fast, plain)


def test_bf16_accumulates_as_before(rng):
    """`preferred_element_type` and precision belong to the product and are kept."""
    _, x, y = data(rng, dtype=np.float32)

    def program(a, b):
        return jax.lax.dot_general(
            a, b, (((0,), (0,)), ((), ())), precision="highest", preferred_element_type=jnp.float32
        )

    a, b = y.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
    fast = with_fast_contractions(program)(a, b)
    assert fast.dtype == jnp.float32
    np.testing.assert_allclose(fast, program(a, b), rtol=1e-6)


def test_left_alone_on_other_backends(rng, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    w, x, y = data(rng)
    fast = with_fast_contractions(jax.grad(loss))
    assert contractions(fast, w, x, y) == contractions(jax.grad(loss), w, x, y)
