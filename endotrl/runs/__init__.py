# SPDX-License-Identifier: Apache-2.0
"""What survives a crash: atomic writes, locks, JSON Lines logs, records, checkpoints, resuming."""
