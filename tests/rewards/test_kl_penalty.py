# SPDX-License-Identifier: Apache-2.0
"""
Warning about training on a frozen model's reward without a KL penalty, TRL's default: logged once per trainer.
"""

import logging
from typing import Any

import pytest
from trl import GRPOTrainer, RLOOTrainer

from endotrl import CollapseMonitor, DenseGRPOTrainer, EndogenousReward, PPOTrainer
from endotrl.rewards import LengthReward, SelfCertaintyReward

from ..support.trainers import LORA, make_trainer


def make(kind: type, path: str, rewards: list[Any], **settings: Any) -> Any:
    return make_trainer(kind, path, "never-written", rewards, peft_config=LORA, **settings)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "no KL penalty" in r.message]


@pytest.mark.parametrize("reward_class", [EndogenousReward, SelfCertaintyReward])
def test_attach_and_the_monitor_warn_once(reward_class, tiny_policy_path, caplog):
    reward = reward_class(None)
    trainer = make(GRPOTrainer, tiny_policy_path, [reward])  # TRL's default is `beta=0`
    assert warnings(caplog) == []
    CollapseMonitor().attach(trainer)
    reward.attach(trainer)
    (warning,) = warnings(caplog)
    assert f"Training on {reward.__name__}," in warning and "`GRPOConfig(beta=0.05, ...)`" in warning


@pytest.mark.parametrize(
    ("kind", "settings", "number"),
    [
        (DenseGRPOTrainer, {}, 1),
        (PPOTrainer, {"beta": 0.0}, 1),
        (GRPOTrainer, {"beta": 0.05}, 0),
        (RLOOTrainer, {}, 0),  # its default is 0.05
        (DenseGRPOTrainer, {"beta": 0.1}, 0),
        (PPOTrainer, {}, 0),  # its default is 0.01
        (GRPOTrainer, {"reward_weights": [0.0, 1.0]}, 0),  # only logged
    ],
)
def test_trainers(kind, settings, number, tiny_policy_path, caplog):
    """Our trainers warn, and the monitor does not repeat it; there is no warning without a reason."""
    rewards = [EndogenousReward(tiny_policy_path), LengthReward()]
    trainer = make(kind, tiny_policy_path, rewards, **settings)
    assert len(warnings(caplog)) == number
    CollapseMonitor().attach(trainer)
    assert len(warnings(caplog)) == number
