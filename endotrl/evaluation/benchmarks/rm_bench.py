# SPDX-License-Identifier: Apache-2.0
"""
RM-Bench (https://huggingface.co/papers/2410.16184): three right and three wrong answers per prompt: concise,
detailed, and detailed with Markdown. The 3x3 matrix of wins separates substance from style.
"""

from collections.abc import Iterable, Sequence

from ...data.sources import HubDataset, Row
from ..intervals import Array, Means, Unit
from ..items import Item
from .benchmark import Benchmark, Scores, mean_of


STYLES = ("concise", "detailed", "markdown")
DOMAINS = ("chat", "math", "code", "safety")
# Safety is the mean of its two parts.
PARTS = {"safety-refuse": "safety", "safety-response": "safety"}
LEVELS = ("easy", "normal", "hard")


def read(rows: Iterable[Row]) -> list[Item]:
    """
    Rows `{"prompt", "chosen": [3], "rejected": [3], "domain"}`; without a domain, it is taken from the file's name.
    Items that are repeated in another file count once.
    """
    items = []
    sources: dict[str, str] = {}
    for row in rows:
        chosen, rejected = row.responses("chosen", exactly=3), row.responses("rejected", exactly=3)
        pairs = tuple((i, 3 + j) for i in range(3) for j in range(3))
        item = Item(row.name("id"), _part(row), row.text("prompt"), (*chosen, *rejected), better=pairs)
        # The repository's folder has one file per part and another with all of them together.
        if sources.setdefault(item.key, row.source) == row.source:
            items.append(item)
    return items


def units(items: Sequence[Item], scores: Scores) -> list[Unit]:
    """
    One unit per item: its 3x3 matrix of wins and the means of its parts. Hard is a plainer right answer against a
    fancier wrong one (above the diagonal), easy the reverse, normal the diagonal.
    """
    result = []
    for item, row in zip(items, scores, strict=True):
        wins = [[float(row[i] > row[3 + j]) for j in range(3)] for i in range(3)]
        values = {
            "easy": (wins[1][0] + wins[2][0] + wins[2][1]) / 3,
            "normal": (wins[0][0] + wins[1][1] + wins[2][2]) / 3,
            "hard": (wins[0][1] + wins[0][2] + wins[1][2]) / 3,
        }
        values |= {f"{STYLES[i]} > {STYLES[j]}": wins[i][j] for i in range(3) for j in range(3)}
        result.append(Unit(f"{item.group} {item.id}", item.group, values))
    return result


def metrics(means: Means) -> dict[str, Array]:
    """
    The repository's averaging: easy, normal and hard per domain, safety being the mean of its two parts; their mean
    over the available domains; and the mean of the three.
    """
    parts_of: dict[str, list[str]] = {}
    for group in means:
        if group != "*":
            parts_of.setdefault(PARTS.get(group, group), []).append(group)
    keys = [*LEVELS, *(f"{a} > {b}" for a in STYLES for b in STYLES)]
    by_domain = {
        domain: {key: mean_of(means[part][key] for part in parts) for key in keys}
        for domain, parts in parts_of.items()
    }
    total = {key: mean_of(values[key] for values in by_domain.values()) for key in keys}
    result = {"average": mean_of(total[level] for level in LEVELS), **{level: total[level] for level in LEVELS}}
    for domain, values in by_domain.items():
        result[domain] = mean_of(values[level] for level in LEVELS)
        result |= {f"{domain} {level}": values[level] for level in LEVELS}
        if len(parts_of[domain]) > 1:
            for part in parts_of[domain]:
                result[part] = mean_of(means[part][level] for level in LEVELS)
                result |= {f"{part} {level}": means[part][level] for level in LEVELS}
    return result | {f"{a} > {b}": total[f"{a} > {b}"] for a in STYLES for b in STYLES}


def _part(row: Row) -> str:
    known = ("chat", "math", "code", *PARTS)
    if row.data.get("domain") is not None:
        domain = row.text("domain")
        # The authors' code matches the beginning of the name, too.
        parts = {"safety-refus": "safety-refuse", "safety-respon": "safety-response"} | {d: d for d in DOMAINS}
        for beginning, part in parts.items():
            if domain.startswith(beginning):
                return part
        raise row.error(f'"domain" must begin with one of {", ".join(DOMAINS)}, but is {domain!r}.')
    for part in known:
        if part in row.stem:
            return part
    raise row.error(f'the key "domain" is missing, and the name of the file has none of {", ".join(known)}.')


BENCHMARK = Benchmark(
    name="rm-bench",
    title="RM-Bench",
    paper="https://huggingface.co/papers/2410.16184",
    hub=HubDataset("THU-KEG/RM-Bench", ("train",)),
    read=read,
    units=units,
    metrics=metrics,
    headline=("average", *LEVELS, *DOMAINS),
)
