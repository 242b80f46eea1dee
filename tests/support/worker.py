# SPDX-License-Identifier: Apache-2.0
"""What scripts have in common that tests start in several processes."""

import zlib
from typing import Any

import torch
from transformers import Trainer


EOS = 2


class FixedRollouts:
    """
    For a trainer: completions are a function of the prompt, the step and their place in their group, so that runs that
    split the prompts differently are comparable. Groups are whole on each process.
    """

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        super()._generate_single_turn(prompt_ids, *args, **kwargs)  # must work, whatever it gives
        completions = []
        for place, ids in enumerate(prompt_ids):
            seed = zlib.crc32(str(ids).encode()) + 1000 * self.state.global_step + place % self.num_generations
            generator = torch.Generator().manual_seed(seed)
            words = torch.randint(7, 19, (8,), generator=generator).tolist()
            length = int(torch.randint(1, 9, (), generator=generator))
            completions.append(words if length == 8 else [*words[:length], EOS])
        return completions, None


def what_ran(trainer: Trainer) -> dict[str, Any]:
    """Engine and log of a run: accelerate falls back to DDP in silence."""
    return {
        "engine": type(trainer.model_wrapped).__name__,
        "zero_stage": trainer._dist.zero_stage,
        "fsdp_version": trainer._dist.fsdp_version,
        "num_processes": trainer.accelerator.num_processes,
        "history": trainer.state.log_history,
    }
