# SPDX-License-Identifier: Apache-2.0
"""Scores to results: metrics with intervals, differences, length, calibration; what `results.json` holds."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from .benchmarks import BENCHMARKS, Benchmark
from .benchmarks.base import Scores
from .intervals import (
    TOTAL,
    Array,
    Estimate,
    Means,
    MetricsOf,
    Pair,
    Unit,
    calibration,
    difference_in_words,
    differences,
    estimates,
    length_split,
    resampling_weights,
    verdict,
)
from .items import Item
from .runner import scores_of


DECIMALS = 12


def pairs_of(items: Sequence[Item], scores: Scores, lengths: Sequence[Sequence[int]]) -> list[Pair]:
    """All pairs of a better and a worse response."""
    return [
        Pair(row[better] - row[worse], counts[better], counts[worse])
        for item, row, counts in zip(items, scores, lengths, strict=True)
        for better, worse in item.better
    ]


def evaluate(
    benchmark: Benchmark,
    items: Sequence[Item],
    names: Sequence[str],
    records: Mapping[str, dict[str, Any]],
    num_resamples: int | None = None,
) -> dict[str, Any]:
    """
    What the scores of `records` ([`score_items`]) say, as JSON values: `metrics` (scorer -> metric -> value, low,
    high), `differences` (to the first of `names`), `statements` (the same in words), `length`, `calibration`,
    `details`, `ties`, `units`, `examples`.
    """
    lengths = [records[item.key]["tokens"] for item in items]
    scored = {name: scores_of(name, items, records) for name in names}
    all_scores = {name: rows for name, (rows, _) in scored.items()}
    units = {name: benchmark.units(items, rows) for name, rows in all_scores.items()}
    first = units[names[0]]
    weights = resampling_weights(first, num_resamples)
    main = next(iter(estimates(first, benchmark.metrics, weights[:1])))
    pairs = {name: pairs_of(items, rows, lengths) for name, rows in all_scores.items()}
    gaps = {name: differences(first, units[name], benchmark.metrics, weights) for name in names[1:]}
    num_clusters = len({unit.cluster for unit in first})
    return {
        "title": benchmark.title,
        "headline": list(benchmark.headline),
        "main_metric": main,
        "tie_rule": benchmark.tie_rule,
        "metrics": {name: estimates_to_json(estimates(units[name], benchmark.metrics, weights)) for name in names},
        "differences": {name: estimates_to_json(gap) for name, gap in gaps.items()},
        "statements": [difference_in_words(names[0], name, gap[main], num_clusters) for name, gap in gaps.items()],
        "length": {name: rounded(length_split(pairs[name])) for name in names if pairs[name]},
        "calibration": {name: [rounded(part) for part in calibration(pairs[name])] for name in names if pairs[name]},
        "ties": {name: sum(pair.margin == 0 for pair in pairs[name]) for name in names if pairs[name]},
        "details": {
            name: details
            for name, (rows, slopes) in scored.items()
            if (details := benchmark.details(items, rows) | ({"slopes": slopes} if slopes else {}))
        },
        "units": [
            {
                "cluster": unit.cluster,
                "group": unit.group,
                "values": {name: rounded(dict(units[name][i].values)) for name in names},
            }
            for i, unit in enumerate(first)
        ],
        "examples": [
            {
                "id": item.id,
                "group": item.group,
                "key": item.key,
                "better": [list(pair) for pair in item.better],
                "tokens": lengths[i],
                "scores": {name: all_scores[name][i] for name in names},
            }
            for i, item in enumerate(items)
        ],
    }


def metrics_of(name: str) -> MetricsOf:
    """How a benchmark averages; what measures answers takes plain means."""
    return BENCHMARKS[name].metrics if name in BENCHMARKS else plain_means


def plain_means(means: Means) -> dict[str, Array]:
    """The mean of every value over all units."""
    return dict(means[TOTAL])


def units_of(results: Mapping[str, Any], name: str) -> list[Unit]:
    """The units of one scorer, back from `results.json`."""
    return [Unit(unit["cluster"], unit["group"], unit["values"][name]) for unit in results["units"]]


def compare(a: Mapping[str, Any], b: Mapping[str, Any], num_resamples: int | None = None) -> dict[str, Any]:
    """
    Paired differences of two runs, as in `results.json`, on the units that both have: `num_units`, `left_out`, and
    `rows`: `{"scorer", "metric", "a", "b", "difference", "low", "high", "verdict"}`.
    """
    if a["benchmark"] != b["benchmark"]:
        raise ValueError(f"The runs are of different benchmarks: {a['benchmark']} and {b['benchmark']}.")
    names = [name for name in a["metrics"] if name in b["metrics"]]
    if not names:
        raise ValueError(
            f"The runs have no scorer in common: {', '.join(a['metrics'])}; and {', '.join(b['metrics'])}."
        )
    averaging = metrics_of(a["benchmark"])
    order = _common_units(a["units"], b["units"])
    if not order[0]:
        raise ValueError("The runs have no item in common.")
    num_clusters = len({a["units"][i]["cluster"] for i in order[0]})
    rows = []
    weights = None
    for name in names:
        units = [[units_of(run, name)[i] for i in indices] for run, indices in zip((a, b), order, strict=True)]
        weights = resampling_weights(units[0], num_resamples) if weights is None else weights
        before = estimates(units[0], averaging, weights[:1])
        after = estimates(units[1], averaging, weights[:1])
        for metric, gap in differences(units[0], units[1], averaging, weights).items():
            if metric in a["headline"]:
                rows.append(
                    {
                        "scorer": name,
                        "metric": metric,
                        "a": before[metric].value,
                        "b": after[metric].value,
                        "difference": gap.value,
                        "low": gap.low,
                        "high": gap.high,
                        "verdict": verdict(gap, num_clusters),
                    }
                )
    left_out = len(a["units"]) + len(b["units"]) - 2 * len(order[0])
    return {"benchmark": a["benchmark"], "num_units": len(order[0]), "left_out": left_out, "rows": rows}


def _common_units(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """
    Indices in A and in B of the units that both have. Where ids are not unique, the first of a name is A's first and
    B's.
    """
    places = []
    for units in (a, b):
        count: Counter[tuple[str, str]] = Counter()
        index = {}
        for i, unit in enumerate(units):
            name = (unit["cluster"], unit["group"])
            index[*name, count[name]] = i
            count[name] += 1
        places.append(index)
    common = [place for place in places[0] if place in places[1]]
    return [places[0][place] for place in common], [places[1][place] for place in common]


def estimates_to_json(values: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Estimates as `{"value", "low", "high"}`."""
    return {name: rounded(asdict(estimate)) for name, estimate in values.items()}


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Floats rounded; JSON has no NaN."""
    return {
        key: (round(value, DECIMALS) if math.isfinite(value) else None) if isinstance(value, float) else value
        for key, value in values.items()
    }
