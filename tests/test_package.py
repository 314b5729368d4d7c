"""The package as a whole: what it exports, what importing it does, and the statuses that all rooms share."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
import pytest

import curvax as cx

ROOT = Path(__file__).parents[1]
ROOMS = sorted(module.name for module in pkgutil.iter_modules(cx.__path__) if not module.name.startswith("_"))


def public_names(module: types.ModuleType) -> list[str]:
    """The names that a module offers: its `__all__`, else what is neither private nor a submodule."""
    if hasattr(module, "__all__"):
        return sorted(module.__all__)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    )


def public_objects() -> dict[str, object]:
    """Every public object of the package by its shortest name, each once."""
    found: dict[int, tuple[str, object]] = {}
    for prefix in ("curvax", *(f"curvax.{room}" for room in ROOMS)):
        module = importlib.import_module(prefix)
        for name in public_names(module):
            value = getattr(module, name)
            found.setdefault(id(value), (f"{prefix}.{name}", value))
    return dict(found.values())


def run_python(code: str, **environment: str) -> str:
    """The output of a fresh interpreter in which nothing has been set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=kept | environment,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_changes_no_setting():
    """Neither JAX's configuration nor the environment nor the warning filters."""
    run_python(
        "import os, warnings, jax, equinox, lineax, optimistix, optax\n"
        "settings = lambda: (dict(jax.config.values), dict(os.environ), list(warnings.filters))\n"
        "before = settings()\n"
        "import curvax\n"
        "assert settings() == before\n"
        "assert jax.numpy.zeros(1).dtype == 'float32'\n"
    )


def test_importing_computes_nothing():
    """No array is made at import: JAX's backends, and thereby the memory of a GPU, stay untouched."""
    run_python("import curvax", JAX_PLATFORMS="there-is-no-such-platform")


def test_importing_is_cheap():
    """What only the command line and the checkpoints need is not loaded by `import curvax`."""
    heavy = ["matplotlib", "pandas", "sklearn", "scipy", "orbax", "tensorstore"]
    code = f"import curvax, sys; print([name for name in {heavy} if name in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_public_objects_have_one_home():
    """What a room or the package exports is defined in the package, not a dependency that leaked."""
    leaked = [
        name
        for name, value in public_objects().items()
        if (home := getattr(value, "__module__", None)) is not None and not home.startswith("curvax")
    ]
    assert not leaked


@pytest.mark.parametrize(
    "name",
    [name for name, value in public_objects().items() if inspect.isclass(value) or inspect.isroutine(value)],
)
def test_public_objects_are_documented(name):
    """Every public class and function says what it is; functions with arguments list them."""
    value = public_objects()[name]
    text = inspect.getdoc(value) or ""
    assert len(text.splitlines()[0]) > 10, f"{name} has no docstring"
    if inspect.isfunction(value) and inspect.signature(value).parameters:
        assert re.search(r"^Args:$", text, re.MULTILINE), f"{name} has no Args section"


@pytest.mark.parametrize("room", ROOMS)
def test_api_page_lists_what_the_room_exports(room):
    """`docs/api/<room>.md` names every public object of the room and nothing else."""
    page = (ROOT / "docs" / "api" / f"{room}.md").read_text()
    documented = re.findall(rf"^::: curvax\.{room}\.(\w+)$", page, re.MULTILINE)
    assert sorted(documented) == public_names(importlib.import_module(f"curvax.{room}"))


STATUSES = [
    "successful",
    "singular_curvature",
    "indefinite_curvature",
    "no_influence",
    "adjoint_not_converged",
    "inner_not_converged",
    "precision_limited",
    "chaotic_path",
    "flow_not_finished",
]


def test_results_are_told_apart():
    """Each status of ours equals itself alone, also under `jit`, and all but success say what to do."""
    members = [getattr(cx.RESULTS, name) for name in STATUSES]
    same = jax.jit(lambda a, b: a == b)
    for i, first in enumerate(members):
        for j, second in enumerate(members):
            assert bool(same(first, second)) == (i == j)
    messages = [cx.RESULTS[member] for member in members]
    assert messages[0] == "" and len(set(messages)) == len(messages)
    assert all(len(message) > 40 for message in messages[1:])


@pytest.mark.parametrize("foreign", [lx.RESULTS, optx.RESULTS])
def test_results_take_in_foreign_statuses(foreign):
    """Lineax's and Optimistix's statuses are promoted; comparing without promotion raises."""
    assert cx.RESULTS.promote(foreign.successful) == cx.RESULTS.successful
    assert cx.RESULTS.promote(foreign.singular) == cx.RESULTS.singular
    assert cx.RESULTS.promote(foreign.singular) != cx.RESULTS.singular_curvature
    with pytest.raises(ValueError):
        bool(cx.RESULTS.successful == foreign.successful)


def test_results_are_chosen_inside_jit_and_vmap():
    """`RESULTS.where` selects element by element."""

    @jax.jit
    @jax.vmap
    def judge(curvature):
        return (
            cx.RESULTS.where(curvature > 0, cx.RESULTS.successful, cx.RESULTS.indefinite_curvature)
            == cx.RESULTS.indefinite_curvature
        )

    assert judge(jnp.array([1.0, -1.0, 2.0])).tolist() == [False, True, False]
