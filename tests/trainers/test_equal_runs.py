# SPDX-License-Identifier: Apache-2.0
"""Runs of both trainers that must be equal: however a batch is split, whole or resumed from a checkpoint."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from endotrl import DenseGRPOTrainer, EndogenousReward, PPOTrainer
from endotrl.trainers.value_head import CRITIC_FILE

from ..support import trainers
from ..support.helpers import assert_same_to_the_bit, weights
from ..support.trainers import LORA, PROMPTS, history


def parity(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    return [[float(token % 2) for token in ids] for ids in completion_ids]


def train(kind: type, model: str, folder: Path, resume: Path | None = None, **settings: Any) -> Any:
    defaults = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1}
    if kind is PPOTrainer:
        defaults["value_learning_rate"] = settings.get("learning_rate", 1e-2)
    rewards = [EndogenousReward(model), *([parity] if kind is DenseGRPOTrainer else [])]
    trainer = trainers.make_trainer(kind, model, folder, rewards, **{**defaults, **settings})
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


PPO_KEYS = ["loss", "ppo/value_loss", "ppo/explained_variance", "ppo/returns_mean", "grad_norm"]
DAPO = {"loss_type": "dapo", "max_steps": 2}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((DenseGRPOTrainer, {"num_iterations": iterations, **DAPO}) for iterations in (1, 2)),
        *((PPOTrainer, {"critic": critic}) for critic in ("value_head", "value_model")),
    ],
    ids=str,
)
def test_however_a_batch_is_split(kind, settings, tiny_policy_path, tmp_path):
    is_ppo = kind is PPOTrainer
    keys, near = (PPO_KEYS, {"abs": 1e-5, "rel": 1e-3}) if is_ppo else (["loss"], {"abs": 1e-5})
    atol, rtol = (1e-5, 1e-4) if is_ppo else (1e-4, 1e-3)
    runs = []
    for size, checkpointing in ((8, False), (1, False), (4, True)):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        # Adam would enlarge rounding of gradients that are zero.
        batch |= {"optim": "sgd", "learning_rate": 0.1, "gradient_checkpointing": checkpointing}
        runs.append(train(kind, tiny_policy_path, tmp_path, **batch, **settings))
    expected = runs[0].model.state_dict()
    for run in runs[1:]:
        for name, tensor in run.model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], atol=atol, rtol=rtol, msg=lambda m, n=name: f"{n}: {m}")
        for key in keys:
            assert history(run, key) == pytest.approx(history(runs[0], key), **near) and history(run, key), key


# A generation batch of GRPO serves 4 steps, and two of them are an epoch; one of PPO serves 6.
GRPO = {"num_iterations": 2, "num_generations": 2, "max_steps": 14, "train_dataset": PROMPTS.select(range(16))}
PPO = {"num_iterations": 3, "per_device_train_batch_size": 4, "max_steps": 10}


@pytest.mark.parametrize(
    ("kind", "settings", "serves", "steps"),
    [
        (DenseGRPOTrainer, {**GRPO, "beta": 0.1, "optim": "sgd", "learning_rate": 0.1}, 4, (3, 8, 12, 13)),
        (PPOTrainer, {**PPO, "critic": "value_head"}, 6, (2, 6, 7)),
        (PPOTrainer, {**PPO, "critic": "value_model"}, 6, (2, 6, 7)),
        (PPOTrainer, {**PPO, "peft_config": LORA}, 6, (2, 6, 7)),
        (PPOTrainer, {**PPO, "kl_target": 0.5, "kl_horizon": 10}, 6, (2, 6, 7)),
        (PPOTrainer, {**PPO, "critic": "none", "max_steps": 4}, 6, (2,)),
    ],
    ids=["dense", "value_head", "value_model", "lora", "adaptive kl", "none"],
)
def test_resumed(kind, settings, serves, steps, tiny_policy_path, tmp_path, caplog):
    settings = {"steps_per_generation": 2, **settings}
    whole = train(kind, tiny_policy_path, tmp_path, save_strategy="steps", save_steps=1, **settings)
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        for step in steps:
            folder = tmp_path / f"checkpoint-{step}"
            assert (folder / "rollout_0.pt").exists() == (step % serves != 0)  # what is left of the generation batch
            assert (folder / CRITIC_FILE).exists() == (kind is PPOTrainer and settings.get("critic") != "none")
            resumed = train(kind, tiny_policy_path, tmp_path / "resumed", folder, **settings)
            assert resumed.state.global_step == settings["max_steps"]
            assert_same_to_the_bit(weights(whole.model), weights(resumed.model))
            for key in ("loss", "ppo/value_loss", "ppo/kl_coef"):
                assert history(resumed, key) == history(whole, key)
            assert resumed.beta == whole.beta
    assert not [record.getMessage() for record in caplog.records if "keys" in record.getMessage()]
    assert ("kl_target" in settings) == (whole.beta != whole.args.beta)
    args = torch.load(tmp_path / f"checkpoint-{steps[-1]}" / "training_args.bin", weights_only=False)
    assert type(args) is trainers.CONFIGS[kind]
