# SPDX-License-Identifier: Apache-2.0
"""
Credit assignment against its definitions: one completion at a time, holes cut out, sums written out in float64. What
stands where the mask is `False` is NaN, infinite or huge, so that anything that reads it shows.
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
FUZZ = settings(deadline=None)


@st.composite
def batches(draw: st.DrawFn, num_tensors: int, min_rows: int = 0, max_rows: int = 4) -> tuple[Tensor, ...]:
    """
    Tensors of one shape, which may be empty, and of one dtype, with garbage outside the mask; and the mask, with holes
    and padding on both sides. They may be not contiguous.
    """
    shape = (draw(st.integers(min_rows, max_rows)), draw(st.integers(0, 7)))
    mask = torch.from_numpy(draw(hnp.arrays(bool, shape)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.int64]))
    tensors = []
    for _ in range(num_tensors):
        values = torch.from_numpy(draw(hnp.arrays("float32", shape, elements=st.floats(-8, 8, width=16))))
        garbage = GARBAGE[torch.from_numpy(draw(hnp.arrays("int64", shape, elements=st.integers(0, 3))))]
        outside = garbage.to(dtype) if dtype.is_floating_point else torch.tensor(10**9)
        tensors.append(torch.where(mask, values.to(dtype), outside))
    tensors.append(mask)
    return tuple(tensor.t().contiguous().t() for tensor in tensors) if draw(st.booleans()) else tuple(tensors)


discounts = st.floats(0.05, 1.0) | st.sampled_from([1.0, 1e-3])
lambdas = st.floats(0.0, 1.0) | st.just(1.0)


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


@given(batch=batches(1), gamma=discounts)
@FUZZ
def test_returns(batch, gamma):
    rewards, mask = batch

    def returns(r: list[float]) -> list[float]:
        return [sum(gamma ** (k - h) * r[k] for k in range(h, len(r))) for h in range(len(r))]

    assert_near(returns_to_go(rewards, mask, gamma), by_row(mask, returns, rewards))


@given(batch=batches(2), gamma=discounts, lam=lambdas, final=st.none() | st.floats(-5, 5, width=16))
@FUZZ
def test_generalized_advantage_estimate(batch, gamma, lam, final):
    rewards, values, mask = batch

    def advantages(r: list[float], v: list[float]) -> list[float]:
        after = [*v[1:], final or 0.0]
        td = [r[h] + gamma * after[h] - v[h] for h in range(len(r))]
        return [sum((gamma * lam) ** (k - h) * td[k] for k in range(h, len(r))) for h in range(len(r))]

    final_values = None if final is None else torch.full((len(mask),), final)
    actual, returns = generalized_advantage_estimate(rewards, values, mask, gamma, lam, final_values)
    assert_near(actual, by_row(mask, advantages, rewards, values))
    assert_near(returns, actual.double() + torch.where(mask, values.double(), 0.0))


def test_long_completion_does_not_underflow():
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_dtype_is_computed_in_float32(dtype):
    mask = torch.ones(1, 3000, dtype=torch.bool)
    assert returns_to_go(torch.ones(1, 3000, dtype=dtype), mask)[0, 0] == 3000.0  # 2048 + 1 == 2048 in float16


class TestGroupBaseline:
    def test_by_hand(self):
        # The first has ended after one token and keeps its 6; the second has a hole, where it has its next token's 4.
        values = torch.tensor([[6.0, math.nan, math.nan], [5.0, math.nan, 4.0], [9.0, 8.0, 7.0]])
        mask = torch.tensor([[T, F, F], [T, F, T], [T, T, T]])
        others = group_baseline(values, mask, 3, leave_one_out=True)
        assert others.tolist() == [[7.0, 0.0, 0.0], [7.5, 0.0, 6.5], [5.5, 5.0, 5.0]]
        assert group_baseline(values, mask, 3)[2].tolist() == pytest.approx([20 / 3, 6.0, 17 / 3])

    @given(batch=batches(1, min_rows=1, max_rows=8), leave_one_out=st.booleans(), data=st.data())
    @FUZZ
    def test_definition(self, batch, leave_one_out, data):
        values, mask = batch
        size = data.draw(st.sampled_from([n for n in range(1, len(mask) + 1) if len(mask) % n == 0]))
        given_valid = data.draw(st.none() | st.just(torch.from_numpy(data.draw(hnp.arrays(bool, len(mask))))))
        written = [
            [(t, value) for t, (value, there) in enumerate(zip(*row, strict=True)) if there]
            for row in zip(values.tolist(), mask.tolist(), strict=True)
        ]
        valid = [bool(row) and (given_valid is None or bool(given_valid[i])) for i, row in enumerate(written)]
        expected = torch.zeros(mask.shape, dtype=torch.float64)
        for i, row in enumerate(written):
            group = [j for j in range(i - i % size, i - i % size + size) if valid[j]]
            others = [written[j] for j in group if j != i or not leave_one_out] or [row]
            for h, _ in row if valid[i] else []:
                # The value of the next token, or, after the last one, its value
                held = [next((value for t, value in other if t >= h), other[-1][1]) for other in others]
                expected[i, h] = sum(held) / len(held)
        assert_near(group_baseline(values, mask, size, leave_one_out, given_valid), expected)


class TestWhiten:
    @given(batch=batches(1))
    @FUZZ
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
        assert whiten(values, mask, shift_mean=False).tolist() == [[0.5, 1.5], [2.5, 0.0]]

    def test_equal_values_are_not_blown_up(self):
        white = whiten(torch.full((3, 1001), 0.1), torch.ones(3, 1001, dtype=torch.bool))
        assert white.abs().max() < 1e-6


@given(batch=batches(1), data=st.data())
@FUZZ
def test_segments(batch, data):
    values, mask = batch
    shape = tuple(mask.shape)
    if data.draw(st.booleans()):  # in any order, and whatever stands where the mask is False
        ids = torch.from_numpy(data.draw(hnp.arrays("int64", shape, elements=st.integers(0, 3))))
        ids = torch.where(mask, ids, data.draw(st.sampled_from([-5, 10**9])))
    else:
        ends = data.draw(hnp.arrays(bool, shape))
        ids = segment_ids_from_ends(torch.from_numpy(ends))
        assert ids.tolist() == [[int(row[:t].sum()) for t in range(shape[1])] for row in ends]
    sums, there = sum_by_segment(values, ids, mask)
    starts, spread = start_of_segment(values, ids, mask), spread_over_segments(sums, ids, mask)
    pooled = pool_by_segment(values, ids, mask)
    assert sums.shape == there.shape == starts.shape and pooled.shape == spread.shape == mask.shape
    assert torch.equal(pool_by_segment(values, ids, mask, at="all"), spread)
    assert not pooled[~mask].any() and not spread[~mask].any()
    for b, (row, here, segments) in enumerate(zip(values.tolist(), mask.tolist(), ids.tolist(), strict=True)):
        for k in range(sums.shape[1]):
            members = [t for t in range(len(row)) if here[t] and segments[t] == k]
            assert there[b, k] == bool(members)
            assert sums[b, k].item() == pytest.approx(sum(row[t] for t in members), rel=1e-6, abs=1e-6)
            assert starts[b, k].item() == pytest.approx(row[members[0]] if members else 0, rel=1e-7)
            for t in members:
                assert spread[b, t] == sums[b, k]
                assert pooled[b, t] == (sums[b, k] if t == members[-1] else 0)


ONES = torch.ones(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
IDS = torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        *((lambda g=g: returns_to_go(ONES, MASK, g), f"`gamma` is {g}") for g in (0.0, -0.1, 1.1, math.nan)),
        (lambda: returns_to_go(ONES, MASK[:, :2]), r"`rewards` has shape \(2, 3\) and `mask` has shape \(2, 2\)"),
        (lambda: returns_to_go(ONES, ONES), "`mask` is torch.float32"),
        (
            lambda: start_of_segment(ONES[0], IDS[0], MASK[0]),
            "`values` has shape .* must have shape .completions, tokens.",
        ),
        *(
            (lambda v=v: generalized_advantage_estimate(ONES, ONES, MASK, lam=v), f"`lam` is {v}")
            for v in (-0.1, 1.5, math.nan)
        ),
        (lambda: generalized_advantage_estimate(ONES, ONES[:, :2], MASK), "`values` has shape"),
        *(
            (
                lambda s=shape: generalized_advantage_estimate(ONES, ONES, MASK, final_values=torch.ones(s)),
                r"`final_values` has shape \(",
            )
            for shape in ((2, 1), (3,))
        ),
        *(
            (lambda n=n: group_baseline(ONES, MASK, n), f"`num_generations` is {n}, but the 2 completions")
            for n in (3, -2)
        ),
        *(
            (lambda v=v: group_baseline(ONES, MASK, 2, valid=v), "`valid` is .*must be bool, with one entry")
            for v in (torch.tensor([True]), torch.ones(2))
        ),
        (lambda: sum_by_segment(ONES, ONES, MASK), "`segment_ids` is torch.float32"),
        (lambda: sum_by_segment(ONES, IDS - 1, MASK), "`segment_ids` contains -1"),
        (lambda: pool_by_segment(ONES, IDS[:1], MASK), r"`segment_ids` is torch.int64 of shape \(1, 3\)"),
        (lambda: pool_by_segment(ONES, IDS, MASK, at="first"), "`at` is 'first'"),
        (lambda: spread_over_segments(torch.ones(2, 1), IDS + 4, MASK), "`segment_values` .*"),
        (lambda: spread_over_segments(torch.ones(3, 1), IDS, MASK), "`segment_values` .*"),
    ],
)
def test_what_cannot_be_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_examples_in_docstrings():
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    for name in credit.__all__:
        text = (getattr(credit, name).__doc__ or "").replace("```", "")
        result = runner.run(parser.get_doctest(text, {}, name, None, None))
        assert result.attempted > 1 and result.failed == 0, name
    assert len(credit.__all__) == 9
