# SPDX-License-Identifier: Apache-2.0
"""
Credit assignment against its definitions: one completion at a time, holes cut out, sums written out in float64. What
stands where the mask is `False` is NaN or infinite in most tests, so that anything that reads it shows.
"""

import doctest
import math
from collections.abc import Callable

import hypothesis.extra.numpy as hnp
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from endotrl import credit
from endotrl.credit import (
    generalized_advantage_estimate,
    group_baseline,
    pool_by_segment,
    returns_to_go,
    segment_ids_from_ends,
    spread_over_segments,
    start_of_segment,
    sum_by_segment,
    whiten,
)


T, F = True, False
GARBAGE = torch.tensor([math.nan, math.inf, -math.inf, 1e30])


@st.composite
def batches(draw: st.DrawFn, num_tensors: int, max_rows: int = 4, max_positions: int = 7) -> tuple[Tensor, ...]:
    """Tensors of one shape with garbage outside the mask, and the mask, with holes and padding on both sides."""
    shape = (draw(st.integers(1, max_rows)), draw(st.integers(1, max_positions)))
    mask = torch.from_numpy(draw(hnp.arrays(bool, shape)))
    tensors = []
    for _ in range(num_tensors):
        values = hnp.arrays("float32", shape, elements=st.floats(-8, 8, width=16))
        garbage = GARBAGE[torch.from_numpy(draw(hnp.arrays("int64", shape, elements=st.integers(0, 3))))]
        tensors.append(torch.where(mask, torch.from_numpy(draw(values)), garbage))
    return *tensors, mask


discounts = st.floats(0.05, 1.0)
lambdas = st.floats(0.0, 1.0)


def by_row(mask: Tensor, row_function: Callable[..., list[float]], *tensors: Tensor) -> Tensor:
    """Applies a function of plain lists to what is left of each row when holes and padding are cut out."""
    result = torch.zeros(mask.shape, dtype=torch.float64)
    for i in range(len(mask)):
        result[i, mask[i]] = torch.tensor(
            row_function(*(tensor[i, mask[i]].double().tolist() for tensor in tensors)), dtype=torch.float64
        )
    return result


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-5, atol=2e-5)


class TestReturns:
    @given(batch=batches(1), gamma=discounts)
    @settings(deadline=None)
    def test_definition(self, batch, gamma):
        rewards, mask = batch

        def returns(r: list[float]) -> list[float]:
            return [sum(gamma ** (k - h) * r[k] for k in range(h, len(r))) for h in range(len(r))]

        assert_near(returns_to_go(rewards, mask, gamma), by_row(mask, returns, rewards))

    def test_by_hand_with_a_hole(self):
        # 1 + 0.5 * (2 + 0.5 * 4): the hole costs no discount.
        rewards = torch.tensor([[1.0, math.nan, 2.0, 4.0, math.inf]])
        mask = torch.tensor([[T, F, T, T, F]])
        assert returns_to_go(rewards, mask, 0.5).tolist() == [[3.0, 0.0, 4.0, 4.0, 0.0]]

    def test_long_completion_does_not_underflow(self):
        # Weights 0.9^h of an absolute position are 0 in float32 from h = 980 on.
        length = 4096
        mask = torch.ones(1, length, dtype=torch.bool)
        returns = returns_to_go(torch.ones(1, length), mask, 0.9)
        torch.testing.assert_close(returns[0, :-200], torch.full((length - 200,), 10.0))
        last_only = torch.zeros(1, length)
        last_only[0, -1] = 1.0
        torch.testing.assert_close(
            returns_to_go(last_only, mask, 0.9)[0, -100:], 0.9 ** torch.arange(99, -1, -1, dtype=torch.float32)
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_any_dtype_is_computed_in_float32(self, dtype):
        mask = torch.ones(1, 3000, dtype=torch.bool)
        assert returns_to_go(torch.ones(1, 3000, dtype=dtype), mask)[0, 0] == 3000.0  # 2048 + 1 == 2048 in float16

    @pytest.mark.parametrize("gamma", [0.0, -0.1, 1.1, math.nan])
    def test_discount_out_of_range(self, gamma):
        with pytest.raises(ValueError, match="gamma"):
            returns_to_go(torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), gamma)

    def test_shapes_must_fit(self):
        with pytest.raises(ValueError, match=r"`rewards` has shape \(1, 2\) and `mask` \(1, 3\)"):
            returns_to_go(torch.ones(1, 2), torch.ones(1, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match=r"`mask` is torch.int64"):
            returns_to_go(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.long))


class TestGae:
    @given(batch=batches(2), gamma=discounts, lam=lambdas, final=st.none() | st.floats(-5, 5, width=16))
    @settings(deadline=None)
    def test_definition(self, batch, gamma, lam, final):
        rewards, values, mask = batch

        def advantages(r: list[float], v: list[float]) -> list[float]:
            after = [*v[1:], final or 0.0]
            td = [r[h] + gamma * after[h] - v[h] for h in range(len(r))]
            return [sum((gamma * lam) ** (k - h) * td[k] for k in range(h, len(r))) for h in range(len(r))]

        final_values = None if final is None else torch.full((len(mask),), final)
        actual, returns = generalized_advantage_estimate(rewards, values, mask, gamma, lam, final_values)
        assert_near(actual, by_row(mask, advantages, rewards, values))
        assert_near(returns, actual.double() + torch.where(mask, values, 0.0))

    @given(batch=batches(2), gamma=discounts)
    @settings(deadline=None)
    def test_lambda_1_is_returns_minus_values(self, batch, gamma):
        rewards, values, mask = batch
        advantages, returns = generalized_advantage_estimate(rewards, values, mask, gamma, lam=1.0)
        assert_near(advantages, (returns_to_go(rewards, mask, gamma) - torch.where(mask, values, 0.0)).double())
        assert_near(returns, returns_to_go(rewards, mask, gamma).double())

    @pytest.mark.parametrize("finished", [True, False])
    def test_endogenous_reward_with_its_own_soft_value(self, finished):
        # r_h = f_h - V(s_{h+1}) and baseline V(s_h): the TD error is f_h - V(s_h) = alpha log pi(a_h | s_h).
        alpha, horizon = 0.7, 9
        logits = 5 * torch.randn(horizon + 1, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        actions = torch.arange(horizon) % 13
        values = alpha * (logits / alpha).exp().sum(-1).log()
        if finished:
            values[-1] = 0.0  # terminal
        chosen = logits[torch.arange(horizon), actions]
        log_probs = (logits[:-1] / alpha).log_softmax(-1)[torch.arange(horizon), actions]

        def padded(row: Tensor) -> Tensor:
            return torch.cat([row, torch.full((2,), math.nan)])[None]

        rewards, mask = padded(chosen - values[1:]), padded(chosen).isfinite()
        # What a trainer bootstraps is the value of the state after the last token; a terminal one has none.
        final_values = None if finished else values[-1:]
        td_errors, _ = generalized_advantage_estimate(
            rewards, padded(values[:-1]), mask, lam=0.0, final_values=final_values
        )
        assert_near(td_errors[mask], alpha * log_probs)
        to_go, _ = generalized_advantage_estimate(
            rewards, padded(values[:-1]), mask, lam=1.0, final_values=final_values
        )
        assert_near(to_go[mask], alpha * log_probs.flip(0).cumsum(0).flip(0))

    def test_value_of_a_hole_is_passed_over(self):
        values = torch.tensor([[1.0, math.nan, 2.0]])
        td, _ = generalized_advantage_estimate(
            torch.zeros(1, 3), values, torch.tensor([[T, F, T]]), gamma=0.5, lam=0.0
        )
        assert td.tolist() == [[0.5 * 2.0 - 1.0, 0.0, -2.0]]

    def test_bad_arguments(self):
        ones, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
        with pytest.raises(ValueError, match="`lam` is 1.5"):
            generalized_advantage_estimate(ones, ones, mask, lam=1.5)
        with pytest.raises(ValueError, match=r"`final_values` has shape \(3,\)"):
            generalized_advantage_estimate(ones, ones, mask, final_values=torch.ones(3))
        with pytest.raises(ValueError, match="`values` has shape"):
            generalized_advantage_estimate(ones, ones[:, :2], mask)


class TestGroupBaseline:
    def test_equal_lengths(self):
        values = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [4.0, 3.0]])
        mask = torch.ones(6, 2, dtype=torch.bool)
        mean = group_baseline(values, mask, 3)
        torch.testing.assert_close(mean, torch.tensor([[3.0, 3.0]] * 3 + [[1.0, 1.0]] * 3))
        others = group_baseline(values, mask, 3, leave_one_out=True)
        torch.testing.assert_close(others[:3], torch.tensor([[4.0, 3.5], [3.0, 1.5], [2.0, 4.0]]))

    def test_ragged_by_hand(self):
        # The first has ended after one token and keeps its 6; the second has a hole, where it has its next token's 4.
        values = torch.tensor([[6.0, math.nan, math.nan], [5.0, math.nan, 4.0], [9.0, 8.0, 7.0]])
        mask = torch.tensor([[T, F, F], [T, F, T], [T, T, T]])
        others = group_baseline(values, mask, 3, leave_one_out=True)
        assert others.tolist() == [[7.0, 0.0, 0.0], [7.5, 0.0, 6.5], [5.5, 5.0, 5.0]]
        assert group_baseline(values, mask, 3)[2].tolist() == pytest.approx([20 / 3, 6.0, 17 / 3])

    @given(batch=batches(1, max_rows=8))
    @settings(deadline=None)
    def test_own_value_only_scales(self, batch):
        values, mask = batch
        n = mask.any(dim=1).sum().item()
        own = torch.where(mask, values, 0.0)
        mean, others = (group_baseline(values, mask, len(mask), leave_one_out=x) for x in (False, True))
        factor = 1 - 1 / n if n > 1 else 0.0
        assert_near(own - mean, (factor * (own - others)).double())

    @given(batch=batches(1, max_rows=8))
    @settings(deadline=None)
    def test_no_completion_sees_its_own_rewards(self, batch):
        values, mask = batch
        changed = values.clone()
        changed[0] += 8
        if mask.any(dim=1).sum() > 1:
            before, after = (group_baseline(x, mask, len(mask), leave_one_out=True)[0] for x in (values, changed))
            assert_near(after, before.double())

    @pytest.mark.parametrize("leave_one_out", [False, True])
    def test_reward_at_the_last_token_is_credited_as_in_grpo(self, leave_one_out):
        outcomes, lengths = torch.tensor([1.0, 0.0, 0.5, 3.0]), torch.tensor([2, 7, 1, 4])
        mask = torch.arange(7) < lengths[:, None]
        rewards = torch.zeros(4, 7)
        rewards[torch.arange(4), lengths - 1] = outcomes
        baseline = group_baseline(returns_to_go(rewards, mask), mask, 4, leave_one_out)
        for i in range(4):
            others = outcomes[torch.arange(4) != i] if leave_one_out else outcomes
            torch.testing.assert_close(baseline[i, mask[i]], others.mean().expand(int(lengths[i])))

    def test_completions_without_a_reward_count_for_nobody(self):
        values, mask = torch.tensor([[1.0], [100.0], [3.0], [7.0]]), torch.ones(4, 1, dtype=torch.bool)
        baseline = group_baseline(values, mask, 4, valid=torch.tensor([T, F, T, T]))
        assert baseline[:, 0].tolist() == pytest.approx([11 / 3, 0.0, 11 / 3, 11 / 3])
        empty = torch.tensor([[T], [F], [T], [T]])
        assert torch.equal(group_baseline(values, empty, 4), baseline)

    @pytest.mark.parametrize("leave_one_out", [False, True])
    def test_alone(self, leave_one_out):
        values, mask = torch.tensor([[2.0, 5.0]]), torch.ones(1, 2, dtype=torch.bool)
        assert torch.equal(group_baseline(values, mask, 1, leave_one_out), values)

    def test_groups_must_be_full(self):
        with pytest.raises(ValueError, match="3 completions, which are not full groups of `num_generations`=2"):
            group_baseline(torch.ones(3, 1), torch.ones(3, 1, dtype=torch.bool), 2)


class TestWhiten:
    @given(batch=batches(1))
    @settings(deadline=None)
    def test_mean_0_and_deviation_1(self, batch):
        values, mask = batch
        white = whiten(values, mask)
        assert (white[~mask] == 0).all()
        distinct = values[mask].unique().numel()
        if distinct > 1:
            assert white[mask].mean().abs() < 1e-4
            assert white[mask].std().item() == pytest.approx(1.0, abs=1e-3)
        else:
            assert (white == 0).all()

    def test_population_of_other_processes(self):
        values, mask = torch.tensor([[1.0, 3.0], [5.0, math.nan]]), torch.tensor([[T, T], [T, F]])
        whole = whiten(values, mask)
        parts = [whiten(values[i : i + 1], mask[i : i + 1], population=values[mask]) for i in range(2)]
        assert torch.equal(torch.cat(parts), whole)
        assert whole.tolist() == [[-1.0, 0.0], [1.0, 0.0]]

    def test_scale_only(self):
        values = torch.tensor([[1.0, 3.0, 5.0]])
        assert whiten(values, torch.ones(1, 3, dtype=torch.bool), shift_mean=False).tolist() == [[0.5, 1.5, 2.5]]

    def test_equal_values_are_not_blown_up(self):
        white = whiten(torch.full((3, 1001), 0.1), torch.ones(3, 1001, dtype=torch.bool))
        assert white.abs().max() < 1e-6

    def test_nothing_to_whiten(self):
        assert whiten(torch.tensor([[math.nan]]), torch.tensor([[F]])).tolist() == [[0.0]]


class TestSegments:
    def test_by_hand(self):
        values = torch.tensor([[1.0, 2.0, math.nan, 4.0, 8.0], [16.0, math.nan, math.nan, math.nan, math.nan]])
        mask = torch.tensor([[T, T, F, T, T], [T, F, F, F, F]])
        ids = torch.tensor([[0, 0, 0, 0, 1], [0, 99, 99, -5, -5]])  # whatever stands where the mask is False
        sums, there = sum_by_segment(values, ids, mask)
        assert sums.tolist() == [[7.0, 8.0], [16.0, 0.0]]
        assert there.tolist() == [[T, T], [T, F]]
        assert start_of_segment(values, ids, mask).tolist() == [[1.0, 8.0], [16.0, 0.0]]
        assert spread_over_segments(sums, ids, mask).tolist() == [
            [7.0, 7.0, 0.0, 7.0, 8.0],
            [16.0, 0.0, 0.0, 0.0, 0.0],
        ]
        assert pool_by_segment(values, ids, mask).tolist() == [[0.0, 0.0, 0.0, 7.0, 8.0], [16.0, 0.0, 0.0, 0.0, 0.0]]
        everywhere = pool_by_segment(values, ids, mask, at="all")
        assert torch.equal(everywhere, spread_over_segments(sums, ids, mask))

    @given(batch=batches(1), data=st.data())
    @settings(deadline=None)
    def test_pooling_keeps_totals_and_returns_at_segment_starts(self, batch, data):
        values, mask = batch
        ids = segment_ids_from_ends(torch.from_numpy(data.draw(hnp.arrays(bool, tuple(mask.shape)))))
        pooled = pool_by_segment(values, ids, mask)
        sums, _ = sum_by_segment(values, ids, mask)
        assert_near(pooled.sum(1), torch.where(mask, values, 0.0).sum(1).double())
        assert_near(sums.sum(1), pooled.sum(1).double())
        # Where a segment starts, all of it is still to come, whether by token or by segment.
        by_token = start_of_segment(returns_to_go(values, mask), ids, mask)
        assert_near(start_of_segment(returns_to_go(pooled, mask), ids, mask), by_token.double())

    def test_one_segment_a_token_changes_nothing(self):
        values, mask = torch.randn(3, 5), torch.rand(3, 5) > 0.3
        ids = torch.arange(5).expand(3, 5)
        own = torch.where(mask, values, 0.0)
        sums, there = sum_by_segment(values, ids, mask)
        # The last positions may be nobody's.
        assert torch.equal(sums, own[:, : sums.shape[1]]) and torch.equal(there, mask[:, : sums.shape[1]])
        assert torch.equal(pool_by_segment(values, ids, mask), own)
        assert torch.equal(start_of_segment(values, ids, mask), sums)

    def test_unknown_place(self):
        with pytest.raises(ValueError, match="`at` is 'first'"):
            pool_by_segment(torch.ones(1, 1), torch.zeros(1, 1).long(), torch.tensor([[T]]), at="first")


def test_examples_in_docstrings():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for name in credit.__all__:
        text = (getattr(credit, name).__doc__ or "").replace("```", "")
        result = runner.run(parser.get_doctest(text, {}, name, None, None))
        assert result.attempted > 1 and result.failed == 0, name
    assert len(credit.__all__) == 9
