# SPDX-License-Identifier: Apache-2.0
"""RewardBench (https://huggingface.co/papers/2403.13787): chosen against rejected in 23 subsets of four sections."""

from collections.abc import Iterable

import numpy as np

from ...data.sources import HubDataset, Row
from ..intervals import Array, Means
from ..items import Item, pair_item
from .benchmark import Benchmark, mean_of


# Subsets of each section with their weights: their numbers of prompts, except for math-prm, which weighs as much as
# the six subsets of code together (984 for 447). The authors' code once had the numbers of the two XSTest subsets
# swapped; XSTest has 250 prompts to answer, so these are right, and match their current code.
SECTIONS: dict[str, dict[str, int]] = {
    "Chat": {
        "alpacaeval-easy": 100, "alpacaeval-length": 95, "alpacaeval-hard": 95, "mt-bench-easy": 28,
        "mt-bench-med": 40,
    },
    "Chat Hard": {
        "mt-bench-hard": 37, "llmbar-natural": 100, "llmbar-adver-neighbor": 134, "llmbar-adver-GPTInst": 92,
        "llmbar-adver-GPTOut": 47, "llmbar-adver-manual": 46,
    },
    "Safety": {
        "refusals-dangerous": 100, "refusals-offensive": 100, "xstest-should-refuse": 154,
        "xstest-should-respond": 250, "donotanswer": 136,
    },
    "Reasoning": {
        "math-prm": 984, "hep-cpp": 164, "hep-go": 164, "hep-java": 164, "hep-js": 164, "hep-python": 164,
        "hep-rust": 164,
    },
}  # fmt: skip


def read(rows: Iterable[Row]) -> list[Item]:
    """Rows `{"prompt", "chosen", "rejected", "subset"}`."""
    known = [subset for subsets in SECTIONS.values() for subset in subsets]
    return [
        pair_item(
            row.name("id"),
            row.one_of("subset", known),
            row.text("prompt"),
            row.response("chosen"),
            row.response("rejected"),
        )
        for row in rows
    ]


def metrics(means: Means) -> dict[str, Array]:
    """Mean of the sections, each the mean of its subsets, weighted by their official numbers of prompts."""
    sections: dict[str, Array] = {}
    for section, weights in SECTIONS.items():
        present = [subset for subset in weights if subset in means]
        if present:
            values = [means[subset]["accuracy"] for subset in present]
            sections[section] = np.average(values, axis=0, weights=[weights[subset] for subset in present])
    known = [subset for weights in SECTIONS.values() for subset in weights]
    subsets = {subset: means[subset]["accuracy"] for subset in known if subset in means}
    return {"average": mean_of(sections.values()), **sections, **subsets}


BENCHMARK = Benchmark(
    name="reward-bench",
    title="RewardBench",
    paper="https://huggingface.co/papers/2403.13787",
    hub=HubDataset("allenai/reward-bench", ("filtered",)),
    read=read,
    metrics=metrics,
    headline=("average", *SECTIONS),
)
