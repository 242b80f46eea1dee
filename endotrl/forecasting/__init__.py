# SPDX-License-Identifier: Apache-2.0
"""What RL on a reward of a frozen model ends with, from samples of the frozen model."""
