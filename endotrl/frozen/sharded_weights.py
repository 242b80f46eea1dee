# SPDX-License-Identifier: Apache-2.0
"""Gathering of frozen weights sharded over processes by DeepSpeed ZeRO-3 or FSDP2, for scoring."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from transformers.integrations import deepspeed


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether a trainer with this accelerator shards weights in a way that [`whole_weights`] can gather."""
    return deepspeed.is_deepspeed_zero3_enabled() or accelerator.is_fsdp2


@contextmanager
def whole_weights(wrapped: Any, accelerator: Accelerator) -> Iterator[None]:
    """Context with gathered weights on each process, which may run its own passes. All must enter it together."""
    if deepspeed.is_deepspeed_zero3_enabled():
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(wrapped, accelerator):
            yield
        return
    sharded: list[Any] = []  # empty for a policy before training
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import FSDPModule

        sharded = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
    if sharded:
        wrapped.set_reshard_after_forward(False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
        if sharded:
            wrapped.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Lets each process load full weights while a trainer shards (ZeRO-3, FSDP's `cpu_ram_efficient_loading`)."""
    key = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    given = os.environ.pop(key, None)
    config = deepspeed._hf_deepspeed_config_weak_ref() if deepspeed.is_deepspeed_zero3_enabled() else None
    if config is not None:
        deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)
        if given is not None:
            os.environ[key] = given
