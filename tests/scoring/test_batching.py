# SPDX-License-Identifier: Apache-2.0
import pytest
from hypothesis import given
from hypothesis import strategies as st

from endotrl.scoring.batching import plan_batches


class TestPlanBatches:
    @pytest.mark.parametrize(
        ("lengths", "max_tokens", "expected"),
        [
            ([3, 10, 4, 9], 20, [[1, 3], [2, 0]]),  # 2 * 10 and 2 * 4
            ([3, 10, 4, 9], 19, [[1], [3, 2], [0]]),  # 2 * 10 > 19; 2 * 9 fits; the third would make 27
            ([5, 5, 5], 15, [[0, 1, 2]]),
            ([5, 5, 5], 14, [[0, 1], [2]]),
            ([50, 2], 10, [[0], [1]]),  # longer than the budget: alone
            ([1], 1, [[0]]),
            ([], 8, []),
        ],
    )
    def test_by_hand(self, lengths, max_tokens, expected):
        assert plan_batches(lengths, max_tokens) == expected

    def test_kinds_are_kept_apart(self):
        # a: 10 and 9; b: 4 and 3, whose budget is their own.
        assert plan_batches([3, 10, 4, 9], 20, kinds=["b", "a", "b", "a"]) == [[1, 3], [2, 0]]
        assert plan_batches([9, 10, 4, 9], 20, kinds=["b", "a", "b", "a"]) == [[1, 3], [0, 2]]

    @given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 2000))
    def test_every_row_once_and_within_the_budget(self, lengths, max_tokens):
        batches = plan_batches(lengths, max_tokens)
        assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
        widths = [max(lengths[index] for index in batch) for batch in batches]
        for batch, width in zip(batches, widths, strict=True):
            assert len(batch) == 1 or len(batch) * width <= max_tokens
        # From the longest to the shortest: if memory does not suffice, the first batch shows it.
        assert widths == sorted(widths, reverse=True)

    @pytest.mark.parametrize("max_tokens", [0, -1])
    def test_no_budget(self, max_tokens):
        with pytest.raises(ValueError, match=rf"`max_tokens_per_batch` is {max_tokens}.*at least one token"):
            plan_batches([1, 2], max_tokens)
