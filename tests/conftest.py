"""Settings of the whole suite: float64 on, strict promotion, no compilation left between runs."""

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
