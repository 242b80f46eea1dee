# SPDX-License-Identifier: Apache-2.0
r"""
Judges a run from what it logged: a fold over the entries of `trainer.state.log_history`, without a trainer.

With a held-out reward, the verdict is how much evidence there is that it falls ([`HeldOut`]), and symptoms ([`Drift`])
only say how much is enough. The same is asked of its change since the first policy ([`change_since`]), whose level at
first is known: 0; and of that change next to what the rise of the trained reward should have brought.

Without one, the first policy's own log-probability of what is written takes its place. A reward of a frozen model
sharpens: for $\pi_k \propto \hat\pi^{1+k}$, $\mathrm{d}\, \mathbb{E}_k[\log \hat\pi] / \mathrm{d}k =
\mathrm{Var}_k(\log \hat\pi) \geq 0$. A policy whose answers the first one finds less and less probable goes
elsewhere. What this cannot show is a policy that is sure of what is wrong and becomes surer: it does as forecast.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .collapse_thresholds import (
    ASKED_EVIDENCE,
    CHANGE_WARMUP,
    CLIPPED_RISE,
    DISTINCT_COMPLETIONS,
    DRIFT_EVIDENCE,
    EARLY_WARMUP,
    ENTROPY_RATIO,
    LENGTH_CORRELATION,
    LOG_PROB_FALL,
    REPETITION_RISE,
    WARMUP,
    CollapseThresholds,
)
from .series import WINDOW, Drift, HeldOut, Series, cusum


# What trainers call the same thing: GRPO, RLOO, DenseGRPO and PPO; OnlineDPO.
REWARD_KEYS = ("reward", "objective/scores")
ENTROPY_KEYS = ("entropy", "objective/entropy")
KL_KEY = "kl"  # per token; the `objective/kl` of OnlineDPO is per completion
HELD_OUT = "collapse/held_out/"
HELD_OUT_ERROR = "collapse/held_out_error/"
CHANGE = "collapse/change/"
CHANGE_ERROR = "collapse/change_error/"
AGREEMENT_EVIDENCE = "collapse/agreement_z/"
SLOPE = "collapse/slope/"
REWARD_CHANGE, REWARD_CHANGE_ERROR = "collapse/reward_change", "collapse/reward_change_error"
# Of the first policy's log-probability, nats per token: the mean, and its change since training began.
FIRST_LOG_PROB = "collapse/first_log_prob"
FIRST_LOG_PROB_CHANGE, FIRST_LOG_PROB_ERROR = "collapse/first_log_prob_change", "collapse/first_log_prob_error"
ASKED_CHANGE = "collapse/asked_change/"
ASKED_CHANGE_ERROR = "collapse/asked_change_error/"

# Pooled standard deviations from which on the trained reward is taken to push the held-out one up.
AGREES = 2.0
# The part that a held-out reward must have of the change that the trained one's should bring.
HALF = 0.5


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
            Running mean of the held-out rewards (their sum, of several), to compare checkpoints by; `None` without
            one.
    """

    alarm: str | None
    symptoms: list[str] = field(default_factory=list)
    evidence: float = 0.0
    level: float | None = None


class Detector:
    """
    Reads log entries in order and says after each whether the run collapses.

    With a held-out reward, a collapse is that it falls, and the symptoms only say how much evidence is enough. Without
    one, symptoms decide.

    Args:
        thresholds ([`CollapseThresholds`], *optional*):
            When to speak.
        held_out (`list[str]`, *optional*):
            Names of reward functions whose logged means are held-out rewards, if the log has no
            `collapse/held_out/<name>`.

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
        self._held_out: dict[str, HeldOut] = {}
        self._changes: dict[str, HeldOut] = {}  # since the first policy, of held-out rewards
        self._changes_age: dict[str, int] = {}  # entries since the last one
        self._shortfalls: dict[str, HeldOut] = {}  # of these changes, below what the trained reward's should bring
        self._first_log_prob = HeldOut(CHANGE_WARMUP, start=0.0)  # its change
        self._slopes: dict[str, tuple[float, int]] = {}  # sum and number
        self._reward_change = (0.0, 0.0)  # and its standard error
        self._asked: dict[str, deque[tuple[float, float]]] = {}  # changes of the last askings, and their errors
        self._evaluations: dict[str, list[float]] = {}
        self._drifts: dict[str, Drift] = {}
        self._levels: dict[str, Series] = {}
        self._disagreement: dict[str, float] = {}  # CUSUM
        self._agreement: dict[str, tuple[float, int]] = {}  # sum, in standard deviations, and number
        self._gross: dict[str, int] = {}  # entries in a row that show it
        self.last = Verdict(None)

    def update(self, entry: Mapping[str, float]) -> Verdict:
        """
        Reads one entry, with what the monitor added. Entries that are neither of a training step nor of an evaluation
        (the summary at the end) are passed over.
        """
        entry = {key: value for key, value in entry.items() if isinstance(value, int | float) and math.isfinite(value)}
        if any(key.startswith("eval_") for key in entry):
            self.last = self._evaluation(entry)
        # PPO logs the reward when it generates, and questions may be asked in between.
        elif any(key in REWARD_KEYS or key.startswith(HELD_OUT) for key in entry):
            self.last = self._step(entry)
        return self.last

    def _evaluation(self, entry: Mapping[str, float]) -> Verdict:
        reasons = []
        for name in {*self._held_out, *self._named.values()}:
            key = f"eval_rewards/{name}/mean"
            if key not in entry:
                continue
            values = self._evaluations.setdefault(name, [])
            values.append(entry[key])
            fall = max(values) - max(values[-2:])
            if fall > self.thresholds.evaluation_fall:
                reasons.append(
                    f"`{name}` on the evaluation set was {max(values):.3f} and has been {fall:.3f} or more below that "
                    "twice in a row"
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
            # Questions that are asked every few steps have seen as many by their third time.
            warmup = EARLY_WARMUP if ASKED_CHANGE + name in entry else WARMUP
            self._held_out.setdefault(name, HeldOut(warmup)).add(entry[key], entry.get(HELD_OUT_ERROR + name))
        for name, series in self._held_out.items():
            levels.append(series)
            fall = series.fell(limit, self.thresholds.held_out_fall)
            if fall:
                reasons.append(
                    f"the held-out reward `{name}` is {fall.size:.3f} below its best level of {fall.best:.3f}, more "
                    f"than noise explains ({fall.evidence:.1f} standard errors)"
                )
        if not self._held_out:
            reasons, gross = [*gross, *self._log_prob_falls(entry, limit)], []
        for name, series in changes.items():
            fall = series.fell(limit, self.thresholds.held_out_fall)
            # Adam's first updates are erratic, and what they lose comes back where the reward pushes it up.
            early = series.count < CHANGE_WARMUP
            if fall and not (early and self._may_come_back(name)):
                reasons.append(
                    f"next to the first policy, completion by completion, the held-out reward `{name}` has lost "
                    f"{fall.size:.3f} ({fall.evidence:.1f} standard errors)"
                )
        reasons += [*self._asked_falls(entry), *self._shortfalls_of(entry, changes, limit)]
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

    def _log_prob_falls(self, entry: Mapping[str, float], limit: float) -> Iterator[str]:
        """The first policy's log-probability of what is written, next to what it was for its own answers."""
        if FIRST_LOG_PROB_CHANGE in entry:
            self._first_log_prob.add(entry[FIRST_LOG_PROB_CHANGE], entry.get(FIRST_LOG_PROB_ERROR))
            fall = self._first_log_prob.fell(limit, self.thresholds.first_log_prob_fall)
            if fall:
                yield (
                    f"the first policy finds the completions less and less probable, by {fall.size:.3f} nats per "
                    f"token ({fall.evidence:.1f} standard errors): a reward of a frozen model does the opposite"
                )

    def _changes_until(self, entry: Mapping[str, float]) -> dict[str, HeldOut]:
        """Held-out rewards compared with the first policy, where that was possible in the last entries."""
        for name in self._changes_age:
            self._changes_age[name] += 1
        for key, value in entry.items():
            if key.startswith(CHANGE):
                name = key.removeprefix(CHANGE)
                series = self._changes.setdefault(name, HeldOut(EARLY_WARMUP, start=0.0))
                series.add(value, entry.get(CHANGE_ERROR + name))
                self._changes_age[name] = 0
        return {name: series for name, series in self._changes.items() if self._changes_age[name] < WINDOW}

    def _asked_falls(self, entry: Mapping[str, float]) -> Iterator[str]:
        """Held-out questions whose answers have become worse, question by question, in the last two askings."""
        for key, value in entry.items():
            if key.startswith(ASKED_CHANGE):
                name = key.removeprefix(ASKED_CHANGE)
                asked = self._asked.setdefault(name, deque(maxlen=2))
                asked.append((value, entry.get(ASKED_CHANGE_ERROR + name, math.inf)))
        least = self.thresholds.held_out_fall
        for name, asked in self._asked.items():
            if len(asked) == 2 and all(c < -max(least, ASKED_EVIDENCE * error) for c, error in asked):
                change, error = asked[-1]
                yield (
                    f"question by question, `{name}` has lost {-change:.3f} since training began "
                    f"({-change / error:.1f} standard errors, twice in a row)"
                )

    def _shortfalls_of(
        self, entry: Mapping[str, float], changes: Mapping[str, HeldOut], limit: float
    ) -> Iterator[str]:
        r"""
        Held-out rewards that have not risen as far as they should have: within groups, they change by a slope
        $b = \mathrm{Cov}(r, a) / \mathrm{Var}(r)$ with the trained reward, so that a rise of $\Delta r$ since the
        first policy should have brought $b \Delta r$. They must have half of that: the slope changes on the way.
        """
        if REWARD_CHANGE in entry:
            self._reward_change = entry[REWARD_CHANGE], entry.get(REWARD_CHANGE_ERROR, math.inf)
        rise, rise_error = self._reward_change
        for name in changes:
            total, number = self._slopes.get(name, (0.0, 0))
            if SLOPE + name in entry:
                total, number = self._slopes[name] = total + entry[SLOPE + name], number + 1
            if not number:
                continue
            slope, agreement = total / number, self._agreement.get(name, (0.0, 1))
            series = self._shortfalls.setdefault(name, HeldOut(CHANGE_WARMUP, start=0.0))
            if CHANGE + name in entry and REWARD_CHANGE in entry:
                evidence = max(abs(agreement[0]) / math.sqrt(agreement[1]), 1.0)  # of the slope, in its errors
                half = HALF * slope
                error = math.hypot(entry.get(CHANGE_ERROR + name, math.inf), half * rise_error, half * rise / evidence)
                series.add(entry[CHANGE + name] - half * rise, error)
            fall = series.fell(limit, self.thresholds.held_out_fall)
            if fall and rise > self.thresholds.evidence * rise_error:
                yield (
                    f"the trained reward has risen by {rise:.3g} ({rise / rise_error:.0f} standard errors), which by "
                    f"its agreement with `{name}` should have changed that by {slope * rise:+.3f}: it is "
                    f"{fall.size:.3f} below half of it ({fall.evidence:.1f} standard errors)"
                )

    def _may_come_back(self, name: str) -> bool:
        """Whether the trained reward is higher where this held-out one is, or nothing is known of that."""
        total, number = self._agreement.get(name, (0.0, 0))
        return number == 0 or total / math.sqrt(number) > AGREES

    def _held_out_keys(self, entry: Mapping[str, float]) -> list[tuple[str, str]]:
        measured = [(key, key.removeprefix(HELD_OUT)) for key in entry if key.startswith(HELD_OUT)]
        return measured or [(key, name) for key, name in self._named.items() if key in entry]

    def _symptoms(self, entry: Mapping[str, float]) -> dict[str, str]:
        """What is no collapse by itself, by what it is seen in."""
        found = {}
        for key, value in entry.items():
            if key.startswith(AGREEMENT_EVIDENCE):
                name = key.removeprefix(AGREEMENT_EVIDENCE)
                total, number = self._agreement.get(name, (0.0, 0))
                self._agreement[name] = total + value, number + 1
                self._disagreement[name] = cusum(self._disagreement.get(name, 0.0), -value)
                if self._disagreement[name] > DRIFT_EVIDENCE:
                    found["agreement"] = f"within groups, the trained reward is higher where `{name}` is lower"
        log_prob = _log_prob(entry)
        for name, level, both_ways, text in (
            (
                "log_prob",
                log_prob,
                False,
                "the frozen model finds the completions less probable",
            ),
            ("length", entry.get("completions/mean_length"), True, "the length drifts"),
        ):
            if level is not None:
                drift = self._drifts.setdefault(name, Drift(WARMUP, both_ways))
                drift.add(level)
                if drift.evidence > DRIFT_EVIDENCE:
                    found[name] = f"{text} ({drift.first:.3g} at first, now {drift.mean:.3g})"
        return found

    def _gross_symptoms(self, entry: Mapping[str, float]) -> list[str]:
        """What is taken for a collapse without a held-out reward, once it lasts."""
        t = self.thresholds
        log_prob = _log_prob(entry)
        values = {
            "length": entry.get("completions/mean_length"),
            "clipped": entry.get("completions/clipped_ratio"),
            "repetition": entry.get("collapse/repetition"),
            "log_prob": log_prob,
            "kl": entry.get(KL_KEY),
            "entropy": _first(entry, ENTROPY_KEYS),
        }
        first, now = {}, {}
        for name, value in values.items():
            if value is not None:
                series = self._levels.setdefault(name, Series(WARMUP))
                series.add(value)
                if series.ready:
                    first[name], now[name] = series.first, value
        change = {name: now[name] - first[name] for name in now}
        deterministic = (
            "entropy" in now
            and now["entropy"] < ENTROPY_RATIO * first["entropy"]
            and entry.get("collapse/distinct_completions", math.inf) <= DISTINCT_COMPLETIONS
            and not entry.get("collapse/reward_is_verdict", 1.0)
        )
        length_ratio = now["length"] / first["length"] if first.get("length") else 1.0
        little_but_length = abs(entry.get("collapse/length_correlation", 0.0)) > LENGTH_CORRELATION
        shown = {
            "completions have become short": length_ratio < t.length_ratio,
            "the reward is little but length, which has halved or doubled": little_but_length
            and not 0.5 < length_ratio < 2.0,
            "completions do not end any more": change.get("clipped", 0.0) > CLIPPED_RISE,
            "completions repeat themselves": change.get("repetition", 0.0) > REPETITION_RISE,
            "the frozen model finds the completions improbable": change.get("log_prob", 0.0) < -LOG_PROB_FALL
            or self._log_prob_sinks(),
            "the policy is far from the reference": now.get("kl", 0.0) > t.kl,
            "the policy says one thing only": deterministic,
        }
        found = []
        for reason, is_shown in shown.items():
            self._gross[reason] = self._gross.get(reason, 0) + 1 if is_shown else 0
            if self._gross[reason] >= t.patience:
                found.append(reason)
        return found

    def _log_prob_sinks(self) -> bool:
        """Whether the frozen model's log-probability has sunk by more than noise explains, and by enough to matter."""
        drift = self._drifts.get("log_prob")
        if drift is None or drift.evidence <= DRIFT_EVIDENCE:
            return False
        return drift.mean - drift.first < -self.thresholds.log_prob_drift


def _log_prob(entry: Mapping[str, float]) -> float | None:
    """Of what is written, per token, by the frozen model of a reward or else the first policy."""
    return next((v for k, v in entry.items() if k.endswith("/log_prob_per_token")), entry.get(FIRST_LOG_PROB))


def _first(entry: Mapping[str, float], keys: Sequence[str]) -> float | None:
    return next((entry[key] for key in keys if key in entry), None)
