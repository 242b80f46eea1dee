# SPDX-License-Identifier: Apache-2.0
r"""
Logged numbers over time: whether they fall, or drift, beyond their noise.

Evidence that a held-out reward falls is the difference between the best level that it had (the mean of up to 20
entries, with the highest lower confidence bound) and its mean since, over the last 2 to 40 entries, in standard errors
of that difference. The error of an entry is the standard error of the batch where the monitor sees it; else it is
inferred from the differences of entries.

Evidence of a drift is the one-sided CUSUM of Page (1954), $S_t = \max(0, S_{t-1} + (\mu - x_t)/\sigma - k)$ with the
allowance $k$: noise keeps it near 0, a level that is $d$ standard deviations lower raises it by $d - k$ a step.
$\sigma$ is the mean difference of consecutive entries over $2/\sqrt\pi$ (the moving range of control charts), which a
slow drift does not inflate.
"""

import math
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple


ALLOWANCE = 0.75  # of the CUSUM, in standard deviations
REFERENCE = 20  # most entries of a level of a held-out reward
# Entries that are compared with the best level before them: few see fast falls, many slow ones.
RECENT = (2, 3, 5, 10, 20, 40)
WINDOW = 10  # entries of a running mean
INFERRED = 1.2  # what noise that is inferred from few differences is taken for, times itself
NOISE_WINDOW = 100  # entries of the noise estimate


class Series:
    """A logged number: its first level, its running mean, its noise, and evidence that it has left its first level."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._values: list[float] = []
        self.sinks, self.rises = 0.0, 0.0

    def add(self, value: float) -> None:
        if self.ready:
            deviation = (value - self.first) / max(self.noise, 1e-9 + 1e-6 * abs(self.first))
            self.sinks, self.rises = cusum(self.sinks, -deviation), cusum(self.rises, deviation)
        self._values.append(value)

    @property
    def count(self) -> int:
        return len(self._values)

    @property
    def ready(self) -> bool:
        return self.count >= self._warmup

    @property
    def first(self) -> float:
        return fmean(self._values[: self._warmup])

    @property
    def noise(self) -> float:
        """Standard deviation of an entry."""
        differences = [abs(after - before) for before, after in pairwise(self._values[-NOISE_WINDOW - 1 :])]
        return INFERRED * fmean(differences) * math.sqrt(math.pi) / 2 if differences else 0.0

    @property
    def mean(self) -> float:
        return fmean(self._values[-WINDOW:])

    @property
    def moved(self) -> str:
        return f"({self.first:.3g} at first, now {self.mean:.3g})"


class Fall(NamedTuple):
    """How far the mean of a window is below the best level before it."""

    evidence: float  # in standard errors
    size: float
    best: float  # that level


class HeldOut(Series):
    """How far a held-out reward is below the best level that it had, or a level `start` that is known exactly."""

    def __init__(self, warmup: int, start: float | None = None) -> None:
        super().__init__(warmup)
        self._start = start
        self._squares: list[float] = []  # of the errors
        self._measured = True
        # For each number of entries: lower confidence bound, mean and squared error of the best level until then.
        self._best = [(-math.inf, 0.0, 0.0) if start is None else (start, start, 0.0)]
        self.windows: list[Fall] = []

    def add(self, value: float, error: float | None = None) -> None:
        super().add(value)
        self._measured = self._measured and error is not None
        self._squares.append((error or 0.0) ** 2)
        # Where the errors are measured, the first entry counts as a level: it is the model as it was.
        fewest = 0 if self._start is not None else 1 if self._measured else self._warmup // 2
        best = self._best[-1]
        if self._start is None and self.count >= fewest:
            mean, square = self._level(max(0, self.count - REFERENCE), self.count)
            # The lower bound, or the best of many levels would be mostly luck.
            best = max(best, (mean - 2 * math.sqrt(square), mean, square))
        self._best.append(best)
        self.windows = []
        for number in RECENT if self.ready else ():
            before = self.count - number
            if before >= fewest:
                _, level, square = self._best[before]
                mean, own_square = self._level(before, self.count)
                evidence = (level - mean) / math.sqrt(square + own_square + 1e-12)
                self.windows.append(Fall(evidence, level - mean, level))

    @property
    def evidence(self) -> float:
        """The greatest of the windows; 0 if nothing fell."""
        return max((0.0, *(window.evidence for window in self.windows)))

    def fell(self, evidence: float, fall: float) -> Fall | None:
        """The greatest fall above `fall` and this evidence, if the shortest window has not come back."""
        if not self.windows or self.windows[0].size <= fall:
            return None
        found = [window for window in self.windows if window.evidence > evidence and window.size > fall]
        return max(found, key=lambda window: window.size, default=None)

    def _level(self, start: int, end: int) -> tuple[float, float]:
        """Mean of some entries, and its squared standard error."""
        # A few batches without a wrong answer look more exact than they are: those before them tell.
        longer = max(0, min(start, end - REFERENCE))
        squares = [fmean(self._squares[i:end]) for i in (start, longer)]
        square = max(squares) if self._measured else self.noise**2
        return fmean(self._values[start:end]), square / (end - start)


def cusum(evidence: float, deviation: float) -> float:
    """The next value of a one-sided CUSUM, for a deviation in standard deviations."""
    return max(0.0, evidence + deviation - ALLOWANCE)
