# SPDX-License-Identifier: Apache-2.0
"""Runs on a CPU: precision, where it is not given, and sharding."""

import os
from argparse import Namespace
from collections.abc import Collection

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from ..frozen.cpu_dtype import faster_dtype
from ..reporting import say
from ..runs.record import recorded_settings


def choose_precision(settings: Namespace, given: Collection[str]) -> None:
    """
    Sets `bf16` and `dtype` of a run on a CPU by what is faster there, unless they are given: `bf16` (or `fp16`) by any
    value, `dtype` by any but `"auto"`. A run that is resumed keeps what it has. What was chosen, and why, is said in
    one line.
    """
    on_cpu = settings.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    choose_bf16 = not {"bf16", "fp16"} & set(given)
    choose_dtype = settings.dtype == "auto"
    if not on_cpu or not (choose_bf16 or choose_dtype):
        return
    before = recorded_settings(settings.output_dir) if settings.resume else {}
    if {"bf16", "dtype"} <= before.keys():
        faster, reason = before["dtype"], f"the run in {settings.output_dir} has it"
        bf16 = before["bf16"]
    else:
        PartialState(cpu=True)  # accelerate takes each process for the only one unless it is told
        faster, reason = faster_dtype()
        bf16 = faster == "bfloat16"
    chosen = {}
    if choose_bf16:
        settings.bf16 = chosen["bf16"] = bf16
    if choose_dtype:
        settings.dtype = chosen["dtype"] = faster
    if PartialState().is_main_process:
        values = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in chosen.items())
        say(f"Chosen for this CPU: {values}, as {reason}. Say otherwise in the recipe to have it otherwise.")


def shard_on_cpu() -> list[str]:
    """
    Words for the command line with which processes that `accelerate launch` was asked to run with DeepSpeed or FSDP
    shard on the CPU where there is no accelerator: accelerate would take plain DDP, without a word.
    """
    uses_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    asked = uses_deepspeed or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if not asked or "LOCAL_RANK" not in os.environ or torch.accelerator.is_available():
        return []
    if uses_deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        do_without_shared_memory()
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.DEEPSPEED if uses_deepspeed else DistributedType.MULTI_GPU
    return ["--accelerator_config", '{"use_configured_state": true}']


def do_without_shared_memory() -> None:
    """
    Keeps DeepSpeed from compiling its collectives in shared memory: gloo has all that is needed. The compiler may not
    be there, it takes minutes, and a process that is killed meanwhile leaves a lock that later ones wait for without
    end.
    """
    import deepspeed.ops

    # Looked at when process groups are made, and else worked out by looking for compilers.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
