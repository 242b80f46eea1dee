# SPDX-License-Identifier: Apache-2.0
"""Estimates, alternatives and verdict of records whose numbers are written by hand."""

import math

import numpy as np
import pytest

from endotrl.forecasting.forecast import from_records
from endotrl.forecasting.policies import Objective
from endotrl.forecasting.sampling import Mixture


MIXTURE = Mixture({1.0: 4, 0.0: 1})
# One question: a likely wrong start that leads to two wrong answers, and the right answer, the most probable whole.
TOKENS = [[7, 1, 9], [7, 2, 9], [5, 5, 5, 9], [7, 1, 9], [7, 1, 9]]
PROBABILITIES = [0.3, 0.25, 0.4, 0.3, 0.3]


def make_record(key: str, token_ids: list, answers: list, probabilities: list, right: list | None) -> dict:
    """What is kept of a question: its samples, the last of them greedy."""
    log_probs = np.log(probabilities)
    return {
        "key": key,
        "texts": list(map(str, answers)),
        "token_ids": token_ids,
        "finished": [True] * len(answers),
        "log_probs": {"1.0": log_probs.tolist(), "0.5": (2 * log_probs).tolist()},
        "rewards": log_probs.tolist(),
        "right": right,
        "groups": [answers.index(answer) for answer in answers],
    }


def record(key: str, right: list[float] | None) -> dict:
    once = make_record(key, TOKENS, ["x", "y", "z", "x", "x"], PROBABILITIES, right)
    return {**once, "finished": [True, True, True, False, True]}


@pytest.fixture(scope="module")
def result():
    records = [record(str(i), [0.0, 0.0, 1.0, 0.0, 0.0]) for i in range(30)]
    return from_records(records, MIXTURE, Objective("rloo"), [1.0, 0.25])


def test_alternatives(result):
    # Of the four at T = 1: one is right; two say x; the right one has the highest reward, and is the longest.
    assert result.alternatives["sampled"] == 0.25
    assert result.alternatives["greedy"] == 0.0
    assert result.alternatives["majority"] == 0.0
    assert result.alternatives["best_of_n"] == 1.0
    assert result.alternatives["best_of_n_length"] == 1.0
    details = result.details["alternative_details"]
    assert details["majority"]["truncated"]["value"] == 0.5
    assert details["sampled"]["length"]["value"] == 3.25


def test_weights(result):
    def q(probability, greedy):
        return 0.8 * probability + 0.2 * greedy

    masses = [3 * 0.3**2 / q(0.3, 1), 0.25**2 / q(0.25, 0), 0.4**2 / q(0.4, 0)]  # beta 1: pi^2 / q
    shares = [mass / sum(masses) for mass in masses]
    row = result.betas[0]
    assert row["beta"] == 1.0
    assert row["accuracy"] == pytest.approx(shares[2])
    assert row["accuracy_interval"] == pytest.approx([shares[2]] * 2)  # all questions are alike
    assert row["length"] == pytest.approx(3 + shares[2])
    assert row["truncated"] == pytest.approx(shares[0] / 3)
    power = [p**2 / (0.3**2 + 0.25**2 + 0.4**2) for p in (0.3, 0.25, 0.4)]  # what else there is has 0.05 at most
    assert row["distinct"] == pytest.approx(sum(1 - (1 - p) ** 8 for p in power), abs=0.05)
    assert row["reward"] == pytest.approx(sum(s * math.log(p) for s, p in zip(shares, (0.3, 0.25, 0.4), strict=True)))
    assert row["ess"] == pytest.approx(1 / (shares[0] ** 2 / 3 + shares[1] ** 2 + shares[2] ** 2))
    assert row["ess_below_5"] == 1.0


@pytest.mark.parametrize(
    ("objective", "share"),
    [(Objective("rloo"), 1.0), (Objective("grpo", 8, "none"), 7 / 8), (Objective("grpo", 2, "none"), 0.5)],
)
def test_slope(objective, share):
    """The first step from the frozen model of one-token answers: that of the accuracy under pi^(1 + share / beta)."""
    answers = [0] * 200 + [1] * 120 + [2] * 80 + [0]  # as often as they are probable; the last is greedy
    base = np.array([0.5, 0.3, 0.2])
    one = make_record("0", [[a] for a in answers], answers, base[answers], [float(a == 0) for a in answers])
    found = from_records([one], Mixture({1.0: 400, 0.0: 1}), objective, [1.0]).details["slope"]["value"]
    step = 1e-5
    power = base ** (1 + share * step)
    assert found == pytest.approx((power[0] / power.sum() - base[0]) / step, rel=0.02)


def test_verdict_says_where_samples_do_not_suffice(result):
    assert result.suggested_beta is None
    assert "There are too few samples at every beta" in result.verdict
    assert "Training first improves the answers" in result.verdict


@pytest.mark.parametrize(
    ("right", "words"),
    [
        ([0.0, 0.0, 1.0, 0.0, 0.0], "Sharpening helps"),
        ([1.0, 1.0, 0.0, 1.0, 1.0], "Training would hurt"),
        ([1.0] * 5, "No change beyond noise"),
        (None, "Answers move away from the majority answer"),
    ],
)
def test_verdicts(right, words):
    """The same samples three times over, so that they suffice."""
    once = record("", right)
    if right is None:  # one answer in two texts, which together are more probable than the most probable text
        once["groups"] = [0, 0, 2, 0, 0]
    more = {key: value * 3 if isinstance(value, list) else value for key, value in once.items()}
    more |= {"log_probs": {t: values * 3 for t, values in once["log_probs"].items()}, "groups": once["groups"] * 3}
    records = [more | {"key": str(i)} for i in range(30)]
    result = from_records(records, Mixture({1.0: 14, 0.0: 1}), Objective("rloo"), [2.0, 1.0])
    assert result.verdict.startswith(words)
    assert result.suggested_beta == (1.0 if words == "Sharpening helps" else None)
    assert ("greedy decoding gives 0%" in result.verdict) == (words == "Sharpening helps")
    assert ("Wrong answers are more probable in 100% of" in result.verdict) == (words == "Training would hurt")
    assert "20% of the samples are truncated" in result.verdict or "21%" in result.verdict


def second_best(key: str) -> dict:
    """40 samples, as often as they are probable: a wrong answer before the right one, which is before three others."""
    answers = [0] * 16 + [1] * 12 + [2] * 4 + [3] * 4 + [4] * 4 + [0]  # the last is greedy
    probabilities = [(0.4, 0.3, 0.1, 0.1, 0.1)[a] for a in answers]
    return make_record(key, [[a, 9] for a in answers], answers, probabilities, [float(a == 1) for a in answers])


def test_right_answers_are_probable_but_not_most():
    """Training begins with better answers, and ends with worse ones: the verdict does not blame the covariance."""
    records = [second_best(str(i)) for i in range(30)]
    result = from_records(records, Mixture({1.0: 40, 0.0: 1}), Objective("rloo"), [2.0, 0.1])
    assert result.details["slope"]["value"] > 0
    assert result.betas[0]["accuracy"] > 0.3 > result.betas[1]["accuracy"]
    assert result.verdict.startswith("Sharpening helps") and "A smaller beta is worse again" in result.verdict
    alone = from_records(records, Mixture({1.0: 40, 0.0: 1}), Objective("rloo"), [0.1])
    assert alone.verdict.startswith("Training would hurt") and "Wrong answers are more probable" not in alone.verdict


@pytest.mark.parametrize(
    ("right", "words"),
    [([0.0] * 41, "No sample is right"), (None, "no answers"), ([0.0] * 40 + [1.0], None)],
)
def test_verdict_says_why_there_is_no_accuracy(right, words):
    """A grader that fits no completion, or a misspelt column of answers, looks like a model that knows nothing."""
    records = [second_best(str(i)) | {"right": right} for i in range(30)]
    verdict = from_records(records, Mixture({1.0: 40, 0.0: 1}), Objective("rloo"), [2.0]).verdict
    assert [w for w in ("No sample is right", "no answers") if w in verdict] == ([] if words is None else [words])


def test_few_questions():
    result = from_records([second_best("0")], Mixture({1.0: 40, 0.0: 1}), Objective("rloo"), [0.1])
    assert result.verdict.startswith("With only 1 question, this holds for these questions alone. Training would hurt")
