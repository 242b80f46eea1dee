# SPDX-License-Identifier: Apache-2.0
"""LLMBar (https://huggingface.co/papers/2310.07641): outputs that follow an instruction, or only look better."""

from collections.abc import Iterable

from ...data.sources import HubDataset, Row
from ..intervals import Array, Means
from ..items import Item, pair_item
from .benchmark import Benchmark, mean_of


SUBSETS = ("Natural", "Neighbor", "GPTInst", "GPTOut", "Manual")


def read(rows: Iterable[Row]) -> list[Item]:
    """Rows of the authors' files, with the subset in their path, or of RewardBench, which has all five in full."""
    items = []
    for row in rows:
        if "subset" in row.data:
            if not str(row.data["subset"]).startswith("llmbar-"):
                continue
            prompt, outputs, label = row.text("prompt"), (row.response("chosen"), row.response("rejected")), 1
            group = _subset(str(row.data["subset"]))
        else:
            prompt, outputs = row.text("input"), (row.response("output_1"), row.response("output_2"))
            label = row.one_of("label", (1, 2))
            group = _subset(row.source)
        if group is None:
            raise row.error(f"the file's path does not tell the subset: it must contain one of {', '.join(SUBSETS)}.")
        items.append(pair_item(f"{group} {row.name('id')}", group, prompt, *outputs, label == 1))
    return items


def metrics(means: Means) -> dict[str, Array]:
    """Mean of the subsets, and of the four adversarial ones."""
    subsets = {name: means[name]["accuracy"] for name in SUBSETS if name in means}
    result = {"average": mean_of(subsets.values())}
    adversarial = [value for name, value in subsets.items() if name != "Natural"]
    if adversarial:
        result["adversarial"] = mean_of(adversarial)
    return result | subsets


def _subset(text: str) -> str | None:
    return next((name for name in SUBSETS if name.lower() in text.lower()), None)


BENCHMARK = Benchmark(
    name="llmbar",
    title="LLMBar",
    paper="https://huggingface.co/papers/2310.07641",
    # The authors' own hub dataset is a script, which `datasets` no longer runs.
    hub=HubDataset("allenai/reward-bench", ("filtered",)),
    read=read,
    metrics=metrics,
    headline=("average", "adversarial", *SUBSETS),
)
