"""Claims: K-FAC is where a well tuned Adam ends after a third of its steps and 0.7 of its time; of a transformer 0.4.

The autoencoder of the K-FAC papers, smaller (64-256-128-64-30-64-128-256-64, tanh, cross-entropy of pixels), on
scikit-learn's digits, with all 1797 at every step and with batches of 256; a network of two convolutions and a
transformer of two scanned layers on the same digits as classifiers, where only the steps count for the transformer.
Adam is the peer: the best of three learning rates, each constant and with a cosine schedule, by the loss on all digits
at the end; the best rate is in the middle. The second-order optimisers have the settings with which they come, for
every problem. Time is the number of steps × the median time of a step, timed in turns. Losses are those on all digits,
taken every few steps and not counted.
"""

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import curvax as cx

# Learning rates that Adam is tuned over.
RATES, LARGER, LARGEST = (2e-3, 4e-3, 8e-3), (4e-3, 8e-3, 1.6e-2), (3.2e-2, 6.4e-2, 0.128)
OURS = {
    "K-FAC": cx.optim.kfac,
    "EKFAC": cx.optim.ekfac,
    "K-BFGS": cx.optim.kbfgs,
    "trust region": cx.optim.kf_trust_region,
}


def weights(rng, *shapes):
    return [
        (jnp.asarray(rng.standard_normal(s) * s[-1] ** -0.5, jnp.float32), jnp.zeros(s[0])) for s in shapes
    ]


def digits():
    data = load_digits()
    return jnp.asarray(data.data / 16, jnp.float32), jnp.asarray(data.target)


def autoencoder():
    sizes = (64, 256, 128, 64, 30, 64, 128, 256, 64)
    params = weights(np.random.default_rng(0), *zip(sizes[1:], sizes, strict=False))
    x, _ = digits()

    def model_fn(params, x):
        for number, (w, b) in enumerate(params):
            x = w @ x + b
            if number not in (3, 7):  # the code and the logits
                x = jnp.tanh(x)
        return x

    return model_fn, cx.operators.BinaryCrossEntropy(), params, x, x


def convolutions():
    rng = np.random.default_rng(0)
    kernels = [
        jnp.asarray(rng.standard_normal(s) * (9 * s[2]) ** -0.5, jnp.float32)
        for s in ((3, 3, 1, 8), (3, 3, 8, 16))
    ]
    params = {"kernels": kernels, "biases": [jnp.zeros(8), jnp.zeros(16)], "head": weights(rng, (10, 64))[0]}
    x, y = digits()

    def model_fn(params, x):
        x = x.reshape(8, 8, 1)
        for kernel, bias in zip(params["kernels"], params["biases"], strict=True):
            convolved = jax.lax.conv_general_dilated(
                x[None], kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            x = jnp.tanh(convolved[0] + bias)
        return params["head"][0] @ x.ravel() + params["head"][1]

    return model_fn, cx.operators.SoftmaxCrossEntropy(), params, x, y


def transformer(width=32, layers=2):
    rng = np.random.default_rng(0)
    normal = lambda *s: jnp.asarray(rng.standard_normal(s) * s[-1] ** -0.5, jnp.float32)
    params = {
        "embed": normal(width, 8),
        "position": 0.1 * normal(8, width),
        "layers": {"qkv": normal(layers, 3, width, width), "out": normal(layers, width, width),
                   "up": normal(layers, 2 * width, width), "down": normal(layers, width, 2 * width)},
        "head": weights(rng, (10, width))[0],
    }  # fmt: skip
    x, y = digits()

    def normed(x):
        return x * jax.lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)

    def block(x, layer):
        q, k, v = (normed(x) @ w.T for w in layer["qkv"])
        x = x + jax.nn.softmax(q @ k.T / width**0.5) @ v @ layer["out"].T
        return x + jax.nn.gelu(normed(x) @ layer["up"].T) @ layer["down"].T, None

    def model_fn(params, x):
        x = x.reshape(8, 8) @ params["embed"].T + params["position"]
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["layers"])
        return params["head"][0] @ jnp.mean(normed(x), axis=0) + params["head"][1]

    return model_fn, cx.operators.SoftmaxCrossEntropy(), params, x, y


# For the picture: by problem and optimiser, steps and losses.
CURVES: dict[tuple[str, str], tuple[list[int], list[float]]] = {}
# The problem, the batch, the steps of Adam and of all others, and the rates of Adam.
PROBLEMS = {
    "autoencoder": (autoencoder, 1797, 300, 60, RATES),
    "autoencoder, batches of 256": (autoencoder, 256, 800, 100, RATES),
    "convolutions": (convolutions, 1797, 150, 50, LARGEST),
    "transformer": (transformer, 1797, 150, 60, LARGER),
}
# What K-FAC must do, by problem: its steps to Adam's last loss ÷ those of Adam, and likewise the time (None: no claim).
CLAIMS: dict[str, tuple[float, float | None]] = {
    "autoencoder": (1 / 3, 0.7),
    "autoencoder, batches of 256": (1 / 3, 0.7),
    "convolutions": (1 / 3, 0.7),
    "transformer": (0.4, None),
}
# Losses are taken so often in a run.
LOOKS = 50


class Run:
    """Steps of an optimiser, one a call; `losses` on all examples now and then, before the step in `looks`."""

    def __init__(self, optimiser, batch, model_fn, loss, params, x, y):
        def mean(params, x, y):
            return jnp.mean(jax.vmap(lambda x, y: loss(model_fn(params, x), y))(x, y))

        def step(params, state, key, x, y):
            if batch < len(x):
                picked = jax.random.choice(jax.random.fold_in(key, 1), len(x), (batch,), replace=False)
                x, y = x[picked], y[picked]
            grads = jax.grad(mean)(params, x, y)
            extra = {"inputs": x, "targets": y, "key": key}
            updates, state = optax.with_extra_args_support(optimiser).update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        self.carry, self.data, self.number = (params, optimiser.init(params)), (x, y), 0
        self.step = jax.jit(step).lower(*self.carry, jax.random.key(0), x, y).compile()
        self.mean = jax.jit(mean).lower(params, x, y).compile()
        self.losses: list[float] = []
        self.looks: list[int] = []

    def __call__(self):
        self.carry = self.step(*self.carry, jax.random.fold_in(jax.random.key(0), self.number), *self.data)
        self.number += 1
        return self.carry

    def curve(self, steps):
        self.looks, self.losses = [], []
        for number in range(steps + 1):
            if number % max(1, steps // LOOKS) == 0:
                self.looks.append(number)
                self.losses.append(float(self.mean(self.carry[0], *self.data)))
            self()
        return self


def tuned_adam(problem, batch, steps, rates):
    """The one that ends lowest, and its name."""
    best, ends, name, kept = None, np.inf, "", ()
    for cosine in (False, True):
        shape = optax.cosine_decay_schedule(1.0, steps) if cosine else optax.constant_schedule(1.0)
        adam = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
        run = Run(optax.chain(adam, optax.scale_by_schedule(shape)), batch, *problem)
        start = run.carry
        for rate in rates:
            (first, *others) = start[1]
            hyperparams = first.hyperparams | {"learning_rate": jnp.asarray(rate, jnp.float32)}
            run.carry, run.number = (start[0], (first._replace(hyperparams=hyperparams), *others)), 0
            run.curve(steps)
            if run.losses[-1] < ends:
                best, ends, kept = run, run.losses[-1], (run.looks, run.losses)
                name = f"Adam, {rate:g}" + (", cosine" if cosine else "")
    best.looks, best.losses = kept
    return name, best


def measure(only: str = "") -> harness.Report:
    rows, claims = [], []
    for name, (make, batch, of_adam, of_others, rates) in PROBLEMS.items():
        if only not in name:
            continue
        problem = make()
        model_fn, loss, _, x, _ = problem
        adam, reference = tuned_adam(problem, batch, of_adam, rates)
        target = reference.losses[-1]
        runs = {adam: reference}
        for what, optimiser in OURS.items():
            runs[what] = Run(optimiser(model_fn, loss, example=x[0]), batch, *problem).curve(of_others)
        times = harness.in_turns(runs, 11)
        for what, run in runs.items():
            reached = [n for n, value in zip(run.looks, run.losses, strict=True) if value <= target]
            steps = reached[0] if reached else float("nan")
            share = steps / of_adam * harness.ratio(times[what], times[adam])
            rows.append(
                {
                    "problem": name,
                    "optimiser": what,
                    "last loss": run.losses[-1],
                    "ms a step": harness.milliseconds(times[what]),
                    "steps to Adam's last loss": steps,
                    "steps ÷ Adam's": steps / of_adam,
                    "time ÷ Adam's": share,
                }
            )
            CURVES[name, what] = (run.looks, run.losses)
            if what == "K-FAC":
                for unit, value, most in zip(
                    ("steps", "time"), (steps / of_adam, share), CLAIMS[name], strict=True
                ):
                    text = f"{name}: {unit} of K-FAC to Adam's last loss ÷ Adam's"
                    if most is not None:
                        claims.append(harness.Claim(text, value, at_most=most))
    return harness.Report(
        "Loss against steps and time",
        "float32; Adam with the best of six settings, others with those that they come with; losses on all digits.",
        rows,
        claims,
    )


def picture(report: harness.Report, file_name: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    problems = list(dict.fromkeys(row["problem"] for row in report.rows))
    figure, axes = plt.subplots(
        2, len(problems), figsize=(4.2 * len(problems), 6.4), squeeze=False, layout="constrained"
    )
    for column, name in enumerate(problems):
        for row in (row for row in report.rows if row["problem"] == name):
            steps, losses = CURVES[name, row["optimiser"]]
            for axis, scale in zip(axes[:, column], (1, row["ms a step"] / 1e3), strict=True):
                axis.plot(scale * np.maximum(steps, 0.5), losses, label=row["optimiser"], lw=1.6)
        for axis, label in zip(axes[:, column], ("steps", "seconds"), strict=True):
            axis.set(xscale="log", yscale="log", xlabel=label, title=name if label == "steps" else "")
            low, high = axis.get_ylim()
            if high < 100 * low:  # else the powers of ten are enough
                for formatted in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
                    formatted("{x:g}")
            axis.grid(alpha=0.3, which="both", lw=0.4)
        axes[0, column].legend(fontsize=8)
        axes[0, 0].set_ylabel("mean loss")
        axes[1, 0].set_ylabel("mean loss")
    figure.savefig(file_name, dpi=110)


if __name__ == "__main__":
    harness.main(measure, picture)
