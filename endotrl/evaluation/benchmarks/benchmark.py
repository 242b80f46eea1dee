# SPDX-License-Identifier: Apache-2.0
"""Benchmark definition: parsing of rows, correctness, metrics."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.sources import HubDataset, Row
from ..intervals import TOTAL, Array, Means, Unit
from ..items import Item


Scores = Sequence[Sequence[float]]  # by item: one number per response, or per step
NUM_CANDIDATES = 200  # thresholds of step scores
STRICT = "A tie is not right: the better response must score strictly higher."


def mean_of(arrays: Iterable[Array]) -> Array:
    """Unweighted mean of metrics."""
    return np.mean(np.stack(list(arrays)), axis=0)


def harmonic_mean(a: Array, b: Array) -> Array:
    """F1 of two rates; 0 where both are 0."""
    total = a + b
    return np.where(total > 0, 2 * a * b / np.where(total > 0, total, 1.0), 0.0)


def pair_units(items: Sequence[Item], scores: Scores) -> list[Unit]:
    """One unit per item: the fraction of its pairs in which the better response scores strictly higher."""
    return [
        Unit(
            item.cluster or f"{item.group} {item.id}",  # two files may number their items alike
            item.group,
            {"accuracy": sum(row[better] > row[worse] for better, worse in item.better) / len(item.better)},
        )
        for item, row in zip(items, scores, strict=True)
    ]


def accuracy_metrics(means: Means) -> dict[str, Array]:
    """Accuracy over all items, then by group if there are several."""
    metrics = {"accuracy": means[TOTAL]["accuracy"]}
    groups = [group for group in means if group != TOTAL]
    if len(groups) > 1:
        metrics |= {group: means[group]["accuracy"] for group in groups}
    return metrics


def fold(item: Item) -> int:
    """Index of the half that an item belongs to: by its content, whatever the order and number of items."""
    return int(item.key, 16) % 2


def crossfit_thresholds(
    items: Sequence[Item], scores: Scores, quality_of: Callable[[Sequence[int]], Callable[[float], float]]
) -> tuple[float, float]:
    """
    Thresholds per half, below which a step counts as wrong: the candidate (quantiles of step scores) that does best on
    the other half, by `quality_of` the items at some indices. Intrinsic rewards have no natural zero, and no item
    affects its own threshold.
    """
    result = []
    for half in (0, 1):
        others = [i for i, item in enumerate(items) if fold(item) != half] or list(range(len(items)))
        values = np.concatenate([np.asarray(scores[i], dtype=float) for i in others])
        candidates = np.unique(np.quantile(values, np.linspace(0, 1, NUM_CANDIDATES + 1)))
        result.append(max(candidates.tolist(), key=quality_of(others)))
    return result[0], result[1]


@dataclass(frozen=True)
class Benchmark:
    """Definition of a benchmark, and of its metrics."""

    name: str  # as on the command line
    title: str  # display name
    paper: str  # link
    hub: HubDataset | None  # `None` if it must be given as a file
    read: Callable[[Iterable[Row]], list[Item]]  # rows of a file to items; raises [`FormatError`]
    metrics: Callable[[Means], dict[str, Array]]  # group means to metrics, the main one first
    headline: tuple[str, ...]  # metrics for tables, where available
    units: Callable[[Sequence[Item], Scores], list[Unit]] = pair_units  # scores of one scorer to units of correctness
    tie_rule: str = STRICT  # how equal scores count, in words
    details: Callable[[Sequence[Item], Scores], dict[str, Any]] = lambda items, scores: {}  # further results
    chat: bool = True  # text prompts become user messages, if there is a chat template
    reads_images: bool = False  # whether rows may have images
