"""Hypergradients by several rules against one another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, PyTree
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from curvax._printed import Printed
from curvax._results import RESULTS, describe
from curvax.bilevel import Bilevel, Hypergradient, hypergradient
from curvax.implicit._rule import AbstractRule


@dataclass(frozen=True, repr=False)
class RuleComparison(Printed):
    """What `compare_rules` found, for k rules.

    Attributes:
        names: The rules' names.
        cosine: (k, k), cosine between the hypergradients of two rules; NaN where one vanishes or is not finite.
        relative_error: (k, k), ‖row − column‖ / ‖column‖.
        norms: (k,), Euclidean norms.
        hypergradients: Name -> what `hypergradient` returned.
        messages: Name -> the failure that was reported; empty if there was none.
    """

    names: tuple[str, ...]
    cosine: np.ndarray
    relative_error: np.ndarray
    norms: np.ndarray
    hypergradients: dict[str, Hypergradient]
    messages: dict[str, str]

    def __rich__(self) -> RenderableType:
        """The tables, for `rich.print`."""
        parts: list[RenderableType] = []
        overview = Table(title="Hypergradients by rule", title_justify="left")
        for column in ("rule", "outer loss", "norm", "own error estimate", "result"):
            overview.add_column(column)
        for name, norm in zip(self.names, self.norms, strict=True):
            hg = self.hypergradients[name]
            result = Text("failed", "bold red") if self.messages[name] else Text("successful", "green")
            estimate = float(hg.stats.error_estimate)
            overview.add_row(
                Text(name), f"{float(hg.value):.6g}", f"{norm:.6e}",
                f"{estimate:.1e}" if np.isfinite(estimate) else "none", result,
            )  # fmt: skip
        pairs = Table(title="In pairs", title_justify="left")
        for column in ("rule", "against", "cosine", "relative error"):
            pairs.add_column(column)
        for i, name in enumerate(self.names):
            for j in range(i):
                cosine, error = self.cosine[i, j], self.relative_error[i, j]
                pairs.add_row(Text(name), Text(self.names[j]), f"{cosine:.8f}", f"{error:.2e}")
        parts += [overview, pairs]
        parts += [Text(f"{name}: {text}") for name, text in self.messages.items() if text]
        return Group(*parts)


def compare_rules(
    problem: Bilevel,
    phi: PyTree,
    theta0: PyTree,
    *,
    inner_solver: Any,
    rules: Mapping[str, AbstractRule],
    inner_data: Any = None,
    outer_data: Any = None,
    key: Array | None = None,
    printed: bool = True,
) -> RuleComparison:
    """Hypergradients of one problem by several rules: cosine and relative error of each pair.

    Args:
        problem: the bilevel problem.
        phi: hyperparameters.
        theta0: start of the inner solver.
        inner_solver: one for all rules, or a mapping with one for each name in `rules` (unrolling needs
            `cx.Steps`, the implicit rule may do better with an Optimistix solver).
        rules: name -> rule, at least two.
        inner_data: as in `cx.hypergradient`; with a sampler every rule gets the same key.
        outer_data: the same for the outer function.
        key: random key for samplers.
        printed: whether to print the tables.

    Returns:
        A `RuleComparison`. A rule that fails is reported there; wrong arguments raise.

    Raises:
        ValueError: fewer than two rules, or a mapping of inner solvers that lacks one of them.

    Cost: one hypergradient for each rule.

    Example:
        ```python
        import jax.numpy as jnp
        import optax
        import curvax as cx

        problem = cx.Bilevel(
            inner=lambda w, lam, _: jnp.sum((w - 1.0) ** 2) + jnp.exp(lam) * jnp.sum(w**2),
            outer=lambda w, lam, _: jnp.sum((w - 0.3) ** 2),
        )
        found = cx.diagnostics.compare_rules(
            problem,
            jnp.array(0.5),
            jnp.zeros(3),
            inner_solver=cx.Steps(optax.sgd(0.1), 200),
            rules={"implicit": cx.Implicit(), "unrolled": cx.Unrolled()},
        )
        found.relative_error[1, 0]  # of the unrolled one against the implicit one
        ```
    """
    names = tuple(rules)
    if len(names) < 2:
        raise ValueError(f"`rules` must hold at least two rules to compare, found {list(names)}.")
    if isinstance(inner_solver, Mapping) and set(names) - set(inner_solver):
        missing = sorted(set(names) - set(inner_solver))
        raise ValueError(f"`inner_solver` is a mapping without an entry for {missing}.")
    found = {
        name: hypergradient(
            problem,
            phi,
            theta0,
            inner_solver=inner_solver[name] if isinstance(inner_solver, Mapping) else inner_solver,
            rule=rule,
            inner_data=inner_data,
            outer_data=outer_data,
            key=key,
            throw=False,
        )
        for name, rule in rules.items()
    }
    flat = [
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(hg.grad)])
        for hg in found.values()
    ]
    norms = np.array([np.linalg.norm(vector) for vector in flat])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.array([[a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for b in flat] for a in flat])
        error = np.array([[np.linalg.norm(a - b) / np.linalg.norm(b) for b in flat] for a in flat])
    messages = {
        name: "" if bool(hg.result == RESULTS.successful) else describe(hg.result)
        for name, hg in found.items()
    }
    comparison = RuleComparison(names, cosine, error, norms, found, messages)
    if printed:
        comparison.print()
    return comparison
