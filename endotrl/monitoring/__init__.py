# SPDX-License-Identifier: Apache-2.0
"""Sees a run collapse before it has lost much: the callback, its thresholds, and what it measures."""

from .collapse import CollapseMonitor
from .detector import Detector, Verdict
from .thresholds import CollapseThresholds


__all__ = ["CollapseMonitor", "CollapseThresholds", "Detector", "Verdict"]
