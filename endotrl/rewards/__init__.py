# SPDX-License-Identifier: Apache-2.0
"""Reward functions for TRL's trainers."""

from typing import TYPE_CHECKING

from .._lazy import attach


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
    "RoutedReward",
    "SelfCertaintyReward",
    "SentencePooledReward",
    "SentenceReward",
    "endogenous_reward",
]

if TYPE_CHECKING:
    from .accuracy import AccuracyReward
    from .controls import FormatReward, LengthReward, RandomReward
    from .corrections import ClipTokens, InformationGain, LengthControl
    from .endogenous import EndogenousReward
    from .environment import endogenous_reward
    from .intrinsic import MeanLogProbReward, NegativeEntropyReward, RelativePerplexityReward, SelfCertaintyReward
    from .protocol import DenseReward, DenseScores
    from .routed import RoutedReward
    from .sentence import SentenceReward
    from .sentence_pooled import SentencePooledReward


# Resolved on first use, so that the command line, which reads the settings, does not wait for torch.
__getattr__, __dir__ = attach(__name__, __all__)
