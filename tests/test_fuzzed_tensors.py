# SPDX-License-Identifier: Apache-2.0
"""
The pure functions with any shapes, dtypes, masks and numbers: right by a naive loop, or an error that names the
argument.
"""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from endotrl.bellman import outcome_reward, soft_value, token_rewards
from endotrl.credit import (
    generalized_advantage_estimate,
    group_baseline,
    pool_by_segment,
    returns_to_go,
    spread_over_segments,
    start_of_segment,
    sum_by_segment,
    whiten,
)


FUZZ = settings(max_examples=60, deadline=None)
NUMBERS = st.floats(-30, 30, width=32)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.int64])
DISCOUNTS = st.sampled_from([1.0, 0.9, 1e-3])


@st.composite
def batches(draw: Any) -> tuple[Tensor, Tensor, Tensor]:
    """
    Values, mask and segment ids of shape (B, T), of which either may be 0; NaN and huge ids where the mask is `False`.
    """
    rows, width = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)), dtype=torch.bool)
    values = torch.tensor(
        draw(st.lists(NUMBERS, min_size=rows * width, max_size=rows * width)), dtype=torch.float64
    ).round()
    ids = torch.tensor(
        draw(st.lists(st.integers(0, 3), min_size=rows * width, max_size=rows * width)), dtype=torch.int64
    )
    mask, values, ids = (tensor.view(rows, width) for tensor in (mask, values, ids))
    dtype = draw(DTYPES)
    values = values.to(dtype)
    if dtype.is_floating_point:
        values = torch.where(mask, values, torch.nan)
    if draw(st.booleans()):  # not contiguous
        values, mask = values.t().contiguous().t(), mask.t().contiguous().t()
    return values, mask, torch.where(mask, ids, 10**9)


@FUZZ
@given(batch=batches(), gamma=DISCOUNTS)
def test_returns_to_go(batch, gamma):
    values, mask, _ = batch
    found = returns_to_go(values, mask, gamma)
    assert found.dtype == torch.float32 and found.shape == mask.shape
    for row, there, out in zip(values.tolist(), mask.tolist(), found.tolist(), strict=True):
        written = [t for t in range(len(row)) if there[t]]
        for number, t in enumerate(written):
            expected = sum(gamma**k * row[later] for k, later in enumerate(written[number:]))
            assert out[t] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert all(out[t] == 0 for t in range(len(row)) if not there[t])
    advantages, returns = generalized_advantage_estimate(values, values, mask, gamma, lam=0.7)
    assert advantages.isfinite().all() and returns.isfinite().all()
    assert whiten(values, mask).isfinite().all()
    assert group_baseline(values, mask, 1).isfinite().all()


@FUZZ
@given(batch=batches())
def test_segments(batch):
    values, mask, ids = batch
    sums, there = sum_by_segment(values, ids, mask)
    starts = start_of_segment(values, ids, mask)
    pooled = pool_by_segment(values, ids, mask)
    assert sums.shape == there.shape == starts.shape
    spread = spread_over_segments(sums, ids, mask)
    for b, (row, here, segments) in enumerate(zip(values.tolist(), mask.tolist(), ids.tolist(), strict=True)):
        for k in range(sums.shape[1]):
            members = [t for t in range(len(row)) if here[t] and segments[t] == k]
            assert there[b, k] == bool(members)
            assert sums[b, k] == sum(row[t] for t in members)
            assert starts[b, k] == (row[members[0]] if members else 0)
            for t in members:
                assert spread[b, t] == sums[b, k]
                assert pooled[b, t] == (sums[b, k] if t == members[-1] else 0)


@FUZZ
@given(
    logits=st.lists(st.lists(NUMBERS, min_size=1, max_size=5), min_size=1, max_size=5),
    alpha=st.sampled_from([1.0, 0.3, 4.0]),
    gamma=DISCOUNTS,
    dtype=DTYPES,
)
def test_rewards_of_any_logits(logits, alpha, gamma, dtype):
    width = min(map(len, logits))
    table = torch.tensor([row[:width] for row in logits], dtype=torch.float64).round().to(dtype)  # (H, V)
    values = soft_value(table, alpha)
    expected = [alpha * math.log(sum(math.exp(x / alpha) for x in row)) for row in table.tolist()]
    assert values.dtype == torch.float32 and values.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-3)
    states = torch.cat([values, torch.zeros(1)])
    rewards = token_rewards(table[:, 0], states, alpha, gamma)
    naive = [table[h, 0].item() - gamma * [*expected, 0.0][h + 1] for h in range(len(table))]
    assert rewards.tolist() == pytest.approx(naive, rel=1e-4, abs=1e-3)
    if gamma == 1.0:
        log_prob = sum(table[h, 0].item() - expected[h] for h in range(len(table)))
        assert outcome_reward(rewards, values[0]).item() == pytest.approx(log_prob, rel=1e-4, abs=1e-2)


ONES = torch.ones(2, 3)
MASK = torch.ones(2, 3, dtype=torch.bool)
IDS = torch.zeros(2, 3, dtype=torch.int64)
WRONG = {
    "alpha 0": lambda: soft_value(ONES, alpha=0.0),
    "alpha NaN": lambda: soft_value(ONES, alpha=math.nan),
    "alpha as text": lambda: soft_value(ONES, alpha="1"),
    "gamma above 1": lambda: token_rewards(ONES, torch.ones(2, 4), gamma=1.01),
    "one value too few": lambda: token_rewards(ONES, ONES),
    "no dimension": lambda: token_rewards(torch.tensor(1.0), torch.tensor(1.0)),
    "entropies of another shape": lambda: token_rewards(
        ONES, torch.ones(2, 4), form="centered", entropies=torch.ones(2, 1)
    ),
    "entropies that would broadcast": lambda: token_rewards(
        ONES, torch.ones(2, 4), form="centered", entropies=torch.ones(3)
    ),
    "a column of initial values": lambda: outcome_reward(ONES, torch.ones(2, 1)),
    "many initial values": lambda: outcome_reward(torch.ones(3), torch.ones(5)),
    "no token": lambda: outcome_reward(torch.ones(2, 0)),
    "a number": lambda: outcome_reward(torch.tensor(1.0)),
    "mask of another shape": lambda: returns_to_go(ONES, MASK[:, :2]),
    "mask of numbers": lambda: returns_to_go(ONES, ONES),
    "one dimension": lambda: start_of_segment(ONES[0], IDS[0], MASK[0]),
    "lambda as NaN": lambda: generalized_advantage_estimate(ONES, ONES, MASK, lam=math.nan),
    "final values as a column": lambda: generalized_advantage_estimate(
        ONES, ONES, MASK, final_values=torch.ones(2, 1)
    ),
    "no full groups": lambda: group_baseline(ONES, MASK, 3),
    "groups of -2": lambda: group_baseline(ONES, MASK, -2),
    "valid for one of two": lambda: group_baseline(ONES, MASK, 2, valid=torch.tensor([True])),
    "valid as numbers": lambda: group_baseline(ONES, MASK, 2, valid=torch.ones(2)),
    "segments as numbers": lambda: sum_by_segment(ONES, ONES, MASK),
    "segments below 0": lambda: sum_by_segment(ONES, IDS - 1, MASK),
    "segments for one row": lambda: pool_by_segment(ONES, IDS[:1], MASK),
    "a segment without a value": lambda: spread_over_segments(torch.ones(2, 1), IDS + 4, MASK),
    "values of other rows": lambda: spread_over_segments(torch.ones(3, 1), IDS, MASK),
}


@pytest.mark.parametrize("call", WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused(call):
    with pytest.raises(ValueError, match="`") as caught:
        call()
    assert len(str(caught.value)) > 30


@pytest.mark.parametrize("width", [0, 3])
@pytest.mark.parametrize("rows", [0, 2])
def test_nothing_in_nothing_out(rows, width):
    values, mask = torch.full((rows, width), torch.nan), torch.zeros(rows, width, dtype=torch.bool)
    ids = torch.full((rows, width), -7)
    for found in (
        returns_to_go(values, mask),
        *generalized_advantage_estimate(values, values, mask),
        group_baseline(values, mask, 2),
        whiten(values, mask),
        pool_by_segment(values, ids, mask),
    ):
        assert torch.equal(found, torch.zeros(rows, width))
