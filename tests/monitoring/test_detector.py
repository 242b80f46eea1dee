# SPDX-License-Identifier: Apache-2.0
"""The detector on logs of our own making: when it speaks, how soon, and how seldom for nothing."""

import math
import random
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import pytest

from endotrl.monitoring import CollapseThresholds, Detector


def first_alarm(entries: Iterable[dict[str, float]], **kwargs: Any) -> int | None:
    detector = Detector(**kwargs)
    return next((i for i, entry in enumerate(entries) if detector.update(entry).alarm), None)


def noisy(levels: Iterable[float], noise: float, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [level + generator.gauss(0, noise) for level in levels]


def log(**series: Any) -> list[dict[str, float]]:
    """A run whose trained reward rises. Series by the monitor's names: a number per entry, or one for all."""
    of_reward = ("held_out", "change", "agreement_z", "slope")
    keys = {name: f"collapse/{name}" + "/accuracy" * (name.removesuffix("_error") in of_reward) for name in series}
    length = max(len(values) for values in series.values() if isinstance(values, list))
    return [
        {"reward": 0.1 * i, **{keys[k]: v[i] if isinstance(v, list) else v for k, v in series.items()}}
        for i in range(length)
    ]


def accuracies(
    levels: Iterable[float], noise: float = 0.03, seed: int = 0, with_error: bool = True
) -> list[dict[str, float]]:
    error = {"held_out_error": noise} if with_error else {}
    return log(held_out=noisy(levels, noise, seed), **error)


def plateau(height: float, rise: float, steps: int) -> list[float]:
    return [height - rise * math.exp(-i / 30) for i in range(steps)]


@pytest.mark.parametrize("with_error", [True, False])
def test_silent_where_nothing_falls(with_error: bool) -> None:
    # 6 runs of 1,000 steps: flat, and rising to a plateau.
    logs = [
        accuracies(levels, seed=seed, with_error=with_error)
        for levels in ([0.7] * 1000, plateau(0.95, 0.3, 1000))
        for seed in range(3)
    ]
    assert sum(first_alarm(log) is not None for log in logs) <= 1


def wandering(levels: Iterable[float], correlation: float, seed: int, noise: float = 0.03) -> list[dict[str, float]]:
    """A held-out reward whose noise is correlated from entry to entry, and is measured nowhere."""
    steps, values, now = noisy([0.0] * 1000, noise, seed), [], 0.0
    for i, level in enumerate(levels):
        now = steps[i] if i == 0 else correlation * now + math.sqrt(1 - correlation**2) * steps[i]
        values.append(level + now)
    return log(held_out=values)


@pytest.mark.parametrize("correlation", [0.8, 0.95])
def test_noise_that_wanders_is_no_fall(correlation: float) -> None:
    flat_and_rising = [0.6] * 120, plateau(0.8, 0.4, 120)
    logs = [wandering(levels, correlation, seed) for levels in flat_and_rising for seed in range(5)]
    assert sum(first_alarm(log) is not None for log in logs) <= 1
    # Most of it is lost at once, in 10 steps, or in 40.
    for steps in (1, 10, 40):
        fallen = [0.7 - 0.5 * min(1.0, max(0, i - 59) / steps) for i in range(120)]
        assert all(first_alarm(wandering(fallen, correlation, seed)) is not None for seed in range(5))


@pytest.mark.parametrize("with_error", [True, False])
@pytest.mark.parametrize("points_a_step", [0.003, 0.01, 0.03])
def test_a_fall_is_seen(points_a_step: float, with_error: bool) -> None:
    levels = [0.7] * 40 + [0.7 - points_a_step * i for i in range(60)]
    lost = []
    for seed in range(5):
        alarm = first_alarm(accuracies(levels, seed=seed, with_error=with_error))
        assert alarm is not None and alarm >= 40
        lost.append(0.7 - levels[alarm])
    # Alone, the held-out reward of a step is known to 3 points, and nothing can see a fall of that size at once.
    # Without its error, noise is known from these 40 steps alone, which may be correlated.
    assert sum(lost) / len(lost) < (0.08 if with_error else 0.15) + 3.5 * points_a_step


def test_a_symptom_makes_it_sooner() -> None:
    levels = [0.7] * 40 + [0.7 - 0.004 * i for i in range(60)]
    for seed in range(5):
        plain = accuracies(levels, seed=seed)
        disagreeing = [{**entry, "collapse/agreement_z/accuracy": -3.0} for entry in plain]
        alone, together = first_alarm(plain), first_alarm(disagreeing)
        assert together < alone
        assert 0.7 - levels[together] < 0.07
    # The symptom itself is no alarm.
    steady = accuracies([0.7] * 200, noise=0.001)
    assert first_alarm({**entry, "collapse/agreement_z/accuracy": -3.0} for entry in steady) is None


def changes(levels: list[float], error: float, seed: int = 0, **series: Any) -> list[dict[str, float]]:
    """A held-out reward that is known to 5 points, next to its change since the first policy, known better."""
    accuracy = noisy([0.7 + level for level in levels], 0.05, seed)
    series |= {"change": noisy(levels, error, seed + 1000), "change_error": error}
    return log(held_out=accuracy, held_out_error=0.05, **series)


@pytest.mark.parametrize(("points_a_step", "lost"), [(0.002, 0.042), (0.005, 0.05), (0.01, 0.06)])
def test_next_to_the_first_policy_a_fall_is_seen_sooner(points_a_step: float, lost: float) -> None:
    levels = [0.0] * 10 + [-points_a_step * i for i in range(60)]
    for seed in range(5):
        entries = changes(levels, error=0.012, seed=seed)
        alarm = first_alarm(entries)
        later = first_alarm({k: v for k, v in entry.items() if "change" not in k} for entry in entries)
        assert alarm is not None and alarm >= 10 and -levels[alarm] < lost
        assert later is None or later > alarm


def test_what_comes_back_is_no_collapse() -> None:
    # Adam's first updates: ten points lost in the first, and back by the fifth.
    levels = [0.0, -0.1, -0.07, -0.03, 0.0, 0.02, *(0.02 + 0.005 * i for i in range(40))]
    assert all(first_alarm(changes(levels, error=0.015, seed=seed)) is None for seed in range(5))


@pytest.mark.parametrize("agreement", [-3.0, 0.5, 5.0])
def test_what_is_lost_at_once_counts_early_where_the_reward_does_not_push_it_up(agreement: float) -> None:
    levels = [0.0, -0.05, -0.1, -0.15, -0.2, -0.2, -0.2, -0.2]
    for seed in range(5):
        # The third batch, which the policy wrote after two updates; or else the sixth.
        expected = 5 if agreement == 5.0 else 2
        assert first_alarm(changes(levels, error=0.012, seed=seed, agreement_z=agreement)) == expected


def test_a_change_that_is_no_longer_known_is_forgotten() -> None:
    fallen = changes([0.0] * 10 + [-0.1] * 10, error=0.01)
    after = accuracies([0.7] * 20, noise=0.01)
    detector = Detector()
    alarms = [detector.update(entry).alarm is not None for entry in [*fallen, *after]]
    assert not any(alarms[:10]) and alarms[19] and alarms[22] and not alarms[-1]


def first_policy(levels: Iterable[float], error: float = 0.004, seed: int = 0) -> list[dict[str, float]]:
    """A run without a held-out reward: the first policy's log-probability of what is written, next to its own."""
    return log(first_log_prob_change=noisy(levels, error, seed), first_log_prob_error=error)


def test_without_labels_the_first_policy_judges() -> None:
    sharpened = [0.25 * (1 - math.exp(-i / 30)) for i in range(200)]  # as a reward of a frozen model does it
    led_away = [0.0] * 10 + [-0.002 * i for i in range(50)]
    for seed in range(5):
        assert first_alarm(first_policy(sharpened, seed=seed)) is None
        assert first_alarm(first_policy([0.0] * 200, seed=seed)) is None
        alarm = first_alarm(first_policy(led_away, seed=seed))
        assert alarm is not None and 10 < alarm < 35  # 0.05 nats per token
        # With a held-out reward, that decides: a better policy may be one that the first finds improbable.
        labelled = [{**a, **b} for a, b in zip(accuracies([0.7] * 60), first_policy(led_away), strict=True)]
        assert first_alarm(labelled) is None


def test_a_lucky_streak_is_no_level() -> None:
    # Batches of 64 answers, nearly all right: those without a wrong one have an error of one answer.
    generator = random.Random(0)
    for _ in range(5):
        right = [sum(generator.random() < 0.97 for _ in range(64)) / 64 for _ in range(300)]
        errors = [math.hypot(math.sqrt(a * (1 - a) / 64), 1 / 64) for a in right]
        assert first_alarm(log(held_out=right, held_out_error=errors)) is None


def test_a_fast_fall_from_the_first_step() -> None:
    alarm = first_alarm(accuracies([0.7 - 0.03 * i for i in range(20)], noise=0.02))
    assert alarm is not None and alarm <= 7


BASE = {"reward": 0.0, "completions/mean_length": 100.0, "completions/clipped_ratio": 0.1, "entropy": 1.0, "kl": 0.01}
BASE |= {"collapse/repetition": 0.02, "r/log_prob_per_token": -1.0, "collapse/distinct_completions": 8.0}
BASE |= {"collapse/length_correlation": -0.5, "collapse/reward_is_verdict": 0.0}


@pytest.mark.parametrize(
    "changed",
    [
        {"completions/mean_length": 30.0},
        {"completions/clipped_ratio": 0.9},
        {"collapse/repetition": 0.5},
        {"r/log_prob_per_token": -2.0},
        {"kl": 2.0},
        {"entropy": 0.001, "collapse/distinct_completions": 1.0},
        {"collapse/length_correlation": -0.97, "completions/mean_length": 45.0},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_symptoms_decide_without_a_held_out_reward(changed: dict[str, float]) -> None:
    entries = [BASE] * 20 + [{**BASE, **changed}] * 5
    assert first_alarm(entries) == 22  # the third in a row
    # They do not last: no alarm. (A log-probability that is low more often than not has sunk.)
    if "r/log_prob_per_token" not in changed:
        assert first_alarm([*[BASE] * 20, *([{**BASE, **changed}] * 2 + [BASE]) * 5]) is None
    # A held-out reward that does not fall has the last word.
    steady = [{**entry, "collapse/held_out/accuracy": 0.7 + 0.01 * (i % 2)} for i, entry in enumerate(entries)]
    assert first_alarm(steady) is None


@pytest.mark.parametrize(("sinks", "speaks"), [(0.1, True), (0.02, False), (-0.2, False)])
def test_the_frozen_models_log_probability_may_not_sink_for_good(sinks: float, speaks: bool) -> None:
    levels = [-0.4] * 20 + [-0.4 - sinks * min(1.0, i / 20) for i in range(80)]
    for seed in range(5):
        entries = [{**BASE, "r/log_prob_per_token": level} for level in noisy(levels, 0.02, seed)]
        alarm = first_alarm(entries)
        assert (alarm is not None and alarm >= 20) if speaks else alarm is None
        assert first_alarm(entries, thresholds=CollapseThresholds(log_prob_drift=0.2)) is None


def test_what_success_looks_like() -> None:
    # A verifier's verdict: the policy has become sure, and brief, and right.
    sure = {"entropy": 0.001, "collapse/distinct_completions": 1.0, "completions/mean_length": 60.0}
    entries = [BASE] * 20 + [{**BASE, **sure}] * 50
    assert first_alarm({**entry, "collapse/reward_is_verdict": 1.0} for entry in entries) is None
    # Longer answers, as of models that learn to reason.
    assert first_alarm([{**BASE, "completions/mean_length": 100.0 + 10 * i} for i in range(100)]) is None


def test_evaluations() -> None:
    steps = accuracies([0.7] * 10, noise=0.01)
    evaluations = lambda *values: [{"eval_loss": 0.0, "eval_rewards/accuracy/mean": v} for v in values]  # noqa: E731
    assert first_alarm([*steps, *evaluations(0.7, 0.72, 0.66, 0.71, 0.60)]) is None  # never twice in a row
    assert first_alarm([*steps, *evaluations(0.7, 0.72, 0.66, 0.65)]) == 13
    # Of many that differ by eight points, the last two tell nothing.
    differing = [0.74, 0.66] * 15
    assert first_alarm([*steps, *evaluations(*differing, 0.66, 0.65)]) is None
    assert first_alarm([*steps, *evaluations(*differing, 0.3, 0.3)]) == 41


def test_the_first_policy_corroborates_a_fall() -> None:
    """A loss of 0.4 points a step, its change measured to 1 point: sooner if completions become less probable, too."""

    def alarm(drift: float, fall: float = 0.004) -> int | None:
        falls = [-fall * i for i in range(60)]
        log_probs = {
            "first_log_prob_change": noisy([-drift * i for i in range(60)], 0.01, seed=2),
            "first_log_prob_error": 0.01,
        }
        accuracy = noisy([0.7 + level for level in falls], 0.03, seed=0)
        change = noisy(falls, 0.01, seed=1)
        return first_alarm(log(held_out=accuracy, held_out_error=0.03, change=change, change_error=0.01, **log_probs))

    with_it, healthy, flat = alarm(0.004), alarm(-0.004), alarm(0.0)
    assert with_it is not None and healthy is not None and flat is not None
    assert with_it < healthy == flat
    assert alarm(0.004, fall=0.0) is None, "with held-out answers as right as before, it decides nothing"


def test_an_alarm_lasts_from_evaluation_to_evaluation() -> None:
    fallen = accuracies([0.7] * 20 + [0.3] * 20, noise=0.01)
    good, bad = ({"eval_loss": 0.0, "eval_rewards/accuracy/mean": value} for value in (0.7, 0.3))
    detector = Detector()
    for entry in fallen:
        detector.update(entry)
    assert detector.update(good).alarm, "the held-out reward of the steps has fallen as before"
    detector = Detector()
    for entry in [*accuracies([0.7] * 10, noise=0.01), good, bad, bad]:
        detector.update(entry)
    assert detector.update(accuracies([0.7])[0]).alarm, "a step says nothing of the evaluations"
    assert not any(detector.update(entry).alarm for entry in [good, *accuracies([0.7] * 3, noise=0.01)])


def test_other_entries_are_passed_over() -> None:
    detector = Detector()
    assert detector.update({"train_runtime": 3.0, "train_loss": 0.1}).alarm is None
    assert detector.update({"reward": math.nan, "completions/mean_length": None}).alarm is None  # type: ignore[dict-item]
    assert detector.update({"step": 3, "loss": 0.1}).symptoms == []


def test_thresholds_are_checked() -> None:
    for field in fields(CollapseThresholds):
        assert f"{field.name} (`" in (CollapseThresholds.__doc__ or "")
        with pytest.raises(ValueError, match=f"`{field.name}` must be positive, got 0"):
            CollapseThresholds(**{field.name: 0})


def slopes(held_out_part: float, steps: int = 40, slope: float = 0.5, seed: int = 0) -> list[dict[str, float]]:
    """
    The trained reward rises by 0.01 a step since the first policy, and the held-out one by `held_out_part` of what
    that should bring: slope times as much. Both are known to 0.004.
    """
    rises = noisy([0.01 * i for i in range(steps)], 0.004, seed)
    change = noisy([held_out_part * slope * 0.01 * i for i in range(steps)], 0.004, seed + 1000)
    accuracy = {"held_out": [0.5 + x for x in change], "held_out_error": 0.03, "change": change, "change_error": 0.004}
    return log(reward_change=rises, reward_change_error=0.004, slope=slope, agreement_z=6.0, **accuracy)


def test_a_held_out_reward_that_does_not_rise_with_the_trained_one() -> None:
    # It is flat: nothing falls, and only what it should have gained is missing. Half of that is 2 points at step 8.
    entries = slopes(held_out_part=0.0)
    detector = Detector()
    alarms = [detector.update(entry).alarm for entry in entries]
    first = next(i for i, alarm in enumerate(alarms) if alarm)
    assert 8 <= first <= 16
    assert "should have changed `accuracy` by +0.0" in alarms[first] and "lost" not in alarms[first]
    # Without the slope, that is no collapse.
    assert first_alarm([{k: v for k, v in e.items() if "slope" not in k} for e in entries]) is None


@pytest.mark.parametrize("part", [0.6, 1.0, 1.5])
def test_silent_where_it_rises_as_it_should(part: float) -> None:
    assert [first_alarm(slopes(part, seed=seed)) for seed in range(10)] == [None] * 10


def test_silent_where_they_have_nothing_to_do_with_each_other() -> None:
    # A slope of 0: a reward for form, which leaves the answers alone.
    assert [first_alarm(slopes(0.0, slope=0.0, seed=seed)) for seed in range(10)] == [None] * 10


def test_kl_of_completions_is_no_kl_per_token() -> None:
    # OnlineDPO's `objective/kl` is a sum over the completion.
    assert first_alarm([{"objective/scores": 0.1 * i, "objective/kl": 5.0} for i in range(20)]) is None
    assert first_alarm([{"reward": 0.1 * i, "kl": 5.0} for i in range(20)]) is not None
