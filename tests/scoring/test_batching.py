# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endotrl.scoring.batching import plan_batches


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "kinds", "expected"),
    [
        ([3, 10, 4, 9], 20, None, [[1, 3], [2, 0]]),  # 2 * 10 and 2 * 4
        ([3, 10, 4, 9], 19, None, [[1], [3, 2], [0]]),  # 2 * 10 > 19; 2 * 9 fits; the third would make 27
        ([5, 5, 5], 14, None, [[0, 1], [2]]),
        ([50, 2], 10, None, [[0], [1]]),  # longer than the budget: alone
        ([], 8, None, []),
        # a: 10 and 9; b: 4 and 3, whose budget is their own.
        ([3, 10, 4, 9], 20, ["b", "a", "b", "a"], [[1, 3], [2, 0]]),
        ([9, 10, 4, 9], 20, ["b", "a", "b", "a"], [[1, 3], [0, 2]]),
    ],
)
def test_by_hand(lengths, max_tokens, kinds, expected):
    assert plan_batches(lengths, max_tokens, kinds) == expected


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 2000))
def test_every_row_once_and_within_the_budget(lengths, max_tokens):
    batches = plan_batches(lengths, max_tokens)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    widths = [max(lengths[index] for index in batch) for batch in batches]
    for batch, width in zip(batches, widths, strict=True):
        assert len(batch) == 1 or len(batch) * width <= max_tokens
    # From the longest to the shortest: if memory does not suffice, the first batch shows it.
    assert widths == sorted(widths, reverse=True)
