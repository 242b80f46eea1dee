# SPDX-License-Identifier: Apache-2.0
r"""
PPO with a critic, on the endogenous reward of every token, or on a control.

    accelerate launch --config_file accelerate_configs/cpu.yaml \
        -m endotrl.launch.ppo --config recipes/smollm2-135m/ppo.yaml
"""

from ..trainers.ppo_config import PPOConfig
from ..trainers.ppo_trainer import PPOTrainer
from .pipeline import launch


def main() -> None:
    """Launches PPO from the command line: see [`launch`]."""
    launch(PPOTrainer, PPOConfig)


if __name__ == "__main__":
    main()
