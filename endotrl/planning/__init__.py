# SPDX-License-Identifier: Apache-2.0
"""Whether a recipe fits on given hardware, and how long it takes, from configs alone."""

from typing import TYPE_CHECKING

from .._lazy import attach


__all__ = ["Hardware", "ModelSize", "Plan", "Workload", "model_size", "plan_memory", "plan_time"]

if TYPE_CHECKING:
    from .memory import Hardware, Plan, Workload, plan_memory, plan_time
    from .sizes import ModelSize, model_size


# Resolved on first use (PEP 562): `endotrl --help` does not wait for torch.
__getattr__, __dir__ = attach(__name__, __all__)
