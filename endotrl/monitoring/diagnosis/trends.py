# SPDX-License-Identifier: Apache-2.0
"""Statistics of a logged number over a whole run: where it began, where it is, and how sure the difference is."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean as mean
from typing import NamedTuple


class Trend(NamedTuple):
    """Means of the first eighth (at least 3 entries) and of the last third, and their difference over its noise."""

    first: float
    last: float
    z: float


def tail(values: Sequence[float], part: int = 3) -> Sequence[float]:
    """The last entries: of `part` equal parts the last one, and at least three."""
    return values[-max(3, len(values) // part) :]


def trend(values: Sequence[float]) -> Trend:
    """The change of a series from its beginning to its end; `z` is in standard errors of that difference."""
    head, end = values[: max(3, len(values) // 8)], tail(values)
    # From the differences of neighbours, which a trend does not inflate.
    steps = [abs(b - a) for a, b in pairwise(values)]
    noise = mean(steps) * math.sqrt(math.pi) / 2 if steps else 0.0
    error = noise * math.sqrt(1 / len(head) + 1 / len(end))
    first, last = mean(head), mean(end)
    return Trend(first, last, (last - first) / (error + 1e-9 + 1e-6 * abs(first)))


def correlation(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Pearson's correlation; 0 where one of the numbers is constant."""
    x, y = mean(xs), mean(ys)
    product = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    squares = sum((a - x) ** 2 for a in xs) * sum((b - y) ** 2 for b in ys)
    return product / math.sqrt(squares) if squares > 0 else 0.0
