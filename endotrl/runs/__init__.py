# SPDX-License-Identifier: Apache-2.0
"""Crash-safe runs: atomic writes, locks, JSON Lines logs, records, checkpoints, resuming."""
