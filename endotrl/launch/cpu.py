# SPDX-License-Identifier: Apache-2.0
"""CPU runs: default precision, and sharding."""

import os
from argparse import Namespace

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, parse_flag_from_env

from ..frozen.cpu_dtype import faster_dtype
from ..frozen.served import is_url
from ..reporting import say
from ..runs.record import recorded_settings


def choose_precision(settings: Namespace) -> None:
    """
    Sets `bf16`, `dtype` and `reward_dtype` of a run on a CPU to the faster choice, unless they are given (the
    dtypes: as anything but `"auto"`), and reports it. A resumed run keeps its own.
    """
    on_cpu = settings.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    free = {
        "bf16": settings.bf16 is None and not settings.fp16,
        "dtype": settings.dtype == "auto",
        "reward_dtype": vars(settings).get("reward_dtype") == "auto"  # missing in a reward model's recipe
        and settings.reward_device in (None, "cpu")
        and not (settings.reward_model_init_kwargs or is_url(settings.reward_model)),
    }
    if not on_cpu or not any(free.values()):
        return
    found = recorded_settings(settings.output_dir) if settings.resume else {}
    if {"bf16", "dtype"} <= found.keys():
        reason = f"the run in {settings.output_dir} uses them"
    else:
        PartialState(cpu=True)  # otherwise accelerate takes each process for the only one
        faster, reason = faster_dtype()
        found = {"bf16": faster == "bfloat16", "dtype": faster, "reward_dtype": faster}
    chosen = {name: found[name] for name in free if free[name] and name in found}
    vars(settings).update(chosen)
    if chosen and PartialState().is_main_process:
        values = ", ".join(f"`{name}: {str(value).lower()}`" for name, value in chosen.items())
        say(f"Using {values} on this CPU, as {reason}. Set them in the recipe to override this.")


def shard_on_cpu() -> list[str]:
    """Command-line options with which DeepSpeed and FSDP shard on a CPU: accelerate would default to plain DDP."""
    uses_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    asked = uses_deepspeed or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if not asked or "LOCAL_RANK" not in os.environ or torch.accelerator.is_available():
        return []
    if uses_deepspeed:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed.ops

        # Otherwise DeepSpeed compiles shared-memory collectives, which needs a compiler, takes minutes, and leaves a
        # lock behind if it is killed: gloo is sufficient. Read when process groups are created.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    state = PartialState(cpu=True)
    state.distributed_type = DistributedType.DEEPSPEED if uses_deepspeed else DistributedType.MULTI_GPU
    return ["--accelerator_config", '{"use_configured_state": true}']
