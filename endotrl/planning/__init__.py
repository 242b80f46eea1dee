# SPDX-License-Identifier: Apache-2.0
"""Whether a recipe fits on given hardware, and how long it takes, from configs alone."""

from typing import TYPE_CHECKING


__all__ = ["Hardware", "ModelSize", "Plan", "Workload", "model_size", "plan_memory", "plan_time"]

if TYPE_CHECKING:
    from .memory import Hardware, Plan, Workload, plan_memory
    from .sizes import ModelSize, model_size
    from .timing import plan_time


# Resolved on first use (PEP 562): `endotrl --help` does not wait for torch.
_LOCATIONS = {
    "Hardware": ".memory",
    "ModelSize": ".sizes",
    "Plan": ".memory",
    "Workload": ".memory",
    "model_size": ".sizes",
    "plan_memory": ".memory",
    "plan_time": ".timing",
}


def __getattr__(name: str) -> object:
    if name not in _LOCATIONS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LOCATIONS[name], __name__), name)
