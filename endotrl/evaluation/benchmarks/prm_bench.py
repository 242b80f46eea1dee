# SPDX-License-Identifier: Apache-2.0
"""
PRMBench (https://huggingface.co/papers/2501.03124): detection of wrong steps in solutions that were altered.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...data.sources import HubDataset, Row
from ..intervals import TOTAL, Array, Means, Unit
from ..items import Item, step_item
from .benchmark import Benchmark, Scores, crossfit_thresholds, fold, harmonic_mean


CORRECT = "correct"
# The class whose rows also carry the correct solutions, as in the authors' code (and with their spelling).
WITH_CORRECT = "redundency"


def read(rows: Iterable[Row]) -> list[Item]:
    """
    Rows `{"idx", "modified_question", "modified_process": [...], "error_steps", "classification"}`; `error_steps`
    count from 1. Solutions of the class "redundency" are read in their original, correct form as well.
    """
    items, seen = [], set()
    for row in rows:
        steps, group = row.steps("modified_process"), row.text("classification")
        errors = row.get("error_steps")
        if not isinstance(errors, list) or not all(isinstance(error, int) and error >= 1 for error in errors):
            raise row.error('"error_steps" must be a list of whole numbers from 1.')
        name = row.name("idx")
        if group == WITH_CORRECT and (CORRECT, name) not in seen:
            original = row.steps("original_process")
            facts: dict[str, Any] = {"errors": []}
            items.append(step_item(f"{CORRECT} {name}", CORRECT, row.text("original_question"), original, facts))
        if (group, name) not in seen:
            # Some rows name a step after the last one; the authors' code skips it, too.
            facts = {"errors": sorted({error - 1 for error in errors if error <= len(steps)})}
            items.append(step_item(f"{group} {name}", group, row.text("modified_question"), steps, facts))
        seen |= {(CORRECT, name), (group, name)} if group == WITH_CORRECT else {(group, name)}
    return items


def confusion(accepted: NDArray[np.bool_], wrong: NDArray[np.bool_]) -> dict[str, float]:
    """Counts of steps: right or wrong, accepted (at or above the threshold) or not. "Positive" is a right step."""
    counts = {"TP": accepted & ~wrong, "FP": accepted & wrong, "TN": ~accepted & wrong, "FN": ~accepted & ~wrong}
    return {name: float(steps.sum()) for name, steps in counts.items()}


def prm_score(counts: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """F1 of the right steps, F1 of the wrong steps, and their mean, the PRMScore."""
    TP, FP, TN, FN = (np.asarray(counts[name]) for name in ("TP", "FP", "TN", "FN"))
    positive = harmonic_mean(_ratio(TP, TP + FP), _ratio(TP, TP + FN))
    negative = harmonic_mean(_ratio(TN, TN + FN), _ratio(TN, TN + FP))
    return positive, negative, (positive + negative) / 2


def thresholds(items: Sequence[Item], scores: Scores) -> tuple[float, float]:
    """Thresholds of the two halves, chosen for the PRMScore on the other half."""

    def quality_of(indices: Sequence[int]) -> Callable[[float], float]:
        values = np.concatenate([np.asarray(scores[i], dtype=float) for i in indices])
        wrong = np.concatenate([_wrong(items[i]) for i in indices])
        return lambda threshold: float(prm_score(confusion(values >= threshold, wrong))[2])

    return crossfit_thresholds(items, scores, quality_of)


def _wrong(item: Item) -> NDArray[np.bool_]:
    return np.isin(np.arange(item.num_scores), item.facts["errors"])


def units(items: Sequence[Item], scores: Scores) -> list[Unit]:
    """
    One unit per solution: its counts of right and wrong steps, accepted or not; whether its first wrong step is found;
    and the probability that one of its right steps scores above a wrong one (`auc`, ties half), which needs no
    threshold.
    """
    of_fold = thresholds(items, scores)
    result = []
    for item, row in zip(items, scores, strict=True):
        threshold, errors = of_fold[fold(item)], item.facts["errors"]
        if item.group == CORRECT:
            # As in the authors' code, correct solutions are left out of the totals.
            values = {"accepted": sum(score >= threshold for score in row) / len(row)}
        else:
            values = confusion(np.asarray(row) >= threshold, _wrong(item))
            if errors:
                values["first error"] = float(row[errors[0]] < threshold)
            right = [score for i, score in enumerate(row) if i not in errors]
            wrong = [row[i] for i in errors]
            if right and wrong:
                wins = sum((a > b) + 0.5 * (a == b) for a in right for b in wrong)
                values["auc"] = wins / (len(right) * len(wrong))
        result.append(Unit(item.id.removeprefix(f"{item.group} "), item.group, values))
    return result


def metrics(means: Means) -> dict[str, Array]:
    """PRMScore over the steps of all classes, its two F1 scores, and the PRMScore of each class."""
    total = means[TOTAL]
    result: dict[str, Array] = {}
    if "TP" in total:
        positive, negative, score = prm_score(total)
        result = {"PRMScore": score, "F1": positive, "negative F1": negative}
    result |= {key: total[key] for key in ("first error", "auc") if key in total}
    for group, values in means.items():
        if group == CORRECT:
            result[CORRECT] = values["accepted"]
        elif group != TOTAL:
            result[group] = prm_score(values)[2]
    return result


def _ratio(a: Array, b: Array) -> Array:
    return np.where(b > 0, a / np.where(b > 0, b, 1.0), 0.0)


BENCHMARK = Benchmark(
    name="prm-bench",
    title="PRMBench",
    paper="https://huggingface.co/papers/2501.03124",
    hub=HubDataset("hitsmy/PRMBench_Preview", ("train",)),
    read=read,
    units=units,
    metrics=metrics,
    headline=("PRMScore", "F1", "negative F1", "first error", "auc"),
    tie_rule="A step is called wrong if it scores strictly below the threshold, which is chosen on the other half of "
    "the solutions; in the AUC a tie counts one half.",
    details=lambda items, scores: {"thresholds": list(thresholds(items, scores))},
)
