# SPDX-License-Identifier: Apache-2.0
"""FlexAttention over a packed row: its mask against one made token by token, and its compiled CPU kernel."""

import math
import shutil
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endotrl.scoring import kernels
from endotrl.scoring.forward_pass import Group, PackedRow, block_attention
from endotrl.scoring.kernels import BLOCK, block_mask, flex_attention

from .test_packing import naive_attention, random_states, visible_pairs


@settings(max_examples=25, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(1, 200), st.lists(st.integers(0, 200), min_size=1, max_size=4)), min_size=1, max_size=3
    )
)
def test_the_mask_has_every_visible_pair_and_no_other(groups):
    row = PackedRow.of([Group([1] * prompt, [[2] * n for n in lengths]) for prompt, lengths in groups])
    num_tokens = row.input_ids.shape[1]
    length = math.ceil(num_tokens / BLOCK) * BLOCK + BLOCK  # one block that is padding throughout
    visible = visible_pairs(row, length)
    mask = block_mask(row, length, torch.device("cpu"))
    positions = torch.arange(length)
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, positions[:, None], positions[None]), visible)
    tiles = visible.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)  # (blocks, blocks, Q, K)
    for name, expected in (("full", tiles.all(-1).all(-1)), ("partial", tiles.any(-1).any(-1))):
        counts, indices = {
            "full": (mask.full_kv_num_blocks, mask.full_kv_indices),
            "partial": (mask.kv_num_blocks, mask.kv_indices),
        }[name]
        expected = expected & ~tiles.all(-1).all(-1) if name == "partial" else expected
        for line, seen in enumerate(expected):
            listed = indices[0, 0, line, : counts[0, 0, line]].tolist()
            assert listed == seen.nonzero().squeeze(1).tolist(), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_kernel_is_compiled_once_per_power_of_two():
    import torch._dynamo.utils as dynamo

    before = dynamo.counters["stats"]["unique_graphs"]
    rows = [
        PackedRow.of([Group([1] * 50, [[2] * 33, [3] * 70]), Group([4] * 7, [[5] * 29])]),
        PackedRow.of([Group([1] * 90, [[2] * 11, [3] * 20, [3]]), Group([4] * 17, [[5] * 80, []])]),
    ]
    with torch.inference_mode():
        for row in rows:
            query, key, value = random_states(row.input_ids.shape[1])
            # As in a pass, where what users have compiled is left as it is written.
            with torch.compiler.set_stance("force_eager"):
                actual = flex_attention(query, key, value, row, 0.3)
            expected = naive_attention(row, query, key, value, 0.3)
            torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=1e-5)
    assert dynamo.counters["stats"]["unique_graphs"] == before + 1


@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_heads_and_dtypes(monkeypatch, heads, dtype, allowed):
    from torch.nn.attention.flex_attention import flex_attention as as_written

    monkeypatch.setattr(kernels, "flex_kernel", lambda: as_written)
    row = PackedRow.of([Group([1] * 50, [[2] * 33, [3] * 70, []]), Group([4] * 7, [[5] * 29])])
    num_tokens = row.input_ids.shape[1]
    query, key, value = (torch.randn(1, count, num_tokens, 16).to(dtype) for count in (*heads, heads[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is not compiled
        actual = flex_attention(query, key, value, row, None)
    assert actual.dtype == dtype
    assert (actual.double() - naive_attention(row, query, key, value, 0.25)).abs().max() < allowed
    assert (actual - block_attention(query, key, value, row, None)).abs().max() < allowed
