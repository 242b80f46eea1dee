# SPDX-License-Identifier: Apache-2.0
r"""
Time series of logged numbers: falls and drifts beyond their noise.

Evidence that a held-out reward falls is the difference between its best level (the mean of up to 20 entries, with the
highest lower confidence bound) and its mean since, over the last 2 to 40 entries, in standard errors of that
difference. The error of an entry is the standard error of the batch if the monitor observes it; otherwise it is
inferred from the entries before ([`Noise`]).

Evidence of a drift is the one-sided CUSUM of Page (1954), $S_t = \max(0, S_{t-1} + (\mu - x_t)/\sigma - k)$ with the
allowance $k$: noise keeps it near 0, a level that is $d$ standard deviations lower raises it by $d - k$ per step.
$\sigma$ is the mean difference of consecutive entries over $2/\sqrt\pi$ (the moving range of control charts), which a
slow drift does not inflate.
"""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np


ALLOWANCE = 0.75  # of the CUSUM, in standard deviations
REFERENCE = 20  # maximum number of entries in a level of a held-out reward
# Numbers of entries compared with the best level before them: few detect fast falls, many slow ones.
RECENT = (2, 3, 5, 10, 20, 40)
WINDOW = 10  # entries in a running mean
FEWEST, MOST = 8, 100  # entries from which noise is inferred
INFERRED = 1.2  # factor on noise that is inferred from few differences
# Noise models: correlation from entry to entry, and the correlated fraction of the variance.
MODELS = [(0.0, 0.0), *((rho, part) for rho in (0.3, 0.6, 0.8, 0.9, 0.95, 0.98) for part in (1.0, 0.5, 0.2))]


class Noise:
    r"""
    Deviation of at least 8 entries, of which the last 100 count, from a smooth level, if no error is measured. They
    may be correlated, like an accuracy that wanders, and are then less informative than as many independent ones.

    The model is $x_t = f(t) + \sigma (\sqrt\lambda u_t + \sqrt{1 - \lambda} \epsilon_t)$ with a polynomial $f$, an
    autoregression $u_t$ of first order with correlation $\rho$, and white noise $\epsilon_t$. Squared errors are means
    over the posterior of $\rho$ and $\lambda$ with $f$ and $\sigma$ integrated out (Zellner and Tiao 1964,
    https://doi.org/10.2307/2283097): few entries do not rule out that they are correlated.
    """

    def __init__(self, values: Sequence[float]) -> None:
        number = min(len(values), MOST)
        number -= number % 10 if number > 20 else 0
        projections, constants, self.freedom = _models(number)
        array = np.asarray(values[-number:]) - values[-1]
        rounding = (1e-9 + 1e-6 * abs(values[-1])) ** 2
        squares = (projections @ array) @ array / self.freedom + rounding
        log_weights = constants - self.freedom / 2 * np.log(squares)
        weights = np.exp(log_weights - log_weights.max())
        self._squares = squares * weights / weights.sum()

    def square(self, number: int) -> float:
        """Squared standard error of a mean of `number` entries."""
        return float(self._squares @ _of_mean(number)) if number else 0.0

    def evidence(self, difference: float, *numbers: int) -> float:
        """A difference of means over `numbers` entries each, in standard errors."""
        # As these are estimated, Student's t is converted to the normal deviate that is equally improbable (Wallace
        # 1959, Annals of Mathematical Statistics 30).
        n, t = self.freedom, difference / math.sqrt(sum(map(self.square, numbers)))
        return math.copysign((8 * n + 1) / (8 * n + 3) * math.sqrt(n * math.log1p(t * t / n)), t)


@cache
def _models(number: int) -> tuple[Any, Any, int]:
    """For each model, P of the sum of squares x^T P x and the rest of the log-posterior; the degrees of freedom."""
    shapes = np.vander(np.linspace(-1, 1, number), 2 + number // 20)
    if number >= 20:  # like the fall of a loss
        shapes = np.column_stack([shapes, 1 / np.arange(1, number + 1)])
    basis = np.linalg.qr(shapes)[0]
    lags = np.abs(np.subtract.outer(np.arange(number), np.arange(number)))
    projections, constants = [], []
    for rho, part in MODELS:
        covariance = part * rho**lags + (1 - part) * np.eye(number)
        inverse = np.linalg.inv(covariance)
        fitted = inverse @ basis
        gram = basis.T @ fitted
        projections.append(inverse - fitted @ np.linalg.solve(gram, fitted.T))
        constants.append(-(np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(gram)[1]) / 2)
    return np.stack(projections), np.array(constants), number - basis.shape[1]


@cache
def _of_mean(number: int) -> Any:
    """Variance of a mean of `number` entries under each of the models, relative to that of one entry."""
    lags = np.arange(1, number)
    return np.array([(1 + 2 * part * float((1 - lags / number) @ rho**lags)) / number for rho, part in MODELS])


class Series:
    """A logged number: its first level, its running mean, its noise, and evidence of a drift from its first level."""

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
        differences = [abs(after - before) for before, after in pairwise(self._values[-MOST - 1 :])]
        return INFERRED * fmean(differences) * math.sqrt(math.pi) / 2 if differences else 0.0

    @property
    def mean(self) -> float:
        return fmean(self._values[-WINDOW:])

    @property
    def moved(self) -> str:
        return f"({self.first:.3g} at first, now {self.mean:.3g})"


class Fall(NamedTuple):
    """Fall of the mean of a window below the best level before it."""

    evidence: float  # in standard errors
    size: float
    best: float  # that level


class BestLevel(NamedTuple):
    """Level of a series: the mean of its entries from `start` to `end`, none if it is known exactly."""

    bound: float  # lower confidence bound of the mean, by which levels are compared
    mean: float
    start: int
    end: int


class HeldOutSeries(Series):
    """Held-out reward: fall below its best level. If it `is_change`, its level is known exactly: 0."""

    def __init__(self, warmup: int, is_change: bool = False) -> None:
        super().__init__(warmup)
        self._is_change = is_change
        self._squares: list[float] = []  # of the errors
        self._measured = True
        # After each number of entries: the best level so far, and the noise so far if errors are not measured.
        self._best = [BestLevel(0.0 if is_change else -math.inf, 0.0, 0, 0)]
        self._noises: list[Noise | None] = [None]
        self.windows: list[Fall] = []

    def add(self, value: float, error: float = math.inf) -> None:
        """Adds an entry with its standard error, infinite if none is measured."""
        super().add(value)
        self._measured = self._measured and error < math.inf
        self._squares.append(error**2)
        self._noises.append(None if self._measured or self.count < FEWEST else Noise(self._values))
        self._best.append(self._best_level())
        falls = map(self._fall_over, RECENT) if self.ready else ()
        self.windows = [fall for fall in falls if fall is not None]

    @property
    def _fewest(self) -> int:
        """Minimum number of entries in a level. If errors are measured, the first entry is one: the initial model."""
        return 0 if self._is_change else 1 if self._measured else FEWEST

    def _best_level(self) -> BestLevel:
        best, end = self._best[-1], self.count
        if self._is_change or end < self._fewest:
            return best
        start = max(0, end - REFERENCE)
        mean, noise = fmean(self._values[start:]), self._noises[-1]
        square = noise.square(end - start) if noise else self._square(start, end)
        # The lower bound, as the best of many levels would be mostly luck.
        return max(best, BestLevel(mean - 2 * math.sqrt(square), mean, start, end))

    def _fall_over(self, number: int) -> Fall | None:
        """Fall of the mean of the last `number` entries below the best level before them; `None` if unknown."""
        before = self.count - number
        if before < self._fewest or not (self._measured or self._noises[before]):
            return None
        best, noise = self._best[before], self._noises[before]  # the window itself is not noise
        size = best.mean - fmean(self._values[before:])
        if noise:
            evidence = noise.evidence(size, best.end - best.start, number)
        else:
            square = self._square(best.start, best.end) + self._square(before, self.count)
            evidence = size / math.sqrt(square + 1e-12)
        return Fall(evidence, size, best.mean)

    @property
    def evidence(self) -> float:
        """Maximum over the windows; 0 if nothing fell."""
        return max((0.0, *(window.evidence for window in self.windows)))

    def fell(self, evidence: float, fall: float) -> Fall | None:
        """The greatest fall above `fall` and this evidence, unless the shortest window has recovered."""
        if not self.windows or self.windows[0].size <= fall:
            return None
        found = [window for window in self.windows if window.evidence > evidence and window.size > fall]
        return max(found, key=lambda window: window.size, default=None)

    def _square(self, start: int, end: int) -> float:
        """Squared standard error of the mean of entries `start` to `end`, from their measured errors."""
        if start == end:  # an exactly known level
            return 0.0
        # A few batches without a wrong answer look more precise than they are: use those before them.
        longer = max(0, min(start, end - REFERENCE))
        return max(fmean(self._squares[i:end]) for i in (start, longer)) / (end - start)


def cusum(evidence: float, deviation: float) -> float:
    """Next value of a one-sided CUSUM, for a deviation in standard deviations."""
    return max(0.0, evidence + deviation - ALLOWANCE)
