"""The table of all cases: every entry builds a `Case` in the dtype that is asked for."""

import numpy as np

from helpers.dense import rotated
from helpers.fixed_points import tanh_layer
from helpers.problem import Case
from helpers.quadratics import conditioned, coupled, nonsymmetric, quadratic_case, scaled_identity
from helpers.regression import kernel_ridge, ridge, scalar_logistic
from helpers.trees import awkward_tree

MINIMA = {
    "H=I": lambda dtype=np.float64: scaled_identity(1.0, dtype=dtype),
    "H=2I": lambda dtype=np.float64: scaled_identity(2.0, dtype=dtype),
    "H=3.7I": lambda dtype=np.float64: scaled_identity(3.7, dtype=dtype),
    "H=1e-6I": lambda dtype=np.float64: scaled_identity(1e-6, dtype=dtype),
    "H=1e6I": lambda dtype=np.float64: scaled_identity(1e6, dtype=dtype),
    "condition 1e1": lambda dtype=np.float64: conditioned(1e1, dtype=dtype),
    "condition 1e2": lambda dtype=np.float64: conditioned(1e2, kind="clusters", dtype=dtype),
    "condition 1e4": lambda dtype=np.float64: conditioned(1e4, dtype=dtype),
    "condition 1e6": lambda dtype=np.float64: conditioned(1e6, dtype=dtype),
    "condition 1e8": lambda dtype=np.float64: conditioned(1e8, dtype=dtype),
    "outlier low 1e4": lambda dtype=np.float64: conditioned(1e4, kind="outlier-low", dtype=dtype),
    "outlier high 1e4": lambda dtype=np.float64: conditioned(1e4, kind="outlier-high", dtype=dtype),
    "linear loss": lambda dtype=np.float64: conditioned(1e2, curved=False, dtype=dtype),
    "log penalties": lambda dtype=np.float64: coupled(dtype=dtype),
    "ridge, half": lambda dtype=np.float64: ridge("half", dtype=dtype),
    "ridge, full": lambda dtype=np.float64: ridge("full", dtype=dtype),
    "ridge, features": lambda dtype=np.float64: ridge("features", dtype=dtype),
    "kernel ridge": lambda dtype=np.float64: kernel_ridge(dtype=dtype),
    "scalar logistic": lambda dtype=np.float64: scalar_logistic(dtype=dtype),
    "awkward tree": lambda dtype=np.float64: awkward_tree(dtype=dtype),
}

FIXED_POINTS = {
    "tanh layer": lambda dtype=np.float64: tanh_layer("fixed_point", dtype=dtype),
    "quadratic as map": lambda dtype=np.float64: conditioned(
        1e1, kind="uniform", case="fixed_point", dtype=dtype
    ),
}

ROOTS = {
    "tanh layer": lambda dtype=np.float64: tanh_layer("root", dtype=dtype),
    "non-symmetric": lambda dtype=np.float64: nonsymmetric(dtype=dtype),
    "quadratic as root": lambda dtype=np.float64: conditioned(1e3, case="root", dtype=dtype),
}


def indefinite(dtype=np.float64) -> Case:
    """A saddle: one negative eigenvalue, so that the stationary point is no minimum."""
    values = np.concatenate([[-0.4], np.linspace(0.5, 2.0, 7)])
    return quadratic_case(_rotated(values), dtype=dtype, name="indefinite")


def singular(dtype=np.float64) -> Case:
    """One exactly zero eigenvalue (diagonal, so that rounding does not regularise it)."""
    return quadratic_case(
        np.diag(np.concatenate([[0.0], np.linspace(0.5, 2.0, 7)])), dtype=dtype, name="singular"
    )


def definite(dtype=np.float64) -> Case:
    """The benign control of `indefinite` and `singular`: the same with eigenvalue +0.4."""
    values = np.concatenate([[0.4], np.linspace(0.5, 2.0, 7)])
    return quadratic_case(_rotated(values), dtype=dtype, name="definite")


def _rotated(values):
    return rotated(values, np.random.default_rng(11_000))
