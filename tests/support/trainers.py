# SPDX-License-Identifier: Apache-2.0
"""Trainers that finish in a second, and what several tests do with them."""

from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from packaging.version import Version
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from .helpers import QUIET


PROMPTS = Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h i j"] * 8})
CONVERSATIONAL = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS["prompt"]]})
LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
CONFIGS: dict[type, type] = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig, OnlineDPOTrainer: OnlineDPOConfig}
if Version(version("trl")) >= Version("1.15"):  # which ours need
    from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer
    from endotrl.trainers.value_head import critic_of

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


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    """A reward function."""
    return [float(len(ids)) for ids in completion_ids]


def history(trainer: Any, key: str) -> list[float]:
    """What was logged under a key."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def rollout(trainer: Any, num_rows: int = 8) -> dict[str, Any]:
    """One generation batch, as TRL's `_prepare_inputs` makes it."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    rows = [trainer.train_dataset[i // trainer.num_generations] for i in range(num_rows)]
    return trainer._generate_and_score_completions(rows)


def rows_of(output: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Prompt and completion of every row of a batch, without padding."""
    names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    return [
        (prompt[prompt_mask.bool()].tolist(), completion[completion_mask.bool()].tolist())
        for prompt, prompt_mask, completion, completion_mask in zip(*(output[name] for name in names), strict=True)
    ]


def set_head(trainer: Any, bias: float = 0.5, seed: int | None = 0) -> None:
    """Gives PPO's critic a head that says something, as after some training."""
    head = critic_of(trainer._base_policy).head
    with torch.no_grad():
        head.bias.fill_(bias)
        if seed is not None:
            head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(seed)))
