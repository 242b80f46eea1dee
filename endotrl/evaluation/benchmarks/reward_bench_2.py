# SPDX-License-Identifier: Apache-2.0
"""
RewardBench 2 (https://huggingface.co/papers/2506.01937): the right answer among four, and Ties: questions with several
right answers, whose scores should differ less from each other than from the wrong ones.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from ...data.sources import HubDataset, Row
from ..intervals import Array, Means, Unit
from ..items import Item
from .benchmark import Benchmark, Scores, mean_of


TIES = "Ties"


def read(rows: Iterable[Row]) -> list[Item]:
    """
    Rows `{"id", "prompt", "chosen": [...], "rejected": [...], "subset"}`. Ids of Ties are `"ref:N"` (one right answer)
    and `"tied:N"` (several).
    """
    items = []
    seen: set[str] = set()
    for row in rows:
        subset = row.text("subset")
        chosen, rejected = row.responses("chosen"), row.responses("rejected")
        if subset.lower() == TIES.lower():
            kind, _, number = row.text("id").partition(":")
            if kind not in ("ref", "tied") or not number:
                raise row.error('the "id" of a row of Ties must be "ref:N" or "tied:N".')
            if row.data["id"] in seen:
                raise row.error(f'the "id" {row.data["id"]} of Ties is there twice; it joins two questions.')
            seen.add(row.data["id"])
            if kind == "tied" and len(chosen) < 2:
                raise row.error('a row "tied:N" must have at least two right answers in "chosen".')
            group, cluster, facts = TIES, f"{TIES} {number}", {"kind": kind, "num_correct": len(chosen)}
        else:
            if len(chosen) != 1:
                raise row.error(f'"chosen" must be a list of 1 text outside Ties, but has {len(chosen)}.')
            group, cluster, facts = subset, f"{subset} {row.name('id')}", {}
        pairs = tuple((i, len(chosen) + j) for i in range(len(chosen)) for j in range(len(rejected)))
        responses = (*chosen, *rejected)
        items.append(Item(row.name("id"), group, row.text("prompt"), responses, pairs, cluster=cluster, facts=facts))
    return items


def units(items: Sequence[Item], scores: Scores) -> list[Unit]:
    """One unit per item, 1/k if the right answer is among the k best; in Ties, one per question and reference."""
    result = []
    ties: dict[str, dict[str, tuple[float, float]]] = {}
    for item, row in zip(items, scores, strict=True):
        if item.group != TIES:
            best = max(row)
            value = 1.0 / sum(score == best for score in row) if row[0] == best else 0.0
            result.append(Unit(item.cluster or item.id, item.group, {"accuracy": value}))
            continue
        right, wrong = row[: item.facts["num_correct"]], row[item.facts["num_correct"] :]
        # Distance of the right answers from the wrong ones, and from each other.
        gap, spread = min(right) - max(wrong), max(right) - min(right)
        ties.setdefault(item.cluster or item.id, {})[item.facts["kind"]] = (gap, spread)
    return result + [Unit(cluster, TIES, _ties_values(questions)) for cluster, questions in ties.items()]


def _ties_values(questions: dict[str, tuple[float, float]]) -> dict[str, float]:
    values = {f"{kind} accuracy": float(gap > 0) for kind, (gap, _) in questions.items()}
    if len(questions) == 2:
        gap, spread = questions["tied"]
        smaller = min(gap, questions["ref"][0])
        values |= {"preferred": float(gap > spread), "preferred hard": float(smaller > spread)}
        # If the spread is 0, the limit; 0 where both are 0.
        values["margin"] = math.tanh(smaller / spread - 1) if spread > 0 else float(np.sign(smaller))
    return values


def metrics(means: Means) -> dict[str, Array]:
    """
    Mean of the subsets. Ties is 0.3 accuracy on tied questions + 0.3 on reference questions + 0.2 (the right
    answers differ less from each other than from the wrong ones) + 0.2 (the same with the gap of the reference
    question, if that is smaller) + 0.01 tanh(gap / spread - 1).
    """
    subsets = {group: values["accuracy"] for group, values in means.items() if "accuracy" in values and group != "*"}
    if TIES in means:
        ties = means[TIES]
        zero = np.zeros_like(next(iter(ties.values())))
        weights = {"tied accuracy": 0.3, "ref accuracy": 0.3, "preferred": 0.2, "preferred hard": 0.2, "margin": 0.01}
        subsets[TIES] = sum((weight * ties.get(key, zero) for key, weight in weights.items()), start=zero)
    return {"average": mean_of(subsets.values()), **subsets}


BENCHMARK = Benchmark(
    name="reward-bench-2",
    title="RewardBench 2",
    paper="https://huggingface.co/papers/2506.01937",
    hub=HubDataset("allenai/reward-bench-2", ("test",)),
    read=read,
    units=units,
    metrics=metrics,
    headline=("average", "Factuality", "Precise IF", "Math", "Safety", "Focus", TIES),
    tie_rule="If the right answer shares the best score with others, it counts 1/k of k; in Ties, a right answer must "
    "score strictly higher than each wrong one.",
)
