# SPDX-License-Identifier: Apache-2.0
"""Lazy imports of a package's public names (PEP 562), so that `endotrl --help` does not wait for torch."""

import ast
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module


def attach(package: str, public: Sequence[str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """
    Returns the `__getattr__` and `__dir__` of a package, from its `__all__`. The module of each name is read from the
    imports in the package's source (under `if TYPE_CHECKING:`, as for type checkers).
    """
    locations = {
        alias.name: "." * node.level + str(node.module)
        for node in ast.walk(ast.parse(inspect.getsource(sys.modules[package])))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    def getattr_(name: str) -> object:
        if name not in public or name not in locations:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(locations[name], package), name)

    return getattr_, lambda: sorted(public)
