"""Griffe extension: an Equinox module is a dataclass, though no decorator says so.

With it the API pages show `Implicit(rtol=1e-2, …)` and check documented arguments against the fields.
"""

from typing import Any

import griffe

BASES = ("equinox.Module", "lineax.Abstract", "optimistix.Abstract", "curvax.")


class EquinoxModules(griffe.Extension):
    """Marks classes whose base is, or derives from, `equinox.Module`."""

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Add the decorator that griffe looks for, unless the class has its own `__init__`."""
        bases = [str(getattr(base, "canonical_path", base)) for base in cls.bases]
        if "__init__" not in cls.members and any(base.startswith(BASES) for base in bases):
            decorator = griffe.ExprName(name="dataclasses.dataclass")
            cls.decorators.append(griffe.Decorator(decorator, lineno=cls.lineno, endlineno=cls.lineno))
