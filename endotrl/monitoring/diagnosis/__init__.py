# SPDX-License-Identifier: Apache-2.0
"""Diagnosis of a finished or running training run of any TRL trainer, from its logs."""

from .diagnose import Diagnosis, diagnose
from .run_logs import Run, read_run
from .symptoms import Finding


__all__ = ["Diagnosis", "Finding", "Run", "diagnose", "read_run"]
