# SPDX-License-Identifier: Apache-2.0
"""
Uncertainty of benchmark metrics: bootstrap intervals, paired differences, length bias, and calibration.

A benchmark turns scores into units: things that are right or wrong (a pair, a best-of-4 question, a solution). Every
metric is a function of the mean of units by group, so that resampling the units resamples any metric. Units of one
cluster (one prompt under several criteria) are drawn together. This module is independent of models.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]
Means = Mapping[str, Mapping[str, Array]]  # group -> key -> one value per resample
MetricsOf = Callable[[Means], dict[str, Array]]
TOTAL = "*"  # the group of all units

NUM_RESAMPLES = 2000
MIN_CLUSTERS = 20  # too few to judge a difference, if fewer
SIMILAR_LENGTH = 1.2  # largest ratio of lengths at which two responses count as similarly long


@dataclass(frozen=True)
class Unit:
    """Unit of counting: values that metrics average. Units of one cluster are resampled together."""

    cluster: str
    group: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Estimate:
    """Estimate with its 95% interval."""

    value: float
    low: float
    high: float


def group_means(units: Sequence[Unit], weights: Array) -> Means:
    """
    Weighted means of N units' values in R resamples (`weights` has shape `(R, N)`): group, or `"*"` for all, -> key ->
    array of shape `(R,)`, NaN where nothing has weight. A unit without a key does not count for it.
    """
    keys = sorted({key for unit in units for key in unit.values})
    values = np.array([[unit.values.get(key, math.nan) for key in keys] for unit in units])  # (N, K)
    present = ~np.isnan(values)
    filled = np.where(present, values, 0.0)
    names = [unit.group for unit in units]
    means: dict[str, dict[str, Array]] = {}
    for group in [*dict.fromkeys(names), TOTAL]:
        rows = np.array([group in (name, TOTAL) for name in names])
        with np.errstate(invalid="ignore"):
            table = weights[:, rows] @ filled[rows] / (weights[:, rows] @ present[rows].astype(float))  # (R, K)
        means[group] = {key: table[:, k] for k, key in enumerate(keys) if present[rows, k].any()}
    return means


def resampling_weights(units: Sequence[Unit], num_resamples: int | None = None, seed: int = 0) -> Array:
    """
    Weights of a cluster bootstrap, of shape `(num_resamples, N)`: how often each unit is drawn. Clusters are drawn
    among those in the same groups, so that every resample has as many of each part as the data. By default there are
    2000 resamples, and fewer, down to 400, for more than 10,000 units, to bound memory.
    """
    if num_resamples is None:
        num_resamples = max(400, min(NUM_RESAMPLES, 20_000_000 // max(1, len(units))))
    rng = np.random.default_rng(seed)
    groups_of: dict[str, set[str]] = {}
    for unit in units:
        groups_of.setdefault(unit.cluster, set()).add(unit.group)
    strata: dict[tuple[str, ...], list[str]] = {}
    for cluster, groups in groups_of.items():
        strata.setdefault(tuple(sorted(groups)), []).append(cluster)
    counts: dict[str, Array] = {}
    for clusters in strata.values():
        draws = rng.multinomial(len(clusters), [1.0 / len(clusters)] * len(clusters), size=num_resamples)  # (R, C)
        counts.update({cluster: draws[:, i].astype(float) for i, cluster in enumerate(clusters)})
    return np.stack([counts[unit.cluster] for unit in units], axis=1)


def point_values(units: Sequence[Unit], metrics_of: MetricsOf) -> dict[str, float]:
    """Metrics of the units, without resampling."""
    return {name: float(v[0]) for name, v in metrics_of(group_means(units, np.ones((1, len(units))))).items()}


def estimates(units: Sequence[Unit], metrics_of: MetricsOf, weights: Array) -> dict[str, Estimate]:
    """Metrics with percentile bootstrap intervals (95%), from the weights of [`resampling_weights`]."""
    resampled = metrics_of(group_means(units, weights))
    return {name: _estimate(value, resampled[name]) for name, value in point_values(units, metrics_of).items()}


def differences(
    units_a: Sequence[Unit], units_b: Sequence[Unit], metrics_of: MetricsOf, weights: Array
) -> dict[str, Estimate]:
    """Metrics of B minus those of A on the same units, with paired intervals: from the same resamples."""
    if [(u.cluster, u.group) for u in units_a] != [(u.cluster, u.group) for u in units_b]:
        raise ValueError("Paired differences need the same units in the same order, but these differ.")
    first, second = point_values(units_a, metrics_of), point_values(units_b, metrics_of)
    resampled_a, resampled_b = metrics_of(group_means(units_a, weights)), metrics_of(group_means(units_b, weights))
    return {
        name: _estimate(second[name] - first[name], resampled_b[name] - resampled_a[name])
        for name in first
        if name in second
    }


def is_noise(difference: Estimate) -> bool:
    """Whether the interval of a difference contains 0, or is undefined."""
    return not (difference.low > 0 or difference.high < 0)


def verdict(difference: Estimate, num_clusters: int) -> str:
    """Verdict on a difference: `"better"`, `"worse"`, `"noise"`, or `"too few"` items."""
    if num_clusters < MIN_CLUSTERS:
        return "too few"
    return "noise" if is_noise(difference) else "better" if difference.value > 0 else "worse"


@dataclass(frozen=True)
class Pair:
    """A better and a worse response with one scorer's margin: right if the margin is above 0; a tie is not."""

    margin: float  # score of the better minus that of the worse
    length_better: float  # in tokens
    length_worse: float


def length_split(pairs: Sequence[Pair]) -> dict[str, float | int | None]:
    """
    Accuracy by which response is longer: length bias shows as a gap between the first two.

    - `better_is_longer`, `better_is_shorter`, `similar_length` (within a factor of 1.2); `num_...`: numbers of pairs;
    - `length_controlled`: mean of the first two, 0.5 for a scorer that depends on length alone;
    - `bias`: the first minus the second: +1 if longer always wins, -1 if shorter does, 0 if balanced.
    """
    parts: dict[str, list[bool]] = {"better_is_longer": [], "better_is_shorter": [], "similar_length": []}
    for pair in pairs:
        longer = pair.length_better > SIMILAR_LENGTH * pair.length_worse
        shorter = pair.length_worse > SIMILAR_LENGTH * pair.length_better
        name = "better_is_longer" if longer else "better_is_shorter" if shorter else "similar_length"
        parts[name].append(pair.margin > 0)
    means = {name: sum(right) / len(right) if right else None for name, right in parts.items()}
    result: dict[str, float | int | None] = {**means, "length_controlled": None, "bias": None}
    first, second = means["better_is_longer"], means["better_is_shorter"]
    if first is not None and second is not None:
        result |= {"length_controlled": (first + second) / 2, "bias": first - second}
    return result | {f"num_{name}": len(right) for name, right in parts.items()}


def calibration(pairs: Sequence[Pair], num_bins: int = 5) -> list[dict[str, float | int]]:
    """Accuracy of pairs in bins of equal size, by increasing margin."""
    margins = sorted((pair.margin for pair in pairs), key=abs)
    bins = [[margins[i] for i in part] for part in np.array_split(np.arange(len(margins)), num_bins) if len(part)]
    return [
        {
            "low": abs(part[0]),
            "high": abs(part[-1]),
            "accuracy": sum(margin > 0 for margin in part) / len(part),
            "num_pairs": len(part),
        }
        for part in bins
    ]


def _estimate(value: float, resampled: Array) -> Estimate:
    known = resampled[np.isfinite(resampled)]
    if not math.isfinite(value) or known.size == 0:
        return Estimate(value, math.nan, math.nan)
    low, high = np.percentile(known, [2.5, 97.5])
    return Estimate(value, float(low), float(high))
