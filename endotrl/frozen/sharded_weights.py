# SPDX-License-Identifier: Apache-2.0
"""Frozen weights that DeepSpeed ZeRO-3 or FSDP2 split over processes, whole again for scoring."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether a trainer with this accelerator splits weights over processes in a way that [`whole_weights`] knows."""
    return is_deepspeed_zero3_enabled() or accelerator.is_fsdp2


@contextmanager
def whole_weights(wrapped: Any, accelerator: Accelerator) -> Iterator[None]:
    """
    Inside, weights that DeepSpeed ZeRO-3 or FSDP2 split over processes are whole on each, so that passes through the
    model need no communication: processes may run different numbers of them. All processes must enter it together.
    Others' weights are left as they are.
    """
    if is_deepspeed_zero3_enabled():
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(wrapped, accelerator):
            yield
        return
    if not accelerator.is_fsdp2:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
    if not sharded:  # a policy before training
        yield
        return
    wrapped.set_reshard_after_forward(False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
        wrapped.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)


@contextmanager
def loaded_whole() -> Iterator[None]:
    """
    Lets `from_pretrained` load whole weights while a trainer shards: under ZeRO-3 it would load a part on every
    process, and under FSDP with `cpu_ram_efficient_loading` all of them on the first process of a machine only.
    """
    with _without_zero3_init():
        key = "FSDP_CPU_RAM_EFFICIENT_LOADING"
        given = os.environ.pop(key, None)
        try:
            yield
        finally:
            if given is not None:
                os.environ[key] = given


@contextmanager
def _without_zero3_init() -> Iterator[None]:
    """Lets `from_pretrained` load whole weights while a ZeRO-3 trainer exists (it would partition them otherwise)."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)
