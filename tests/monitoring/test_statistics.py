# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from endotrl.monitoring import Detector
from endotrl.monitoring.batch_statistics import (
    ValuesSeen,
    change_since,
    distinct_completions,
    group_correlation,
    repetition,
)


def test_repetition_by_hand() -> None:
    assert repetition([1, 2, 3, 4, 5, 6]) == 0.0
    # (1 2 3 4), (2 3 4 1), (3 4 1 2), (4 1 2 3), (1 2 3 4), (2 3 4 1): two of six were there before.
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4, 1]) == pytest.approx(2 / 6)
    assert repetition([7] * 104) == pytest.approx(100 / 101)
    assert repetition([1, 2, 3, 4]) is None  # one 4-gram cannot recur
    assert repetition([]) is None


def test_distinct_completions_by_hand() -> None:
    assert distinct_completions(torch.tensor([1, 1, 1, 1, 1, 2, 3, 4]), 4) == 2.5
    assert distinct_completions(torch.tensor([9, 9, 8, 8]), 2) == 1.0


def test_correlation_is_pearsons_without_what_groups_differ_by() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 12, generator=generator)
    expected = np.corrcoef(x.numpy(), y.numpy())[0, 1]
    assert group_correlation(x, y, 12)[0] == pytest.approx(expected, abs=1e-6)
    # Two groups with offsets of their own: what remains is the correlation of the differences to the groups' means.
    x, y = torch.randn(2, 2, 6, generator=generator)
    differences = [(t - t.mean(dim=1, keepdim=True)).flatten().numpy() for t in (x, y)]
    expected = float(differences[0] @ differences[1] / np.linalg.norm(differences[0]) / np.linalg.norm(differences[1]))
    offset_x, offset_y = torch.tensor([[0.0], [100.0]]), torch.tensor([[-3.0], [50.0]])
    correlation = group_correlation((x + offset_x).flatten(), (y + offset_y).flatten(), 6)
    assert correlation.rho == pytest.approx(expected, abs=1e-4)


def test_z_is_the_deviation_of_shuffled_groups() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 5 * 8, generator=generator, dtype=torch.float64)
    product = lambda a: ((a.view(5, 8) - a.view(5, 8).mean(1, keepdim=True)) * y.view(5, 8)).sum().item()  # noqa: E731
    shuffled = [
        product(torch.cat([row[torch.randperm(8, generator=generator)] for row in x.view(5, 8)])) for _ in range(4000)
    ]
    assert group_correlation(x, y, 8)[1] == pytest.approx(product(x) / np.std(shuffled), rel=0.05)


def test_undefined_correlations() -> None:
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert group_correlation(x, torch.full((4,), 0.7), 2) is None
    assert group_correlation(x, torch.tensor([0.1, 0.1, 5.0, 5.0]), 2) is None  # only groups differ
    assert group_correlation(x, x, 1) is None
    assert group_correlation(x, x * math.nan, 2) is None
    # A group with a completion that has no reward is left out.
    assert group_correlation(torch.tensor([1.0, 2.0, 3.0, math.nan]), x, 2)[0] == pytest.approx(1.0)


class Tabular:
    """
    Two policies over 8 answers to each of many questions, of which the first is right; the present one is the first
    one shifted.
    """

    def __init__(self, num_groups: int, spread: float, towards_right: float, seed: int) -> None:
        self.generator = np.random.default_rng(seed)
        logits = self.generator.standard_normal((num_groups, 8))
        logits[:, 0] += 2.0
        shift = spread * self.generator.standard_normal((num_groups, 8))
        shift[:, 0] += towards_right
        self.first, self.present = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (logits, logits + shift))

    def batch(self, group_size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
        """Whether sampled answers are right, and their log-ratios."""
        draws = self.generator.random((len(self.present), group_size, 1))
        answers = (draws > self.present.cumsum(1)[:, None, :-1]).sum(2)
        ratios = np.log(np.take_along_axis(self.first / self.present, answers, 1))
        return torch.from_numpy(answers == 0).double().flatten(), torch.from_numpy(ratios).flatten()

    @property
    def change(self) -> float:
        return float((self.present - self.first)[:, 0].mean())


@pytest.mark.parametrize("towards_right", [-0.4, 0.0, 0.4])
def test_change_is_unbiased_and_knows_its_error(towards_right: float) -> None:
    # 64 questions, always the same: what varies is what is answered.
    policies = Tabular(64, 0.3, towards_right, seed=0)
    found = [change_since(*policies.batch(), 8) for _ in range(400)]
    values, errors = np.array([f for f in found if f is not None]).T
    assert len(values) == 400
    assert abs(values.mean() - policies.change) < 4 * values.std() / 20
    # Errors count what questions differ by, too.
    assert values.std() < np.sqrt((errors**2).mean()) < 3 * values.std()
    # Far less than the error of a difference of two means.
    assert values.std() < 0.6 * math.sqrt(2 * 0.25 * 0.75 / 512)


def test_change_by_hand() -> None:
    # Present policy: right with 1/2; before, with 3/4. Weights 3/2 and 1/2.
    right = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    weights = torch.where(right > 0, 1.5, 0.5)
    change, _ = change_since(right, weights.log(), 2)
    # Groups of one right answer: ((1 - 1.5)(1 - 0) + (1 - 0.5)(0 - 1)) / 2; of two: 0.
    assert change == pytest.approx((-0.5 - 0.5 + 0.0) / 3)
    assert change_since(right, torch.zeros(6), 2) == (0.0, 0.0)


def test_too_far_apart_to_compare() -> None:
    right = torch.tensor([1.0, 0.0] * 8)
    one_heavy = torch.tensor([math.log(9.0)] + [math.log(7 / 15)] * 15)  # the mean is 1, and one answer has most of it
    assert change_since(right, one_heavy, 4) is None
    assert change_since(right, torch.full((16,), -1.0), 4) is None  # what the first policy did is not sampled any more
    assert change_since(right, torch.zeros(16), 1) is None
    assert change_since(right[:4], torch.zeros(4), 4) is None
    # A group with a completion that has no held-out reward is left out.
    right[0] = math.nan
    assert change_since(right, torch.zeros(16), 4) == (0.0, 0.0)


def test_no_alarm_from_a_drift_that_changes_nothing() -> None:
    # The shift is such that the mean accuracy stays, by bisection on many questions.
    low, high = -1.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if Tabular(20_000, 0.5, middle, seed=1).change < 0 else (low, middle)
    for seed in range(3):
        detector = Detector()
        for step in range(150):
            found = change_since(*Tabular(32, 0.5, middle, seed=1000 * seed + step).batch(), 8)
            entry = {"reward": 0.0}
            if found is not None:
                entry |= {"collapse/change/accuracy": found[0], "collapse/change_error/accuracy": found[1]}
            assert detector.update(entry).alarm is None


@pytest.mark.parametrize(
    ("batches", "is_verdict"),
    [
        ([("abcd", [0.0, 1.0, 0.0, 0.0])], True),  # from the first batch
        # Numbers, also where completions are the same, and with them their rewards, in this batch or in the next.
        ([("aabc", [-1.5, -1.5, -2.25, math.nan]), ("d", [-2.25])], False),
        ([(range(64), [float(i % 32) for i in range(64)])], True),
        ([(range(64), [float(i % 32) for i in range(64)]), ("a", [32.0])], False),  # a length, say
        ([("ab", [1e-8, 2e-8])], False),
    ],
)
def test_a_verdict_recurs_and_has_few_values(batches: list[tuple[str, list[float]]], is_verdict: bool) -> None:
    seen = ValuesSeen()
    for completions, values in batches:
        seen.add(completions, values)
    assert seen.is_verdict == ValuesSeen(seen.values, seen.recurs).is_verdict == is_verdict
