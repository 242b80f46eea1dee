# SPDX-License-Identifier: Apache-2.0
"""
One of the processes that train a policy that reads images: whole with a checkpoint each step and resumed from the
first, or sharded. Every reward is compared with its row alone in float32 ([`Watched`]), on its own process.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor
from trl import GRPOTrainer

from endotrl import EndogenousReward
from endotrl.runs.processes import leave

from .test_images import LORA, make_trainer, watched


FSDP2 = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer", "CLIPEncoderLayer"],
}


def train(path: str, folder: Path, resumed: bool = False) -> dict[str, Any]:
    """Two steps of LoRA, by the model itself with its adapter off."""
    reward = EndogenousReward(None)
    seen = watched(path, reward)
    settings = {"peft_config": LORA, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(GRPOTrainer, path, seen, folder, "images", **settings)
    reward.attach(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-1") if resumed else None)
    weights = {n: w.flatten().tolist() for n, w in trainer.model.named_parameters() if w.requires_grad}
    return {"compared": seen.compared, "steps": trainer.state.global_step, "weights": weights}


def shard(path: str, folder: Path) -> dict[str, Any]:
    """One step by an own copy that is sharded as the policy is."""
    reward = EndogenousReward(path)
    seen = watched(path, reward)
    # accelerate shards on accelerators only. What it runs works over gloo on CPUs too, if it believes to be on one.
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    settings = {"accelerator_config": {"use_configured_state": True}, "use_cpu": False}
    settings |= {"fsdp": True, "fsdp_config": FSDP2, "max_steps": 1, "beta": 0.0}
    trainer = make_trainer(GRPOTrainer, path, seen, folder, "images", **settings)
    reward.shard(trainer)
    trainer.train()
    sharded = any(isinstance(weight, DTensor) for weight in reward._placement._model.parameters())
    return {"compared": seen.compared, "sharded": sharded}


def main(path: str, output: Path, sharded: bool) -> None:
    folder = output / "run"
    if sharded:
        results: dict[str, Any] = shard(path, folder)
    else:
        results = {"whole": train(path, folder), "resumed": train(path, folder, resumed=True)}
    (output / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "sharded")
    leave()
