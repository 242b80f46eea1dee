# SPDX-License-Identifier: Apache-2.0
"""
Constants in the frozen model's logits: probabilities do not depend on them, so neither may advantages. Each option is
met with the default of every other; where the constants do matter, the trainer says so or refuses. (PPO's targets of
the critic: `test_ppo_trainer.py`.)
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from endotrl import DenseGRPOTrainer, EndogenousReward, PPOTrainer
from endotrl.rewards import ClipTokens

from ..support import trainers


MESSAGE = "depend on constants that the frozen model's logits may contain"


@pytest.fixture(scope="module")
def shifted(tiny_policy_path):
    """The tiny policy with w · h(s) added to all logits of a state with hidden state h(s)."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path).requires_grad_(False)
    model.lm_head.weight += 2.0 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    plain = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    constants = model(ids).logits - plain(ids).logits
    assert constants.std(dim=1).min() > 1.0 and constants.abs().min() > 10.0
    assert constants.std(dim=2).max() < 1e-4
    return model


def lengths(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [0.2 * len(ids) for ids in completion_ids]


def three_letters(text: str) -> list[tuple[int, int]]:
    """A segmenter: a "sentence" is three words of one letter."""
    return [(start, min(start + 6, len(text))) for start in range(0, len(text), 6)]


def make(kind: str, path: str, output_dir: Path, frozen: Any, reward: dict[str, Any], **settings: Any) -> Any:
    settings = {"learning_rate": 0.1, "optim": "sgd", **settings}
    if kind == "ppo":
        settings = {"value_learning_rate": 0.1, "num_iterations": 2, **settings}
    if settings.get("credit") == "sentence":
        settings["segmenter"] = three_letters
    first = EndogenousReward(frozen, AutoTokenizer.from_pretrained(path), **reward)
    rewards = [first, lengths] if settings.pop("second", False) else first
    trainer_class = DenseGRPOTrainer if kind == "dense" else PPOTrainer
    trainer = trainers.make_trainer(trainer_class, path, output_dir, rewards, **settings)
    if kind == "ppo" and trainer.args.critic != "none":
        trainers.set_head(trainer)
    return trainer


BOOTSTRAP = {"truncation": "bootstrap"}
DISCOUNTED = {"aggregate": "discounted", "discount": 0.9, "gamma": 0.9}
BOTH = [
    ({}, {}),
    ({}, {"token_reward": "log_prob"}),
    ({}, {"token_reward": "centered"}),
    ({}, {"alpha": 2.0}),
    ({}, {"truncation": "skip"}),
    ({}, {"correction": "length"}),
    ({}, DISCOUNTED),
    ({"gamma": 0.9}, {"gamma": 0.9}),
    ({"gamma": 0.9}, {"token_reward": "log_prob"}),
    ({"mask_truncated_completions": True}, {}),
]
DENSE = [
    *BOTH,
    ({}, {"correction": ClipTokens(), "token_reward": "log_prob"}),
    ({}, {**DISCOUNTED, "correction": "length"}),
    ({"baseline": "leave_one_out"}, {}),
    ({"num_generations_eval": 2}, {}),
    ({"beta": 0.1}, {}),
    *(({"credit": credit}, {}) for credit in ("sentence", "outcome")),
    *(({"scale_rewards": scale_rewards}, {}) for scale_rewards in ("batch", "none")),
    ({"credit": "sentence"}, DISCOUNTED),
    ({"credit": "outcome"}, {"aggregate": "mean"}),
    ({"credit": "outcome"}, DISCOUNTED),
    ({"credit": "outcome", "gamma": 0.9}, {}),
    ({"scale_rewards": "batch"}, DISCOUNTED),
    ({"scale_rewards": "batch", "second": True, "reward_weights": [0.5, 2.0]}, {}),
    ({"multi_objective_aggregation": "normalize_then_sum", "second": True}, {}),
    ({"multi_objective_aggregation": "normalize_then_sum", "second": True, "credit": "sentence"}, {}),
]
PPO = [
    *BOTH,
    ({"lam": 0.0}, {}),
    ({"lam": 1.0}, {}),
    ({"whiten_advantages": False}, {}),
    (BOOTSTRAP, {}),
    ({"truncation": "bootstrap", "gamma": 0.9}, {"gamma": 0.9}),
    ({"truncation": "bootstrap", "whiten_advantages": False}, DISCOUNTED),
    (BOOTSTRAP, {"truncation": "skip"}),
    (BOOTSTRAP, {"truncation": "bootstrap", "token_reward": "log_prob"}),
    ({"truncation": "bootstrap", "soft_value_baseline": False}, {"token_reward": "log_prob"}),
    ({"soft_value_baseline": False}, {"token_reward": "centered"}),
    ({"critic": "none"}, {}),
    ({"critic": "value_model"}, {}),
    ({"detach_value": False}, {}),
    ({"cliprange_value": None}, {}),
    ({"scale_value_loss": False, "whiten_advantages": False}, {}),
    ({"beta": 0.0}, {}),
    ({"kl_placement": "loss"}, {}),
    ({"kl_target": 1.0}, {}),
    ({"num_generations": 4}, {}),
    ({"second": True, "reward_weights": [0.5, 2.0]}, {}),
]


@pytest.mark.parametrize(
    ("kind", "settings", "reward"),
    [("dense", *case) for case in DENSE] + [("ppo", *case) for case in PPO],
    ids=str,
)
def test_advantages_do_not_change(kind, settings, reward, shifted, tiny_policy_path, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        plain, other = (
            trainers.rollout(make(kind, tiny_policy_path, tmp_path, frozen, reward, **settings))["advantages"]
            for frozen in (tiny_policy_path, shifted)
        )
    assert MESSAGE not in caplog.text
    assert plain.std() > 0.05
    torch.testing.assert_close(other, plain, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings", "reward", "reason"),
    [
        ("dense", {"gamma": 0.9}, {}, "discounted by 0.9, but `gamma` of the endogenous reward is 1: use the same"),
        ("dense", {}, {"gamma": 0.9}, "discounted by 1, but `gamma` of the endogenous reward is 0.9: use the same"),
        ("dense", {}, {"aggregate": "discounted"}, "The returns are discounted by 0.95"),
        ("dense", {"credit": "sentence", "gamma": 0.9}, {"gamma": 0.9}, "from sentence to sentence"),
        ("dense", {"credit": "sentence", "gamma": 0.9}, {}, "from sentence to sentence"),
        ("dense", {}, BOOTSTRAP, "subtracts the soft value of the state"),
        (
            "dense",
            {"gamma": 0.9},
            {"gamma": 0.9, "correction": "length"},
            "outcome of a completion is discounted by 1",
        ),
        ("dense", {"credit": "outcome"}, {"aggregate": "discounted"}, "outcome of a completion is discounted by 0.95"),
        ("dense", {"credit": "outcome"}, {"gamma": 0.9}, "outcome of a completion is discounted by 1"),
        ("dense", {"credit": "outcome", "scale_rewards": "batch"}, DISCOUNTED, "compares prompts"),
        ("ppo", {"gamma": 0.9}, {}, "discounted by 0.9, but `gamma` of the endogenous reward is 1: use the same"),
        ("ppo", {}, {"aggregate": "discounted"}, "The returns are discounted by 0.95"),
        ("ppo", {}, BOOTSTRAP, "subtracts the soft value of the state"),
        ("ppo", {"soft_value_baseline": False}, {}, "leaves the soft value for the critic"),
        ("ppo", {"soft_value_baseline": False, **BOOTSTRAP}, BOOTSTRAP, "leaves the soft value for the critic"),
    ],
    ids=str,
)
def test_one_warning_where_they_do(kind, settings, reward, reason, shifted, tiny_policy_path, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        plain = make(kind, tiny_policy_path, tmp_path, tiny_policy_path, reward, **settings)
    warnings = [record.getMessage() for record in caplog.records if MESSAGE in record.getMessage()]
    assert len(warnings) == 1 and reason in warnings[0] and "'endogenous_reward'" in warnings[0]
    other = make(kind, tiny_policy_path, tmp_path, shifted, reward, **settings)
    moved = trainers.rollout(other)["advantages"] - trainers.rollout(plain)["advantages"]
    assert moved.abs().max() > 0.05  # the warning is justified


@pytest.mark.parametrize(
    ("truncation", "soft_value_baseline"),
    [
        # A truncated completion would earn the critic's value, with soft values that the reward has not subtracted,
        ("terminal", False),
        ("skip", False),
        # or lose a soft value that the critic's value does not restore.
        ("bootstrap", True),
    ],
)
def test_two_ends_that_do_not_meet(truncation, soft_value_baseline, tmp_path):
    settings = {"truncation": "bootstrap", "soft_value_baseline": soft_value_baseline}
    message = f"if, and only if, .*`truncation='{truncation}'` and `soft_value_baseline={soft_value_baseline}`"
    with pytest.raises(ValueError, match=message):
        reward = EndogenousReward("quickstart", truncation=truncation)
        trainers.make_trainer(PPOTrainer, "/nowhere", tmp_path, reward, **settings)
