# SPDX-License-Identifier: Apache-2.0
"""Forecast of the outcome of RL on a frozen model's reward, from its samples. Nothing heavy is imported here."""

from typing import Literal


Trainer = Literal["rloo", "grpo", "dense_grpo", "ppo"]  # the first two are TRL's, the others ours
ScaleRewards = Literal["group", "batch", "none"]  # as in `trl.GRPOConfig`
BETAS = (2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
TEMPERATURES = (1.0, 0.7, 0.5)
