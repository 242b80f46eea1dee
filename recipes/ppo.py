# SPDX-License-Identifier: Apache-2.0
r"""
PPO with a critic, on the endogenous reward of every token, or on a control.

    accelerate launch --config_file accelerate_configs/cpu.yaml \
        recipes/ppo.py --config recipes/smollm2-135m/ppo.yaml

Everything in the YAML file can be overridden on the command line, such as `--reward random --output_dir output/random`.
"""

from endotrl import PPOConfig, PPOTrainer
from endotrl.launch import launch


if __name__ == "__main__":
    launch(PPOTrainer, PPOConfig)
