# SPDX-License-Identifier: Apache-2.0
"""Trainers that finish in a second."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer

from .helpers import QUIET


PROMPTS = Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h i j"] * 8})
CONFIGS: dict[type, type] = {
    PPOTrainer: PPOConfig,
    DenseGRPOTrainer: DenseGRPOConfig,
    GRPOTrainer: GRPOConfig,
    RLOOTrainer: RLOOConfig,
}


def make_trainer(kind: type, model: Any, folder: str | Path, rewards: Any, **settings: Any) -> Any:
    """A trainer of a class, or of one made from it; objects, and what its configuration has not, are its arguments."""
    config = next(config for base, config in CONFIGS.items() if issubclass(kind, base))
    of_config = {field.name for field in fields(config)}
    names = [name for name, value in settings.items() if name not in of_config or callable(value)]
    arguments = {name: settings.pop(name) for name in names}
    defaults = {"per_device_train_batch_size": 8, "num_generations": 1 if issubclass(kind, PPOTrainer) else 4}
    defaults |= {"max_completion_length": 8, "max_steps": 2, "gradient_checkpointing": False, **QUIET}
    args = config(str(folder), **{**defaults, **settings})
    return kind(model, reward_funcs=rewards, args=args, **{"train_dataset": PROMPTS, **arguments})
