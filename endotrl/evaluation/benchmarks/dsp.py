# SPDX-License-Identifier: Apache-2.0
"""
DSP, domain-specific preference (https://huggingface.co/papers/2309.03126): answers to one query, each written for one
of four domains. Scored under a criterion per domain, a reward that follows its criterion prefers that domain's answer:
the 4x4 table of EndoRM (https://huggingface.co/papers/2506.23235, Table 2).
"""

from collections.abc import Iterable, Sequence

from ...data.sources import Row
from ..intervals import Array, Means, Unit
from ..items import Item
from .benchmark import Benchmark, Scores, mean_of


DOMAINS = ("academy", "business", "literature", "entertainment")
RESPONSES = (*DOMAINS, "normal")
NONE = "none"
# Our own: neither paper's texts are public.
CRITERIA = {
    "academy": "You write for an academic audience. Answer as a scholar would: precise, well argued, with "
    "definitions, methods and evidence.",
    "business": "You write for a business audience. Answer as a manager or consultant would: practical, with costs, "
    "benefits, customers and markets in mind.",
    "literature": "You write for lovers of literature and art. Answer as a writer would: with images, feeling and a "
    "sense of style.",
    "entertainment": "You write for an audience that wants to be entertained. Answer as a host or a fan would: "
    "lively, fun, with celebrities, shows, games and pop culture.",
}


def read(rows: Iterable[Row]) -> list[Item]:
    """Rows `{"query", "responses": {domain: text}}`: five items each, without a criterion and under each domain's."""
    items = []
    for row in rows:
        responses = row.get("responses")
        if not isinstance(responses, dict):
            raise row.error(f'"responses" must be an object with the keys {", ".join(RESPONSES)}.')
        inner = Row(responses, row.source, row.place, row.stem)
        answers = tuple(inner.response(name) for name in RESPONSES)
        for name, text in {NONE: None, **CRITERIA}.items():
            others = [i for i, domain in enumerate(RESPONSES) if domain != name]
            better = () if name == NONE else tuple((RESPONSES.index(name), other) for other in others)
            item = Item(f"{row.place} {name}", name, row.text("query"), answers, better, text, cluster=row.name())
            items.append(item)
    return items


def units(items: Sequence[Item], scores: Scores) -> list[Unit]:
    """One unit per item: for each domain, the fraction of the four other answers that its answer beats."""
    result = []
    for item, row in zip(items, scores, strict=True):
        # Minus one, as an answer does not beat itself.
        values = {name: sum(row[i] > score for score in row) / (len(row) - 1) for i, name in enumerate(DOMAINS)}
        result.append(Unit(item.cluster or item.id, item.group, values))
    return result


def metrics(means: Means) -> dict[str, Array]:
    """
    `matching`: mean of the four domains, each under its own criterion (the diagonal); `other`: under the others;
    `follows`: their difference, the effect of the criterion; `no criterion`; and the cells, `criterion > domain`.
    """
    result: dict[str, Array] = {}
    rows = [name for name in DOMAINS if name in means]
    if rows:
        matching = mean_of(means[name][name] for name in rows)
        other = [means[name][domain] for name in rows for domain in DOMAINS if domain != name]
        result = {"matching": matching, "other": mean_of(other), "follows": matching - mean_of(other)}
    if NONE in means:
        result["no criterion"] = mean_of(means[NONE][domain] for domain in DOMAINS)
    for name in (NONE, *DOMAINS):
        if name in means:
            result |= {f"{name} > {domain}": means[name][domain] for domain in DOMAINS}
    return result


BENCHMARK = Benchmark(
    name="dsp",
    title="DSP",
    paper="https://huggingface.co/papers/2309.03126",
    hub=None,
    read=read,
    units=units,
    metrics=metrics,
    headline=("matching", "other", "follows", "no criterion"),
    tie_rule="A tie is not right: a domain's answer must score strictly higher than each other one.",
)
