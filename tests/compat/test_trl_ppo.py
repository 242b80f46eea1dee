# SPDX-License-Identifier: Apache-2.0
"""
The endogenous reward in TRL's last own PPO trainer, that of TRL 1.12. `make test-compat` runs this in an environment
with that version; elsewhere every test is skipped by name.
"""

from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from endotrl import EndogenousReward

from ..support.helpers import QUIET, assert_same_to_the_bit, weights
from ..support.reference import completion_log_probs
from ..support.trainers import LORA


HAS_PPO = Version("1.12") <= Version(version("trl")) < Version("1.13")
if HAS_PPO:
    from trl.experimental.ppo import PPOConfig, PPOTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not HAS_PPO, reason=f"TRL has PPOTrainer up to 1.12, and {version('trl')} is installed: run `make test-compat`"
    ),
]

PAD, EOS = 0, 2
PROMPTS = ["a b c", "d e", "f", "g h i j"]


class Run:
    """A PPO run of a policy whose checkpoint is also the frozen model, with its reward model's inputs and outputs."""

    def __init__(self, path: str, reward: EndogenousReward, output_dir: Path, **settings: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.calls: list[tuple[Tensor, int, Tensor]] = []  # (B, L), context length, (B,)
        reward_model = reward.as_reward_model()
        reward_model.register_forward_hook(
            lambda module, given, scores: self.calls.append((given[0].clone(), given[2], scores.clone()))
        )
        policy = AutoModelForCausalLM.from_pretrained(path)
        self.start = weights(policy)
        queries = [self.tokenizer(prompt)["input_ids"] for prompt in PROMPTS * 16]
        arguments = {name: settings.pop(name, None) for name in ("ref_model", "peft_config")}
        defaults = {"per_device_train_batch_size": 32, "total_episodes": 32 * 2, "num_sample_generations": 0}
        defaults |= {"response_length": 8, "stop_token": "eos", "temperature": 1.0, "logging_steps": 1}
        defaults |= {"learning_rate": 3e-3, "lr_scheduler_type": "constant", **QUIET}
        self.trainer = PPOTrainer(
            args=PPOConfig(str(output_dir), **{**defaults, **settings}),
            processing_class=self.tokenizer,
            model=policy,
            reward_model=reward_model,
            value_model=AutoModelForSequenceClassification.from_pretrained(path, num_labels=1),
            train_dataset=Dataset.from_dict({"input_ids": queries}),
            **arguments,
        )

    def train(self) -> list[dict[str, float]]:
        """Returns TRL's log, one entry per step."""
        self.trainer.train()
        return [entry for entry in self.trainer.state.log_history if "objective/scores" in entry]

    @property
    def policy(self) -> PreTrainedModel:
        return self.trainer.policy_model

    def responses(self, step: int) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of queries and responses of a step, without padding."""
        batch, context, _ = self.calls[step]
        queries = [[token_id for token_id in row[:context] if token_id != PAD] for row in batch.tolist()]
        responses = [row[context:] + [PAD] for row in batch.tolist()]
        return queries, [response[: response.index(PAD)] for response in responses]


def scores_by_hand(path: str, queries: list[list[int]], responses: list[list[int]]) -> Tensor:
    """The log-probability of each response under the checkpoint, one at a time, of shape (B,)."""
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    rows = zip(queries, responses, strict=True)
    return torch.tensor([sum(completion_log_probs(model, query, response)) for query, response in rows])


def frozen_weights(reward: EndogenousReward) -> dict[str, Tensor]:
    with reward._require_placement().active() as model:
        return weights(model)


def moved(before: dict[str, Tensor], policy: PreTrainedModel) -> bool:
    return all(not torch.equal(before[name], tensor) for name, tensor in weights(policy).items())


def test_the_reward_rises(tiny_policy_path: str, tmp_path: Path) -> None:
    reward = EndogenousReward(tiny_policy_path)
    before = frozen_weights(reward)
    run = Run(tiny_policy_path, reward, tmp_path, total_episodes=32 * 20)
    log = run.train()
    assert len(log) == len(run.calls) == 20
    for step, entry in enumerate(log):
        queries, responses = run.responses(step)
        expected = scores_by_hand(tiny_policy_path, queries, responses)
        torch.testing.assert_close(run.calls[step][2], expected, atol=1e-4, rtol=0)
        # What TRL got out of the reward model, and trained on.
        assert entry["objective/scores"] == pytest.approx(expected.mean().item(), abs=1e-4)
    scores = [entry["objective/scores"] for entry in log]
    # From -13 nats to -4: the policy finds the responses that are probable under its initial weights.
    assert mean(scores[-5:]) > mean(scores[:2]) + 4
    assert moved(run.start, run.policy)
    assert_same_to_the_bit(before, frozen_weights(reward))
    assert_same_to_the_bit(before, run.start)


@pytest.mark.parametrize("stop_token", ["eos", None])
def test_missing_eos_penalty(tiny_policy_path: str, tmp_path: Path, stop_token: str | None) -> None:
    settings = {"total_episodes": 32, "stop_token": stop_token, "missing_eos_penalty": 5.0}
    run = Run(tiny_policy_path, EndogenousReward(tiny_policy_path), tmp_path, **settings)
    (entry,) = run.train()
    queries, responses = run.responses(0)
    batch, context, _ = run.calls[0]
    finished = (batch[:, context:] == EOS).any(dim=1)  # TRL looks also behind a pad token that the policy sampled
    assert 0 < finished.sum() < 32
    # Without a stop token, TRL does not stop at EOS, and hands over what follows, too.
    assert (stop_token is None) == any(EOS in response[:-1] for response in responses)
    scores = scores_by_hand(tiny_policy_path, queries, responses) - 5.0 * ~finished
    assert entry["objective/scores"] == pytest.approx(scores.mean().item(), abs=1e-4)


def test_shares_the_reference_model(tiny_policy_path: str, tmp_path: Path) -> None:
    ref_model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    before = weights(ref_model)
    reward = EndogenousReward(ref_model, AutoTokenizer.from_pretrained(tiny_policy_path))
    run = Run(tiny_policy_path, reward, tmp_path, ref_model=ref_model)
    log = run.train()
    expected = scores_by_hand(tiny_policy_path, *run.responses(-1))
    assert log[-1]["objective/scores"] == pytest.approx(expected.mean().item(), abs=1e-4)
    assert run.trainer.ref_model is ref_model
    assert moved(run.start, run.policy)
    assert_same_to_the_bit(before, weights(ref_model))


def test_lora(tiny_policy_path: str, tmp_path: Path) -> None:
    reward = EndogenousReward(tiny_policy_path)
    before = frozen_weights(reward)
    run = Run(tiny_policy_path, reward, tmp_path, peft_config=LORA, learning_rate=0.02)
    log = run.train()
    expected = scores_by_hand(tiny_policy_path, *run.responses(-1))
    assert log[-1]["objective/scores"] == pytest.approx(expected.mean().item(), abs=1e-4)
    adapter = {name: tensor for name, tensor in run.policy.state_dict().items() if "lora_B" in name}
    assert adapter and all(tensor.any() for tensor in adapter.values())
    assert_same_to_the_bit(before, frozen_weights(reward))
