# SPDX-License-Identifier: Apache-2.0
"""PPO with a critic, on the endogenous reward of every token, or on a control: launched like [`grpo`]."""

from functools import partial

from ..trainers.ppo_config import PPOConfig
from ..trainers.ppo_trainer import PPOTrainer
from .pipeline import launch


main = partial(launch, PPOTrainer, PPOConfig)

if __name__ == "__main__":
    main()
