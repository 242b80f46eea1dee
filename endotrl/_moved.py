# SPDX-License-Identifier: Apache-2.0
"""Deprecated import paths and call signatures of 0.1: still work for one release, with a warning."""

import functools
import importlib
import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


MOVED = {
    "endotrl.cli": "endotrl.commands.main",
    "endotrl.evaluation.benchmarks.base": "endotrl.evaluation.benchmarks.benchmark",
    "endotrl.evaluation.sources": "endotrl.data.sources",
    "endotrl.quickstart": "endotrl.demo",
    "endotrl.quickstart.arithmetic": "endotrl.tasks.arithmetic",
    "endotrl.quickstart.facts": "endotrl.tasks.facts",
    "endotrl.quickstart_model": "endotrl.frozen.quickstart_model",
    "endotrl.recipes": "endotrl.launch",
    "endotrl.rewards.base": "endotrl.rewards.frozen_model_reward",
    "endotrl.scoring.messages": "endotrl.rendering.messages",
    "endotrl.scoring.placement": "endotrl.frozen.placement",
    "endotrl.scoring.recording": "endotrl.scoring.reference_pass",
    "endotrl.scoring.rendering": "endotrl.rendering.renderer",
    "endotrl.trainers.base": "endotrl.trainers.dense_reward_trainer",
}


class MovedModules(MetaPathFinder, Loader):
    """Import hook that finds a module of [`MOVED`] under its former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        former, name = module.__name__, MOVED[module.__name__]
        warnings.warn(f"`{former}` is now `{name}`.", DeprecationWarning, stacklevel=2)
        sys.modules[former] = importlib.import_module(name)


def accept_positional(init: Callable[..., None]) -> Callable[..., None]:
    """
    Lets an `__init__` accept its keyword-only arguments by position, in their order, with a `FutureWarning` that names
    them.
    """
    parameters = list(inspect.signature(init).parameters.values())
    by_position = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    @functools.wraps(init)
    def wrapped(*args: Any, **settings: Any) -> None:
        late = args[len(by_position) :]
        if late and len(late) <= len(keywords):
            given = dict(zip(keywords, late, strict=False))
            words = ", ".join(f"{name}={value!r}" for name, value in given.items())
            warnings.warn(
                f"Arguments after `{by_position[-1]}` become keyword-only in the next release: pass `{words}`.",
                FutureWarning,
                stacklevel=2,
            )
            init(*args[: len(by_position)], **given, **settings)
        else:
            init(*args, **settings)

    return wrapped
