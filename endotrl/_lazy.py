# SPDX-License-Identifier: Apache-2.0
"""Names of a package that are imported on first use (PEP 562), so that `endotrl --help` does not wait for torch."""

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module


def attach(
    package: str, locations: Mapping[str, str], public: Sequence[str]
) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package, from the module of every name and its `__all__`."""

    def getattr_(name: str) -> object:
        if name not in locations:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(locations[name], package), name)

    return getattr_, lambda: sorted(public)
