# SPDX-License-Identifier: Apache-2.0
"""
Training runs on a fixed set of completions, on however many processes `torchrun` starts: writes what each process got
to `<output>/rank-<n>.json`. Run by `test_dense_distributed.py`.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset

from endotrl import DenseGRPOTrainer
from endotrl.runs.processes import leave
from tests.support import trainers


TOTAL = 8  # completions of a batch, over all processes: one group, or two of 4
# So ragged that the processes pad to different lengths.
COMPLETIONS = [[7, 8, 2], [9, 2], [10, 11, 12], [2], [7, 8, 9, 10, 11, 12, 13], [14, 2], [8] * 8, [9, 8, 7, 11, 2]]


def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    first = trainer.accelerator.process_index * len(prompts)
    step = trainer.state.global_step
    ids = [COMPLETIONS[(first + i + step) % TOTAL] for i in range(len(prompts))]
    return {
        "prompt_ids": [[3, 4]] * len(prompts),
        "completion_ids": ids,
        "logprobs": [[0.0] * len(row) for row in ids],
        "row": [first + i for i in range(len(prompts))],
    }


def dense(completion_ids: list[list[int]], row: list[int], **kwargs: Any) -> list[Any]:
    """Nothing but `None` on the second of two processes."""
    return [[t**0.5 for t in ids] if r < 4 else None for ids, r in zip(completion_ids, row, strict=True)]


def dense_everywhere(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    return [[float(t % 5) for t in ids] for ids in completion_ids]


def scalar(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [-float(len(ids)) for ids in completion_ids]


def one_kind_here_another_there(completion_ids: list[list[int]], row: list[int], **kwargs: Any) -> list[Any]:
    return [[1.0] * len(ids) if r < 4 else 1.0 for ids, r in zip(completion_ids, row, strict=True)]


class Watched(DenseGRPOTrainer):
    """Keeps the advantages of every batch, before TRL shuffles it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.advantages: list[list[list[float]]] = []

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        lengths = output["completion_mask"].sum(1).tolist()
        rows = zip(output["advantages"].tolist(), lengths, strict=True)
        self.advantages.append([row[:length] for row, length in rows])
        return output


RUNS: dict[str, dict[str, Any]] = {
    # One group over both processes.
    "group": {"num_generations": 8, "loss_type": "dapo", "num_generations_eval": 4},
    "by-function": {"num_generations": 4, "multi_objective_aggregation": "normalize_then_sum", "credit": "sentence"},
    "batch": {
        "num_generations": 8,
        "scale_rewards": "batch",
        "baseline": "leave_one_out",
        "gamma": 0.9,
        "loss_type": "dr_grpo",
    },
}


def make_trainer(model: str, output: Path, functions: list[Any], settings: dict[str, Any]) -> Watched:
    batch_size = TOTAL // int(os.environ.get("WORLD_SIZE", "1"))
    dataset = Dataset.from_dict({"prompt": ["a", "b"] * 8})
    defaults = {"per_device_train_batch_size": batch_size, "per_device_eval_batch_size": batch_size, "max_steps": 3}
    defaults |= {"learning_rate": 0.1, "optim": "sgd", "logging_steps": 1, "shuffle_dataset": False}
    data = {"train_dataset": dataset, "eval_dataset": dataset.select(range(4)), "rollout_func": rollout}
    return trainers.make_trainer(Watched, model, output, functions, **data, **defaults, **settings)


def train(trainer: Watched) -> dict[str, Any]:
    trainer.train()
    trained = len(trainer.advantages)
    trainer.evaluate()
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {
        "advantages": trainer.advantages[:trained],
        "eval_advantages": trainer.advantages[trained:],
        "logs": trainer.state.log_history,
        "weights": {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()},
    }


def main(model: str, output: Path) -> None:
    functions = [dense, dense_everywhere, scalar]
    results: dict[str, Any] = {
        name: train(make_trainer(model, output, list(functions), settings)) for name, settings in RUNS.items()
    }
    try:
        make_trainer(model, output, [one_kind_here_another_there], {"num_generations": 8}).train()
    except (TypeError, ValueError) as error:
        results["error"] = str(error)
    (output / f"rank-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    leave()
