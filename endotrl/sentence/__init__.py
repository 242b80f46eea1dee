# SPDX-License-Identifier: Apache-2.0
"""Sentence-level reward model (https://huggingface.co/papers/2503.04793): segmentation, model and trainer."""

from typing import TYPE_CHECKING

from .._lazy import attach
from .boundary_rules import RuleSegmenter
from .segmentation import SatSegmenter, Segmenter, load_segmenter


__all__ = [
    "EncodedResponse",
    "RuleSegmenter",
    "SatSegmenter",
    "Segmenter",
    "SentenceEncoder",
    "SentenceRewardConfig",
    "SentenceRewardModel",
    "SentenceRewardOutput",
    "SentenceRewardTrainer",
    "SentenceRewardTrainerConfig",
    "SentenceTokens",
    "find_sentences",
    "last_tokens",
    "load_segmenter",
]

if TYPE_CHECKING:
    from .configuration import SentenceRewardConfig
    from .encoding import EncodedResponse, SentenceEncoder
    from .modeling import SentenceRewardModel, SentenceRewardOutput
    from .tokens import SentenceTokens, find_sentences, last_tokens
    from .trainer import SentenceRewardTrainer
    from .trainer_config import SentenceRewardTrainerConfig


# Resolved on first use (PEP 562): splitting text into sentences needs neither torch nor TRL.
__getattr__, __dir__ = attach(__name__, __all__)
