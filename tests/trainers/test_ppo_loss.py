# SPDX-License-Identifier: Apache-2.0
"""Value loss, explained variance and KL controller against hand calculations."""

import math

import pytest
import torch

from endotrl.trainers.ppo_math import adapted_kl_coefficient, clipped_value_loss, explained_variance


class TestClippedValueLoss:
    def test_by_hand(self):
        # v moved from 0 by +0.3 (inside), by +1 towards the target 2 (clipped to 0.5), by +1 away from the target -1.
        values = torch.tensor([0.3, 1.0, 1.0], requires_grad=True)
        losses, clipped = clipped_value_loss(values, torch.zeros(3), torch.tensor([2.0, 2.0, -1.0]), cliprange=0.5)
        assert losses.tolist() == pytest.approx([1.7**2 / 2, 1.5**2 / 2, 2.0**2 / 2])
        assert clipped.tolist() == [False, True, False]
        losses.sum().backward()
        # No gradient where the value has moved far enough towards the target; full gradient back from a wrong move.
        assert values.grad is not None
        assert values.grad.tolist() == pytest.approx([-1.7, 0.0, 2.0])

    def test_scale_is_a_unit(self):
        generator = torch.Generator().manual_seed(0)
        values, old, targets = torch.randn(3, 100, generator=generator)
        expected = clipped_value_loss(values, old, targets, cliprange=0.2)
        unclipped, clipped = clipped_value_loss(values, old, targets)
        torch.testing.assert_close(unclipped, (values - targets) ** 2 / 2)
        assert not clipped.any()
        for unit in (0.01, 40.0):
            losses, clipped = clipped_value_loss(
                unit * values, unit * old, unit * targets, torch.tensor(unit), cliprange=0.2
            )
            torch.testing.assert_close(losses, expected[0])
            assert torch.equal(clipped, expected[1])


@pytest.mark.parametrize(
    ("values", "targets", "expected"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 1.0),  # perfect
        ([5.0, 5.0, 5.0], [1.0, 2.0, 3.0], 0.0),
        ([11.0, 12.0, 13.0], [1.0, 2.0, 3.0], 1.0),  # an offset
        ([3.0, 2.0, 1.0], [1.0, 2.0, 3.0], -3.0),
        ([1.0, 2.0], [1.0, 1.0], math.nan),
        ([1.0], [1.0], math.nan),
    ],
)
def test_explained_variance(values, targets, expected):
    found = explained_variance(torch.tensor(values), torch.tensor(targets))
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("kl", "count", "horizon", "expected"),
    [
        # 100 of 1000 completions: a tenth of the error, which is at most 20 %.
        *((6.0, 100, 1000, 0.01), (6.6, 100, 1000, 0.0101), (60.0, 100, 1000, 0.0102)),
        *((0.0, 100, 1000, 0.0098), (-3.0, 100, 1000, 0.0098)),
        (0.0, 100_000, 1, 0.008),  # it stays positive
    ],
)
def test_kl_controller(kl, count, horizon, expected):
    assert adapted_kl_coefficient(0.01, kl, 6.0, count, horizon) == pytest.approx(expected)
