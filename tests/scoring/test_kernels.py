# SPDX-License-Identifier: Apache-2.0
"""
Attention kernels of a GPU over a packed row: FlexAttention's mask against one made token by token, and its compiled CPU
kernel; attention in two merged calls, with a kernel that computes each sequence on its own; and the choice among
kernels that are slow, wrong, or fail.
"""

import logging
import math
import shutil
import time
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from endotrl.scoring import attention_kernels as kernels
from endotrl.scoring import forward_pass
from endotrl.scoring.attention_kernels import BLOCK, block_mask, flex_attention, varlen_attention
from endotrl.scoring.forward_pass import Group, PackedRow, block_attention

from .test_packing import attend, naive_attention, random_states, visible_pairs


ROW = PackedRow.of([Group([1] * 50, [[2] * 33, [3] * 70]), Group([4] * 7, [[5] * 9])])


def groups(longest):
    """Lengths of prompts, and of their continuations."""
    lengths = st.tuples(st.integers(1, longest), st.lists(st.integers(0, longest), min_size=1, max_size=4))
    return st.lists(lengths, min_size=1, max_size=3)


def row_of(groups):
    return PackedRow.of([Group([1] * prompt, [[2] * n for n in lengths]) for prompt, lengths in groups])


def attention_of_each_sequence(query, key, value, queries, keys, causal, scaling):
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


@settings(max_examples=25, deadline=None)
@given(groups=groups(200))
def test_the_mask_has_every_visible_pair_and_no_other(groups):
    row = row_of(groups)
    num_tokens = row.input_ids.shape[1]
    length = math.ceil(num_tokens / BLOCK) * BLOCK + BLOCK  # one block that is padding throughout
    visible = visible_pairs(row, length)
    mask = block_mask(row, length, torch.device("cpu"))
    positions = torch.arange(length)
    zero = torch.tensor(0)
    assert torch.equal(mask.mask_mod(zero, zero, positions[:, None], positions[None]), visible)
    tiles = visible.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(1, 2)  # (blocks, blocks, Q, K)
    full, partial = tiles.all(-1).all(-1), tiles.any(-1).any(-1)
    for counts, indices, expected in (
        (mask.full_kv_num_blocks, mask.full_kv_indices, full),
        (mask.kv_num_blocks, mask.kv_indices, partial & ~full),
    ):
        for line, seen in enumerate(expected):
            assert indices[0, 0, line, : counts[0, 0, line]].tolist() == seen.nonzero().squeeze(1).tolist()


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


def flex_as_written(*args):
    """FlexAttention, not compiled."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is not compiled
        patch.setattr(kernels, "flex_kernel", lambda: torch.nn.attention.flex_attention.flex_attention)
        return flex_attention(*args)


RUN = {
    "blocks": block_attention,
    "varlen": partial(varlen_attention, kernel=attention_of_each_sequence),
    "flex": flex_as_written,
}


@pytest.mark.parametrize("name", ["blocks", "varlen"])  # the mask of the third, above
@settings(max_examples=40, deadline=None)
@given(groups=groups(40), query_block=st.sampled_from([3, 16, 1024]), kept=st.sampled_from([0, 500, 2**25]))
def test_equal_to_all_scores(name, groups, query_block, kept):
    row = row_of(groups)
    states = random_states(row.input_ids.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_pass, "QUERY_BLOCK", query_block)
        patch.setattr(forward_pass, "KEPT_MASK_ELEMENTS", kept)
        actual = RUN[name](*states, row, 0.3)
        again = RUN[name](*states, row, 0.3)  # with masks that were kept
    torch.testing.assert_close(actual.double(), naive_attention(row, *states, 0.3), atol=1e-5, rtol=1e-5)
    assert torch.equal(actual, again)


@pytest.mark.parametrize("name", ["blocks", "flex"])
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_heads_and_dtypes(name, heads, dtype, allowed):
    row = PackedRow.of([Group([1] * 50, [[2] * 33, [3] * 70, []]), Group([4] * 7, [[5] * 29])])
    states = random_states(row.input_ids.shape[1], dtype, heads)
    actual = RUN[name](*states, row, None)
    assert actual.dtype == dtype
    assert (actual.double() - naive_attention(row, *states, 0.25)).abs().max() < allowed


class Kernel:
    """Right numbers, times `factor`, in some seconds."""

    def __init__(self, seconds, factor=1.0, error=None):
        self.seconds, self.factor, self.error, self.calls = seconds, factor, error, 0

    def __call__(self, query, key, value, row, scaling):
        self.calls += 1
        if self.error is not None:
            raise self.error
        time.sleep(self.seconds)
        return self.factor * block_attention(query, key, value, row, scaling)


@pytest.fixture
def use(monkeypatch):
    def use(**found):
        monkeypatch.setattr(forward_pass, "attend", kernels.attend)  # as on CUDA
        monkeypatch.setattr(kernels, "choices", {})
        monkeypatch.setattr(kernels, "_told", set())
        monkeypatch.setattr(kernels, "CALLS_BEFORE_COMPILING", 2)
        monkeypatch.setattr(kernels, "has_flash_attention", lambda query, value: "varlen" in found)
        monkeypatch.setattr(kernels, "has_flex_attention", lambda *_: "flex" in found)
        monkeypatch.setattr(kernels, "KERNELS", {"blocks": Kernel(0.01), **found})
        return kernels.KERNELS

    return use


def chosen():
    (choice,) = kernels.choices.values()
    return choice


def test_the_fastest_that_is_right(use, caplog):
    caplog.set_level(logging.WARNING)
    found = use(varlen=Kernel(0.005), flex=Kernel(0.001))
    states = random_states(ROW.input_ids.shape[1])
    outputs = [attend(ROW, *states, 0.25)]
    assert chosen().name == "varlen" and set(chosen().seconds) == {"blocks", "varlen"}
    outputs += [attend(ROW, *states, 0.25) for _ in range(2)]
    # What is compiled is tried only in a run that is long enough.
    assert chosen().name == "flex" and set(chosen().seconds) == {"blocks", "varlen", "flex"}
    before = [kernel.calls for kernel in found.values()]
    outputs.append(attend(ROW, *states, 0.25))
    assert [kernel.calls - b for kernel, b in zip(found.values(), before, strict=True)] == [0, 0, 1]
    expected = naive_attention(ROW, *states, 0.25)
    for output in outputs:
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Kernel(0, factor=1.01), "ValueError: its output has a relative error of 0.01"),
        (Kernel(0, factor=math.nan), "ValueError: its output has a relative error of nan"),
        (Kernel(0, error=torch.OutOfMemoryError("no memory\nmore")), "OutOfMemoryError: no memory. Results"),
        (Kernel(0, error=ImportError()), "ImportError: no reason given. Results"),
    ],
)
def test_a_kernel_that_is_wrong_or_fails_is_left_out_with_one_line(use, caplog, bad, reason):
    found = use(varlen=bad, flex=Kernel(0.001))
    states = random_states(ROW.input_ids.shape[1])
    for _ in range(5):
        torch.testing.assert_close(
            attend(ROW, *states, 0.25).double(), naive_attention(ROW, *states, 0.25), atol=1e-5, rtol=1e-5
        )
    assert bad.calls == 1
    other = PackedRow.of([Group([1] * 300, [[2] * 33])])  # another kind, which says it no second time
    attend(other, *random_states(other.input_ids.shape[1]), 0.25)
    assert bad.calls == 2
    choice = next(iter(kernels.choices.values()))
    assert choice.name == "flex" and choice.seconds["varlen"] == math.inf
    (record,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert record.message.startswith("The attention kernel 'varlen' is not used for packed rows on cpu: ")
    assert reason in record.message
    assert found["blocks"].calls > 0


def test_rows_of_other_kinds_are_measured_on_their_own(use):
    use(varlen=Kernel(0))
    longer = PackedRow.of([Group([1] * 300, [[2] * 33])])
    for row in (ROW, longer, ROW):
        attend(row, *random_states(row.input_ids.shape[1]), 0.25)
    attend(ROW, *random_states(ROW.input_ids.shape[1], torch.bfloat16), 0.25)
    assert [choice.calls for choice in kernels.choices.values()] == [2, 1, 1]


def test_only_blocks_on_a_cpu():
    before = dict(kernels.choices)
    states = random_states(ROW.input_ids.shape[1])
    assert torch.equal(attend(ROW, *states, 0.25), block_attention(*states, ROW, 0.25))
    assert kernels.choices == before
