# SPDX-License-Identifier: Apache-2.0
r"""
Judges a run from what it logged: a fold over the entries of `trainer.state.log_history`, without a trainer.

Evidence that a held-out reward falls is the difference between the best level that it had (the mean of up to 20 entries, with the
highest lower confidence bound) and its mean since, over the last 3 to 40 entries, in standard errors of that difference. The error of
an entry is the standard error of the batch where the monitor sees it; else it is inferred from the differences of entries. The same is
asked of the change since the first policy ([`change_since`]), whose level at first is known: 0.

Evidence of a drift is the one-sided CUSUM of Page (1954), $S_t = \max(0, S_{t-1} + (\mu - x_t)/\sigma - k)$ with the allowance $k$:
noise keeps it near 0, a level that is $d$ standard deviations lower raises it by $d - k$ a step. $\sigma$ is the mean
difference of consecutive entries over $2/\sqrt\pi$ (the moving range of control charts), which a slow drift does not inflate.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from .thresholds import CollapseThresholds


# What trainers call the same thing: GRPO, RLOO, DenseGRPO and PPO; OnlineDPO.
REWARD_KEYS = ("reward", "objective/scores")
ENTROPY_KEYS = ("entropy", "objective/entropy")
KL_KEYS = ("kl", "objective/kl")
HELD_OUT = "collapse/held_out/"
HELD_OUT_ERROR = "collapse/held_out_error/"
CHANGE = "collapse/change/"
CHANGE_ERROR = "collapse/change_error/"
AGREEMENT_EVIDENCE = "collapse/agreement_z/"

ALLOWANCE = 0.75  # of the CUSUM, in standard deviations
REFERENCE = 20  # most entries of a level of a held-out reward
RECENT = (
    3,
    5,
    10,
    20,
    40,
)  # entries that are compared with the best level before them: short ones see fast falls, long ones slow ones
WINDOW = 10  # entries of a running mean
INFERRED = 1.2  # what noise that is inferred from few differences is taken for, times itself
NOISE_WINDOW = 100  # entries of the noise estimate


@dataclass(frozen=True)
class Verdict:
    """
    What one entry of the log says.

    Attributes:
        alarm (`str`, *optional*):
            Why the run is taken for a collapse, as a sentence; `None` if it is not.
        symptoms (`list[str]`):
            What differs from a healthy run at this step, alarm or not.
        evidence (`float`):
            Evidence that held-out rewards fall, the greatest of them; 0 without one.
        level (`float`, *optional*):
            Running mean of the held-out rewards (their sum, of several), to compare checkpoints by; `None` without one.
    """

    alarm: str | None
    symptoms: list[str] = field(default_factory=list)
    evidence: float = 0.0
    level: float | None = None


class _Series:
    """A logged number: its first level, its running mean and its noise."""

    def __init__(self, warmup: int) -> None:
        self._warmup = warmup
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._differences: deque[float] = deque(maxlen=NOISE_WINDOW)
        self._first: list[float] = []
        self.count = 0

    def add(self, value: float) -> None:
        if self._recent:
            self._differences.append(abs(value - self._recent[-1]))
        self._recent.append(value)
        if self.count < self._warmup:
            self._first.append(value)
        self.count += 1

    @property
    def ready(self) -> bool:
        return self.count >= self._warmup

    @property
    def first(self) -> float:
        return sum(self._first) / len(self._first)

    @property
    def noise(self) -> float:
        """Standard deviation of an entry."""
        if not self._differences:
            return 0.0
        return INFERRED * sum(self._differences) / len(self._differences) * math.sqrt(math.pi) / 2

    @property
    def mean(self) -> float:
        return sum(self._recent) / len(self._recent)


class _Drift(_Series):
    """Evidence that a number has left its first level: downwards, or both ways."""

    def __init__(self, warmup: int, both_ways: bool) -> None:
        super().__init__(warmup)
        self._both_ways = both_ways
        self._evidence = [0.0, 0.0]

    def add(self, value: float) -> None:
        if self.ready:
            deviation = (value - self.first) / max(self.noise, 1e-9 + 1e-6 * abs(self.first))
            down, up = self._evidence
            self._evidence = [_cusum(down, -deviation), _cusum(up, deviation) if self._both_ways else 0.0]
        super().add(value)

    @property
    def evidence(self) -> float:
        return max(self._evidence)


class _Fall(NamedTuple):
    """How far the mean of a window is below the best level before it: in standard errors, in size, and from which level."""

    evidence: float
    size: float
    best: float


class _HeldOut(_Series):
    """
    How far a held-out reward is below the best level that it had, or below a level `start` that is known exactly. Entries may come with
    their standard error.
    """

    def __init__(self, warmup: int, start: float | None = None) -> None:
        super().__init__(warmup)
        self._start = start
        # Sums of the values and of the squared errors of the first entries.
        self._sums, self._squares = [0.0], [0.0]
        self._measured = True
        # For each number of entries: lower confidence bound, mean and squared error of the best level until then.
        self._best: list[tuple[float, float, float]] = [
            (-math.inf, 0.0, 0.0) if start is None else (start, start, 0.0)
        ]
        self.windows: list[_Fall] = []

    def add(self, value: float, error: float | None = None) -> None:
        super().add(value)
        self._measured = self._measured and error is not None
        self._sums.append(self._sums[-1] + value)
        self._squares.append(self._squares[-1] + (error or 0.0) ** 2)
        mean, square = self._level(max(0, self.count - REFERENCE), self.count)
        # Where the errors are measured, the first entry counts as a level: it is the model as it was.
        fewest = 0 if self._start is not None else 1 if self._measured else self._warmup // 2
        if self._start is None and self.count >= fewest:
            # The lower bound, or the best of many levels would be mostly luck.
            self._best.append(max(self._best[-1], (mean - 2 * math.sqrt(square), mean, square)))
        else:
            self._best.append(self._best[-1])
        self.windows = []
        if self.count < self._warmup:
            return
        for number in RECENT:
            before = self.count - number
            if before < fewest:
                break
            _, best, square = self._best[before]
            mean, own_square = self._level(before, self.count)
            self.windows.append(_Fall((best - mean) / math.sqrt(square + own_square + 1e-12), best - mean, best))

    @property
    def evidence(self) -> float:
        """The greatest of the windows; 0 if nothing fell."""
        return max((0.0, *(window.evidence for window in self.windows)))

    def fell(self, evidence: float, fall: float) -> _Fall | None:
        """The greatest fall of more than `fall` on more evidence than this, if the shortest window has not come back."""
        if not self.windows or self.windows[0].size <= fall:
            return None
        found = [window for window in self.windows if window.evidence > evidence and window.size > fall]
        return max(found, key=lambda window: window.size, default=None)

    def _level(self, start: int, end: int) -> tuple[float, float]:
        """Mean of some entries, and its squared standard error."""
        number = end - start
        # A few batches without a wrong answer look more exact than they are: those before them tell.
        longer = max(0, min(start, end - REFERENCE))
        square = (
            max((self._squares[end] - self._squares[i]) / (end - i) for i in (start, longer))
            if self._measured
            else self.noise**2
        )
        return (self._sums[end] - self._sums[start]) / number, square / number


class Detector:
    """
    Reads log entries in order and says after each whether the run collapses.

    With a held-out reward, a collapse is that it falls, and the symptoms only say how much evidence is enough. Without one,
    symptoms decide.

    Args:
        thresholds ([`CollapseThresholds`], *optional*):
            When to speak.
        held_out (`list[str]`, *optional*):
            Names of reward functions whose logged means are held-out rewards, if the log has no `collapse/held_out/<name>`.

    Example:
    ```python
    >>> from endotrl.monitoring import Detector

    >>> detector = Detector(held_out=["accuracy"])
    >>> noise = [0.01, -0.01] * 50
    >>> accuracies = [0.7 + e for e in noise[:40]] + [0.7 - 0.005 * i + e for i, e in enumerate(noise[:20])]
    >>> alarms = [detector.update({"step": i, "reward": 0.1 * i, "rewards/accuracy/mean": a}).alarm for i, a in enumerate(accuracies)]
    >>> any(alarms[:40]), any(alarms)
    (False, True)
    ```
    """

    def __init__(self, thresholds: CollapseThresholds | None = None, held_out: Sequence[str] = ()) -> None:
        self.thresholds = CollapseThresholds() if thresholds is None else thresholds
        self._named = {f"rewards/{name}/mean": name for name in held_out}
        self._held_out: dict[str, _HeldOut] = {}
        self._changes: dict[str, _HeldOut] = {}  # since the first policy, of held-out rewards
        self._changes_age: dict[str, int] = {}  # entries since the last one
        self._evaluations: dict[str, _Evaluations] = {}
        self._drifts: dict[str, _Drift] = {}
        self._levels: dict[str, _Series] = {}
        self._agreement: dict[str, float] = {}
        self._gross: dict[str, int] = {}  # entries in a row that show it
        self.last = Verdict(None)

    def update(self, entry: Mapping[str, float]) -> Verdict:
        """
        Reads one entry.

        Args:
            entry (`dict[str, float]`):
                What the trainer logged at a step, with what the monitor added. Entries that are neither of a training step nor
                of an evaluation (the summary at the end) are passed over.

        Returns:
            [`Verdict`].
        """
        entry = {key: value for key, value in entry.items() if isinstance(value, int | float) and math.isfinite(value)}
        if any(key.startswith("eval_") for key in entry):
            self.last = self._evaluation(entry)
        elif any(key in entry for key in REWARD_KEYS):
            self.last = self._step(entry)
        return self.last

    def _evaluation(self, entry: Mapping[str, float]) -> Verdict:
        reasons = []
        for name in {*self._held_out, *self._named.values()}:
            key = f"eval_rewards/{name}/mean"
            if key not in entry:
                continue
            series = self._evaluations.setdefault(name, _Evaluations())
            series.add(entry[key])
            if series.fell_by > self.thresholds.evaluation_fall:
                reasons.append(
                    f"`{name}` on the evaluation set was {series.best:.3f} and has been {series.fell_by:.3f} or more below "
                    "that twice in a row"
                )
        alarm = f"{'; '.join(reasons)}." if reasons else None
        return replace(self.last, alarm=alarm)

    def _step(self, entry: Mapping[str, float]) -> Verdict:
        symptoms = self._symptoms(entry)
        gross = self._gross_symptoms(entry)
        reasons, levels, changes = [], [], self._changes_until(entry)
        # A length that drifts is none: healthy runs become brief, or think longer.
        corroborated = gross or any(symptom != "length" for symptom in symptoms)
        limit = self.thresholds.evidence_with_symptom if corroborated else self.thresholds.evidence
        for key, name in self._held_out_keys(entry):
            series = self._held_out.setdefault(name, _HeldOut(self.thresholds.warmup))
            series.add(entry[key], entry.get(HELD_OUT_ERROR + name))
            levels.append(series)
            fall = series.fell(limit, self.thresholds.held_out_fall)
            if fall:
                reasons.append(
                    f"the held-out reward `{name}` is {fall.size:.3f} below its best level of {fall.best:.3f}, more than noise "
                    f"explains ({fall.evidence:.1f} standard errors)"
                )
        if not self._held_out:
            reasons, gross = gross, []
        for name, series in changes.items():
            fall = series.fell(limit, self.thresholds.held_out_fall)
            if fall:
                reasons.append(
                    f"next to the first policy, completion by completion, the held-out reward `{name}` has lost {fall.size:.3f} "
                    f"({fall.evidence:.1f} standard errors)"
                )
        verdict = Verdict(
            alarm=None,
            symptoms=[*symptoms.values(), *gross],
            evidence=max((series.evidence for series in [*levels, *changes.values()]), default=0.0),
            level=sum(series.mean for series in levels) if levels else None,
        )
        if not reasons:
            return verdict
        alarm = f"{'; '.join(reasons)}."
        besides = f" Besides: {'; '.join(verdict.symptoms)}." if verdict.symptoms else ""
        return replace(verdict, alarm=alarm[0].upper() + alarm[1:] + besides)

    def _changes_until(self, entry: Mapping[str, float]) -> dict[str, _HeldOut]:
        """Held-out rewards compared with the first policy, where that was possible in the last entries."""
        for name in self._changes_age:
            self._changes_age[name] += 1
        for key, value in entry.items():
            if key.startswith(CHANGE):
                name = key.removeprefix(CHANGE)
                series = self._changes.setdefault(name, _HeldOut(self.thresholds.change_warmup, start=0.0))
                series.add(value, entry.get(CHANGE_ERROR + name))
                self._changes_age[name] = 0
        return {name: series for name, series in self._changes.items() if self._changes_age[name] < WINDOW}

    def _held_out_keys(self, entry: Mapping[str, float]) -> list[tuple[str, str]]:
        measured = [(key, key.removeprefix(HELD_OUT)) for key in entry if key.startswith(HELD_OUT)]
        return measured or [(key, name) for key, name in self._named.items() if key in entry]

    def _symptoms(self, entry: Mapping[str, float]) -> dict[str, str]:
        """What is no collapse by itself, by what it is seen in."""
        thresholds = self.thresholds
        found = {}
        for key, value in entry.items():
            if key.startswith(AGREEMENT_EVIDENCE):
                name = key.removeprefix(AGREEMENT_EVIDENCE)
                self._agreement[name] = _cusum(self._agreement.get(name, 0.0), -value)
                if self._agreement[name] > thresholds.drift_evidence:
                    found["agreement"] = f"within groups, the trained reward is higher where `{name}` is lower"
        log_prob = [value for key, value in entry.items() if key.endswith("/log_prob_per_token")]
        for name, level, both_ways, text in (
            (
                "log_prob",
                log_prob[0] if log_prob else None,
                False,
                "the frozen model finds the completions less probable",
            ),
            ("length", entry.get("completions/mean_length"), True, "the length drifts"),
        ):
            if level is not None:
                drift = self._drifts.setdefault(name, _Drift(thresholds.warmup, both_ways))
                drift.add(level)
                if drift.evidence > thresholds.drift_evidence:
                    found[name] = f"{text} ({drift.first:.3g} at first, now {drift.mean:.3g})"
        return found

    def _gross_symptoms(self, entry: Mapping[str, float]) -> list[str]:
        """What is taken for a collapse without a held-out reward, once it lasts."""
        t = self.thresholds
        log_prob = [value for key, value in entry.items() if key.endswith("/log_prob_per_token")]
        values = {
            "length": entry.get("completions/mean_length"),
            "clipped": entry.get("completions/clipped_ratio"),
            "repetition": entry.get("collapse/repetition"),
            "log_prob": log_prob[0] if log_prob else None,
            "kl": _first(entry, KL_KEYS),
            "entropy": _first(entry, ENTROPY_KEYS),
        }
        first, now = {}, {}
        for name, value in values.items():
            if value is not None:
                series = self._levels.setdefault(name, _Series(t.warmup))
                series.add(value)
                if series.ready:
                    first[name], now[name] = series.first, value
        change = {name: now[name] - first[name] for name in now}
        deterministic = (
            "entropy" in now
            and now["entropy"] < t.entropy_ratio * first["entropy"]
            and entry.get("collapse/distinct_completions", math.inf) <= t.distinct_completions
            and not entry.get("collapse/reward_is_verdict", 1.0)
        )
        length_ratio = now["length"] / first["length"] if first.get("length") else 1.0
        little_but_length = abs(entry.get("collapse/length_correlation", 0.0)) > t.length_correlation
        shown = {
            "completions have become short": length_ratio < t.length_ratio,
            "the reward is little but length, which has halved or doubled": little_but_length
            and not 0.5 < length_ratio < 2.0,
            "completions do not end any more": change.get("clipped", 0.0) > t.clipped_rise,
            "completions repeat themselves": change.get("repetition", 0.0) > t.repetition_rise,
            "the frozen model finds the completions improbable": change.get("log_prob", 0.0) < -t.log_prob_fall,
            "the policy is far from the reference": now.get("kl", 0.0) > t.kl,
            "the policy says one thing only": deterministic,
        }
        found = []
        for reason, is_shown in shown.items():
            self._gross[reason] = self._gross.get(reason, 0) + 1 if is_shown else 0
            if self._gross[reason] >= t.patience:
                found.append(reason)
        return found


class _Evaluations:
    """A held-out reward on the evaluation set, which is measured seldom."""

    def __init__(self) -> None:
        self._values: list[float] = []

    def add(self, value: float) -> None:
        self._values.append(value)

    @property
    def best(self) -> float:
        return max(self._values)

    @property
    def fell_by(self) -> float:
        """The least distance below the best of the last two evaluations."""
        return self.best - max(self._values[-2:])


def _cusum(evidence: float, deviation: float) -> float:
    return max(0.0, evidence + deviation - ALLOWANCE)


def _first(entry: Mapping[str, float], keys: Sequence[str]) -> float | None:
    return next((entry[key] for key in keys if key in entry), None)
