# SPDX-License-Identifier: Apache-2.0
"""Monitor of a run that collapses, held-out questions asked while it trains, and diagnosis of its logs."""

from typing import TYPE_CHECKING

from .._lazy import attach


__all__ = ["CollapseMonitor", "CollapseThresholds", "Detector", "Diagnosis", "HeldOut", "Verdict", "diagnose"]

if TYPE_CHECKING:
    from .collapse_thresholds import CollapseThresholds
    from .detector import Detector, Verdict
    from .diagnosis.diagnose import Diagnosis, diagnose
    from .held_out import HeldOut
    from .monitor import CollapseMonitor


# On first use: a log is diagnosed without the trainers, whose import takes seconds.
__getattr__, __dir__ = attach(__name__, __all__)
