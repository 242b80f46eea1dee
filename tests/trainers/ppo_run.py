# SPDX-License-Identifier: Apache-2.0
"""
PPO runs as a script, for tests that need several processes: `torchrun ... ppo_run.py SETTINGS.json ...`, one file a
run.

What the main process ends with goes to `<output_dir>/result.json` and `<output_dir>/final`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig

from endotrl import EndogenousReward, PPOTrainer
from endotrl.launch.cpu import do_without_shared_memory
from tests.support.trainers import make_trainer
from tests.support.worker import FixedRollouts, leave_group, what_ran


PROMPTS = ["a b c", "d e", "f", "g h i j", "a a", "k l", "b", "c d e f"] * 4


class FixedPPO(FixedRollouts, PPOTrainer):
    pass


def main(settings: dict[str, Any]) -> None:
    model, output_dir = settings.pop("model"), settings.pop("output_dir")
    lora, resume = settings.pop("lora", False), settings.pop("resume", None)
    sharded = "deepspeed" in settings or "fsdp" in settings
    if sharded:
        # accelerate shards on accelerators only. What it runs works over gloo on CPUs too, if it believes to be on
        # one.
        AcceleratorState._reset_state()
        if "deepspeed" in settings:
            do_without_shared_memory()
        state = PartialState(cpu=True)
        state.distributed_type = DistributedType.DEEPSPEED if "deepspeed" in settings else DistributedType.MULTI_GPU
    defaults = {"shuffle_dataset": False, "learning_rate": 1e-2, "value_learning_rate": 1e-2, "logging_steps": 1}
    defaults |= {"use_cpu": not sharded, "accelerator_config": {"use_configured_state": sharded}}
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=True) if lora else None
    data = {"train_dataset": Dataset.from_dict({"prompt": PROMPTS}), "peft_config": peft_config}
    trainer = make_trainer(FixedPPO, model, output_dir, EndogenousReward(model), **data, **{**defaults, **settings})
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(Path(output_dir) / "final"))
    if trainer.accelerator.is_main_process:
        (Path(output_dir) / "result.json").write_text(json.dumps(what_ran(trainer)))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        main(json.loads(Path(path).read_text()))
    leave_group()
