"""Batched LAPACK calls on two threads: two at once would wait for each other for ever."""

import os
import subprocess
import sys

import pytest

# In a process of its own, since XLA reads its flags once and this suite sets them. NPROC is the size of XLA's pool.
PROGRAM = """
import curvax as cx, jax, jax.numpy as jnp, lineax as lx, optax, optimistix as optx
jax.config.update("jax_enable_x64", True)

def inner(theta, phi, batch):
    return 0.5 * theta @ (batch @ theta) - jnp.sum(phi * theta)

condition, solver = {
    "minimum": (inner, cx.Steps(optax.sgd(0.0), 1)),
    "root": (cx.Root(jax.grad(inner)), optx.Newton(rtol=1e-3, atol=1e-3)),
}["KIND"]
problem = cx.Bilevel(inner=condition, outer=lambda theta, phi, batch: jnp.sum(theta**2))
rule = cx.Implicit(rtol=1e-8, linear_solver=SOLVER, max_sweeps=3)
roots = jax.random.normal(jax.random.key(0), (191, 16, 16))
matrices = roots @ roots.transpose(0, 2, 1) + jnp.eye(16)
run = jax.jit(jax.vmap(lambda matrix: cx.hypergradient(
    problem, jnp.ones(16), jnp.zeros(16), inner_solver=solver, rule=rule, inner_data=matrix, throw=False
).grad))
for _ in range(400):
    run(matrices).block_until_ready()
solution = jnp.linalg.solve(matrices, jnp.ones((191, 16, 1)))
truth = 2 * jnp.linalg.solve(matrices, solution)[..., 0]
assert jnp.allclose(run(matrices), truth, rtol=1e-6, atol=1e-9)
"""


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        ("minimum", "lx.Cholesky()"),
        ("minimum", "lx.LU()"),
        ("minimum", "cx.linear.Auto(rtol=1e-8, atol=0.0)"),
        ("root", "lx.LU()"),
        ("root", "cx.linear.Auto(rtol=1e-8, atol=0.0)"),
    ],
)
def test_dense_solvers_return(kind, solver):
    """With the factorisation of the user's solver and our own decomposition in one program."""
    settings = {**os.environ, "NPROC": "2", "JAX_PLATFORMS": "cpu"}
    for name in ("XLA_FLAGS", "JAX_DISABLE_MOST_OPTIMIZATIONS"):
        settings.pop(name, None)
    program = PROGRAM.replace("SOLVER", solver).replace("KIND", kind)
    ended = subprocess.run(
        [sys.executable, "-c", program], env=settings, timeout=300, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
