# SPDX-License-Identifier: Apache-2.0
"""Trainers that finish in a second."""

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from datasets import Dataset
from packaging.version import Version
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from .helpers import QUIET


PROMPTS = Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h i j"] * 8})
CONFIGS: dict[type, type] = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig, OnlineDPOTrainer: OnlineDPOConfig}
if Version(version("trl")) >= Version("1.15"):  # which ours need
    from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer

    CONFIGS = {PPOTrainer: PPOConfig, DenseGRPOTrainer: DenseGRPOConfig, **CONFIGS}


def make_trainer(kind: type, model: Any, folder: str | Path, rewards: Any, **settings: Any) -> Any:
    """A trainer of a class, or of one made from it; objects, and what its configuration has not, are its arguments."""
    config = next(config for base, config in CONFIGS.items() if issubclass(kind, base))
    of_config = {field.name for field in fields(config)} | {"max_completion_length"}
    names = [name for name, value in settings.items() if name not in of_config or callable(value)]
    arguments = {name: settings.pop(name) for name in names}
    defaults = {"per_device_train_batch_size": 8, "num_generations": 1 if config.__name__ == "PPOConfig" else 4}
    defaults |= {"max_completion_length": 8, "max_steps": 2, "gradient_checkpointing": False, **QUIET}
    given = {**defaults, **settings}
    if config is OnlineDPOConfig:  # two completions, and another name of their length
        del given["num_generations"]
        given["max_new_tokens"] = given.pop("max_completion_length")
        name = model if isinstance(model, str) else model.config._name_or_path
        arguments = {"processing_class": AutoTokenizer.from_pretrained(name), **arguments}
    return kind(
        model, reward_funcs=rewards, args=config(str(folder), **given), **{"train_dataset": PROMPTS, **arguments}
    )
