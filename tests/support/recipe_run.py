# SPDX-License-Identifier: Apache-2.0
"""
Recipes as a script, for tests that need several processes: `accelerate launch ... recipe_run.py ARGUMENTS.json ...`,
one file of arguments a run, the first of which is `grpo`, `ppo` or `sampled`.

Completions are those of [`FixedRollouts`], except for `sampled`, which is GRPO as it is. What the main process ends
with goes to `<output_dir>/result.json`, the frozen weights of the reward after training to `frozen.safetensors`.
"""

import json
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer
from endotrl.launch import launch
from endotrl.runs.processes import leave
from tests.support.worker import FixedRollouts, what_ran


class OneOfSeveral:
    def end(self) -> None:
        """The processes are needed for the next run."""


class SampledGRPO(OneOfSeveral, DenseGRPOTrainer):
    pass


class FixedGRPO(FixedRollouts, SampledGRPO):
    pass


class FixedPPO(FixedRollouts, OneOfSeveral, PPOTrainer):
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
        result = {**what_ran(trainer), "reward": repr(trainer.reward_funcs[0])}
        (Path(trainer.args.output_dir) / "result.json").write_text(json.dumps(result))
    with trainer.reward_funcs[0]._placement.active() as model:  # on all processes
        weights = {
            name.replace(".base_layer", ""): weight.detach().clone()
            for name, weight in model.named_parameters()
            if "lora_" not in name and "ppo_critic" not in name
        }
    if trainer.accelerator.is_main_process:
        save_file(weights, Path(trainer.args.output_dir) / "frozen.safetensors")


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(*json.loads(Path(path).read_text()))
    leave()
