"""Curvax: second derivatives put to work in JAX."""

from curvax._results import RESULTS as RESULTS
