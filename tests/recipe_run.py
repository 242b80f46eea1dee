# SPDX-License-Identifier: Apache-2.0
"""
Recipes as a script, for tests that need several processes: `accelerate launch ... recipe_run.py ARGUMENTS.json ...`, one file
of arguments a run, the first of which is `grpo`, `ppo` or `sampled`.

Completions are a function of the prompt and their place in its group, so that runs that split the prompts differently are
comparable; `sampled` is GRPO as it is. What the main process ends with goes to `<output_dir>/result.json`.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer
from endotrl.recipes import launch


EOS = 2


class SampledGRPO(DenseGRPOTrainer):
    def end(self) -> None:
        """The processes are needed for the next run."""


class FixedRollouts:
    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        super()._generate_single_turn(prompt_ids, *args, **kwargs)  # must work, whatever it gives
        completions = []
        for place, ids in enumerate(prompt_ids):
            # Groups are whole on each process here.
            seed = zlib.crc32(str(ids).encode()) + 1000 * self.state.global_step + place % self.num_generations
            generator = torch.Generator().manual_seed(seed)
            words = torch.randint(7, 19, (8,), generator=generator).tolist()
            length = int(torch.randint(1, 9, (), generator=generator))
            completions.append(words if length == 8 else [*words[:length], EOS])
        return completions, None

    def end(self) -> None:
        """The processes are needed for the next run."""


class FixedGRPO(FixedRollouts, DenseGRPOTrainer):
    pass


class FixedPPO(FixedRollouts, PPOTrainer):
    pass


def main(kind: str, *arguments: str) -> None:
    AcceleratorState._reset_state()
    classes = {
        "grpo": (FixedGRPO, DenseGRPOConfig),
        "ppo": (FixedPPO, PPOConfig),
        "sampled": (SampledGRPO, DenseGRPOConfig),
    }
    trainer = launch(*classes[kind], arguments)
    if trainer.accelerator.is_main_process:
        result = {
            "engine": type(trainer.model_wrapped).__name__,
            "zero_stage": trainer._dist.zero_stage,
            "fsdp_version": trainer._dist.fsdp_version,
            "num_processes": trainer.accelerator.num_processes,
            "reward": repr(trainer.reward_funcs[0]),
            "history": trainer.state.log_history,
        }
        (Path(trainer.args.output_dir) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(*json.loads(Path(path).read_text()))
    # A process that leaves its group to the interpreter's end may abort there, when a thread of gloo is still at work.
    PartialState().destroy_process_group()
