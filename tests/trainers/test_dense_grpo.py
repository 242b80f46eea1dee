# SPDX-License-Identifier: Apache-2.0
"""
`DenseGRPOTrainer` against TRL's `GRPOTrainer`, step by step, wherever the two must be the same; and against hand-made
advantages where they differ. The policy is tiny and random; completions have 1 to 8 tokens.
"""

import importlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

import endotrl.trainers
from endotrl import DenseGRPOConfig, DenseGRPOTrainer, EndogenousReward

from ..support import trainers
from ..support.helpers import QUIET, assert_same_to_the_bit, weights
from ..support.tiny_policy import WORDS
from ..support.trainers import PROMPTS


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


def make_trainer(
    kind: type, model: str, rewards: Any, folder: Path, dataset: Dataset = PROMPTS, **settings: Any
) -> Any:
    # The policy moves far in a few steps, and without Adam, which makes steps of gradients that are only rounding.
    defaults = {"max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "logging_steps": 1}
    return trainers.make_trainer(kind, model, folder, rewards, train_dataset=dataset, **{**defaults, **settings})


class Watched(DenseGRPOTrainer):
    """Keeps what it made of every batch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.outputs: list[dict[str, Any]] = []

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        self.outputs.append(output)
        return output


def train(*args: Any, resume: Any = None, **settings: Any) -> Any:
    trainer = make_trainer(*args, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def run(tiny_policy_path, tmp_path):
    """[`train`] with the tiny policy, in the test's folder."""
    return lambda trainer_class, rewards, *args, **kwargs: train(
        trainer_class, tiny_policy_path, rewards, tmp_path, *args, **kwargs
    )


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same_training(dense: Any, scalar: Any, atol: float = 1e-6) -> None:
    assert logged(dense, "loss") == pytest.approx(logged(scalar, "loss"), abs=atol)
    assert len(logged(dense, "loss")) == dense.state.max_steps
    for name, tensor in dense.model.state_dict().items():
        torch.testing.assert_close(tensor, scalar.model.state_dict()[name], rtol=1e-5, atol=atol, msg=name)
    # The same keys, and ours on top.
    keys = [set().union(*trainer.state.log_history) for trainer in (dense, scalar)]
    assert keys[1] <= keys[0]
    assert {key.removeprefix("eval_").split("/")[0] for key in keys[0] - keys[1]} <= {"advantage", "token_rewards"}


class TestSameAsGrpo:
    """Credit that is the same for all tokens is TRL's: same completions, losses and weights."""

    @pytest.mark.parametrize("loss_type", LOSS_TYPES)
    def test_all_losses(self, loss_type, run):
        # `num_iterations` and `beta` so that importance ratios, clipping and the KL take part.
        kwargs = {"loss_type": loss_type, "num_iterations": 2, "beta": 0.1, "max_steps": 4}
        scalar = run(GRPOTrainer, [vowels, length], **kwargs)
        dense = run(DenseGRPOTrainer, [vowels_at_the_end, length], **kwargs)
        assert_same_training(dense, scalar)
        assert logged(dense, "advantage/within_completion") == pytest.approx([0.0] * 2, abs=1e-5)

    @pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
    @pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
    def test_all_scalings(self, scale_rewards, aggregation, run):
        kwargs = {
            "scale_rewards": scale_rewards,
            "multi_objective_aggregation": aggregation,
            "reward_weights": [1.0, 0.3],
            "max_steps": 2,
        }
        scalar = run(GRPOTrainer, [vowels, length], **kwargs)
        dense = run(DenseGRPOTrainer, [vowels_at_the_end, length], **kwargs)
        assert_same_training(dense, scalar)

    def test_outcome_credit(self, tiny_policy_path, run):
        kwargs = {"beta": 0.1, "max_steps": 2}
        endogenous = EndogenousReward(tiny_policy_path)
        scalar = run(GRPOTrainer, [endogenous, vowels], **kwargs)
        rewards = [endogenous, vowels_at_the_end]
        dense = run(DenseGRPOTrainer, rewards, credit="outcome", **kwargs)
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
            rows = often_none(completion_ids)
            return [
                None if row is None else [0.0] * (len(ids) - 1) + [row]
                for ids, row in zip(completion_ids, rows, strict=True)
            ]

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

    def test_masked_truncated_completions_still_count_in_the_baseline(self, run):
        kwargs = {"mask_truncated_completions": True}
        scalar = run(GRPOTrainer, [vowels, length], **kwargs)
        dense = run(Watched, [vowels_at_the_end, length], **kwargs)
        assert_same_training(dense, scalar)
        dropped = [row.sum() == 0 for output in dense.outputs for row in output["completion_mask"]]
        assert any(dropped) and not all(dropped)

    def test_async_functions_and_reward_models(self, tiny_policy_path, tmp_path, run):
        from transformers import LlamaConfig, LlamaForSequenceClassification

        classifier = str(tmp_path / "classifier")
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
        tokenizer.save_pretrained(classifier)
        config = LlamaConfig.from_pretrained(tiny_policy_path, num_labels=1)
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(classifier)

        async def later(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
            return vowels(completion_ids)

        scalar, dense = (
            run(trainer_class, [classifier, later, last], max_steps=2)
            for trainer_class, last in ((GRPOTrainer, length), (DenseGRPOTrainer, length))
        )
        assert_same_training(dense, scalar)
        assert "rewards/classifier/mean" in dense.state.log_history[0]

    def test_evaluation(self, run):
        kwargs: dict[str, Any] = {"eval_dataset": PROMPTS.select(range(4)), "eval_strategy": "steps"}
        kwargs |= {"eval_steps": 1, "max_steps": 2, "num_generations_eval": 2}
        scalar = run(GRPOTrainer, [vowels, length], **kwargs)
        dense = run(DenseGRPOTrainer, [vowels_at_the_end, length], **kwargs)
        assert_same_training(dense, scalar)
        assert logged(dense, "eval_loss") == pytest.approx(logged(scalar, "eval_loss"), abs=1e-6)
        assert len(logged(dense, "eval_advantage/std")) == 2


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

    def test_endogenous_credit_is_the_log_probability_to_go(self, tiny_policy_path, run):
        # The two forms have the same total and differ in where they put it; without the soft value they credit alike.
        outputs = {}
        for form in ("bellman", "log_prob"):
            reward = EndogenousReward(tiny_policy_path, token_reward=form)
            trainer = run(Watched, reward, max_steps=1)
            outputs[form] = trainer.outputs[0]["advantages"]
            assert logged(trainer, "advantage/within_completion")[0] > 0.01
        torch.testing.assert_close(outputs["bellman"], outputs["log_prob"], atol=1e-5, rtol=1e-4)

    def test_leave_one_out(self, run):
        first, second = (
            run(Watched, dense_vowels, baseline=baseline, max_steps=1).outputs[0]
            for baseline in ("group", "leave_one_out")
        )
        torch.testing.assert_close(second["advantages"], first["advantages"] * 4 / 3)

    def test_tokens_of_tools_are_passed_over(self, run):
        # Rewards on them count for nobody, and they get no advantage.
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
            return [
                [float(t) if m else 1e6 for t, m in zip(ids, masks[tuple(ids)], strict=True)] for ids in completion_ids
            ]

        trainer = run(Watched, token_ids, rollout_func=rollout, scale_rewards="none", max_steps=1, num_generations=8)
        (output,) = trainer.outputs
        policy = output["completion_mask"].bool() & output["tool_mask"].bool()
        assert policy.sum() < output["completion_mask"].sum()
        assert (output["advantages"][~policy] == 0).all()
        # At position 3, after the hole, all have 10 to come, and those that end have 2 more.
        ended = output["completion_mask"].sum(1) == 5
        expected = torch.where(ended, 12.0, 10.0) - 11.0
        torch.testing.assert_close(output["advantages"][:, 3], expected)

    def test_names_and_reward_objects_stay(self, tiny_policy_path, tmp_path, run):
        reward = EndogenousReward(tiny_policy_path)
        functions = [reward, dense_vowels, length]
        trainer = run(DenseGRPOTrainer, functions, max_steps=1, log_completions=True)
        assert trainer.reward_funcs == [reward, dense_vowels, length]
        entry = trainer.state.log_history[0]
        for name in ("endogenous_reward", "dense_vowels", "length"):
            assert f"rewards/{name}/mean" in entry
        assert "endogenous_reward/entropy" in entry
        assert 0 < entry["token_rewards/dense_vowels/mean"] < 1
        assert {"token_rewards/endogenous_reward/mean", "advantage/std"} <= entry.keys()
        assert "token_rewards/length/mean" not in entry
        guide = (Path(__file__).parents[2] / "docs" / "dense.md").read_text(encoding="utf-8")
        for key in ("advantage/std", "advantage/within_completion", "token_rewards/<name>/mean"):
            assert f"`{key}`" in guide
        (table,) = (tmp_path / "completions").glob("*.parquet")
        assert table.stat().st_size > 0

    def test_variance_within_completions(self, run):
        trainer = run(Watched, dense_vowels, max_steps=1, scale_rewards="none")
        (output,) = trainer.outputs
        rows = [a[m.bool()] for a, m in zip(output["advantages"], output["completion_mask"], strict=True)]
        all_tokens = torch.cat(rows)
        entry = trainer.state.log_history[0]
        assert entry["advantage/std"] == pytest.approx(all_tokens.std(correction=0).item(), rel=1e-4)
        within = sum(((row - row.mean()) ** 2).sum() for row in rows) / ((all_tokens - all_tokens.mean()) ** 2).sum()
        assert entry["advantage/within_completion"] == pytest.approx(float(within), rel=1e-4)

    def test_weights_shared_with_the_trainer(self, tiny_policy_path, tmp_path):
        # The reward's token rewards are computed with the policy's own base model, and credited as those of a copy.
        advantages = []
        for model in (None, tiny_policy_path):
            reward = EndogenousReward(model)
            settings = {"max_steps": 1, "peft_config": LoraConfig(task_type="CAUSAL_LM")}
            trainer = make_trainer(Watched, tiny_policy_path, reward, tmp_path, **settings)
            if model is None:
                reward.attach(trainer)
            trainer.train()
            advantages.append(trainer.outputs[0]["advantages"])
        torch.testing.assert_close(*advantages, atol=1e-4, rtol=1e-4)


class TestBatches:
    @pytest.mark.parametrize("num_iterations", [1, 2])
    def test_eight_at_once_or_one_at_a_time(self, num_iterations, tiny_policy_path, run):
        kwargs = {"num_generations": 4, "loss_type": "dapo", "num_iterations": num_iterations, "max_steps": 2}
        rewards = [EndogenousReward(tiny_policy_path), dense_vowels]
        at_once = run(Watched, list(rewards), **kwargs)
        single = run(Watched, list(rewards), per_device_train_batch_size=1,
            gradient_accumulation_steps=8, **kwargs)  # fmt: skip
        assert logged(single, "loss") == pytest.approx(logged(at_once, "loss"), abs=1e-5)
        for name, tensor in single.model.state_dict().items():
            torch.testing.assert_close(tensor, at_once.model.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)

    def test_checkpoint_and_resume(self, tiny_policy_path, tmp_path):
        rewards = [EndogenousReward(tiny_policy_path), dense_vowels]
        kwargs = {"max_steps": 4, "beta": 0.1, "save_strategy": "steps", "save_steps": 2}
        whole = train(DenseGRPOTrainer, tiny_policy_path, list(rewards), tmp_path / "whole", **kwargs)
        checkpoint = str(tmp_path / "whole" / "checkpoint-2")
        resumed = train(DenseGRPOTrainer, tiny_policy_path, rewards, tmp_path / "resumed", resume=checkpoint, **kwargs)
        assert logged(resumed, "loss") == logged(whole, "loss")
        assert_same_to_the_bit(weights(whole.model), weights(resumed.model))
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")
        assert_same_to_the_bit(weights(whole.model), weights(saved))
        args = torch.load(tmp_path / "whole" / "checkpoint-4" / "training_args.bin", weights_only=False)
        assert (type(args), args.credit) == (DenseGRPOConfig, "token")

    def test_resumed_within_a_generation_batch_and_in_a_later_epoch(self, tiny_policy_path, tmp_path, run):
        # An epoch has two generation batches of 8 prompts, each of which serves 4 steps.
        prompts = PROMPTS.select(range(16))
        kwargs: dict[str, Any] = {"num_iterations": 2, "steps_per_generation": 2, "num_generations": 2}
        kwargs |= {"max_steps": 14, "save_strategy": "steps", "save_steps": 1}
        rewards = [EndogenousReward(tiny_policy_path), dense_vowels]
        whole = run(DenseGRPOTrainer, list(rewards), prompts, **kwargs)
        for step in (3, 8, 12, 13):
            again = {**kwargs, "save_strategy": "no", "resume": str(tmp_path / f"checkpoint-{step}")}
            resumed = train(DenseGRPOTrainer, tiny_policy_path, rewards, tmp_path / "resumed", prompts, **again)
            assert_same_to_the_bit(weights(whole.model), weights(resumed.model))
            assert logged(resumed, "loss") == logged(whole, "loss")


class TestConfig:
    def test_old_trl(self, monkeypatch):
        monkeypatch.setattr(trl, "__version__", "1.14.2")
        with pytest.raises(ImportError, match=r"need TRL 1\.15 or newer, and TRL 1\.14\.2 is installed"):
            importlib.reload(endotrl.trainers)

    @pytest.mark.parametrize(
        "settings", [{"credit": "word"}, {"baseline": "mean"}, {"gamma": 0.0}, {"gamma": 1.5}], ids=str
    )
    def test_bad_values(self, settings, tmp_path):
        ((name, value),) = settings.items()
        with pytest.raises(ValueError, match=f"`{name}` is '?{value}"):
            DenseGRPOConfig(str(tmp_path), **settings, **QUIET)

    def test_defaults_are_those_of_trl(self, tmp_path):
        ours, theirs = (config(str(tmp_path), **QUIET).to_dict() for config in (DenseGRPOConfig, GRPOConfig))
        assert {key: ours[key] for key in theirs if key != "logging_dir"} == {
            key: theirs[key] for key in theirs if key != "logging_dir"
        }
        assert {key: ours[key] for key in ours.keys() - theirs.keys()} == {
            "credit": "token",
            "gamma": 1.0,
            "baseline": "group",
            "segmenter": "rules",
        }
        json.dumps(ours)

    def test_command_line(self, tmp_path):
        from trl import TrlParser

        (args,) = TrlParser(DenseGRPOConfig).parse_args_and_config(
            ["--output_dir", str(tmp_path), "--credit", "sentence", "--gamma", "0.9", "--baseline", "leave_one_out"]
            + ["--use_cpu", "true", "--bf16", "false"]
        )
        assert (args.credit, args.gamma, args.baseline) == ("sentence", 0.9, "leave_one_out")

    def test_other_config(self, tiny_policy_path, tmp_path):
        with pytest.raises(TypeError, match="`args` is a GRPOConfig, but DenseGRPOTrainer needs a `DenseGRPOConfig`"):
            DenseGRPOTrainer(tiny_policy_path, vowels, GRPOConfig(str(tmp_path), **QUIET), PROMPTS)

    def test_no_config(self, tiny_policy_path, tmp_path, monkeypatch):
        @dataclass
        class OnCpu(DenseGRPOConfig):
            use_cpu: bool = True
            bf16: bool | None = False

        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("endotrl.trainers.dense_grpo_trainer.DenseGRPOConfig", OnCpu)
        trainer = DenseGRPOTrainer(tiny_policy_path, vowels, train_dataset=PROMPTS)
        assert trainer.args.output_dir.endswith("-DenseGRPO")

    def test_an_error_in_a_reward_leaves_the_trainer_as_it_was(self, tiny_policy_path, tmp_path):
        def broken(completion_ids: list[list[int]], **kwargs: Any) -> list[list[float]]:
            return [[1.0] * (len(ids) + 1) for ids in completion_ids]

        trainer = make_trainer(DenseGRPOTrainer, tiny_policy_path, broken, tmp_path)
        with pytest.raises(ValueError, match=r"'broken' returned token_rewards of shape .* for row 0"):
            trainer.train()
        assert trainer.reward_funcs == [broken]
        assert not math.isnan(sum(p.sum().item() for p in trainer.model.parameters()))


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
        card = self.card(
            tmp_path, tiny_policy_path, reward, vowels, credit="token", beta=0.25, reward_weights=[1.0, 0.0]
        )
        assert "This model was trained with Dense GRPO.\n" in card
        assert "No labels and no reward model were used" in card
        name = Path(tiny_policy_path).name
        assert f"of `{name}`, frozen: the policy as it was before training" in card
        (settings,) = (json.loads(part.split("```")[0]) for part in card.split("```json")[1:])
        assert (settings["alpha"], settings["token_reward"], settings["criterion"]) == (0.5, "centered", "a `b`")
        assert "discount" not in settings  # of another aggregate
        assert "- `vowels` (weight 0: only logged)" in card and "`beta` 0.25" in card

    def test_another_frozen_model(self, tiny_policy_path, tmp_path):
        reward = EndogenousReward(tiny_policy_path, aggregate="discounted", discount=0.75)
        card = self.card(tmp_path, tiny_policy_path, reward, vowels)
        assert "before training" not in card and '"discount": 0.75' in card
        assert "No labels" not in card  # the other reward may be of labels
