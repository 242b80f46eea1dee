# SPDX-License-Identifier: Apache-2.0
"""Scores to results: metrics with intervals, differences, length, calibration; content of `results.json`."""

import math
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..data.formats import message_text
from ..reporting import counted, interval_text, number
from ..rewards.residuals import RESIDUALS, covariates_of, residuals, split_name
from ..runs.jsonl import json_number
from .benchmarks import BENCHMARKS, Benchmark
from .benchmarks.benchmark import Scores
from .intervals import (
    MIN_CLUSTERS,
    TOTAL,
    Array,
    Estimate,
    Means,
    MetricsOf,
    Pair,
    Unit,
    calibration,
    differences,
    estimates,
    is_noise,
    length_split,
    point_values,
    resampling_weights,
    verdict,
)
from .items import CONTROLS, Item


LETTERS = string.ascii_uppercase
MAJORITY, CEILING = "majority", "best possible"  # of best of n
RIVALS = (*CONTROLS, MAJORITY)  # baselines for a scorer
DECIMALS = 12


def pairs_of(items: Sequence[Item], scores: Scores, lengths: Sequence[Sequence[int]]) -> list[Pair]:
    """All pairs of a better and a worse response."""
    return [
        Pair(row[better] - row[worse], counts[better], counts[worse])
        for item, row, counts in zip(items, scores, lengths, strict=True)
        for better, worse in item.better
    ]


def evaluate(
    benchmark: Benchmark, items: Sequence[Item], names: Sequence[str], records: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    """Results of the scores in `records` ([`score_items`]), as JSON values: see [`summarize`]; and single examples."""
    lengths = [records[item.key]["tokens"] for item in items]
    scored = {name: scores_of(name, items, records) for name in names}
    all_scores = {name: rows for name, (rows, _) in scored.items()}
    units = {name: benchmark.units(items, rows) for name, rows in all_scores.items()}
    pairs = {name: found for name, rows in all_scores.items() if (found := pairs_of(items, rows, lengths))}
    return {
        "title": benchmark.title,
        "headline": list(benchmark.headline),
        "tie_rule": benchmark.tie_rule,
        **summarize(units, benchmark.metrics),
        "length": {name: rounded(length_split(found)) for name, found in pairs.items()},
        "calibration": {name: [rounded(part) for part in calibration(found)] for name, found in pairs.items()},
        "ties": {name: sum(pair.margin == 0 for pair in found) for name, found in pairs.items()},
        "details": {
            name: details
            for name, (rows, slopes) in scored.items()
            if (details := benchmark.details(items, rows) | ({"slopes": slopes} if slopes else {}))
        },
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


def scores_of(
    name: str, items: Sequence[Item], records: Mapping[str, dict[str, Any]]
) -> tuple[list[list[float]], dict[str, dict[str, float]] | None]:
    """Scores of one scorer, by item; for residuals, which need all items, also the slopes per group."""
    prefix, base = split_name(name)
    rows = [records[item.key]["scores"][base] for item in items]
    if prefix is None:
        return rows, None
    lengths = [zip(item.responses, records[item.key]["tokens"], strict=True) for item in items]
    covariates = [[covariates_of(prefix, message_text(text), length) for text, length in row] for row in lengths]
    corrected, slopes = residuals(rows, covariates, [item.group for item in items])
    return corrected, {g: dict(zip(RESIDUALS[prefix], values, strict=True)) for g, values in slopes.items()}


def summarize(units: Mapping[str, Sequence[Unit]], averaging: MetricsOf, main: str | None = None) -> dict[str, Any]:
    """
    Summary of the units of some scorers, as JSON values: `verdict`, `main_metric` (by default the first), `metrics`
    (scorer -> metric -> value, low, high), `differences` (to the first scorer), `statements` (in words) and `units`.
    """
    name, first = next(iter(units.items()))
    weights = resampling_weights(first)
    metrics = {scorer: estimates(rows, averaging, weights) for scorer, rows in units.items()}
    main = main or next(iter(metrics[name]))
    gaps = {s: differences(first, rows, averaging, weights) for s, rows in units.items() if s != name}
    num_clusters = len({unit.cluster for unit in first})

    def gap_of(a: str, b: str) -> Estimate:
        return differences(units[a], units[b], averaging, weights)[main]

    return {
        "main_metric": main,
        "verdict": _verdict({s: found[main] for s, found in metrics.items()}, main, num_clusters, gap_of),
        "metrics": {scorer: estimates_to_json(found) for scorer, found in metrics.items()},
        "differences": {scorer: estimates_to_json(gap) for scorer, gap in gaps.items()},
        "statements": _statements(name, {scorer: gap[main] for scorer, gap in gaps.items()}, num_clusters),
        "units": [
            {
                "cluster": unit.cluster,
                "group": unit.group,
                "values": {scorer: rounded(dict(rows[i].values)) for scorer, rows in units.items()},
            }
            for i, unit in enumerate(first)
        ],
    }


def _verdict(
    found: Mapping[str, Estimate], main: str, num_clusters: int, gap_of: Callable[[str, str], Estimate]
) -> str:
    """Sentence on the best scorer, and whether it beats the baselines."""
    order = ranked({name: estimate.value for name, estimate in found.items() if name != CEILING})
    scorers, controls = ([n for n in order if (n in RIVALS) is known] for known in (False, True))
    best = (scorers or order)[0]
    value = f"{main} {number(found[best].value)}"
    if num_clusters < MIN_CLUSTERS:
        return f"No verdict from only {counted(num_clusters, 'distinct item')}; {best} has {value}."
    words = f"{value} (95% interval {interval_text(found[best].low, found[best].high)})"
    which = f"{best} is the best of {len(scorers or order)}"  # the best of many is lucky, too
    if not scorers or not controls:
        return f"{best} has {words}." if len(order) == 1 else f"{which}: {words}."
    control = controls[0]
    if is_noise(gap := gap_of(control, best)):
        return (
            f"No scorer is better than {control} beyond noise: the best, {best}, has {value}, and {control} "
            f"{number(found[control].value)}."
        )
    if gap.value < 0:
        return f"All scorers are worse than {control} ({number(found[control].value)}); the best, {best}, has {words}."
    return f"{which}: {words}, {number(gap.value, sign=True)} over the best control, {control}."


def _statements(first: str, gaps: Mapping[str, Estimate], num_clusters: int) -> list[str]:
    """Differences to the first scorer in words; those within noise in one statement, and none from few items."""
    if num_clusters < MIN_CLUSTERS:
        return []
    gaps = {name: gap for name, gap in gaps.items() if name != CEILING}
    told = [
        f"{name} is {'better' if gap.value > 0 else 'worse'} than {first} "
        f"({gap.value:+.3f}, 95% interval {gap.low:+.3f} to {gap.high:+.3f})"
        for name, gap in gaps.items()
        if not is_noise(gap)
    ]
    noise = [name for name, gap in gaps.items() if is_noise(gap)]
    which = ", ".join(noise) if len(noise) <= 4 else f"the {len(noise)} {'others' if told else 'other scorers'}"
    return [*told, *([f"No difference from {first} beyond noise: {which}."] if noise else [])]


def ranked(values: Mapping[str, float | None]) -> list[str]:
    """Names by value, highest first; those without a value last."""
    known = {name: -math.inf if v is None or math.isnan(v) else v for name, v in values.items()}
    return sorted(known, key=lambda name: -known[name])


def metrics_of(name: str) -> MetricsOf:
    """Averaging rule of a benchmark; plain means for answers."""
    return BENCHMARKS[name].metrics if name in BENCHMARKS else plain_means


def plain_means(means: Means) -> dict[str, Array]:
    """Mean of every value over all units."""
    return dict(means[TOTAL])


def units_of(units: Sequence[Mapping[str, Any]], name: str) -> list[Unit]:
    """Units of one scorer, restored from those of `results.json`."""
    return [Unit(unit["cluster"], unit["group"], unit["values"][name]) for unit in units]


def compare(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """
    Paired differences of runs to the first one, as in `results.json`, on their common units: `num_units`,
    `num_clusters`, `left_out`, `verdict` (a sentence), and `rows`: `{"scorer", "metric", "values", "differences"}`,
    with a difference `{"value", "low", "high", "verdict"}` per further run. Runs are called A, B, C, ...
    """
    first = runs[0]
    for run in runs[1:]:
        if run["benchmark"] != first["benchmark"]:
            raise ValueError(f"The runs have different benchmarks: {first['benchmark']} and {run['benchmark']}.")
    names = [name for name in first["metrics"] if all(name in run["metrics"] for run in runs)]
    if not names:
        raise ValueError(f"The runs have no scorer in common: {'; and '.join(', '.join(r['metrics']) for r in runs)}.")
    common = _common_units([run["units"] for run in runs])
    num_units = len(common[0])
    if not num_units:
        raise ValueError("The runs have no item in common.")
    averaging, weights = metrics_of(first["benchmark"]), resampling_weights(units_of(common[0], names[0]))
    num_clusters = len({unit["cluster"] for unit in common[0]})
    rows: list[dict[str, Any]] = []
    for name in names:
        units = [units_of(part, name) for part in common]
        values = [point_values(part, averaging) for part in units]
        gaps = [differences(units[0], part, averaging, weights) for part in units[1:]]
        rows += [
            {
                "scorer": name,
                "metric": metric,
                "values": [found[metric] for found in values],
                "differences": [
                    {**asdict(gap[metric]), "verdict": verdict(gap[metric], num_clusters)} for gap in gaps
                ],
            }
            for metric in values[0]
            if metric in first["headline"] and all(metric in gap for gap in gaps)
        ]
    if not rows:
        raise ValueError("The runs have no figure in common.")
    return {
        "benchmark": first["benchmark"],
        "num_units": num_units,
        "num_clusters": num_clusters,
        "left_out": sum(len(run["units"]) - num_units for run in runs),
        "verdict": _comparison_verdict(rows, first["main_metric"], num_clusters),
        "rows": rows,
    }


def _comparison_verdict(rows: Sequence[Mapping[str, Any]], main: str, num_clusters: int) -> str:
    """Sentence on the best run, by its best scorer's main metric."""
    told = [row for row in rows if row["scorer"] != CEILING]
    # Not all runs need have it.
    main = main if any(row["metric"] == main for row in told) else told[0]["metric"]
    row = max((row for row in told if row["metric"] == main), key=lambda row: max(row["values"]))
    values, what = row["values"], f"{row['metric']} of {row['scorer']}"
    best = values.index(max(values))
    known = ", ".join(f"{letter} {number(value)}" for letter, value in zip(LETTERS, values, strict=False))
    if num_clusters < MIN_CLUSTERS:
        return f"No verdict from only {counted(num_clusters, 'distinct item')} ({what}: {known})."
    gaps = zip(LETTERS[1:], row["differences"], strict=False)
    changes = [f"{letter} is {gap['verdict']}" for letter, gap in gaps if gap["verdict"] != "noise"]
    if not changes:
        return f"No difference from A beyond noise ({what}: {known})."
    highest = f"; {LETTERS[best]} is highest" if len(values) > 2 else ""
    return f"{', '.join(changes)} than A{highest} ({what}: {known})."


def _common_units(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[Mapping[str, Any]]]:
    """Units common to all runs, in one order. Among duplicate ids, the n-th of one run matches the n-th of another."""
    by_name = []
    for units in runs:
        seen: Counter[tuple[str, str]] = Counter()
        named: dict[tuple[tuple[str, str], int], Mapping[str, Any]] = {}
        for unit in units:
            name = unit["cluster"], unit["group"]
            seen[name] += 1
            named[name, seen[name]] = unit
        by_name.append(named)
    common = [name for name in by_name[0] if all(name in named for named in by_name)]
    return [[named[name] for name in common] for named in by_name]


def estimates_to_json(values: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Estimates as `{"value", "low", "high"}`."""
    return {name: rounded(asdict(estimate)) for name, estimate in values.items()}


def rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    """Floats rounded, non-finite ones as `None`, as JSON has no NaN."""
    return {key: json_number(value, DECIMALS) if isinstance(value, float) else value for key, value in values.items()}
