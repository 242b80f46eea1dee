# SPDX-License-Identifier: Apache-2.0
"""ProcessBench (https://huggingface.co/papers/2412.06559): first wrong step of a solution, if there is one."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from ...data.sources import HubDataset, Row
from ..intervals import TOTAL, Array, Means, Unit
from ..items import Item, step_item
from .benchmark import Benchmark, Scores, crossfit_thresholds, fold, harmonic_mean, mean_of


SPLITS = ("gsm8k", "math", "olympiadbench", "omnimath")


def read(rows: Iterable[Row]) -> list[Item]:
    """Rows `{"id", "problem", "steps": [...], "label"}`: `label` is the first wrong step, from 0, or -1."""
    items = []
    longest_first = sorted(SPLITS, key=len, reverse=True)  # "math" is in "omnimath"
    for row in rows:
        steps = row.steps("steps")
        label = row.integer("label", -1, len(steps) - 1)
        # The official ids begin with the split; the file name need not, if a file has several splits.
        texts = (str(row.data.get("id", "")), row.stem)
        group = next((split for text in texts for split in longest_first if split in text), row.stem)
        items.append(step_item(row.name("id"), group, row.text("problem"), steps, {"label": label}))
    return items


def first_below(scores: Sequence[float], threshold: float) -> int:
    """Index of the first step that scores below the threshold, or -1."""
    return next((i for i, score in enumerate(scores) if score < threshold), -1)


def thresholds(items: Sequence[Item], scores: Scores) -> tuple[float, float]:
    """Thresholds of the two halves, chosen for the average F1 on the other half."""

    def quality_of(indices: Sequence[int]) -> Callable[[float], float]:
        width = max(len(scores[i]) for i in indices)
        table = np.array([[*scores[i], *[np.inf] * (width - len(scores[i]))] for i in indices])  # (items, steps)
        labels = np.array([items[i].facts["label"] for i in indices])
        groups = np.array([items[i].group for i in indices])

        def quality(threshold: float) -> float:
            below = table < threshold
            hits = np.where(below.any(axis=1), below.argmax(axis=1), -1) == labels
            f1 = []
            for group in np.unique(groups):
                parts = [hits[(groups == group) & which] for which in (labels != -1, labels == -1)]
                error, correct = (part.mean() if len(part) else 0.0 for part in parts)
                f1.append(harmonic_mean(np.asarray(error), np.asarray(correct)))
            return float(np.mean(f1))

        return quality

    return crossfit_thresholds(items, scores, quality_of)


def units(items: Sequence[Item], scores: Scores) -> list[Unit]:
    """One unit per solution: whether the first step below the threshold, and the lowest, is the first wrong one."""
    of_fold = thresholds(items, scores)
    result = []
    for item, row in zip(items, scores, strict=True):
        label = item.facts["label"]
        right = float(first_below(row, of_fold[fold(item)]) == label)
        located = {"error": right, "located": float(row.index(min(row)) == label)}
        result.append(Unit(f"{item.group} {item.id}", item.group, {"correct": right} if label == -1 else located))
    return result


def metrics(means: Means) -> dict[str, Array]:
    """F1, the harmonic mean of the accuracies on wrong and on correct solutions, per split, and their mean."""
    groups = [group for group in means if group != TOTAL]
    zero = np.zeros_like(next(iter(means[TOTAL].values())))
    f1 = {group: harmonic_mean(means[group].get("error", zero), means[group].get("correct", zero)) for group in groups}
    result = {"average F1": mean_of(f1.values())}
    for key in ("error", "correct", "located"):
        if any(key in means[g] for g in groups):
            result[key] = mean_of(means[g][key] for g in groups if key in means[g])
    return result | {f"{group} F1": value for group, value in f1.items()}


BENCHMARK = Benchmark(
    name="process-bench",
    title="ProcessBench",
    paper="https://huggingface.co/papers/2412.06559",
    hub=HubDataset("Qwen/ProcessBench", SPLITS),
    read=read,
    units=units,
    metrics=metrics,
    headline=("average F1", "error", "correct", "located", *(f"{split} F1" for split in SPLITS)),
    tie_rule="A step is called wrong if it scores strictly below the threshold, which is chosen on the other half of "
    "the solutions; of equally low steps, the first counts as located.",
    details=lambda items, scores: {"thresholds": list(thresholds(items, scores))},
)
