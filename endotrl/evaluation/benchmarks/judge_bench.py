# SPDX-License-Identifier: Apache-2.0
"""JudgeBench (https://huggingface.co/papers/2410.12784): hard questions, a right and a wrong answer of one model."""

from collections.abc import Iterable

import numpy as np

from ...data.sources import HubDataset, Row
from ..intervals import TOTAL, Array, Means
from ..items import Item, pair_item
from .benchmark import Benchmark


CATEGORIES = {
    "mmlu-pro": "Knowledge",
    "livebench-reasoning": "Reasoning",
    "livebench-math": "Mathematics",
    "livecodebench": "Coding",
}


def read(rows: Iterable[Row]) -> list[Item]:
    """Rows `{"pair_id", "source", "question", "response_A", "response_B", "label": "A>B" or "B>A"}`."""
    items = []
    for row in rows:
        label = row.one_of("label", ("A>B", "B>A"))
        source = row.text("source")
        group = next((name for prefix, name in CATEGORIES.items() if source.startswith(prefix)), None)
        if group is None:
            raise row.error(f'"source" must begin with one of {", ".join(CATEGORIES)}, but is {source!r}.')
        responses = row.response("response_A"), row.response("response_B")
        items.append(pair_item(row.name("pair_id"), group, row.text("question"), *responses, label == "A>B"))
    return items


def metrics(means: Means) -> dict[str, Array]:
    """Accuracy over all pairs, and by category."""
    by_category = {name: means[name]["accuracy"] for name in CATEGORIES.values() if name in means}
    return {"accuracy": np.asarray(means[TOTAL]["accuracy"]), **by_category}


BENCHMARK = Benchmark(
    name="judge-bench",
    title="JudgeBench",
    paper="https://huggingface.co/papers/2410.12784",
    hub=HubDataset("ScalerLab/JudgeBench", ("gpt", "claude")),
    read=read,
    metrics=metrics,
    headline=("accuracy", *CATEGORIES.values()),
)
