# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest
import torch

from endotrl.monitoring.statistics import distinct_completions, group_correlation, repetition


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
    correlation, _ = group_correlation((x + offset_x).flatten(), (y + offset_y).flatten(), 6)
    assert correlation == pytest.approx(expected, abs=1e-4)


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
