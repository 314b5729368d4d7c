"""Every snippet that a reader can copy runs: README, docs pages, docstrings."""

import doctest
import inspect
import re
import textwrap
from pathlib import Path

import jax
import pytest

from helpers import pages
from test_package import public_objects

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^([ ]*)```python[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
PAGES = [
    page
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if BLOCK.search(page.read_text())
]


def script(page: Path) -> str:
    """The Python blocks of a page as one program in which every line keeps its number."""
    text = page.read_text()
    lines = [""] * text.count("\n")
    for block in BLOCK.finditer(text):
        first = text.count("\n", 0, block.start(2))
        for offset, line in enumerate(textwrap.dedent(block.group(2)).splitlines()):
            lines[first + offset] = line
    return "\n".join(lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page, tmp_path):
    """The blocks of a page, in order, in an interpreter with JAX's default settings."""
    program = tmp_path / "page.py"
    program.write_text(script(page))
    failure = pages.run(program)
    assert not failure, f"{page.name} (line numbers are the page's):\n{failure}"


def docstring_examples() -> dict[str, list[doctest.Example] | list[str]]:
    """The examples of each public docstring and of its public methods: `>>>` lines or python fences."""
    found: dict[str, list] = {}
    for name, value in public_objects().items():
        targets = {name: value}
        if inspect.isclass(value):
            targets |= {
                f"{name}.{k}": v for k, v in vars(value).items() if k[0] != "_" and inspect.isfunction(v)
            }
        for label, target in targets.items():
            text = inspect.getdoc(target) or ""
            examples = doctest.DocTestParser().get_examples(text) or [
                textwrap.dedent(code) for _, code in BLOCK.findall(text)
            ]
            if examples and (inspect.isclass(target) or inspect.isroutine(target)):
                found[label] = examples
    return found


EXAMPLES = docstring_examples()

# What a short example may take for granted; the API's start page says so.
IMPORTS = """
import equinox as eqx, jax, jax.numpy as jnp, lineax as lx, numpy as np, optax, optimistix as optx
import curvax as cx
"""


@pytest.mark.parametrize("name", EXAMPLES)
def test_docstring_example_runs(name, tmp_path, monkeypatch):
    """The example of a docstring runs as it stands, and prints what it says where it says it."""
    monkeypatch.chdir(tmp_path)
    examples = EXAMPLES[name]
    namespace: dict[str, object] = {}
    exec(IMPORTS, namespace)
    with jax.numpy_dtype_promotion("standard"):  # as a reader has it
        run_example(name, examples, namespace)


def run_example(name: str, examples: list, namespace: dict[str, object]) -> None:
    """Execute python fences, or `>>>` lines with their output compared."""
    if isinstance(examples[0], str):
        for block in examples:
            exec(compile(block, name, "exec"), namespace)
        return
    test = doctest.DocTest(examples, namespace, name, None, None, None)
    report: list[str] = []
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    result = doctest.DocTestRunner(optionflags=options).run(test, out=report.append)
    assert result.failed == 0, "".join(report)


# Received, never made by a user, or shown in the docstring of the function that makes it.
WITHOUT_EXAMPLE = {
    "curvax.RESULTS",
    "curvax.bilevel.SolutionMap",
    "curvax.diagnostics.ConditionNumber",
    "curvax.diagnostics.DirectionRow",
    "curvax.diagnostics.Extremes",
    "curvax.diagnostics.Ingredient",
    "curvax.diagnostics.SpectralRadius",
    "curvax.diagnostics.Stationarity",
    "curvax.implicit.Outcome",
    "curvax.linear.Method",
    "curvax.linear.Reason",
    "curvax.operators.CrossDerivative",
    "curvax.operators.Fisher",
    "curvax.operators.GaussNewton",
    "curvax.operators.Hessian",
    "curvax.operators.Jacobian",
}


def test_public_objects_have_an_example():
    """All others have one; results (`Attributes:`) and abstract classes are received too."""
    without = {
        name
        for name, value in public_objects().items()
        if (inspect.isfunction(value) or (inspect.isclass(value) and not inspect.isabstract(value)))
        and name not in EXAMPLES
        and "Attributes:" not in (inspect.getdoc(value) or "")
    }
    assert without == WITHOUT_EXAMPLE
