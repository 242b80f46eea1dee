# SPDX-License-Identifier: Apache-2.0
"""Sentence-level reward model on preferences, for `--reward sentence --reward_sentence_model` of GRPO and PPO."""

from functools import partial

from ..sentence import SentenceRewardTrainer, SentenceRewardTrainerConfig
from .pipeline import launch


main = partial(launch, SentenceRewardTrainer, SentenceRewardTrainerConfig)

if __name__ == "__main__":
    main()
