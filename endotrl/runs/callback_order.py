# SPDX-License-Identifier: Apache-2.0
"""Order of this package's callbacks."""

from typing import Any

from transformers import TrainerCallback


# Before the callbacks of transformers and trackers, which save and report what these have added to the log. The first
# one stops a run with NaN before anything of it is logged or saved.
ORDER = ("Interruptions", "Tracking", "HeatMaps", "CollapseMonitor")


def add_in_order(trainer: Any, *callbacks: TrainerCallback) -> None:
    """Adds callbacks, which must be in `ORDER`, to a trainer, each at its place."""
    there = trainer.callback_handler.callbacks
    there += [callback for callback in callbacks if callback not in there]
    there.sort(
        key=lambda c: min(ORDER.index(k.__name__) if k.__name__ in ORDER else len(ORDER) for k in type(c).mro())
    )
