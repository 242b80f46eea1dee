# SPDX-License-Identifier: Apache-2.0
"""
A monitored run as a script: `accelerate launch ... monitor_worker.py MODEL FOLDER ROWS`. Each process writes what it
saw to `<FOLDER>/<rank>.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOTrainer

from endotrl import CollapseMonitor, HeldOut
from endotrl.runs.processes import leave
from tests.support.trainers import length, make_trainer
from tests.support.worker import FixedRollouts


FALLS_AFTER = 14


class FixedGRPO(FixedRollouts, GRPOTrainer):
    pass


def accuracy(completion_ids: list[list[int]], trainer_state: Any, **kwargs: Any) -> list[float]:
    """Right three times out of four, and every other time later."""
    wrong = 1 if trainer_state.global_step < FALLS_AFTER else 2
    return [float(i % 4 >= wrong) for i in range(len(completion_ids))]


def says_much(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(len(ids) > 4) for ids in completion_ids]


def main(model: str, folder: str, rows: str) -> None:
    prompts = ["a b c", "d e", "f", "g h i j", "a a", "k l", "b", "c d e f"] * 4
    settings = {"max_steps": 24, "per_device_train_batch_size": int(rows), "learning_rate": 1e-3, "logging_steps": 1}
    settings |= {"scale_rewards": "none", "reward_weights": [1.0, 0.0], "shuffle_dataset": False}
    settings |= {"train_dataset": Dataset.from_dict({"prompt": prompts})}
    trainer = make_trainer(FixedGRPO, model, folder, [length, accuracy], **settings)
    # An odd number: the second process asks one of them again. As many answers as in a group: see `FixedRollouts`.
    questions = [{"prompt": prompt} for prompt in ("a l", "b k", "c j", "d i", "e h")]
    HeldOut(questions, says_much, every=10, num_samples=4).attach(trainer)
    monitor = CollapseMonitor(action="stop").attach(trainer)
    trainer.train()
    result = {
        "num_processes": trainer.accelerator.num_processes,
        "step": trainer.state.global_step,
        "alarms": monitor.alarms,
        "history": [entry for entry in trainer.state.log_history if "reward" in entry],
    }
    (Path(folder) / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
