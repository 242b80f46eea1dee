# SPDX-License-Identifier: Apache-2.0
"""
`DenseGRPOTrainer` against TRL's `GRPOTrainer`, step by step, wherever the two must be the same; and against hand-made
advantages where they differ. The policy is tiny and random; completions have 1 to 8 tokens.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from trl import GRPOTrainer

from endotrl import DenseGRPOTrainer, EndogenousReward, PPOTrainer
from endotrl.rewards import SentencePooledReward

from ..support import trainers
from ..support.tiny_policy import WORDS
from ..support.trainers import PROMPTS, history


LOSS_TYPES = ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"]


def vowels(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [float(sum(WORDS[token] in "aei" for token in ids)) for ids in completion_ids]


def dense_vowels(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    return [[float(WORDS[token] in "aei") for token in ids] for ids in completion_ids]


def vowels_at_the_end(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
    totals = vowels(completion_ids)
    return [[0.0] * (len(ids) - 1) + [total] for ids, total in zip(completion_ids, totals, strict=True)]


vowels_at_the_end.__name__ = "vowels"  # so that it is logged under the same name


def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    return [-0.1 * len(ids) for ids in completion_ids]


def make_trainer(kind: type, model: str, rewards: Any, folder: Path, **settings: Any) -> Any:
    # The policy moves far in a few steps, and without Adam, which makes steps of gradients that are only rounding.
    defaults = {"max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1}
    return trainers.make_trainer(kind, model, folder, rewards, **{**defaults, **settings})


class Watched(DenseGRPOTrainer):
    """Keeps what it made of every batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outputs: list[dict[str, Any]] = []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.outputs.append(output)
        return output


@pytest.fixture
def run(tiny_policy_path, tmp_path):
    """Trains the tiny policy, in the test's folder."""

    def train(kind: type, rewards: Any, **settings: Any) -> Any:
        trainer = make_trainer(kind, tiny_policy_path, rewards, tmp_path, **settings)
        trainer.train()
        return trainer

    return train


def assert_same_training(dense: Any, scalar: Any, atol: float = 1e-6) -> None:
    assert history(dense, "loss") == pytest.approx(history(scalar, "loss"), abs=atol)
    assert len(history(dense, "loss")) == dense.state.max_steps
    for name, tensor in dense.model.state_dict().items():
        torch.testing.assert_close(tensor, scalar.model.state_dict()[name], rtol=1e-5, atol=atol, msg=name)
    # The same keys, and ours on top.
    keys = [set().union(*trainer.state.log_history) for trainer in (dense, scalar)]
    assert keys[1] <= keys[0]
    assert {key.removeprefix("eval_").split("/")[0] for key in keys[0] - keys[1]} <= {"advantage", "token_rewards"}


AT_THE_END = [vowels_at_the_end, length]
# `num_iterations` and `beta` so that importance ratios, clipping and the KL take part.
RATIOS = {"num_iterations": 2, "beta": 0.1, "max_steps": 4}
TWO_OF = {"reward_weights": [1.0, 0.3], "max_steps": 2}
EVALUATED = {"eval_dataset": PROMPTS.select(range(4)), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}


class TestSameAsGrpo:
    """Credit that is the same for all tokens is TRL's: same completions, losses and weights."""

    @pytest.mark.parametrize(
        "settings",
        [
            *({"loss_type": loss_type, **RATIOS} for loss_type in LOSS_TYPES),
            *(
                {"scale_rewards": scale, "multi_objective_aggregation": aggregation, **TWO_OF}
                for scale in ("group", "batch", "none")
                for aggregation in ("sum_then_normalize", "normalize_then_sum")
            ),
            {"mask_truncated_completions": True},  # they still count in the baseline
            {"num_generations_eval": 2, **EVALUATED},
        ],
        ids=lambda settings: " ".join(map(str, settings.values()))[:60],
    )
    def test_rewards_with_the_last_token(self, settings, run):
        scalar = run(GRPOTrainer, [vowels, length], **settings)
        dense = run(Watched, AT_THE_END, **settings)
        assert_same_training(dense, scalar)
        within = history(dense, "advantage/within_completion")
        assert within and within == pytest.approx([0.0] * len(within), abs=1e-5)
        if "eval_dataset" in settings:
            assert history(dense, "eval_loss") == pytest.approx(history(scalar, "eval_loss"), abs=1e-6)
            assert len(history(dense, "eval_advantage/std")) == 2
        if "mask_truncated_completions" in settings:
            dropped = [row.sum() == 0 for output in dense.outputs for row in output["completion_mask"]]
            assert any(dropped) and not all(dropped)

    def test_outcome_credit(self, tiny_policy_path, run):
        kwargs = {"beta": 0.1, "max_steps": 2}
        endogenous = EndogenousReward(tiny_policy_path)
        scalar = run(GRPOTrainer, [endogenous, vowels], **kwargs)
        dense = run(DenseGRPOTrainer, [endogenous, vowels_at_the_end], credit="outcome", **kwargs)
        assert_same_training(dense, scalar)
        assert "token_rewards/vowels/mean" not in dense.state.log_history[0]

    def test_one_sentence(self, tiny_policy_path, run):
        rewards = [EndogenousReward(tiny_policy_path), vowels]
        scalar = run(GRPOTrainer, list(rewards), scale_rewards="none")
        whole = {"credit": "sentence", "segmenter": lambda text: [(0, len(text))] if text else []}
        dense = run(DenseGRPOTrainer, list(rewards), scale_rewards="none", **whole)
        # Sums of differences of soft values: rounding is larger than elsewhere.
        assert_same_training(dense, scalar, atol=1e-4)

    @pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
    def test_none(self, aggregation, run):
        def often_none(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
            return [float(ids[0]) if ids[0] % 2 else None for ids in completion_ids]

        def dense_often_none(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
            rows = zip(completion_ids, often_none(completion_ids), strict=True)
            return [None if row is None else [0.0] * (len(ids) - 1) + [row] for ids, row in rows]

        def sometimes(completion_ids: list[list[int]], **kwargs: Any) -> list[Any]:
            return [float(ids[0]) if ids[0] % 3 else None for ids in completion_ids]

        kwargs = {"multi_objective_aggregation": aggregation, "num_generations": 8}
        scalar = run(GRPOTrainer, [often_none, sometimes], **kwargs)
        dense_often_none.__name__ = "often_none"
        dense = run(Watched, [dense_often_none, sometimes], **kwargs)
        assert_same_training(dense, scalar)
        unscorable = [ids[0] % 6 == 0 for output in dense.outputs for ids in output["completion_ids"].tolist()]
        zero = [row.abs().max().item() == 0 for output in dense.outputs for row in output["advantages"]]
        assert any(unscorable) and all(z for z, u in zip(zero, unscorable, strict=True) if u)

    def test_async_functions_and_reward_models(self, tiny_policy_path, tmp_path, run):
        classifier = str(tmp_path / "classifier")
        AutoTokenizer.from_pretrained(tiny_policy_path).save_pretrained(classifier)
        torch.manual_seed(0)
        config = LlamaConfig.from_pretrained(tiny_policy_path, num_labels=1)
        LlamaForSequenceClassification(config).save_pretrained(classifier)

        async def later(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            return vowels(completion_ids)

        kinds = (GRPOTrainer, DenseGRPOTrainer)
        scalar, dense = (run(kind, [classifier, later, length], max_steps=2) for kind in kinds)
        assert_same_training(dense, scalar)
        assert "rewards/classifier/mean" in dense.state.log_history[0]


class TestAdvantages:
    @pytest.mark.parametrize("gamma", [1.0, 0.5])
    def test_by_hand(self, gamma, run):
        trainer = run(Watched, [dense_vowels, length], gamma=gamma, scale_rewards="none", max_steps=1)
        (output,) = trainer.outputs
        ids, mask = output["completion_ids"], output["completion_mask"].bool()
        assert len({int(n) for n in mask.sum(1)}) > 1
        expected = torch.zeros(ids.shape)
        # Rows were shuffled after they were made; their groups are told by the prompt.
        rows = [[token for token, m in zip(*row, strict=True) if m] for row in zip(ids.tolist(), mask, strict=True)]
        prompts = output["prompt_ids"].tolist()
        for i, own in enumerate(rows):
            group = [row for row, prompt in zip(rows, prompts, strict=True) if prompt == prompts[i]]
            assert len(group) == 4
            for h in range(len(own)):
                to_go = [
                    sum(gamma**k * r for k, r in enumerate(dense_vowels([row])[0][min(h, len(row) - 1) :]))
                    for row in (own, *group)
                ]
                totals = [r - 0.1 * len(row) for r, row in zip(to_go, (own, *group), strict=True)]
                expected[i, h] = totals[0] - sum(totals[1:]) / 4
        torch.testing.assert_close(output["advantages"], expected)

    def test_leave_one_out(self, run):
        first, second = (
            run(Watched, dense_vowels, baseline=baseline, max_steps=1).outputs[0]
            for baseline in ("group", "leave_one_out")
        )
        torch.testing.assert_close(second["advantages"], first["advantages"] * 4 / 3)

    @pytest.mark.parametrize("masked", [False, True])
    def test_tokens_of_tools_are_passed_over(self, masked, run):
        # Rewards on them count for nobody, and they get no advantage: also if the loss leaves out the whole completion.
        masks: dict[tuple[int, ...], list[int]] = {}

        def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
            ids = [[7 + i, 8, 9 + i, 10, 2][: 5 - i % 2] for i in range(len(prompts))]
            for row in ids:
                masks[tuple(row)] = [1, 0, 0, 1, 1][: len(row)]
            return {
                "prompt_ids": [[3, 4]] * len(prompts),
                "completion_ids": ids,
                "logprobs": [[0.0] * len(row) for row in ids],
                "env_mask": [masks[tuple(row)] for row in ids],
            }

        def token_ids(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
            rows = [zip(ids, masks[tuple(ids)], strict=True) for ids in completion_ids]
            return [[float(token) if m else 1e6 for token, m in row] for row in rows]

        settings: dict[str, Any] = {"rollout_func": rollout, "max_steps": 1, "num_generations": 8}
        trainer = run(Watched, token_ids, scale_rewards="none", mask_truncated_completions=masked, **settings)
        (output,) = trainer.outputs
        policy = output["completion_mask"].bool() & output["tool_mask"].bool()
        assert policy.sum() < output["completion_mask"].sum()
        assert (output["advantages"][~policy] == 0).all()
        # At position 3, after the hole, all have 10 to come, and those that end have 2 more.
        ended = output["completion_ids"][:, 4] == 2
        expected = torch.where(ended, 12.0, 10.0) - 11.0
        expected = torch.where(ended | (not masked), expected, 0.0)
        torch.testing.assert_close(output["advantages"][:, 3], expected)
        # At position 0, before it, they have their first token more: 7 to 14.
        first = output["completion_ids"][ended, 0] - 10.5
        torch.testing.assert_close(output["advantages"][ended, 0], first + expected[ended])

    def test_sums_of_sentences_are_not_paid_to_an_environment(self, tiny_policy_path, run):
        """They are at ends of sentences, and the value of a state knows what is owed: advantages are those of tokens."""
        rows = [[7 + i, 8, 9 + i, 10, 2][: 5 - i % 2] for i in range(8)]
        written = {"env_mask": [[1, 1, 0, 0, 1][: len(row)] for row in rows]}
        written |= {"prompt_ids": [[3, 4]] * 8, "completion_ids": rows, "logprobs": rows}
        settings: dict[str, Any] = {"scale_rewards": "none", "max_steps": 1, "num_generations": 8}
        endogenous = EndogenousReward(tiny_policy_path)
        pooled = SentencePooledReward(endogenous, AutoTokenizer.from_pretrained(tiny_policy_path))
        tokens, sentences = (
            run(Watched, reward, rollout_func=lambda *args: dict(written), **settings).outputs[0]["advantages"]
            for reward in (endogenous, pooled)
        )
        assert tokens.abs().max() > 1
        torch.testing.assert_close(sentences, tokens, rtol=1e-4, atol=1e-4)

    def test_names_and_reward_objects_stay(self, tiny_policy_path, tmp_path, run):
        functions = [EndogenousReward(tiny_policy_path), dense_vowels, length]
        trainer = run(DenseGRPOTrainer, list(functions), max_steps=1, log_completions=True)
        assert trainer.reward_funcs == functions
        entry = trainer.state.log_history[0]
        names = ("endogenous_reward", "dense_vowels", "length")
        assert {f"rewards/{name}/mean" for name in names} | {"endogenous_reward/entropy"} <= entry.keys()
        assert [f"token_rewards/{name}/mean" in entry for name in names] == [True, True, False]
        assert 0 < entry["token_rewards/dense_vowels/mean"] < 1
        guide = (Path(__file__).parents[2] / "docs" / "dense.md").read_text(encoding="utf-8")
        for key in ("advantage/std", "advantage/within_completion", "token_rewards/<name>/mean"):
            assert f"`{key}`" in guide
        (table,) = (tmp_path / "completions").glob("*.parquet")
        assert table.stat().st_size > 0


@pytest.mark.parametrize("kind", [DenseGRPOTrainer, PPOTrainer])
def test_the_table_of_completions_has_their_mean_advantages(kind, tiny_policy_path, tmp_path):
    """TRL has logged those of whole completions in their groups, which are not trained on: in PPO, 0 for all."""
    trainer = trainers.make_trainer(kind, tiny_policy_path, tmp_path, EndogenousReward(tiny_policy_path))
    expected: list[float] = []
    for output in (trainers.rollout(trainer, num_rows=4) for _ in range(2)):
        for row, mask in zip(output["advantages"], output["completion_mask"].bool(), strict=True):
            expected.append(row[mask].mean().item())
    assert min(map(abs, expected)) > 0
    assert list(trainer._logs["advantages"]) == pytest.approx(expected, abs=1e-5)


def test_an_error_in_a_reward_leaves_the_trainer_as_it_was(tiny_policy_path, tmp_path):
    def broken(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
        return [[1.0] * (len(ids) + 1) for ids in completion_ids]

    trainer = make_trainer(DenseGRPOTrainer, tiny_policy_path, broken, tmp_path)
    with pytest.raises(ValueError, match=r"'broken' returned token_rewards of shape .* for row 0"):
        trainer.train()
    assert trainer.reward_funcs == [broken]
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


class TestModelCard:
    def card(self, path: Path, tiny_policy_path: str, *reward_funcs: Any, **settings: Any) -> str:
        trainer = make_trainer(DenseGRPOTrainer, tiny_policy_path, list(reward_funcs), path, **settings)
        for reward in reward_funcs:
            if isinstance(reward, EndogenousReward) and reward.is_shared:
                reward.attach(trainer)
        trainer.create_model_card(model_name="policy")
        return (path / "README.md").read_text()

    def test_plain_grpo(self, tiny_policy_path, tmp_path):
        card = self.card(tmp_path, tiny_policy_path, vowels, credit="outcome")
        assert "This model was trained with GRPO, a method introduced in [DeepSeekMath" in card
        assert "- grpo\n" in card and "- endotrl\n" in card and "dense" not in card.lower()
        assert "- `vowels` (weight 1): a reward function" in card and "No labels" not in card
        assert "None" not in card.split("## Quick start")[0]

    def test_endogenous(self, tiny_policy_path, tmp_path):
        reward = EndogenousReward(None, alpha=0.5, token_reward="centered", criterion="a `b`")
        settings = {"credit": "token", "beta": 0.25, "reward_weights": [1.0, 0.0]}
        card = self.card(tmp_path, tiny_policy_path, reward, vowels, **settings)
        assert "This model was trained with Dense GRPO.\n" in card
        assert "No labels and no reward model were used" in card
        name = Path(tiny_policy_path).name
        assert f"of `{name}`, frozen: the policy before training" in card
        (shown,) = (json.loads(part.split("```")[0]) for part in card.split("```json")[1:])
        assert (shown["alpha"], shown["token_reward"], shown["criterion"]) == (0.5, "centered", "a `b`")
        assert "discount" not in shown  # of another aggregate
        assert "- `vowels` (weight 0: only logged)" in card and "`beta` 0.25" in card
