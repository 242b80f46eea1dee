# SPDX-License-Identifier: Apache-2.0
r"""
A sentence-level reward model, trained on preferences, for `--reward sentence --reward_sentence_model` of GRPO and PPO.

    accelerate launch --config_file accelerate_configs/cpu.yaml \
        -m endotrl.launch.sentence_reward --config recipes/smollm2-135m/sentence_reward.yaml
"""

from ..sentence import SentenceRewardTrainer, SentenceRewardTrainerConfig
from .pipeline import launch


def main() -> None:
    """Launches the training of a sentence-level reward model from the command line: see [`launch`]."""
    launch(SentenceRewardTrainer, SentenceRewardTrainerConfig)


if __name__ == "__main__":
    main()
