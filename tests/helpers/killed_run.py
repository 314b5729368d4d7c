"""A run of `minimise` that is made to be killed: `python killed_run.py DIRECTORY NUM_STEPS RESULT`.

Saves as often as it can; after each chunk it writes the number of steps to its output, so that the parent knows
where it stands. The end is written to RESULT as plain arrays.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax as cx
from helpers import tuning

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


def inner(theta, phi, batch):
    """The ridge loss, with ballast that makes a checkpoint take time."""
    return tuning.inner(theta, phi["log_l2"], batch) + 0 * phi["ballast"][0] * jnp.sum(theta)


def outer(theta, phi, batch):
    """The outer loss, NaN beyond a wall into which Adam overshoots; the ballast is pulled to one."""
    wall = jnp.where(phi["log_l2"] > 2.3, jnp.nan, 0.0)
    return tuning.outer(theta, phi, batch) + 1e-6 * jnp.sum((phi["ballast"] - 1.0) ** 2) + wall


PROBLEM = cx.Bilevel(inner=inner, outer=outer)
OPTIMIZER = optax.adam(0.3)


def run(directory, num_steps, *, callbacks=(), **options):
    """Long enough to be killed, with a key, retries and Adam's state."""
    checkpoint = None if directory is None else cx.Checkpoint(directory, every_seconds=0.0)
    return tuning.minimise(
        num_steps,
        problem=PROBLEM,
        optimizer=OPTIMIZER,
        phi0={"log_l2": jnp.asarray(0.0), "ballast": jnp.zeros(200_000)},
        outer_data=tuning.stochastic(),
        key=jax.random.key(5),
        checkpoint=checkpoint,
        callbacks=callbacks,
        **options,
    )


def arrays(solution):
    """Every leaf of a solution as a NumPy array."""
    leaves = jax.tree.leaves((solution.phi, solution.theta, solution.value, solution.history, solution.state))
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [np.asarray(jax.random.key_data(x) if k else x) for x, k in zip(leaves, keys, strict=True)]


if __name__ == "__main__":

    def tell(info):
        """Say where the run stands, and take time, so that a kill finds it in the middle."""
        print(info.step, flush=True)
        time.sleep(0.02)

    solution = run(sys.argv[1], int(sys.argv[2]), callbacks=[cx.Every(1, tell)])
    np.savez(sys.argv[3], *arrays(solution))
