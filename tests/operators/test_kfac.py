"""K-FAC and EKFAC against blocks of the dense Gauss–Newton matrix, in float64."""

import functools as ft

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optimistix as optx
import pytest
from jax.flatten_util import ravel_pytree

import curvax as cx
import curvax.operators as ops
from helpers.quick import quick
from helpers.sweep import sweep

N = 4
SQUARED, SOFTMAX = ops.SquaredError(), ops.SoftmaxCrossEntropy()


def _normal(key, **shapes):
    keys = jax.random.split(key, len(shapes))
    return {name: jax.random.normal(k, s) for k, (name, s) in zip(keys, shapes.items(), strict=True)}


def blocks(curvature):
    """Flat positions of the entries of every block, member of a stack by member."""
    like = curvature.in_structure()
    sizes = [leaf.size for leaf in jax.tree.leaves(like)]
    numbers = jnp.arange(1.0, 1 + sum(sizes))
    starts = np.cumsum([0, *sizes])
    leaves = [
        numbers[a:b].reshape(leaf.shape)
        for a, b, leaf in zip(starts, starts[1:], jax.tree.leaves(like), strict=False)
    ]
    tree = jax.tree.unflatten(jax.tree.structure(like), leaves)
    packed = quick(lambda tree: {name: block.pack(tree) for name, block in curvature.coordinates})(tree)
    flat = lambda matrix: np.rint(np.asarray(matrix).ravel()).astype(int) - 1
    return {name: [flat(m) for m in stack] for name, stack in packed.items()}


def block_part(curvature, matrix):
    """A dense matrix with what is in no block set to zero."""
    kept = np.zeros_like(matrix)
    for stack in blocks(curvature).values():
        for where in stack:
            kept[np.ix_(where, where)] = matrix[np.ix_(where, where)]
    return kept


def distance(curvature, matrix, exact):
    """Relative, in the Frobenius norm, over the blocks."""
    truth = block_part(curvature, np.asarray(exact))
    return np.linalg.norm(np.asarray(matrix) - truth) / np.linalg.norm(truth)


def dense(model_fn, loss, params, inputs, targets, *makers):
    """In one program: the Gauss–Newton matrix, and for each maker its operator and the matrix of that."""

    @quick
    def everything(arrays, inputs, targets):
        params = eqx.combine(arrays, rest)
        made = [make(model_fn, loss, params, inputs, targets) for make in makers or (ops.kfac,)]
        exact = ops.gauss_newton(model_fn, loss, params, inputs, targets).as_matrix()
        return exact, *((curvature, curvature.as_matrix()) for curvature in made)

    arrays, rest = eqx.partition(params, eqx.is_inexact_array)
    return everything(arrays, inputs, targets)


def distances(model_fn, params, inputs, outputs, *makers):
    """Of the operators from the Gauss–Newton matrix of squared errors."""
    targets = jnp.zeros((len(inputs), *outputs))
    exact, *made = dense(model_fn, SQUARED, params, inputs, targets, *makers)
    return [distance(curvature, matrix, exact) for curvature, matrix in made]


# Deep linear networks: exact.


def _wrapped(p, x):
    """Inside of `jit` and `jax.checkpoint`, one in the other, with transposed weights."""
    block = jax.checkpoint(
        lambda p, x: jax.jit(lambda h: p["b"].T.T @ h)(x @ p["a"].T),
        policy=jax.checkpoint_policies.dots_saveable,
    )
    return jax.jit(jax.checkpoint(lambda p, h: p["c"] @ h))(p, block(p, x))


def _folded(p, x):
    h = p["a"] @ x + p["a0"]
    return p["c"] @ (p["b"] @ h + p["b0"]) + p["c0"]


def _scanned(p, x):
    step = jax.checkpoint(lambda h, layer: (layer[0] @ h + layer[1], None))
    return jax.lax.scan(step, x, (p["stack"], p["biases"]))[0]


LINEAR = {
    "jit and remat": (_wrapped, dict(a=(4, 3), b=(3, 4), c=(2, 3)), 2),
    "folded bias": (_folded, dict(a=(4, 3), a0=(4,), b=(3, 4), b0=(3,), c=(2, 3), c0=(2,)), 2),
    "stacked scan": (_scanned, dict(stack=(3, 3, 3), biases=(3, 3)), 3),
}


@pytest.mark.parametrize("name", LINEAR)
def test_exact_for_deep_linear_networks(name, key):
    model_fn, shapes, outputs = LINEAR[name]
    params, x = _normal(key, **shapes), jax.random.normal(key, (N, 3))
    exact, (curvature, matrix) = dense(model_fn, SQUARED, params, x, jnp.zeros((N, outputs)))
    assert distance(curvature, matrix, exact) < 1e-12
    if name == "stacked scan":
        assert list(blocks(curvature)) == ["['stack']"] and len(blocks(curvature)["['stack']"]) == 3


def test_exact_for_separate_inputs_with_separate_outputs(key):
    """One weight on several tokens that never meet."""
    model_fn = lambda p, x: x @ p["w"].T
    found = distances(model_fn, _normal(key, w=(2, 3)), jax.random.normal(key, (N, 5, 3)), (5, 2))
    assert found[0] < 1e-12


def test_exact_for_one_datum_where_each_weight_acts_once(key):
    """Any model, any loss: with one example G ⊗ A is the block."""
    params, x = _normal(key, a=(4, 3), b=(3, 4)), jax.random.normal(key, (1, 3))
    model_fn = lambda p, x: p["b"] @ jnp.tanh(p["a"] @ x)
    exact, (curvature, matrix) = dense(model_fn, SOFTMAX, params, x, jnp.array([1]))
    assert distance(curvature, matrix, exact) < 1e-12


def test_reduce_is_exact_for_a_linear_layer_and_a_mean(key):
    model_fn = lambda p, x: jnp.mean(x @ p["w"].T + p["b"], axis=0)
    params, x = _normal(key, w=(2, 3), b=(2,)), jax.random.normal(key, (N, 5, 3))
    reduced, expanded = distances(model_fn, params, x, (2,), ft.partial(ops.kfac, sharing="reduce"), ops.kfac)
    assert reduced < 1e-12 and expanded > 0.05


INEXACT = {
    "twice in a row": (lambda p, x: p["w"] @ (p["w"] @ x), (N, 3), (3,)),
    "linear over time": (
        lambda p, x: jax.lax.scan(lambda h, x_t: (p["w"] @ h + x_t, None), jnp.zeros(3), x)[0],
        (N, 4, 3),
        (3,),
    ),
    "one datum, several tokens": (lambda p, x: jnp.sum(jnp.tanh(x @ p["w"].T), axis=0), (1, 6, 3), (3,)),
}


@pytest.mark.parametrize("name", sweep(INEXACT, always=("linear over time", "one datum, several tokens")))
def test_what_is_not_claimed_is_an_approximation(name, key):
    """Uses of one weight that meet: off by a part of the block, or by a few times it."""
    model_fn, inputs, outputs = INEXACT[name]
    params, x = _normal(key, w=(3, 3)), 0.5 * jax.random.normal(key, inputs)
    plain, corrected = distances(model_fn, params, x, outputs, ops.kfac, ops.ekfac)
    print(f"relative error of K-FAC {plain:.3g}, of EKFAC {corrected:.3g}")
    assert 1e-3 < plain < 10
    if name.startswith("one datum"):  # with the gradients of examples, whatever the tokens do
        assert corrected <= plain


# Any model.


def _mlp(p, x):
    return p["w2"] @ jnp.tanh(p["w1"] @ x + p["b1"])


MLP = dict(w1=(4, 3), b1=(4,), w2=(3, 4))


def _mlp_case(key, dtype=jnp.float64):
    params = jax.tree.map(lambda w: w.astype(dtype), _normal(key, **MLP))
    return params, jax.random.normal(key, (N, 3)).astype(dtype), jnp.arange(N) % 3


def test_factors_are_the_formula(key):
    """G and A written out with `jax.jacobian`; generic losses have the same ones."""
    params, x, y = _mlp_case(key)
    augmented = np.concatenate([x, np.ones((N, 1))], axis=1)
    hidden = np.asarray(jnp.tanh(x @ params["w1"].T + params["b1"]))

    def cotangents(x, y):
        pre = params["w1"] @ x + params["b1"]
        jacobian = jax.jacobian(lambda s: params["w2"] @ jnp.tanh(s))(pre)
        return jacobian, jax.hessian(lambda z: SOFTMAX(z, y))(_mlp(params, x))

    jacobian, hessian = map(np.asarray, quick(jax.vmap(cotangents))(x, y))
    first = np.kron(
        np.einsum("nki,nkl,nlj->ij", jacobian, hessian, jacobian) / N, augmented.T @ augmented / N
    )
    second = np.kron(hessian.mean(0), hidden.T @ hidden / N)
    for loss in (SOFTMAX, lambda z, y: SOFTMAX(z, y)):
        _, (curvature, matrix) = dense(_mlp, loss, params, x, y)
        matrix = np.asarray(matrix)
        for name, truth in (("['w1']", first), ("['w2']", second)):
            (where,) = blocks(curvature)[name]
            np.testing.assert_allclose(matrix[np.ix_(where, where)], truth, atol=1e-13)
        assert np.count_nonzero(matrix) <= first.size + second.size


def test_empirical_factors(key):
    params, x, y = _mlp_case(key)
    loss = lambda z, y: jnp.sum(z**4) * (1.0 + y.astype(z.dtype))  # convexity is not asked for
    _, (curvature, matrix) = dense(_mlp, loss, params, x, y, ft.partial(ops.kfac, kind="empirical"))
    g = np.asarray(jax.vmap(lambda x, y: jax.grad(lambda z: loss(z, y))(_mlp(params, x)))(x, y))
    hidden = np.asarray(jnp.tanh(x @ params["w1"].T + params["b1"]))
    (where,) = blocks(curvature)["['w2']"]
    truth = np.kron(g.T @ g / N, hidden.T @ hidden / N)
    np.testing.assert_allclose(np.asarray(matrix)[np.ix_(where, where)], truth, rtol=1e-10)


@pytest.mark.parametrize("loss", [SOFTMAX, lambda z, y: SOFTMAX(z, y)], ids=["draws", "signs"])
def test_sampled_factors_have_the_exact_ones_as_mean(loss, key):
    params, x, y = _mlp_case(key)
    sampled = jax.vmap(lambda key: ops.kfac(_mlp, loss, params, x, y, kind="monte_carlo", key=key).diagonal())
    both = quick(lambda keys: (ops.kfac(_mlp, SOFTMAX, params, x, y).diagonal(), sampled(keys)))
    exact, draws = map(np.asarray, both(jax.random.split(key, 500)))
    error = draws.std(0) / np.sqrt(len(draws))
    assert np.all(np.abs(draws.mean(0) - exact) <= 5 * error + 1e-12)


def test_convolution_by_explicit_patches(key):
    """Expand and reduce of a convolution whose patches and cotangents are written out."""
    w, x = jax.random.normal(key, (2, 3, 3, 3)), jax.random.normal(key, (N, 3, 5, 4))
    numbers = ("NCHW", "OIHW", "NCHW")
    conv = lambda x, w: jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=numbers)[0]
    model_fn = lambda w, x: jnp.einsum("chw,chw->c", jnp.tanh(conv(x, w)), jnp.ones((2, 5, 4)))
    patches = jax.lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME")
    patches = np.asarray(patches).reshape(N, 27, 20).swapaxes(1, 2)  # (image, position, input)
    slope = np.asarray(jax.vmap(lambda x: 1 - jnp.tanh(conv(x, w)) ** 2)(x)).reshape(N, 2, 20)
    g = np.einsum("kc,ncp->nkpc", np.eye(2), slope)  # cotangents of the two outputs
    y = jnp.zeros((N, 2))
    expanded = np.kron(
        np.einsum("nkpc,nkpd->cd", g, g) / N, np.einsum("npi,npj->ij", patches, patches) / (20 * N)
    )
    means, sums = patches.mean(1), g.sum(2)
    reduced = np.kron(np.einsum("nkc,nkd->cd", sums, sums) / N, means.T @ means / N)
    make = lambda sharing: ops.kfac(model_fn, SQUARED, w, x, y, sharing=sharing).as_matrix()
    found = quick(lambda: (make("expand"), make("reduce")))()
    for matrix, truth in zip(found, (expanded, reduced), strict=True):
        np.testing.assert_allclose(matrix, truth, atol=1e-12 * np.abs(truth).max())


def test_masked_tokens_do_not_count(key):
    """Padding is in no factor: the same as without the padded tokens."""
    model_fn = lambda p, x: jnp.tanh(x @ p["w1"].T + p["b1"]) @ p["w2"].T
    params, x = _normal(key, **MLP), jax.random.normal(key, (1, 6, 3))
    labels = jnp.array([[0, 2, -1, 1, -1, -1]])
    kept = jnp.array([0, 1, 3])
    make = lambda x, labels: ops.kfac(model_fn, SOFTMAX, params, x, labels).as_matrix()
    padded, alone = quick(lambda: (make(x, labels), make(x[:, kept], labels[:, kept])))()
    np.testing.assert_allclose(padded, alone, atol=1e-14)


def test_tied_embedding(key):
    """A table that is looked up and, transposed, multiplied with: one block, diagonal in the words, the trace kept."""
    table = jax.random.normal(key, (6, 2))
    model_fn = lambda table, x: jnp.tanh(table[x]) @ table.T
    x, y = jnp.array([[0, 1, 1], [3, 4, 0]]), jnp.array([[1, 2, 0], [3, 0, 5]])
    looked_up = lambda t, x: jnp.tanh(t[x]) @ table.T
    multiplied = lambda t, x: jnp.tanh(table[x]) @ t.T

    @quick
    def everything(table, v):
        curvature = ops.kfac(model_fn, SOFTMAX, table, x, y)
        parts = [ops.kfac(part, SOFTMAX, table, x, y).trace() for part in (looked_up, multiplied)]
        return (
            curvature,
            curvature.trace(),
            sum(parts),
            curvature.damped(0.1).inverse().mv(curvature.damped(0.1).mv(v)),
        )

    v = jax.random.normal(key, (6, 2))
    curvature, trace, parts, back = everything(table, v)
    np.testing.assert_allclose(trace, parts, rtol=1e-12)
    (stacked,) = curvature.blocks.values()
    assert stacked.operator.right.operator.diagonal.shape == (1, 6)  # (stack, vocabulary): no 6 × 6 matrix
    np.testing.assert_allclose(back, v, rtol=1e-10)


# The operator.


def _transformer(p, tokens):
    """Stacked layers with a table, of which the last rows are not used, and a parameter that is not used at all."""
    x = p["table"][tokens] + p["position"][:3]
    step = lambda h, w: (h + jnp.tanh(h @ w), None)
    return jax.lax.scan(step, x, p["stack"])[0] @ p["head"]


@pytest.fixture(scope="module")
def curvature():
    key = jax.random.key(5)
    params = _normal(key, table=(5, 2), position=(4, 2), stack=(3, 2, 2), head=(2, 3), idle=(2,))
    tokens = jax.random.randint(key, (N, 3), 0, 5)
    return ops.kfac(_transformer, SOFTMAX, params, tokens, tokens % 3)


def test_structure_against_its_matrix(curvature):
    """Inverse, damping, roots, trace, determinant, diagonal of stacked and diagonal blocks and unused entries."""
    v = jax.tree.map(lambda s: jnp.arange(1.0, 1 + s.size).reshape(s.shape), curvature.in_structure())

    @quick
    def everything(curvature, v):
        damped = curvature.damped(0.1)
        root = damped.power(0.5)
        products = {
            "itself": curvature.mv(v),
            "transpose": curvature.transpose().mv(v),
            "damped": damped.mv(v),
            "inverse": damped.inverse().mv(v),
            "root, twice": root.mv(root.mv(v)),
            "power": damped.power(-1).mv(v),
            "singular": curvature.inverse().mv(v),
        }
        scalars = curvature.trace(), damped.trace(), curvature.logdet(), damped.logdet()
        flat = {name: ravel_pytree(tree)[0] for name, tree in products.items()}
        return curvature.as_matrix(), flat, scalars, curvature.diagonal()

    matrix, products, (trace, damped_trace, logdet, damped_logdet), diagonal = everything(curvature, v)
    matrix, flat = np.asarray(matrix), np.asarray(ravel_pytree(v)[0])
    shifted = matrix + 0.1 * np.eye(len(matrix))
    solved = np.linalg.solve(shifted, flat)
    truth = {"damped": shifted @ flat, "inverse": solved, "root, twice": shifted @ flat, "power": solved}
    for name, expected in truth.items():
        np.testing.assert_allclose(products[name], expected, rtol=1e-9, atol=1e-9, err_msg=name)
    for name in ("itself", "transpose"):
        np.testing.assert_allclose(products[name], matrix @ flat, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(diagonal, np.diag(matrix), atol=1e-13)
    np.testing.assert_allclose([trace, damped_trace], [np.trace(matrix), np.trace(shifted)], rtol=1e-10)
    np.testing.assert_allclose(damped_logdet, np.linalg.slogdet(shifted)[1], rtol=1e-10)
    assert float(logdet) == -np.inf and not np.all(np.isfinite(products["singular"]))  # entries without a use
    assert lx.is_positive_semidefinite(curvature.damped(0.1)) and lx.is_symmetric(curvature)


def test_damped_factors(curvature):
    """(A + π√λ I) ⊗ (B + √λ/π I), block by block, and larger than exact damping."""
    damping = 0.1

    @quick
    def everything(curvature):
        made = curvature.damped_factors(damping)
        blocks = {name: block.as_matrix() for name, block in curvature.blocks.items()}
        return made.as_matrix(), curvature.damped(damping).as_matrix(), made.inverse().as_matrix(), blocks

    matrix, exact, inverse, dense_blocks = jax.tree.map(np.asarray, everything(curvature))
    for name, stack in blocks(curvature).items():
        block = curvature.blocks[name]
        _, m, n = block.in_structure().shape
        stacked = dense_blocks[name].reshape(len(stack), m * n, len(stack), m * n)
        for i, where in enumerate(stack):
            product = stacked[i, :, i].reshape(m, n, m, n)
            if not product.any():  # without a use
                assert np.array_equal(matrix[np.ix_(where, where)], damping * np.eye(m * n))
                continue
            left, right = np.einsum("iaja->ij", product), np.einsum("iaib->ab", product)
            total = np.trace(left)
            left, right = left / np.sqrt(total), right / np.sqrt(total)  # equal traces √total
            ratio = np.sqrt(n / m)
            shift = np.sqrt(damping)
            truth = np.kron(left + ratio * shift * np.eye(m), right + shift / ratio * np.eye(n))
            np.testing.assert_allclose(matrix[np.ix_(where, where)], truth, atol=1e-12)
    assert np.linalg.eigvalsh(matrix - exact).min() > -1e-12
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), atol=1e-9)


def test_ekfac_is_the_nearest_with_its_vectors(key):
    """Its values are the diagonal of the true block in the eigenbasis, through tokens, stacks and folded biases."""
    params = _normal(key, table=(5, 2), stack=(2, 2, 2), biases=(2, 2), head=(2, 3))

    def model_fn(p, tokens):
        step = lambda h, layer: (jnp.tanh(h @ layer[0] + layer[1]), None)
        return jax.lax.scan(step, p["table"][tokens], (p["stack"], p["biases"]))[0].sum(0) @ p["head"]

    tokens = jax.random.randint(key, (N, 3), 0, 5)
    labels = tokens[:, 0] % 3
    exact, (corrected, matrix), plain = dense(model_fn, SOFTMAX, params, tokens, labels, ops.ekfac, ops.kfac)
    assert distance(corrected, matrix, exact) < 0.9 * distance(*plain, exact)
    truth = block_part(corrected, np.asarray(exact))
    for name, stack in blocks(corrected).items():
        eigen = corrected.blocks[name].operator
        for i, where in enumerate(stack):
            m, n = eigen.values.shape[1:]
            u = np.eye(m) if eigen.left is None else np.asarray(eigen.left[i])
            v = np.eye(n) if eigen.right is None else np.asarray(eigen.right[i])
            turned = np.kron(u, v).T @ truth[np.ix_(where, where)] @ np.kron(u, v)
            np.testing.assert_allclose(np.diag(turned), eigen.values[i].ravel(), atol=1e-12)
    inverse = quick(lambda curvature: curvature.damped(0.1).inverse().as_matrix())(corrected)
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix + 0.1 * np.eye(len(matrix))), atol=1e-9)
    with pytest.raises(ValueError, match="use damped"):
        corrected.damped_factors(0.1)


@pytest.mark.parametrize("kind", ["monte_carlo", "empirical"])
def test_ekfac_of_draws_is_nearer_to_their_matrix(kind, key):
    params, x, y = _mlp_case(key)
    options = dict(kind=kind, key=key if kind == "monte_carlo" else None)

    @quick
    def everything(params):
        made = [make(_mlp, SOFTMAX, params, x, y, **options) for make in (ops.ekfac, ops.kfac)]
        exact = ops.fisher(_mlp, SOFTMAX, params, x, y, kind="empirical").as_matrix()
        return [(m, m.as_matrix()) for m in made], made[1].damped(0.0), exact

    (corrected, plain), eigen, exact = everything(params)
    if kind == "empirical":
        assert distance(*corrected, exact) <= distance(*plain, exact)
    vectors = [c.blocks["['w1']"].operator.left for c in (corrected[0], eigen)]
    np.testing.assert_allclose(*vectors)  # of the same draws


# Use.


def test_float32_and_half(key):
    params, x, y = _mlp_case(key)
    make = lambda params, x: ops.kfac(_mlp, SOFTMAX, params, x, y)
    truth = np.asarray(quick(lambda p, x: make(p, x).as_matrix())(params, x))
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 0.1)):
        narrow, inputs, _ = _mlp_case(key, dtype)
        both = quick(lambda p, x: (make(p, x).damped(0.1).inverse().mv(p), make(p, x).as_matrix()))
        product, matrix = both(narrow, inputs)
        assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(product))
        difference = np.asarray(matrix, np.float64) - truth
        assert np.max(np.abs(difference)) < tolerance * np.max(np.abs(truth))


def test_any_pytree_and_an_equinox_model(key):
    """Integers, None and functions among the parameters, several outputs, a loss of all of them; one example."""
    model = eqx.nn.MLP(3, 2, 4, 1, key=key, dtype=jnp.float64)
    params = {"model": model, "scale": jnp.ones(2), "count": 3, "none": None}
    model_fn = lambda p, x: (p["model"](x) * p["scale"], jnp.argmax(x))
    loss = lambda out, y: jnp.sum(jnp.cosh(out[0] - y))
    x, y = jax.random.normal(key, (1, 3)), jnp.zeros((1, 2))
    exact, (curvature, matrix) = dense(model_fn, loss, params, x, y)
    assert distance(curvature, matrix, exact) < 1e-12  # one datum: exact, the scale too
    gradient = eqx.filter(params, eqx.is_inexact_array)
    assert jax.tree.structure(curvature.in_structure()) == jax.tree.structure(gradient)
    step = quick(lambda curvature, v: curvature.damped(1.0).inverse().mv(v))(curvature, gradient)
    assert jax.tree.structure(step) == jax.tree.structure(gradient)


def test_jit_and_no_second_compilation(key):
    params, x, y = _mlp_case(key)
    traces = []

    def model_fn(p, x):
        traces.append(None)
        return _mlp(p, x)

    @eqx.filter_jit
    def step(curvature, v):
        traces.append(None)
        return curvature.damped(0.1).inverse().mv(v)

    first = step(ops.kfac(model_fn, SOFTMAX, params, x, y), params)
    count = len(traces)
    second = step(ops.kfac(model_fn, SOFTMAX, jax.tree.map(lambda w: 2 * w, params), x, y), params)
    assert len(traces) == count
    assert not np.allclose(first["w1"], second["w1"])
    inside = jax.jit(lambda p: ops.kfac(model_fn, SOFTMAX, p, x, y).damped(0.1).inverse().mv(p))(params)
    np.testing.assert_allclose(inside["w1"], first["w1"], rtol=1e-10)


def test_many_tasks_at_once(key):
    """Factors of each task are its own."""
    params, x, y = _mlp_case(key)
    tasks = jax.tree.map(lambda w: jnp.stack([w, -0.5 * w]), params)
    diagonal = lambda p: ops.kfac(_mlp, SOFTMAX, p, x, y).diagonal()
    together = quick(jax.vmap(diagonal))(tasks)
    for i in range(2):
        alone = quick(diagonal)(jax.tree.map(lambda w, i=i: w[i], tasks))
        np.testing.assert_allclose(together[i], alone, rtol=1e-12)


def test_preconditions_conjugate_gradients(key):
    """Far fewer products than without, on an ill-conditioned classifier."""
    x, y = jax.random.normal(key, (60, 12)) * jnp.logspace(-2, 1, 12), jnp.arange(60) % 3
    params = jax.tree.map(lambda leaf: 0.1 * leaf, _normal(key, w=(3, 12), b=(3,)))
    model_fn = lambda p, x: p["w"] @ x + p["b"]

    @quick
    def solve(params):
        curvature = ops.Damped(ops.gauss_newton(model_fn, SOFTMAX, params, x, y), 1e-5)
        inverse = ops.kfac(model_fn, SOFTMAX, params, x, y).damped(1e-5).inverse()
        solver = cx.linear.CG(rtol=1e-6, max_steps=1000)
        found = [
            lx.linear_solve(curvature, params, solver, options=options, throw=False)
            for options in ({}, {"preconditioner": inverse})
        ]
        residual = jax.tree.map(jnp.subtract, curvature.mv(found[1].value), params)
        return [solution.stats["num_steps"] for solution in found], ravel_pytree(residual)[0]

    (plain, helped), residual = solve(params)
    assert 3 * int(helped) < int(plain)
    assert float(jnp.linalg.norm(residual)) < 1e-4


def test_preconditions_a_hypergradient(key):
    """`Implicit` with K-FAC at the inner solution: the closed form, in fewer products than it takes without."""
    x, y = jax.random.normal(key, (30, 10)) * jnp.logspace(-2, 1, 10), jax.random.normal(key, (30, 2))
    model_fn = lambda w, x: w @ x
    penalty = 1e-4

    def inner(w, phi, _):
        losses = jax.vmap(lambda x, y: SQUARED(model_fn(w, x), y))(x, y)
        return jnp.mean(losses) + 0.5 * penalty * jnp.sum((w - phi) ** 2)

    problem = cx.Bilevel(inner=inner, outer=lambda w, phi, _: 0.5 * jnp.sum((w - 1.0) ** 2))
    curvature = lambda w, args: ops.kfac(model_fn, SQUARED, w, x, y).damped(penalty).inverse()
    gram = np.asarray(x.T @ x) / 30 + penalty * np.eye(10)
    phi = jnp.zeros((2, 10))
    w = np.linalg.solve(gram, np.asarray(x.T @ y) / 30).T
    truth = penalty * np.linalg.solve(gram, (w - 1.0).T).T
    products = []
    for preconditioner in (None, curvature):
        rule = cx.Implicit(rtol=None, linear_solver=cx.linear.CG(rtol=1e-8), preconditioner=preconditioner)
        call = eqx.filter_jit(
            lambda phi, rule=rule: cx.hypergradient(
                problem, phi, jnp.asarray(w), inner_solver=optx.LBFGS(1e-6, 1e-6), rule=rule, throw=False
            )
        )
        found = call(phi)
        np.testing.assert_allclose(found.grad, truth, atol=1e-6 * np.abs(truth).max())
        products.append(int(found.stats.num_matvecs))
    assert 2 * products[1] < products[0]


# Bad input.


def test_a_loss_that_is_not_convex_is_said(key):
    params, x, y = _mlp_case(key)
    with pytest.raises(Exception, match="not convex"):
        jax.block_until_ready(ops.kfac(_mlp, lambda z, y: -SOFTMAX(z, y), params, x, y).trace())


@pytest.mark.parametrize("scale", [1.0, 1e6])
def test_a_sure_prediction_is_no_lack_of_convexity(scale):
    """Where p(1 − p) is next to nothing the Hessian of a loss that is any function is all rounding."""
    loss = lambda z, y: scale * (jax.nn.logsumexp(z) - z[y])
    w = jnp.eye(4, dtype=jnp.float32)
    x = jnp.linspace(5, 30, 64, dtype=jnp.float32)[:, None] * jnp.array([1, 0.5, -1, -0.3], jnp.float32)
    curvature = ops.kfac(lambda w, x: w @ x, loss, w, x, jnp.zeros(64, int))
    truth = ops.kfac(lambda w, x: w @ x, SOFTMAX, w, x, jnp.zeros(64, int))
    np.testing.assert_allclose(curvature.trace(), scale * truth.trace(), rtol=1e-2)


def test_a_loss_for_each_output_is_refused():
    for kind in ("exact", "empirical"):
        with pytest.raises(ValueError, match="must return a scalar"):
            ops.kfac(
                lambda w, x: w @ x,
                lambda z, y: (z - y) ** 2,
                jnp.ones((2, 3)),
                jnp.ones((4, 3)),
                jnp.ones((4, 2)),
                kind=kind,
            )


def test_too_many_outputs_are_refused(key):
    x, w = jnp.zeros((2, 1)), jnp.ones((3000, 1))
    for loss, y, message in (
        (SQUARED, jnp.zeros((2, 3000)), "monte_carlo"),
        (lambda z, y: jnp.sum(z**2), jnp.zeros((2, 3000)), "written out|monte_carlo"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.kfac(lambda w, x: w @ x, loss, w, x, y)


def test_nan_is_seen(key):
    params, x, y = _mlp_case(key)
    curvature = ops.kfac(_mlp, SOFTMAX, params, x.at[0, 0].set(jnp.nan), y)
    assert np.isnan(curvature.trace())


def test_bad_arguments(key):
    params, x, y = _mlp_case(key)
    with pytest.raises(ValueError, match="sharing"):
        ops.kfac(_mlp, SOFTMAX, params, x, y, sharing="both")
    with pytest.raises(ValueError, match="floating-point"):
        ops.kfac(lambda p, x: x, SQUARED, {"n": jnp.arange(2)}, x, x)
    with pytest.raises(ValueError, match="leading axis"):
        ops.kfac(_mlp, SOFTMAX, params, x, y[:2])
    layers = cx.capture.find_layers(_mlp, params, x[0])
    with pytest.raises(ValueError, match="must act on arrays"):
        ops.Layerwise.of(layers, {})
