"""Differentiating through training: Optax inner loops and their derivatives."""

from curvax.unroll._steps import Steps as Steps
from curvax.unroll._unrolled import Unrolled as Unrolled
