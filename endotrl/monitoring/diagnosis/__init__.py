# SPDX-License-Identifier: Apache-2.0
"""Diagnosis of a finished or running training run of any trainer of TRL, from what it logged."""

from .checks import Finding
from .diagnose import Diagnosis, diagnose
from .sources import Run, read_run


__all__ = ["Diagnosis", "Finding", "Run", "diagnose", "read_run"]
