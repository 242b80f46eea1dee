# SPDX-License-Identifier: Apache-2.0
"""The trainers that credit tokens, on a sentence reward model."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

from endotrl import (
    DenseGRPOConfig,
    DenseGRPOTrainer,
    EndogenousReward,
    PPOConfig,
    PPOTrainer,
    SentenceReward,
    SentenceRewardModel,
)
from endotrl.rewards import DenseReward, DenseScores, SentencePooledReward
from endotrl.sentence import SentenceRewardConfig

from ..support.helpers import QUIET, weights


class Spy:
    """Notes what a dense reward gave."""

    __name__ = "spy"

    def __init__(self, reward: DenseReward) -> None:
        self.reward = reward
        self.scores: list[tuple[DenseScores, Any]] = []

    def __call__(self, **kwargs: Any) -> Any:
        raise AssertionError("A trainer that credits tokens takes the dense reward.")

    def outcome_and_token_rewards(self, completion_ids: Any = None, **kwargs: Any) -> DenseScores:
        scores = DenseScores(*self.reward.outcome_and_token_rewards(completion_ids=completion_ids, **kwargs))
        self.scores.append((scores, completion_ids))
        return scores


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trained", "endogenous"])
@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(DenseGRPOTrainer, DenseGRPOConfig), (PPOTrainer, PPOConfig)]
)
def test_rewards_of_sentences(trainer_class, config_class, kind, tiny_model_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    torch.manual_seed(0)
    if kind == "trained":
        model = SentenceRewardModel.from_backbone(tiny_model_path, SentenceRewardConfig(attention_dim=8))
        spy = Spy(SentenceReward(model, tokenizer))
    else:
        spy = Spy(SentencePooledReward(EndogenousReward(tiny_model_path), tokenizer))
    args = config_class(
        output_dir=str(tmp_path),
        max_steps=1,
        num_generations=2,
        num_iterations=1,
        per_device_train_batch_size=4,
        max_completion_length=24,
        logging_steps=1,
        learning_rate=1e-3,
        **QUIET,
    )
    dataset = Dataset.from_dict({"prompt": ["What is it?", "Hi?", "So?", "And?"]})
    trainer = trainer_class(tiny_model_path, reward_funcs=spy, args=args, train_dataset=dataset)
    before = weights(trainer.model)
    trainer.train()
    assert any(not torch.equal(before[name], weight) for name, weight in weights(trainer.model).items())
    (scores, completion_ids) = spy.scores[0]
    assert trainer.state.log_history[0]["rewards/spy/mean"] == pytest.approx(
        sum(scores.outcomes) / len(scores.outcomes), rel=1e-4
    )
    for outcome, rewards, ids in zip(scores.outcomes, scores.token_rewards, completion_ids, strict=True):
        if kind == "trained":  # the sum identity: what is credited is what is logged
            assert rewards.sum().item() == pytest.approx(outcome, abs=1e-5)
        assert rewards.shape == (len(ids),)
        assert 1 <= rewards.count_nonzero() <= len(ids) / 2  # at ends of sentences only
        assert rewards[-1] != 0
