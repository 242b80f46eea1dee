# SPDX-License-Identifier: Apache-2.0
"""What samples say of answers, in expectation over all samples that can be drawn, against the policies themselves."""

import itertools
import math

import numpy as np
import pytest

from endotrl.forecasting.forecast import from_records
from endotrl.forecasting.policies import Objective
from endotrl.forecasting.sampling import Mixture
from endotrl.forecasting.summary import Answers


BASE = np.array([0.4, 0.25, 0.15, 0.1, 0.06, 0.04])
ANSWERS = np.array([0, 1, 1, 2, 2, 3])  # that each completion gives
SAMPLES = 6


def draws():
    """All ways to draw from the frozen model, up to their order, with their probabilities."""
    for drawn in itertools.combinations_with_replacement(range(len(BASE)), SAMPLES):
        counts = np.bincount(drawn)
        ways = math.factorial(SAMPLES) / math.prod(map(math.factorial, counts.tolist()))
        yield np.array(drawn), ways * BASE[list(drawn)].prod()


def answers_of(drawn: np.ndarray) -> Answers:
    given = ANSWERS[drawn].tolist()
    seen = np.log(1 - (1 - BASE[drawn]) ** SAMPLES)
    return Answers([[i] for i in drawn], [given.index(a) for a in given], np.log(BASE[drawn]), seen)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_distinct_of_the_frozen_model(size):
    found = sum(
        p * answers_of(drawn).distinct(np.full(SAMPLES, 1 / SAMPLES), np.log(BASE[drawn]), size)
        for drawn, p in draws()
    )
    groups = itertools.product(range(len(BASE)), repeat=size)
    expected = sum(BASE[list(group)].prod() * len(set(ANSWERS[list(group)])) for group in groups)
    assert found == pytest.approx(expected, abs=0.02)  # counts alone: 0.13 to 0.31 too few


def test_distinct_where_one_completion_has_all():
    drawn = np.array([0, 0, 1, 2, 3, 5])
    weights = np.array([0.4995, 0.4995, 0.001, 0.0, 0.0, 0.0])
    density = np.log(np.array([0.999, 0.999, 0.001, 1e-12, 1e-12, 1e-12]))
    assert answers_of(drawn).distinct(weights, density, 8) == pytest.approx(1 + 8 * 0.001, abs=1e-3)


def record(key: str, probabilities: np.ndarray, answers: np.ndarray, mixture: Mixture, rng: np.random.Generator):
    drawn, log_probs = [], np.log(probabilities)
    tempered = {t: log_probs / t - np.logaddexp.reduce(log_probs / t) for t in mixture.recorded}
    for t in mixture.temperatures:
        drawn.append(int(log_probs.argmax() if t == 0 else rng.choice(len(log_probs), p=np.exp(tempered[t]))))
    given = answers[drawn].tolist()
    return {
        "key": key,
        "token_ids": [[i, 99] for i in drawn],
        "finished": [True] * len(drawn),
        "log_probs": {str(t): row[drawn].tolist() for t, row in tempered.items()},
        "rewards": log_probs[drawn].tolist(),
        "right": None,
        "groups": [given.index(a) for a in given],
    }


def test_answers_that_are_all_alike_probable():
    """Sharpening changes nothing: counts alone said that it moves away from the majority answer."""
    rng, mixture = np.random.default_rng(0), Mixture.of(16, (1.0, 0.7, 0.5))
    records = [record(str(i), np.full(200, 1 / 200), np.arange(200), mixture, rng) for i in range(60)]
    result = from_records(records, mixture, Objective("rloo"), [0.2])
    sampled = result.details["alternative_details"]["sampled"]
    distinct = 200 * (1 - (1 - 1 / 200) ** 8)
    assert result.betas[0]["distinct"] == pytest.approx(distinct, abs=1e-3)
    assert sampled["distinct"]["value"] == pytest.approx(distinct, abs=1e-3)
    assert result.betas[0]["agreement"] < 0.01 and sampled["agreement"]["value"] < 0.01
    assert result.verdict.startswith("Answers hardly change")


def test_sharper_policies_agree_more():
    rng, mixture = np.random.default_rng(1), Mixture.of(16, (1.0, 0.7, 0.5))
    records, expected = [], []
    for i in range(300):
        base = rng.dirichlet(np.full(10, 0.7)) + 1e-6
        base /= base.sum()
        records.append(record(str(i), base, np.arange(10), mixture, rng))
        sharp = base**6 / (base**6).sum()
        expected.append([sharp[base.argmax()], (1 - (1 - sharp) ** 8).sum()])
    row = from_records(records, mixture, Objective("rloo"), [0.2]).betas[0]
    agreement, distinct = np.mean(expected, axis=0)
    assert row["agreement"] == pytest.approx(agreement, abs=0.03)  # shares of counted answers: 0.15 too low
    assert row["distinct"] == pytest.approx(distinct, abs=0.08)


def test_long_completions_have_tiny_probabilities():
    log_probs = {1.0: [-2000.0, -1500.0, -3.0], 0.5: [-2100.0, -1600.0, -1.0]}
    mixture = Mixture({1.0: 2, 0.5: 3, 0.0: 1})
    found = mixture.log_seen(log_probs, [False, True, False])
    assert found[:2] == pytest.approx([-2000 + math.log(2), 0.0])
    assert math.exp(found[2]) == pytest.approx(1 - (1 - math.exp(-3)) ** 2 * (1 - math.exp(-1)) ** 3)
