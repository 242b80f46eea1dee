# SPDX-License-Identifier: Apache-2.0
"""Scoring: from token ids to the frozen model's logit and soft value at every token of a completion."""

from .scorer import FrozenScorer
from .token_stats import TokenStats


__all__ = ["FrozenScorer", "TokenStats"]
