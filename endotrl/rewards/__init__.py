# SPDX-License-Identifier: Apache-2.0
"""Rewards to plug into TRL's trainers."""

from .accuracy import AccuracyReward
from .controls import FormatReward, LengthReward, RandomReward
from .corrections import ClipTokens, InformationGain, LengthControl
from .endogenous import EndogenousReward
from .environment import endogenous_reward
from .intrinsic import MeanLogProbReward, NegativeEntropyReward, RelativePerplexityReward, SelfCertaintyReward
from .protocol import DenseReward, DenseScores
from .sentence import SentenceReward
from .sentence_pooled import SentencePooledReward


__all__ = [
    "AccuracyReward",
    "ClipTokens",
    "DenseReward",
    "DenseScores",
    "EndogenousReward",
    "FormatReward",
    "InformationGain",
    "LengthControl",
    "LengthReward",
    "MeanLogProbReward",
    "NegativeEntropyReward",
    "RandomReward",
    "RelativePerplexityReward",
    "SelfCertaintyReward",
    "SentencePooledReward",
    "SentenceReward",
    "endogenous_reward",
]
