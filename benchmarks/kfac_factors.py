"""Claims: what the factors of K-FAC and a Gauss–Newton product cost, in gradients of the mean loss.

Factors of one batch by `cx.operators.kfac`, in float32: of a multilayer perceptron, of a network of 3 × 3 convolutions
(all of them, those of a quarter of the batch, and reduced ones), and of a transformer whose layers are scanned and
computed again in reverse mode. One sampled target for each example. Every row is timed in turns with the gradient of
the same model, and with curvlinops (PyTorch) doing the same for the perceptron and the convolutions, which it knows;
its rows are left out where it is not installed. Memory is what XLA plans beside arguments and results: the factors of
a layer are larger than its weight, whoever computes them.
"""

import functools as ft
from importlib.util import find_spec

import harness
import jax
import jax.numpy as jnp
import numpy as np

import curvax as cx

REPEATS = 9
LOSS = cx.operators.SoftmaxCrossEntropy()
RNG = np.random.default_rng(0)


def normal(*shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * RNG.standard_normal(shape), jnp.float32)


def perceptron(params, x):
    for weight, bias in params[:-1]:
        x = jnp.tanh(weight @ x + bias)
    return params[-1][0] @ x + params[-1][1]


def perceptron_problem(sizes=(64, 256, 256, 256, 10), examples=1797):
    params = [(normal(o, i, scale=i**-0.5), jnp.zeros(o)) for i, o in zip(sizes, sizes[1:], strict=False)]
    return perceptron, params, normal(examples, sizes[0]), jnp.asarray(RNG.integers(0, 10, examples))


def convolutions(params, x):
    conv = lambda x, w: jax.lax.conv_general_dilated(
        x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]
    for weight, bias in params["convolutions"]:
        x = jax.nn.relu(conv(x, weight) + bias)
    return params["head"] @ jnp.mean(x, axis=(0, 1))


def convolution_problem(channels=(3, 32, 32, 64, 64, 64), examples=64, size=32):
    layers = [
        (normal(3, 3, i, o, scale=(9 * i) ** -0.5), jnp.zeros(o))
        for i, o in zip(channels, channels[1:], strict=False)
    ]
    params = {"convolutions": layers, "head": normal(10, channels[-1], scale=0.1)}
    return (
        convolutions,
        params,
        normal(examples, size, size, 3),
        jnp.asarray(RNG.integers(0, 10, examples)),
    )


def transformer(params, tokens, heads=4):
    x = params["table"][tokens] + params["position"]
    length, width = x.shape
    mask = jnp.tril(jnp.ones((length, length), bool))

    def block(x, layer):
        h = x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)
        q, k, v = jnp.split((h @ layer["qkv"]).reshape(length, 3 * heads, -1), 3, axis=1)
        scores = jnp.where(mask, jnp.einsum("thd,shd->hts", q, k), -1e9)
        x = x + jnp.einsum("hts,shd->thd", jax.nn.softmax(scores), v).reshape(length, width) @ layer["out"]
        return x + jax.nn.gelu(x @ layer["up"] + layer["bias"]) @ layer["down"], None

    return jax.lax.scan(jax.checkpoint(block), x, params["layers"])[0] @ params["table"].T


def transformer_problem(width=128, length=64, layers=4, words=256, examples=16):
    params = {
        "table": normal(words, width, scale=0.1),
        "position": normal(length, width, scale=0.1),
        "layers": {
            "qkv": normal(layers, width, 3 * width, scale=width**-0.5),
            "out": normal(layers, width, width, scale=width**-0.5),
            "up": normal(layers, width, 4 * width, scale=width**-0.5),
            "bias": jnp.zeros((layers, 4 * width)),
            "down": normal(layers, 4 * width, width, scale=0.5 * width**-0.5),
        },
    }
    tokens = jnp.asarray(RNG.integers(0, words, (examples, length)))
    return transformer, params, tokens, jnp.roll(tokens, -1, axis=1)


def gradient(model_fn, params, x, y):
    return jax.grad(lambda p: jnp.mean(jax.vmap(lambda x, y: LOSS(model_fn(p, x), y))(x, y)))(params)


def factors(model_fn, params, x, y, fraction=1.0, sharing="expand", kind="monte_carlo"):
    count = int(fraction * len(x))
    key = jax.random.key(0) if kind == "monte_carlo" else None
    curvature = cx.operators.kfac(
        model_fn, LOSS, params, x[:count], y[:count], kind=kind, sharing=sharing, key=key
    )
    return [leaf for leaf in jax.tree.leaves(curvature) if isinstance(leaf, jax.Array)]


def product(model_fn, params, x, y):
    return cx.operators.gauss_newton(model_fn, LOSS, params, x, y).mv(params)


SAMPLED = ("sampled factors", factors)
EMPIRICAL = ("empirical factors", ft.partial(factors, kind="empirical"))
PRODUCT = ("Gauss–Newton product", product)
REDUCED = ("sampled factors, reduced", ft.partial(factors, sharing="reduce"))
QUARTER = ("sampled factors, a quarter of the batch", ft.partial(factors, fraction=0.25))
# What is measured, and at most how many gradients it may take.
CASES = {
    "perceptron": (perceptron_problem, {SAMPLED: 1.5, EMPIRICAL: None, PRODUCT: 1.8}),
    "convolutions": (convolution_problem, {SAMPLED: 2.7, REDUCED: 1.0, QUARTER: 0.8, PRODUCT: 1.8}),
    "transformer": (transformer_problem, {SAMPLED: 1.3, PRODUCT: 1.8}),
}


def peer(name, arrays):
    """What curvlinops does, by name: functions to be timed."""
    import curvlinops
    import torch

    _, x, y = arrays
    tensor = lambda array: torch.from_numpy(np.array(array))
    sizes = [64, 256, 256, 256, 10] if name == "perceptron" else [3, 32, 32, 64, 64, 64]
    layers: list[torch.nn.Module] = []
    for i, o in zip(sizes, sizes[1:], strict=False):
        linear = torch.nn.Linear(i, o) if name == "perceptron" else torch.nn.Conv2d(i, o, 3, padding="same")
        layers += [linear, torch.nn.Tanh() if name == "perceptron" else torch.nn.ReLU()]
    if name == "perceptron":
        model, inputs = torch.nn.Sequential(*layers[:-1]), tensor(x)
    else:
        tail = [torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False)]
        model, inputs = torch.nn.Sequential(*layers, *tail), tensor(x).permute(0, 3, 1, 2).contiguous()
    targets, loss = tensor(y).long(), torch.nn.CrossEntropyLoss()
    params = [p for p in model.parameters() if p.requires_grad]
    of = lambda count: [(inputs[:count], targets[:count])]
    options = {"check_deterministic": False, "num_data": len(inputs)}

    def gradient():
        torch.autograd.grad(loss(model(inputs), targets), params)

    def factors(count=None, kfac_approx="expand", fisher_type="mc"):
        count = count or len(inputs)
        curvature = curvlinops.KFACLinearOperator(
            model, loss, params, of(count), num_per_example_loss_terms=1, separate_weight_and_bias=False,
            kfac_approx=kfac_approx, fisher_type=fisher_type, **(options | {"num_data": count}),
        )  # fmt: skip
        curvature.compute_kronecker_factors()

    def product():
        curvlinops.GGNLinearOperator(model, loss, params, of(len(inputs)), **options) @ params

    found = {"gradient": gradient, SAMPLED[0]: factors, PRODUCT[0]: product}
    if name == "perceptron":
        return found | {EMPIRICAL[0]: ft.partial(factors, fisher_type="empirical")}
    quarter = ft.partial(factors, count=len(inputs) // 4)
    return found | {REDUCED[0]: ft.partial(factors, kfac_approx="reduce"), QUARTER[0]: quarter}


def measure() -> harness.Report:
    rows, claims = [], []
    for name, (problem, wanted) in CASES.items():
        arguments = problem()
        model_fn, arrays = arguments[0], arguments[1:]
        compiled = {
            what: jax.jit(ft.partial(function, model_fn)).lower(*arrays).compile()
            for what, function in [("gradient", gradient), *wanted]
        }
        calls = {what: ft.partial(program, *arrays) for what, program in compiled.items()}
        peers = peer(name, arrays) if name != "transformer" and find_spec("curvlinops") else {}
        both = calls | {f"{what} of curvlinops": call for what, call in peers.items()}
        times = harness.in_turns(both, REPEATS)
        memory = {
            what: program.memory_analysis().temp_size_in_bytes / 2**20 for what, program in compiled.items()
        }
        for what in calls:
            row = {
                "model": name,
                "what": what,
                "ms": harness.milliseconds(times[what]),
                "gradients": harness.ratio(times[what], times["gradient"]),
                "MB": memory[what],
                "curvlinops, ms": "–",
                "curvlinops, its gradients": "–",
            }
            if what in peers:
                theirs = times[f"{what} of curvlinops"]
                row["curvlinops, ms"] = harness.milliseconds(theirs)
                row["curvlinops, its gradients"] = harness.ratio(theirs, times["gradient of curvlinops"])
            rows.append(row)
        for (what, _), most in wanted.items():
            if most is not None:
                value = harness.ratio(times[what], times["gradient"])
                claims.append(harness.Claim(f"{name}: {what}, in gradients", value, at_most=most))
            if what in peers:
                value = harness.ratio(times[what], times[f"{what} of curvlinops"])
                claims.append(harness.Claim(f"{name}: {what}, time ÷ curvlinops'", value, at_most=1.0))
        if name == "transformer":
            value = memory[SAMPLED[0]] / memory["gradient"]
            claims.append(
                harness.Claim("transformer: temporaries of the factors ÷ gradient's", value, at_most=1.0)
            )
    return harness.Report(
        "Factors of K-FAC and Gauss–Newton products",
        "float32; perceptron 64-256-256-256-10 with 1797 examples, five convolutions of 32 × 32 images with 64 "
        "examples, four scanned transformer layers of width 128 with 16 sequences of 64 tokens.",
        rows,
        claims,
    )


if __name__ == "__main__":
    harness.main(measure)
