# SPDX-License-Identifier: Apache-2.0
r"""
Collapse detection from logs: a fold over the entries of `trainer.state.log_history`, without a trainer.

With a held-out reward, the verdict is the evidence that it falls ([`HeldOutSeries`]), and symptoms only set how much
is enough. The same applies to its change since the first policy ([`change_since`]), whose initial level is known: 0;
and to that change compared with what the rise of the trained reward should have brought.

Without one, the first policy's own log-probability of the completions is used instead. A reward of a frozen model
sharpens: for $\pi_k \propto \hat\pi^{1+k}$, $\mathrm{d}\, \mathbb{E}_k[\log \hat\pi] / \mathrm{d}k =
\mathrm{Var}_k(\log \hat\pi) \geq 0$. A policy whose answers become less and less probable under the first one moves
elsewhere. This cannot show a policy that is confidently wrong and becomes more so: it behaves as forecast.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from . import collapse_thresholds as limits
from .collapse_thresholds import CollapseThresholds
from .series import FEWEST, WINDOW, HeldOutSeries, Noise, Series, cusum


# Names of the same metric in trainers: GRPO, RLOO, DenseGRPO and PPO; OnlineDPO.
REWARD_KEYS = ("reward", "objective/scores")
ENTROPY_KEYS = ("entropy", "objective/entropy")
KL_KEY = "kl"  # per token; the `objective/kl` of OnlineDPO is per completion
HELD_OUT = "collapse/held_out/"
CHANGE = "collapse/change/"
AGREEMENT_EVIDENCE = "collapse/agreement_z/"
SLOPE = "collapse/slope/"
REWARD_CHANGE = "collapse/reward_change"
# Of the first policy's log-probability, in nats per token: the mean, and its change since training began.
FIRST_LOG_PROB = "collapse/first_log_prob"
FIRST_LOG_PROB_CHANGE = "collapse/first_log_prob_change"
ASKED_CHANGE = "collapse/asked_change/"
OF_HELD_OUT = (HELD_OUT, CHANGE, ASKED_CHANGE, AGREEMENT_EVIDENCE, SLOPE)

# Pooled standard deviations from which on the trained reward is considered to raise the held-out one.
AGREES = 2.0
# Minimum fraction of the change that the trained reward should bring about in a held-out one.
HALF = 0.5


@dataclass(frozen=True)
class Verdict:
    """Verdict after one log entry."""

    alarm: str | None  # reason for which the run counts as collapsed, as a sentence
    symptoms: list[str] = field(default_factory=list)  # deviations from a healthy run, with or without an alarm
    evidence: float = 0.0  # that held-out rewards fall, the maximum over them; 0 without one
    level: float | None = None  # running mean of the held-out rewards (of their sum, if several), if there are any


class Detector:
    """
    Reads log entries in order and judges after each whether the run collapses. `held_out` are names of reward
    functions whose logged means are held-out rewards, if the log has no `collapse/held_out/<name>`.

    Example:
    ```python
    >>> from endotrl.monitoring import Detector

    >>> detector = Detector(held_out=["accuracy"])
    >>> noise = [0.01, -0.01] * 50
    >>> accuracies = [0.7 + e for e in noise[:40]] + [0.7 - 0.005 * i + e for i, e in enumerate(noise[:20])]
    >>> logs = [{"step": i, "reward": 0.1 * i, "rewards/accuracy/mean": a} for i, a in enumerate(accuracies)]
    >>> alarms = [detector.update(log).alarm for log in logs]
    >>> any(alarms[:40]), any(alarms)
    (False, True)
    ```
    """

    def __init__(self, thresholds: CollapseThresholds | None = None, held_out: Sequence[str] = ()) -> None:
        self.thresholds = CollapseThresholds() if thresholds is None else thresholds
        self._named = {f"rewards/{name}/mean": name for name in held_out}
        self._rewards: dict[str, _HeldOutReward] = {}
        self._first_log_prob = HeldOutSeries(limits.CHANGE_WARMUP, is_change=True)  # its change
        self._levels: defaultdict[str, Series] = defaultdict(lambda: Series(limits.WARMUP))
        self._gross: defaultdict[str, int] = defaultdict(int)  # consecutive entries that show it
        self.last = self._on_step = Verdict(None)
        self._on_evaluation: str | None = None  # the alarm

    def update(self, entry: Mapping[str, float]) -> Verdict:
        """Reads one entry; those of neither a training step nor an evaluation are skipped."""
        entry = {key: value for key, value in entry.items() if isinstance(value, int | float) and math.isfinite(value)}
        if any(key.startswith("eval_") for key in entry):
            self._on_evaluation = self._evaluation(entry)
        # PPO logs the reward on generation, and held-out questions may be evaluated in between.
        elif any(key in REWARD_KEYS or key.startswith(HELD_OUT) for key in entry):
            self._on_step = self._step(entry)
        alarms = [alarm for alarm in (self._on_step.alarm, self._on_evaluation) if alarm]
        self.last = replace(self._on_step, alarm=" ".join(alarms) or None)
        return self.last

    def _evaluation(self, entry: Mapping[str, float]) -> str | None:
        reasons = []
        for name in dict.fromkeys([*self._rewards, *self._named.values()]):
            if (key := f"eval_rewards/{name}/mean") not in entry:
                continue
            values = self._rewards.setdefault(name, _HeldOutReward()).evaluations
            values.append(entry[key])
            fall = max(values) - max(values[-2:])
            noise = Noise(values[:-2]) if len(values) > FEWEST + 2 else None  # unknown with fewer
            beyond_noise = noise is None or noise.evidence(fall, 1, 2) > limits.ASKED_EVIDENCE
            if fall > self.thresholds.evaluation_fall and beyond_noise:
                reasons.append(
                    f"`{name}` on the evaluation set has been at least {fall:.3f} below its maximum of "
                    f"{max(values):.3f} in two consecutive evaluations"
                )
        return f"{'; '.join(reasons)}." if reasons else None

    def _step(self, entry: dict[str, float]) -> Verdict:
        now = self._read(entry)
        levels = [reward.levels for reward in self._rewards.values() if reward.levels is not None]
        # Not a collapse by themselves, but make one likelier: less evidence of a fall is required.
        drifts = [
            f"within groups, the trained reward is higher where `{name}` is lower"
            for name, reward in self._rewards.items()
            if AGREEMENT_EVIDENCE + name in entry and reward.disagreement > limits.DRIFT_EVIDENCE
        ]
        log_prob, length = self._levels["log_prob"], self._levels["length"]
        if "log_prob" in now and log_prob.sinks > limits.DRIFT_EVIDENCE:
            drifts.append(f"the completions become less probable under the frozen model {log_prob.moved}")
        gross = self._gross_symptoms(entry, now)
        limit = self.thresholds.evidence_with_symptom if drifts or gross else self.thresholds.evidence
        improbable = self._improbable(entry, limits.BOTH_EVIDENCE if levels else limit)
        if levels and improbable:
            limit = min(limit, limits.BOTH_EVIDENCE)
        falls = [fall for name, reward in self._rewards.items() for fall in reward.falls(name, limit, self.thresholds)]
        lengths = []
        if "length" in now and max(length.sinks, length.rises) > limits.DRIFT_EVIDENCE:
            # This corroborates nothing: healthy runs get shorter, or think longer, too.
            lengths = [f"the mean length is drifting {length.moved}"]
        if levels:
            reasons, symptoms = falls, [*drifts, *improbable, *lengths, *gross]
        else:
            reasons, symptoms = [*gross, *improbable, *falls], [*drifts, *lengths]
        alarm = f"{'; '.join(reasons)}."
        others = f" Other symptoms: {'; '.join(symptoms)}." if symptoms else ""
        changes = [reward.changes for reward in self._rewards.values() if reward.is_comparable]
        return Verdict(
            alarm=alarm[0].upper() + alarm[1:] + others if reasons else None,
            symptoms=symptoms,
            evidence=max((series.evidence for series in [*levels, *changes]), default=0.0),
            level=sum(series.mean for series in levels) if levels else None,
        )

    def _read(self, entry: dict[str, float]) -> dict[str, float]:
        """Updates all series but [`_improbable`]'s; returns the metrics of the policy in this entry, by name."""
        if not any(key.startswith(HELD_OUT) for key in entry):
            entry |= {HELD_OUT + name: entry[key] for key, name in self._named.items() if key in entry}
        for name in (key.removeprefix(prefix) for prefix in OF_HELD_OUT for key in entry if key.startswith(prefix)):
            self._rewards.setdefault(name, _HeldOutReward())
        for name, reward in self._rewards.items():
            reward.read(name, entry)
        log_probs = (value for key, value in entry.items() if key.endswith("/log_prob_per_token"))
        metrics = {
            "length": entry.get("completions/mean_length"),
            "clipped": entry.get("completions/clipped_ratio"),
            "repetition": entry.get("collapse/repetition"),
            # Per token, of the completions, by the frozen model of a reward or else the first policy.
            "log_prob": next(log_probs, entry.get(FIRST_LOG_PROB)),
            "kl": entry.get(KL_KEY),
            "entropy": next((entry[key] for key in ENTROPY_KEYS if key in entry), None),
        }
        now = {name: value for name, value in metrics.items() if value is not None}
        for name, value in now.items():
            self._levels[name].add(value)
        return now

    def _improbable(self, entry: Mapping[str, float], limit: float) -> list[str]:
        """The symptom that completions become improbable under the first policy, if there is this evidence of it."""
        if FIRST_LOG_PROB_CHANGE in entry:
            self._first_log_prob.add(*_measured(entry, FIRST_LOG_PROB_CHANGE))
            if fall := self._first_log_prob.fell(limit, self.thresholds.first_log_prob_fall):
                return [
                    f"the log-probability of the completions under the initial policy has fallen by {fall.size:.3f} "
                    f"nats per token ({fall.evidence:.1f} standard errors), although a reward of a frozen model "
                    "should raise it"
                ]
        return []

    def _gross_symptoms(self, entry: Mapping[str, float], now: Mapping[str, float]) -> list[str]:
        """Symptoms that count as a collapse without a held-out reward, if they last."""
        levels = {name: self._levels[name] for name in now if self._levels[name].ready}
        change = {name: now[name] - level.first for name, level in levels.items()}
        ratio = {name: now[name] / level.first for name, level in levels.items() if level.first}
        log_prob = self._levels["log_prob"]
        drift = log_prob.mean - log_prob.first if log_prob.sinks > limits.DRIFT_EVIDENCE else 0.0  # beyond its noise
        is_length = abs(entry.get("collapse/length_correlation", 0.0)) > limits.LENGTH_CORRELATION
        is_repeated = entry.get("collapse/distinct_completions", math.inf) <= limits.DISTINCT_COMPLETIONS
        is_verdict = entry.get("collapse/reward_is_verdict", 1.0)
        shown = {
            "completions have become short": ratio.get("length", 1.0) < self.thresholds.length_ratio,
            "the reward measures mostly length, which has halved or doubled": (
                is_length and not 0.5 < ratio.get("length", 1.0) < 2.0
            ),
            "most completions no longer end": change.get("clipped", 0.0) > limits.CLIPPED_RISE,
            "completions repeat themselves": change.get("repetition", 0.0) > limits.REPETITION_RISE,
            "the completions are improbable under the frozen model": (
                change.get("log_prob", 0.0) < -limits.LOG_PROB_FALL or drift < -self.thresholds.log_prob_drift
            ),
            "the policy is far from the reference model": "kl" in levels and now["kl"] > self.thresholds.kl,
            "the policy samples the same completion every time": (
                ratio.get("entropy", 1.0) < limits.ENTROPY_RATIO and is_repeated and not is_verdict
            ),
        }
        found = []
        for reason, is_shown in shown.items():
            self._gross[reason] = self._gross[reason] + 1 if is_shown else 0
            if self._gross[reason] >= self.thresholds.patience:
                found.append(reason)
        return found


class Measured(NamedTuple):
    """A logged number and its standard error, infinite if there is none."""

    value: float
    error: float


@dataclass
class _HeldOutReward:
    """Statistics of one held-out reward."""

    levels: HeldOutSeries | None = None
    # Since the first policy
    changes: HeldOutSeries = field(default_factory=lambda: HeldOutSeries(limits.EARLY_WARMUP, is_change=True))
    changes_age: int = WINDOW  # entries since the last one
    shortfalls: HeldOutSeries = field(default_factory=lambda: HeldOutSeries(limits.CHANGE_WARMUP, is_change=True))
    asked: list[Measured] = field(default_factory=list)  # the last two changes per question
    evaluations: list[float] = field(default_factory=list)
    agreement: float = 0.0  # with the trained reward: sum over `agreements` entries, in standard deviations
    agreements: int = 0
    disagreement: float = 0.0  # CUSUM
    slope: float = 0.0  # on the trained reward: sum over `slopes` entries
    slopes: int = 0
    rise: Measured = Measured(0.0, 0.0)  # of the trained reward since the first policy

    @property
    def is_comparable(self) -> bool:
        """Whether the last entries could be compared with the first policy."""
        return self.changes_age < WINDOW

    @property
    def agreement_z(self) -> float:
        return self.agreement / math.sqrt(max(self.agreements, 1))

    def read(self, name: str, entry: Mapping[str, float]) -> None:
        """Updates the statistics from a log entry."""
        level, change, asked = HELD_OUT + name, CHANGE + name, ASKED_CHANGE + name
        if level in entry:
            if self.levels is None:
                # Questions that are evaluated every few steps have seen as many by their third time.
                self.levels = HeldOutSeries(limits.EARLY_WARMUP if asked in entry else limits.WARMUP)
            self.levels.add(*_measured(entry, level))
        if asked in entry:
            self.asked = [*self.asked[-1:], _measured(entry, asked)]
        if (z := entry.get(AGREEMENT_EVIDENCE + name)) is not None:
            self.agreement, self.agreements = self.agreement + z, self.agreements + 1
            self.disagreement = cusum(self.disagreement, -z)
        self.changes_age = 0 if change in entry else self.changes_age + 1
        if change in entry:
            self.changes.add(*_measured(entry, change))
        if SLOPE + name in entry and self.is_comparable:
            self.slope, self.slopes = self.slope + entry[SLOPE + name], self.slopes + 1
        if REWARD_CHANGE in entry:
            self.rise = _measured(entry, REWARD_CHANGE)
            if change in entry and self.slopes:
                mean_slope = self.slope / self.slopes
                self.shortfalls.add(*_shortfall(_measured(entry, change), self.rise, mean_slope, self.agreement_z))

    def falls(self, name: str, limit: float, thresholds: CollapseThresholds) -> Iterator[str]:
        """Yields descriptions of its falls, or of rises that fell short."""
        least = thresholds.held_out_fall
        if self.levels and (fall := self.levels.fell(limit, least)):
            yield (
                f"the held-out reward `{name}` is {fall.size:.3f} below its best level of {fall.best:.3f}, more than "
                f"noise explains ({fall.evidence:.1f} standard errors)"
            )
        if len(self.asked) == 2 and all(c < -max(least, limits.ASKED_EVIDENCE * error) for c, error in self.asked):
            change, error = self.asked[-1]
            yield (
                f"`{name}` has lost {-change:.3f} since training began, paired by question "
                f"({-change / error:.1f} standard errors, in two consecutive evaluations)"
            )
        if not self.is_comparable:
            return
        # Adam's first updates are erratic, and what they lose is regained if the reward pushes upwards.
        may_come_back = not self.agreements or self.agreement_z > AGREES
        is_early = may_come_back and self.changes.count < limits.CHANGE_WARMUP
        if (fall := self.changes.fell(limit, least)) and not is_early:
            yield (
                f"compared with the initial policy on the same completions, the held-out reward `{name}` has lost "
                f"{fall.size:.3f} ({fall.evidence:.1f} standard errors)"
            )
        rise, error = self.rise
        if (fall := self.shortfalls.fell(limit, least)) and rise > thresholds.evidence * error:
            yield (
                f"the trained reward has risen by {rise:.3g} ({rise / error:.0f} standard errors), which should have "
                f"changed `{name}` by {self.slope / self.slopes * rise:+.3f} according to their correlation within "
                f"groups, but `{name}` is {fall.size:.3f} below half of that ({fall.evidence:.1f} standard errors)"
            )


def error_key(key: str) -> str:
    """Log key of the standard error of a logged number."""
    if key == FIRST_LOG_PROB_CHANGE:
        return f"{FIRST_LOG_PROB}_error"
    collapse, kind, *name = key.split("/")
    return "/".join([collapse, f"{kind}_error", *name])


def _measured(entry: Mapping[str, float], key: str) -> Measured:
    return Measured(entry[key], entry.get(error_key(key), math.inf))


def _shortfall(change: Measured, rise: Measured, slope: float, agreement_z: float) -> Measured:
    r"""
    Shortfall of a held-out reward's change since the first policy from half of $b \Delta r$: the change expected from
    its slope $b = \mathrm{Cov}(r, a) / \mathrm{Var}(r)$ within groups and the rise $\Delta r$ of the trained reward.
    (Half: $b$ changes during training.)
    """
    expected = HALF * slope  # per unit of the rise
    slope_evidence = max(abs(agreement_z), 1.0)  # in standard errors
    errors = change.error, expected * rise.error, expected * rise.value / slope_evidence
    return Measured(change.value - expected * rise.value, math.hypot(*errors))
