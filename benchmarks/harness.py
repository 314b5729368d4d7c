"""What every benchmark shares: timing in turns, memory of a compiled program, claims, and how they are printed.

A benchmark is a script with a function `measure() -> Report` that ends in

    if __name__ == "__main__":
        harness.main(measure)

It is run alone (`python benchmarks/hypergradient_cold.py`) or by `run.py`. Ours and the peer are measured in the
same process, in turns, so that a noisy machine disturbs both alike; figures are medians.
"""

import argparse
import dataclasses
import inspect
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

# OpenBLAS threads slow small factorisations down by orders of magnitude; must be set before NumPy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# jaxopt announces on import that it is no longer maintained.
warnings.filterwarnings("ignore", message="JAXopt is no longer maintained", category=DeprecationWarning)

import jax  # noqa: E402

VERSIONS = (
    "jax",
    "jaxlib",
    "equinox",
    "lineax",
    "optimistix",
    "optax",
    "jaxopt",
    "torch",
    "torchopt",
    "higher",
    "curvlinops-for-pytorch",
    "numpy",
    "scipy",
    "scikit-learn",
)


@dataclasses.dataclass(frozen=True)
class Claim:
    """`value` must be at least (`at_least`) or at most (`at_most`) the bound; `aim` is what we would like."""

    text: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    aim: float | None = None

    @property
    def holds(self) -> bool:
        """Whether the bound is met; NaN meets none."""
        above = self.at_least is None or self.value >= self.at_least
        below = self.at_most is None or self.value <= self.at_most
        return above and below

    @property
    def bound(self) -> str:
        """The bound as text, with the aim if there is one."""
        bounds = [f"≥ {self.at_least:g}"] if self.at_least is not None else []
        bounds += [f"≤ {self.at_most:g}"] if self.at_most is not None else []
        return " and ".join(bounds) + (f" (aim {self.aim:g})" if self.aim is not None else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """One benchmark: what was measured, a table of figures (one mapping a row, same keys), and the claims."""

    title: str
    setting: str
    rows: list[dict[str, Any]]
    claims: list[Claim]


def in_turns(
    functions: Mapping[str, Callable[[], Any]], repeats: int = 11, warm_ups: int = 2
) -> dict[str, list[float]]:
    """Seconds of each call, `repeats` times in turns, after `warm_ups` calls of each that are not counted.

    The order within a round alternates, so that none always runs right after the same other one.
    """
    for function in functions.values():
        for _ in range(warm_ups):
            jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        names = list(functions) if turn % 2 == 0 else list(functions)[::-1]
        for name in names:
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            times[name].append(time.perf_counter() - start)
    return times


def milliseconds(times: list[float]) -> float:
    """Median of `times`, in ms."""
    return statistics.median(times) * 1e3


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median of the ratios of neighbours in time, less noisy than the ratio of medians."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


def memory_mb(compiled: Any) -> float:
    """Peak memory of a compiled program in MB as XLA planned it: arguments, results and temporaries."""
    analysis = compiled.memory_analysis()
    used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return (used - analysis.alias_size_in_bytes) / 2**20


def relative_error(found: Any, exact: Any) -> float:
    """‖found − exact‖ / ‖exact‖ over all leaves, computed in NumPy."""
    import numpy as np

    def flat(tree: Any) -> Any:
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])

    found, exact = flat(found), flat(exact)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def machine() -> dict[str, Any]:
    """Cores and versions: what a figure depends on, and nothing that identifies the machine."""
    versions = {}
    for package in VERSIONS:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cores": cores,
        "architecture": platform.machine(),
        "system": platform.system(),
        "device": f"{jax.devices()[0].platform} ({jax.devices()[0].device_kind})",
        "python": platform.python_version(),
        "versions": versions,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table."""
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    widths = [max(len(column), *(len(row[i]) for row in cells)) for i, column in enumerate(columns)]

    def line(values: list[str]) -> str:
        return (
            "| " + " | ".join(value.ljust(width) for value, width in zip(values, widths, strict=True)) + " |"
        )

    return "\n".join([line(columns), "|" + "|".join("-" * (w + 2) for w in widths) + "|", *map(line, cells)])


def claims_table(claims: list[Claim]) -> str:
    """Claims as a Markdown table: the figure, the bound, and whether it holds; nothing if there are none."""
    if not claims:
        return ""
    return table(
        [
            {"claim": c.text, "measured": c.value, "bound": c.bound, "holds": "yes" if c.holds else "**no**"}
            for c in claims
        ]
    )


def main(measure: Callable[..., Report], picture: Callable[[Report, str], None] | None = None) -> None:
    """Measure, print, write JSON where `--json FILE` asks for it; exit code 1 if a claim does not hold.

    A `measure(only: str = "")` is told by `--only TEXT` which rows to measure. With a `picture` there is
    `--picture FILE` as well.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to FILE")
    if "only" in inspect.signature(measure).parameters:
        parser.add_argument("--only", metavar="TEXT", help="the rows whose name contains TEXT", default="")
    if picture is not None:
        parser.add_argument("--picture", metavar="FILE", help="also draw them into FILE")
    arguments = vars(parser.parse_args())
    file_name, drawing = arguments.pop("json"), arguments.pop("picture", None)
    report = measure(**arguments)
    print(
        f"{report.title}\n{report.setting}\n\n{table(report.rows)}\n\n{claims_table(report.claims)}",
        flush=True,
    )
    if picture is not None and drawing:
        picture(report, drawing)
    if file_name:
        content = dataclasses.asdict(report) | {
            "holds": all(c.holds for c in report.claims),
            "machine": machine(),
        }
        with open(file_name, "w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
    sys.exit(0 if all(claim.holds for claim in report.claims) else 1)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1e}" if value != 0 and not 1e-2 <= abs(value) < 1e5 else f"{value:.3g}"
    return str(value)
