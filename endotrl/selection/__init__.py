# SPDX-License-Identifier: Apache-2.0
"""
Uses of a reward without reinforcement learning: ranking, best of n, preference pairs, scored and filtered datasets.
The implementation of `endotrl pairs`, and library calls.
"""

from typing import TYPE_CHECKING

from .._lazy import attach


__all__ = ["best_of_n", "preference_pairs", "rank", "score_dataset", "top_fraction"]

if TYPE_CHECKING:
    from .datasets import best_of_n, preference_pairs, rank, score_dataset, top_fraction


__getattr__, __dir__ = attach(__name__, __all__)
