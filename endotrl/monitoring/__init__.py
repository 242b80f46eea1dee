# SPDX-License-Identifier: Apache-2.0
"""Sees a run collapse before it has lost much: the callback, its thresholds, and what it measures."""

from .collapse_thresholds import CollapseThresholds
from .detector import Detector, Verdict
from .monitor import CollapseMonitor


__all__ = ["CollapseMonitor", "CollapseThresholds", "Detector", "Verdict"]
