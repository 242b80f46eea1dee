# SPDX-License-Identifier: Apache-2.0
"""Import paths of 0.1 that moved: they work for one release, with a `DeprecationWarning`."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


MOVED = {
    "endotrl.cli": "endotrl.commands.main",
    "endotrl.quickstart": "endotrl.demo",
    "endotrl.quickstart.arithmetic": "endotrl.tasks.arithmetic",
    "endotrl.quickstart.facts": "endotrl.tasks.facts",
    "endotrl.quickstart_model": "endotrl.frozen.quickstart_model",
    "endotrl.recipes": "endotrl.launch",
    "endotrl.scoring.messages": "endotrl.rendering.messages",
    "endotrl.scoring.placement": "endotrl.frozen.placement",
    "endotrl.scoring.recording": "endotrl.scoring.reference_pass",
    "endotrl.scoring.rendering": "endotrl.rendering.renderer",
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module of [`MOVED`] under its former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        former, name = module.__name__, MOVED[module.__name__]
        warnings.warn(f"`{former}` is now `{name}`.", DeprecationWarning, stacklevel=2)
        sys.modules[former] = importlib.import_module(name)
