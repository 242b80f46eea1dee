# SPDX-License-Identifier: Apache-2.0
r"""
A sentence-level reward model, trained on preferences, for `--reward sentence --reward_sentence_model` of grpo.py and ppo.py.

    accelerate launch --config_file accelerate_configs/cpu.yaml \
        recipes/sentence_reward.py --config recipes/smollm2-135m/sentence_reward.yaml

Everything in the YAML file can be overridden on the command line, such as `--aggregator sum`.
"""

from endotrl.launch import launch_sentence_reward


if __name__ == "__main__":
    launch_sentence_reward()
