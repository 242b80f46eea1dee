# SPDX-License-Identifier: Apache-2.0
"""Attention in two merged calls, with a kernel that computes each sequence on its own, against all scores at once."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endotrl.scoring.forward_pass import Group, PackedRow
from endotrl.scoring.kernels import varlen_attention

from .test_packing import naive_attention, random_states


def kernel(query, key, value, queries, keys, causal, scaling):
    """What a flash-attention kernel for sequences of several lengths is documented to return."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    output = torch.full_like(query, torch.nan)
    log_sum_exp = torch.full(query.shape[1::-1], torch.nan)
    q_ends, k_ends = queries.offsets.tolist(), keys.offsets.tolist()
    assert len(q_ends) == len(k_ends) and q_ends[-1] == len(query) and k_ends[-1] == len(key)
    for q_start, q_end, k_start, k_end in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        assert q_end - q_start <= queries.longest and k_end - k_start <= keys.longest
        scores = torch.einsum("qhd,khd->hqk", query[q_start:q_end], key[k_start:k_end]) * scaling
        if causal:
            scores += torch.full_like(scores, -math.inf).triu(1)
        output[q_start:q_end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value[k_start:k_end])
        log_sum_exp[:, q_start:q_end] = scores.logsumexp(-1)
    return output, log_sum_exp


@settings(max_examples=40, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.integers(0, 40), min_size=1, max_size=4)), min_size=1, max_size=3
    )
)
def test_equal_to_all_scores(groups):
    row = PackedRow.of([Group([1] * prompt, [[2] * n for n in lengths]) for prompt, lengths in groups])
    query, key, value = random_states(row.input_ids.shape[1])
    actual = varlen_attention(query, key, value, row, 0.3, kernel)
    expected = naive_attention(row, query, key, value, 0.3)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
