"""Compilation for programs that run once or twice on small arrays: compiling them is all the time they take."""

import functools as ft

import jax

quick = ft.partial(
    jax.jit,
    compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True},
)
