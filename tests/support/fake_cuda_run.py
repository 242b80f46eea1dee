# SPDX-License-Identifier: Apache-2.0
"""
The GPU benchmark as it runs on a GPU, in tiny sizes on the stand-in for one: `fake_cuda_run.py RESULTS.json`. A process
of its own, because libraries remember that there is a GPU.
"""

import gc
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.attention.flex_attention

from benchmarks import gpu_cells as gpu
from endotrl.reporting import quiet_libraries
from endotrl.runs.files import write_json
from tests.support.fake_cuda import CUDA, fake_cuda, flex_attention


ANSWERS: dict[str, Any] = {
    "is_available": True,
    "is_bf16_supported": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_properties": SimpleNamespace(
        name="stand-in", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    ),
    "memory_allocated": 0,
    "max_memory_allocated": 0,
    "get_rng_state": torch.zeros(1),
    "get_rng_state_all": [],
    **dict.fromkeys(("synchronize", "empty_cache", "reset_peak_memory_stats", "set_device", "manual_seed_all")),
}


def parts() -> dict[str, Any]:
    """Those that have paths of their own on a GPU: workloads differ in lengths, and tiny models of one shape in none."""

    def scoring(machine: gpu.Machine) -> dict[str, gpu.Cell]:
        return dict(list(gpu.scoring(machine).items())[-2:-1])

    def step(machine: gpu.Machine) -> dict[str, gpu.Cell]:
        return {k: v for k, v in gpu.training_step(machine).items() if not k.startswith("0.5B: shared with LoRA")}

    return {"exactness": gpu.exactness, "step": step, "scoring": scoring}


def main(file: str) -> None:
    quiet_libraries()
    results: dict[str, Any] = {"cells": {}, "failed": {}}
    with ExitStack() as stack:
        # Often, and of many objects.
        stack.enter_context(mock.patch.object(gc, "collect", lambda *args: 0))
        for name, value in ANSWERS.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *args, value=value, **kwargs: value))
        stack.enter_context(mock.patch.object(torch.accelerator, "current_accelerator", lambda *args, **kwargs: CUDA))
        stack.enter_context(mock.patch.object(torch.accelerator, "is_available", lambda: True))
        stack.enter_context(mock.patch.object(torch.accelerator, "device_count", lambda: 1))
        # The tiny benchmark runs FlexAttention uncompiled.
        stack.enter_context(mock.patch.object(torch.nn.attention.flex_attention, "flex_attention", flex_attention))
        # Asks the driver whether a CUDA graph is captured.
        health = "_accelerator_graph_capture_health_check"
        stack.enter_context(mock.patch.object(torch.optim.Optimizer, health, lambda self: None, create=True))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(fake_cuda())
        stack.enter_context(mock.patch.object(gpu, "PARTS", parts()))
        machine, end = gpu.Machine("cuda", True, Path(folder)), time.time() + 3600
        gpu.measure(machine, results, list(gpu.PARTS), end, lambda: write_json(Path(file), results))


if __name__ == "__main__":
    main(sys.argv[1])
