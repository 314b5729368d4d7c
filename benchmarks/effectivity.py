"""Is the error estimate of a hypergradient the error? A table for the documentation.

    python benchmarks/effectivity.py [--seed N] [--size 100] [--small]

Quadratics of seven spectra, conditions 10 to 1e6, constant and θ-dependent cross derivatives, linear and
quadratic outer losses; inner solutions stopped by gradient steps, by conjugate gradients and by noise;
requests from 1e-1 to 1e-9. Effectivity is estimate ÷ true error; the truth is a dense solve with
residuals in long double. Flagged results (a reported failure) are not counted, and are listed.
"""

import argparse
import pathlib
import sys
import time

import jax

jax.config.update("jax_enable_x64", True)
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import jax.numpy as jnp  # noqa: E402
import lineax as lx  # noqa: E402
import numpy as np  # noqa: E402

import curvax as cx  # noqa: E402
from helpers import effectivity  # noqa: E402
from helpers.stopped import stack  # noqa: E402

HEADER = (
    "| variant | runs | counted | below 0.5 | min | median | max | above 5 | wrong successes | s |\n|"
    + "---|" * 10
)


def jacobi(theta, args):
    """The diagonal of the curvature."""
    phi, batch = args
    return lx.DiagonalLinearOperator(1.0 / (batch["s"] * jnp.exp(phi) + jnp.diagonal(batch["H"])))


def line(
    name, seed, *, dtype=np.float64, conditions=(1e1, 1e2, 1e3, 1e4, 1e5, 1e6), size=40, every=1, **options
):
    """One row of the table."""
    stopped = stack(seed, n=size, conditions=conditions, dtype=dtype, every=every)
    rtols = np.random.default_rng(seed).choice([1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 1e-9], len(stopped.manner))
    begin = time.perf_counter()
    row = effectivity.measure(stopped, rtols, **options)
    seconds = time.perf_counter() - begin
    ratio = effectivity.effectivity(row, float(np.finfo(dtype).eps))
    kept = ratio[~row.flagged]
    wrong = (row.met & (row.error > 2.05 * rtols * row.size)).sum()
    return (
        f"| {name} | {len(ratio)} | {len(kept)} | {(kept < 0.5).sum()} | {kept.min():.2g} | {np.median(kept):.2f} | "
        f"{kept.max():.3g} | {(kept > 5).sum()} | {wrong} | {seconds:.0f} |"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=None, help="a fresh one is drawn and printed by default")
    parser.add_argument("--size", type=int, default=100)
    parser.add_argument("--small", action="store_true", help="one case in eight")
    options = parser.parse_args()
    seed = int(np.random.SeedSequence().entropy % 2**31) if options.seed is None else options.seed
    every, size = (8 if options.small else 1), options.size
    few = (1e1, 1e2, 1e3, 1e4)
    print(f"seed {seed}, {size} unknowns, JAX {jax.__version__} on {jax.default_backend()}\n")
    print(HEADER)
    print(line("conjugate gradients, one sweep", seed, size=size, every=every), flush=True)
    print(line("same, up to 5 sweeps", seed + 1, size=size, every=every, max_sweeps=5), flush=True)
    print(line("Jacobi preconditioner", seed + 2, size=size, every=every, preconditioner=jacobi), flush=True)
    print(line("dense, 16 unknowns", seed + 3, size=16, every=every), flush=True)
    print(
        line("damping 1e-3, condition ≤ 1e4", seed + 4, size=size, every=every, conditions=few, damping=1e-3),
        flush=True,
    )
    print(
        line("float32, condition ≤ 1e4", seed + 5, size=size, every=every, conditions=few, dtype=np.float32),
        flush=True,
    )
    print(line("float32, condition ≤ 1e6", seed + 6, size=size, every=every, dtype=np.float32), flush=True)
    for name, solver in {
        "curvax MINRES 1e-6": cx.linear.MINRES(rtol=1e-6),
        "Lineax CG 1e-6": lx.CG(rtol=1e-6, atol=1e-6),
        "Lineax GMRES 1e-6": lx.GMRES(rtol=1e-6, atol=1e-6),
    }.items():
        options_of = {
            "linear_solver": solver,
            "max_sweeps": 3,
            "size": 24,
            "conditions": few,
            "every": 2 * every,
        }
        print(line(f"{name}, condition ≤ 1e4", seed + 7, **options_of), flush=True)


if __name__ == "__main__":
    main()
