# SPDX-License-Identifier: Apache-2.0
"""Faster dtype on a CPU: few CPUs have bfloat16 instructions, and the others are several times slower in it."""

import time

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel


def matmul_seconds() -> dict[str, float]:
    """Seconds of some matrix products in `"bfloat16"` and in `"float32"`, measured in about half a second."""

    def seconds(dtype: torch.dtype, rows: int) -> float:
        a, b = torch.randn(rows, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
        started = time.perf_counter()
        for _ in range(3):
            a @ b
        return time.perf_counter() - started

    # The fastest of several, alternating: other load on the same cores must not decide, or a run would not be
    # reproducible. Few rows first: without the instructions, products of many rows would take a minute.
    for rows, repeats in ((32, 2), (512, 10)):
        rounds = [(seconds(torch.bfloat16, rows), seconds(torch.float32, rows)) for _ in range(repeats)]
        bfloat16, float32 = map(min, zip(*rounds, strict=True))
        if max(bfloat16, float32) > 4 * min(bfloat16, float32):
            break
    return {"bfloat16": bfloat16, "float32": float32}


def faster_dtype() -> tuple[str, str]:
    """The faster dtype on this CPU, `"bfloat16"` or `"float32"`, and why. All processes must call it together."""
    seconds = matmul_seconds()
    if PartialState().num_processes > 1:
        (seconds,) = broadcast_object_list([seconds])
    faster, slower = sorted(seconds, key=lambda dtype: seconds[dtype])
    ratio = seconds[slower] / seconds[faster]
    return faster, f"it multiplies matrices {ratio:.1f} times as fast in {faster} as in {slower}"


def make_head_input_contiguous(model: PreTrainedModel) -> None:
    """
    Makes a model's LM head copy its input to contiguous memory: for the slice of hidden states that `generate` passes,
    PyTorch copies the weight matrix for every row of the batch, which is most of a prompt's time.
    """
    model.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0].contiguous(),))
