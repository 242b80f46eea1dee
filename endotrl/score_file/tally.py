# SPDX-License-Identifier: Apache-2.0
"""Statistics of a file's rows, kept while they pass by."""

import math
from typing import Any

from .rows import TOKEN_KEYS, Row


HEAD = 10  # first rows that are kept


class Tally:
    """Running statistics of the rows of a file, in memory that does not grow with their number."""

    def __init__(self) -> None:
        self.rows = self.errors = self.skipped = self.tokens = 0
        self.head: list[tuple[Row, dict[str, Any]]] = []  # the first rows, each with its output line
        # Count, means of length and reward, central second moments (xx, yy, xy): Welford's recurrence.
        self._moments = (0, 0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, row: Row, record: dict[str, Any]) -> None:
        """Adds a row and its output line."""
        self.rows += 1
        if len(self.head) < HEAD:
            self.head.append((row, {key: value for key, value in record.items() if key not in TOKEN_KEYS}))
        if "error" in record:
            self.errors += 1
            return
        self.tokens += record["num_tokens"]
        if record["reward"] is None:
            self.skipped += 1
            return
        count, mean_x, mean_y, xx, yy, xy = self._moments
        dx, dy, count = record["num_tokens"] - mean_x, record["reward"] - mean_y, count + 1
        mean_x, mean_y = mean_x + dx / count, mean_y + dy / count
        to_mean_y = record["reward"] - mean_y
        xx, yy, xy = xx + dx * (record["num_tokens"] - mean_x), yy + dy * to_mean_y, xy + dx * to_mean_y
        self._moments = (count, mean_x, mean_y, xx, yy, xy)

    @property
    def mean_reward(self) -> float | None:
        """Mean reward in nats; `None` if no row has one."""
        return self._moments[2] if self._moments[0] else None

    @property
    def length_correlation(self) -> float | None:
        """Pearson correlation of reward and length in tokens; `None` where it is not defined."""
        count, _, _, xx, yy, xy = self._moments
        # The second moment of equal values is a rounding error, not a variance.
        if count < 3 or min(xx, yy) <= 1e-12 * count:
            return None
        return max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))
