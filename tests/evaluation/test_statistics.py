# SPDX-License-Identifier: Apache-2.0
import math
import random

import numpy as np
import pytest

from endotrl.evaluation.intervals import (
    Estimate,
    Pair,
    Unit,
    calibration,
    differences,
    estimates,
    group_means,
    length_split,
    resampling_weights,
    verdict,
)
from endotrl.evaluation.results import summarize


def accuracy(means):
    return {"accuracy": means["*"]["accuracy"]}


def units_of(values, groups=None, clusters=None):
    groups = groups or ["g"] * len(values)
    clusters = clusters or [str(i) for i in range(len(values))]
    return [Unit(c, g, {"accuracy": float(v)}) for v, g, c in zip(values, groups, clusters, strict=True)]


class TestGroupMeans:
    def test_by_hand(self):
        units = [Unit("1", "a", {"x": 1.0}), Unit("2", "a", {"x": 0.0, "y": 5.0}), Unit("3", "b", {"x": 1.0})]
        means = group_means(units, np.array([[1.0, 1, 1], [2.0, 1, 0]]))
        assert means["a"]["x"].tolist() == pytest.approx([0.5, 2 / 3])
        assert means["a"]["y"].tolist() == [5.0, 5.0]  # a unit without a key does not count for it
        assert means["*"]["x"].tolist() == pytest.approx([2 / 3, 2 / 3])
        assert math.isnan(means["b"]["x"][1])  # nothing has weight
        assert "y" not in means["b"]


class TestBootstrap:
    def test_interval_is_that_of_a_proportion(self):
        values = [1] * 140 + [0] * 60
        units = units_of(values)
        estimate = estimates(units, accuracy, resampling_weights(units))["accuracy"]
        assert estimate.value == 0.7
        # Normal approximation: 0.7 +- 1.96 sqrt(0.7 * 0.3 / 200) = 0.0635.
        assert estimate.low == pytest.approx(0.7 - 0.0635, abs=0.01)
        assert estimate.high == pytest.approx(0.7 + 0.0635, abs=0.01)

    def test_clusters_are_drawn_together(self):
        # 50 clusters of four equal units: as uncertain as 50 units, twice as wide as 200 independent ones.
        values = [i % 2 for i in range(50) for _ in range(4)]
        together = units_of(values, clusters=[str(i) for i in range(50) for _ in range(4)])
        wide = estimates(together, accuracy, resampling_weights(together))["accuracy"]
        narrow = estimates(units_of(values), accuracy, resampling_weights(units_of(values)))["accuracy"]
        assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2.0, rel=0.15)

    def test_every_part_keeps_its_size(self):
        units = units_of([0, 1, 1, 0, 1], groups=["a", "a", "a", "b", "b"])
        weights = resampling_weights(units, num_resamples=50)
        assert (weights[:, :3].sum(axis=1) == 3).all() and (weights[:, 3:].sum(axis=1) == 2).all()
        assert (weights == resampling_weights(units, num_resamples=50)).all()


class TestDifferences:
    def test_paired_is_narrower_than_unpaired(self):
        rng = random.Random(0)
        a = [rng.random() < 0.6 for _ in range(300)]
        b = [right if rng.random() < 0.95 else not right for right in a]  # nearly the same answers
        weights = resampling_weights(units_of(a))
        gap = differences(units_of(a), units_of(b), accuracy, weights)["accuracy"]
        assert gap.value == pytest.approx(np.mean(b) - np.mean(a))
        # Only the units on which they differ count: variance of the mean of b - a.
        spread = 1.96 * np.std(np.array(b, float) - np.array(a, float)) / math.sqrt(300)
        assert gap.high - gap.value == pytest.approx(spread, rel=0.2)

    def test_same_units_only(self):
        with pytest.raises(ValueError, match="same units in the same order"):
            differences(units_of([1, 0]), units_of([1]), accuracy, np.ones((1, 2)))

    @pytest.mark.parametrize(
        ("low", "high", "n", "word"),
        [(0.1, 0.2, 99, "better"), (-0.2, -0.1, 99, "worse"), (0.0, 0.2, 99, "noise"), (0.1, 0.2, 19, "too few")],
    )
    def test_verdict(self, low, high, n, word):
        assert verdict(Estimate((low + high) / 2, low, high), n) == word


HALF = [0, 1] * 20


@pytest.mark.parametrize(
    ("scorer", "control", "says"),
    [
        ([1] * 40, HALF, "log_prob.mean is the best of 1: accuracy 1.000 (95% interval 1.000 to 1.000), +0.500 over"),
        ([1, *HALF[1:]], HALF, "No scorer is better than length beyond noise: the best, log_prob.mean, has accuracy"),
        (
            HALF,
            [1] * 40,
            "All scorers are worse than length (1.000); the best, log_prob.mean, has accuracy 0.500 (95%",
        ),
    ],
)
def test_verdict_on_a_scorer_beside_a_control(scorer, control, says):
    units = {"log_prob.mean": units_of(scorer), "length": units_of(control)}
    assert summarize(units, accuracy)["verdict"].startswith(says)


class TestLength:
    def test_length_alone_gets_one_half(self):
        lengths = [(100, 50), (100, 300), (10, 100), (100, 99), (70, 10)]
        pairs = [Pair(better - worse, better, worse) for better, worse in lengths]  # longer wins
        split = length_split(pairs)
        assert split["better_is_longer"] == 1.0 and split["better_is_shorter"] == 0.0
        assert split["length_controlled"] == 0.5 and split["bias"] == 1.0
        assert split["similar_length"] == 1.0 and split["num_similar_length"] == 1
        opposite = length_split([Pair(-p.margin, p.length_better, p.length_worse) for p in pairs])
        assert opposite["bias"] == -1.0 and opposite["length_controlled"] == 0.5

    def test_by_hand(self):
        # Longer: right, wrong. Shorter: right. A tie is not right. 120 to 100 is similar still.
        pairs = [Pair(1, 200, 100), Pair(0, 200, 100), Pair(1, 100, 200), Pair(1, 120, 100)]
        split = length_split(pairs)
        assert (split["better_is_longer"], split["better_is_shorter"], split["similar_length"]) == (0.5, 1.0, 1.0)
        assert split["length_controlled"] == 0.75 and split["bias"] == -0.5

    def test_one_side_only(self):
        assert length_split([Pair(1, 200, 100)])["bias"] is None


class TestCalibration:
    def test_by_hand(self):
        pairs = [Pair(margin, 1, 1) for margin in (5, -1, 4, 2, -3, 6)]
        # By absolute margin: -1, 2 | -3, 4 | 5, 6.
        bins = calibration(pairs, num_bins=3)
        assert [part["accuracy"] for part in bins] == [0.5, 0.5, 1.0]
        assert [(part["low"], part["high"]) for part in bins] == [(1, 2), (3, 4), (5, 6)]
        assert sum(part["num_pairs"] for part in bins) == 6

    def test_fewer_pairs_than_bins(self):
        assert len(calibration([Pair(1, 1, 1)])) == 1
        assert calibration([]) == []
