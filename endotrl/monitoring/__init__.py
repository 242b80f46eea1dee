# SPDX-License-Identifier: Apache-2.0
"""Collapse monitor, held-out evaluation during training, and diagnosis of training logs."""

from typing import TYPE_CHECKING

from .._lazy import attach


__all__ = ["CollapseMonitor", "CollapseThresholds", "Detector", "Diagnosis", "HeldOut", "Verdict", "diagnose"]

if TYPE_CHECKING:
    from .collapse_thresholds import CollapseThresholds
    from .detector import Detector, Verdict
    from .diagnosis.diagnose import Diagnosis, diagnose
    from .held_out import HeldOut
    from .monitor import CollapseMonitor


# Lazy: diagnosing a log does not need the trainers, whose import takes seconds.
__getattr__, __dir__ = attach(__name__, __all__)
