# SPDX-License-Identifier: Apache-2.0
"""
Training on a frozen model's reward without a KL penalty, TRL's default, is warned of: once, whoever sees it first.
"""

import logging
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from endotrl import (
    CollapseMonitor,
    DenseGRPOConfig,
    DenseGRPOTrainer,
    EndogenousReward,
    PPOConfig,
    PPOTrainer,
)
from endotrl.rewards import LengthReward, SelfCertaintyReward

from ..support.helpers import QUIET


LORA = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def make_trainer(trainer_class: Any, config_class: Any, path: str, rewards: list[Any], **settings: Any) -> Any:
    if config_class is not PPOConfig:
        settings = {"num_generations": 2, **settings}
    args = config_class(
        output_dir="never-written",
        per_device_train_batch_size=2,
        max_completion_length=4,
        **QUIET,
        **settings,
    )
    dataset = Dataset.from_dict({"prompt": ["a b"] * 4})
    return trainer_class(path, rewards, args=args, train_dataset=dataset, peft_config=LORA)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "no KL penalty" in r.message]


@pytest.mark.parametrize("reward_class", [EndogenousReward, SelfCertaintyReward])
def test_attach_and_the_monitor_warn_once(reward_class, tiny_policy_path, caplog):
    reward = reward_class(None)
    trainer = make_trainer(GRPOTrainer, GRPOConfig, tiny_policy_path, [reward])  # TRL's default is `beta=0`
    assert warnings(caplog) == []
    CollapseMonitor().attach(trainer)
    reward.attach(trainer)
    (warning,) = warnings(caplog)
    assert f"is trained on {reward.__name__}" in warning and "`GRPOConfig(beta=0.05, ...)`" in warning


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "settings", "number"),
    [
        (DenseGRPOTrainer, DenseGRPOConfig, {}, 1),
        (PPOTrainer, PPOConfig, {"beta": 0.0}, 1),
        (GRPOTrainer, GRPOConfig, {"beta": 0.05}, 0),
        (RLOOTrainer, RLOOConfig, {}, 0),  # its default is 0.05
        (DenseGRPOTrainer, DenseGRPOConfig, {"beta": 0.1}, 0),
        (PPOTrainer, PPOConfig, {}, 0),  # its default is 0.01
        (GRPOTrainer, GRPOConfig, {"reward_weights": [0.0, 1.0]}, 0),  # only looked at
    ],
)
def test_trainers(trainer_class, config_class, settings, number, tiny_policy_path, caplog):
    """Ours warn by themselves, and the monitor not again; nobody without a reason."""
    rewards = [EndogenousReward(tiny_policy_path), LengthReward()]
    trainer = make_trainer(trainer_class, config_class, tiny_policy_path, rewards, **settings)
    assert len(warnings(caplog)) == number
    CollapseMonitor().attach(trainer)
    assert len(warnings(caplog)) == number
