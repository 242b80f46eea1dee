# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported on first use (PEP 562), so that `endotrl --help` does not wait for torch."""

import ast
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib import import_module


def attach(package: str, public: Sequence[str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """
    The `__getattr__` and `__dir__` of a package, from its `__all__`. Which module a name is in, its source says, under
    `if TYPE_CHECKING:`, to type checkers and so here.
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
