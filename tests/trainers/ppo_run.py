# SPDX-License-Identifier: Apache-2.0
"""
PPO runs as a script, for tests that need several processes: `torchrun ... ppo_run.py SETTINGS.json ...`, one file a run.

Completions are a function of the prompt, so that runs that split the prompts differently are comparable. What the main
process ends with goes to `<output_dir>/result.json` and `<output_dir>/final`.
"""

import json
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig

from endotrl import EndogenousReward, PPOConfig, PPOTrainer
from endotrl.recipes.launch import do_without_shared_memory


PROMPTS = ["a b c", "d e", "f", "g h i j", "a a", "k l", "b", "c d e f"] * 4
EOS = 2


class FixedRollouts(PPOTrainer):
    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        super()._generate_single_turn(prompt_ids, *args, **kwargs)  # must work, whatever it gives
        completions = []
        for ids in prompt_ids:
            generator = torch.Generator().manual_seed(zlib.crc32(str(ids).encode()) + self.state.global_step)
            words = torch.randint(7, 19, (8,), generator=generator).tolist()
            length = int(torch.randint(1, 9, (), generator=generator))
            completions.append(words if length == 8 else [*words[:length], EOS])
        return completions, None


def main(settings: dict[str, Any]) -> None:
    model, output_dir = settings.pop("model"), settings["output_dir"]
    lora, resume = settings.pop("lora", False), settings.pop("resume", None)
    sharded = "deepspeed" in settings or "fsdp" in settings
    if sharded:
        # accelerate shards on accelerators only. What it runs works over gloo on CPUs too, if it believes to be on one.
        AcceleratorState._reset_state()
        if "deepspeed" in settings:
            do_without_shared_memory()
        state = PartialState(cpu=True)
        state.distributed_type = DistributedType.DEEPSPEED if "deepspeed" in settings else DistributedType.MULTI_GPU
    args = PPOConfig(
        **{
            "max_completion_length": 8,
            "shuffle_dataset": False,
            "learning_rate": 1e-2,
            "value_learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": not sharded,
            "accelerator_config": {"use_configured_state": sharded},
            "bf16": False,
            "disable_tqdm": True,
            **settings,
        }
    )
    trainer = FixedRollouts(
        model,
        reward_funcs=EndogenousReward(model),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True) if lora else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(output_dir) / "final"))
    if trainer.accelerator.is_main_process:
        result = {
            "engine": type(trainer.model_wrapped).__name__,
            "zero_stage": trainer._dist.zero_stage,
            "fsdp_version": trainer._dist.fsdp_version,
            "history": trainer.state.log_history,
        }
        (Path(output_dir) / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(json.loads(Path(path).read_text()))
    # A process that leaves its group to the interpreter's end may abort there, when a thread of gloo is still at work.
    PartialState().destroy_process_group()
