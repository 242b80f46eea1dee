# SPDX-License-Identifier: Apache-2.0
"""Files that survive a crash: atomic writes, locks, checkpoints, resumption."""
