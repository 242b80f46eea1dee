# SPDX-License-Identifier: Apache-2.0
"""Rewards to plug into TRL's trainers."""

from .controls import LengthReward, RandomReward
from .endogenous import EndogenousReward
from .environment import endogenous_reward


__all__ = ["EndogenousReward", "LengthReward", "RandomReward", "endogenous_reward"]
