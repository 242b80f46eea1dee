# SPDX-License-Identifier: Apache-2.0
"""The choice of the attention kernel, with kernels that are slow, wrong, or fail."""

import logging
import math
import time

import pytest
import torch

from endotrl.scoring import forward_pass, kernels
from endotrl.scoring.forward_pass import Group, PackedRow, block_attention

from .test_packing import attend, naive_attention, random_states


ROW = PackedRow.of([Group([1] * 50, [[2] * 33, [3] * 70]), Group([4] * 7, [[5] * 9])])


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
        monkeypatch.setattr(kernels, "has_flex_attention", lambda query: "flex" in found)
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
    before = {name: kernel.calls for name, kernel in found.items()}
    outputs.append(attend(ROW, *states, 0.25))
    assert {name: kernel.calls - before[name] for name, kernel in found.items()} == {
        "blocks": 0,
        "varlen": 0,
        "flex": 1,
    }
    expected = naive_attention(ROW, *states, 0.25)
    for output in outputs:
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)
    assert not caplog.records


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Kernel(0, factor=1.01), "ValueError: its numbers are off by a part of 0.01"),
        (Kernel(0, factor=math.nan), "ValueError: its numbers are off by a part of nan"),
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
