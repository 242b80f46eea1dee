# SPDX-License-Identifier: Apache-2.0
"""
From step scores to steps called wrong: a step is wrong if it scores below a threshold. Intrinsic rewards have no
natural zero, so the threshold is chosen on one half of the items and used on the other: no item has a say in its own.
"""

from collections.abc import Callable, Sequence

import numpy as np

from ..items import Item
from .benchmark import Scores


NUM_CANDIDATES = 200


def fold(item: Item) -> int:
    """Which half an item is in: by its content, so that order and number of items do not matter."""
    return int(item.key, 16) % 2


def crossfit_thresholds(
    items: Sequence[Item], scores: Scores, quality_of: Callable[[Sequence[int]], Callable[[float], float]]
) -> tuple[float, float]:
    """
    Threshold for each half, fold 0 and fold 1: the candidate (quantiles of step scores) with which the other half does
    best. `quality_of` tells how well the items of some indices do with a threshold.
    """
    result = []
    for half in (0, 1):
        others = [i for i, item in enumerate(items) if fold(item) != half] or list(range(len(items)))
        values = np.concatenate([np.asarray(scores[i], dtype=float) for i in others])
        candidates = np.unique(np.quantile(values, np.linspace(0, 1, NUM_CANDIDATES + 1)))
        result.append(max(candidates.tolist(), key=quality_of(others)))
    return result[0], result[1]
