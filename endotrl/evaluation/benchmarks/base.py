# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is: how its rows are read, what counts as right, and how it averages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..intervals import TOTAL, Array, Means, Unit
from ..items import Item
from ..sources import HubDataset


Scores = Sequence[Sequence[float]]  # by item: one number a response, or a step


def no_details(items: Sequence[Item], scores: Scores) -> dict[str, Any]:
    """For benchmarks whose metrics say all."""
    return {}


@dataclass(frozen=True)
class Benchmark:
    """
    A benchmark.

    Attributes:
        name (`str`):
            As on the command line.
        title (`str`):
            As people write it.
        paper (`str`):
            Link.
        hub ([`HubDataset`], *optional*):
            Where the hub has it; `None` if it must be given as a file.
        read (`Callable[[Iterable[Row]], list[Item]]`):
            Rows of a file to items. Raises [`FormatError`].
        units (`Callable[[Sequence[Item], Scores], list[Unit]]`):
            Scores of one scorer to what counts as right.
        metrics (`Callable[[Means], dict[str, Array]]`):
            Averaging: group means to metrics, the main one first.
        headline (`tuple[str, ...]`):
            Metrics for tables, as far as they are there.
        tie_rule (`str`):
            What two equal scores count as, in words.
        details (`Callable[[Sequence[Item], Scores], dict[str, Any]]`, *optional*):
            What else the results say of a scorer.
        chat (`bool`, *optional*, defaults to `True`):
            Whether prompts given as text are messages of a user, where the model has a chat template.
        options (`tuple[str, ...]`, *optional*):
            Keyword arguments that `read` takes.
    """

    name: str
    title: str
    paper: str
    hub: HubDataset | None
    read: Callable[..., list[Item]]
    units: Callable[[Sequence[Item], Scores], list[Unit]]
    metrics: Callable[[Means], dict[str, Array]]
    headline: tuple[str, ...]
    tie_rule: str
    details: Callable[[Sequence[Item], Scores], dict[str, Any]] = no_details
    chat: bool = True
    options: tuple[str, ...] = ()


STRICT = "A tie is not right: the better response must score strictly higher."


def mean_of(arrays: Iterable[Array]) -> Array:
    """Plain mean of metrics."""
    return np.mean(np.stack(list(arrays)), axis=0)


def harmonic_mean(a: Array, b: Array) -> Array:
    """F1 of two rates; 0 where both are 0."""
    total = a + b
    return np.where(total > 0, 2 * a * b / np.where(total > 0, total, 1.0), 0.0)


def pair_units(items: Sequence[Item], scores: Scores) -> list[Unit]:
    """One unit an item: the fraction of its pairs in which the better response scores strictly higher."""
    return [
        Unit(
            item.cluster or f"{item.group} {item.id}",  # two files may count their items alike
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
