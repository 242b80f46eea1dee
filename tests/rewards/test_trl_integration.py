# SPDX-License-Identifier: Apache-2.0
"""
`EndogenousReward` inside TRL's own trainers: the numbers that TRL gets and logs, against a naive fp32 reference; every
placement of the frozen weights; and that those weights are the same to the bit after training.
"""

import pickle
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import GRPOTrainer, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOTrainer

from endotrl import EndogenousReward

from ..support import trainers
from ..support.helpers import assert_same_to_the_bit, count_forwards, weights
from ..support.reference import scores_from_logits, state_logits
from ..support.trainers import CONVERSATIONAL, LORA, history


EOS = 2
PLAIN = trainers.PROMPTS
TRAINERS = (GRPOTrainer, RLOOTrainer, OnlineDPOTrainer)
DATASETS = {"plain": PLAIN, "conversational": CONVERSATIONAL}


class Recorder:
    """A reward function that keeps what TRL hands over, and always returns the same."""

    def __init__(self, value: float | None = 0.0) -> None:
        self.__name__ = "recorder"
        self.value = value
        self.calls: list[dict[str, Any]] = []

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float | None]:
        self.calls.append({"prompts": prompts, "completions": completions, "completion_ids": completion_ids})
        return [self.value] * len(completion_ids)


class CountingReward:
    """An attached reward that counts how often its calls run the frozen backbone."""

    def __init__(self, **kwargs: Any) -> None:
        self.__name__ = "counter"
        self.reward = EndogenousReward(model=None, **kwargs)
        self.forwards: list[int] = []

    def attach(self, trainer: Any) -> None:
        self.reward.attach(trainer)

    def __call__(self, **kwargs: Any) -> list[float | None]:
        with self.reward._placement.active() as model, count_forwards(model) as ran:
            rewards = self.reward(**kwargs)
        self.forwards.append(ran.count("LlamaModel"))
        return rewards


def make_trainer(
    model: Any, rewards: Any, folder: Path, kind: type = GRPOTrainer, dataset: Dataset = PLAIN, **settings: Any
) -> Any:
    """The policy moves far in its two steps."""
    defaults = {"learning_rate": 0.05, "logging_steps": 1, "per_device_eval_batch_size": 8, "train_dataset": dataset}
    return trainers.make_trainer(kind, model, folder, rewards, **{**defaults, **settings})


def reference_scores(path: str, call: dict[str, Any], ends: tuple[int, ...] = (EOS,)) -> list[dict[str, Any]]:
    """One sequence at a time, full logits, fp32."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    rows = []
    for prompt, ids in zip(call["prompts"], call["completion_ids"], strict=True):
        ids = ids[: next((i for i, t in enumerate(ids) if t in ends), len(ids)) + 1]  # OnlineDPO pads
        messages = {} if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
        prompt_ids = (messages or tokenizer(prompt))["input_ids"]
        scores = scores_from_logits(state_logits(model, prompt_ids, ids), ids, 1.0)
        row = {"reward": sum(scores.log_probs), "entropies": scores.entropies, "values": scores.values[:-1]}
        rows.append({**row, "length": len(ids), "last": ids[-1], "truncated": ids[-1] not in ends})
    return rows


def mean_reward(path: str, call: dict[str, Any], **kwargs: Any) -> float:
    return float(np.mean([row["reward"] for row in reference_scores(path, call, **kwargs)]))


def adapter(setting: str, dropout: float = 0.0) -> dict[str, Any]:
    """The argument of a trainer that shares by `"lora"`, with its adapter off."""
    return {"peft_config": replace(LORA, lora_dropout=dropout)} if setting == "lora" else {}


def train(
    path: str, reward: Any, folder: Path, kind: type = GRPOTrainer, dataset: Dataset = PLAIN, **settings: Any
) -> tuple[Any, list[dict[str, Any]]]:
    """A trainer that has trained on a reward, with the mean of the naive reference in every step; and its calls."""
    recorder = Recorder()
    trainer = make_trainer(path, [reward, recorder], folder, kind, dataset, reward_weights=[1.0, 0.0], **settings)
    if getattr(reward, "is_shared", True):
        reward.attach(trainer)
    trainer.train()
    key = "objective/scores" if kind is OnlineDPOTrainer else f"rewards/{reward.__name__}/mean"
    expected = [mean_reward(path, call) for call in recorder.calls]
    assert len(expected) == trainer.args.max_steps
    assert history(trainer, key) == pytest.approx(expected, abs=1e-4)
    return trainer, recorder.calls


def own_model(reward: EndogenousReward) -> PreTrainedModel:
    with reward._placement.active() as model:
        return model


class TestDropIn:
    @pytest.mark.parametrize(
        ("kind", "prompts"), [*((kind, "plain") for kind in TRAINERS), (GRPOTrainer, "conversational")]
    )
    def test_trainers(self, kind, prompts, tiny_policy_path, tmp_path):
        reward = EndogenousReward(tiny_policy_path)
        before = weights(own_model(reward))
        in_groups = kind is not OnlineDPOTrainer
        settings = {"beta": 0.1, **({"log_completions": True} if in_groups else {})}
        trainer, calls = train(tiny_policy_path, reward, tmp_path, kind, DATASETS[prompts], **settings)
        assert_same_to_the_bit(before, own_model(reward).state_dict())
        # The policy did train.
        policy = trainer.model.state_dict()
        assert not any(torch.equal(tensor, policy[name]) for name, tensor in before.items())
        if not in_groups:
            # The trainer pads completions: some of these do end early, and what follows the end is not scored.
            assert any(ids[-1] == 0 for call in calls for ids in call["completion_ids"])
            return
        # The recorder has weight 0: TRL's total is the endogenous reward alone.
        means = history(trainer, "rewards/endogenous_reward/mean")
        assert history(trainer, "reward") == pytest.approx(means, abs=1e-4)
        for step, call in enumerate(calls):
            rows = reference_scores(tiny_policy_path, call)
            rewards = torch.tensor([row["reward"] for row in rows])
            lengths = torch.tensor([float(row["length"]) for row in rows])
            expected = {
                "rewards/endogenous_reward/std": rewards.std(),
                "endogenous_reward/reward_per_token": (rewards / lengths).mean(),
                "endogenous_reward/log_prob_per_token": rewards.sum() / lengths.sum(),
                "endogenous_reward/entropy": np.mean([entropy for row in rows for entropy in row["entropies"]]),
                "endogenous_reward/soft_value": np.mean([value for row in rows for value in row["values"]]),
                "endogenous_reward/truncated_fraction": sum(row["truncated"] for row in rows) / len(rows),
                "endogenous_reward/length_correlation": torch.corrcoef(torch.stack([rewards, lengths]))[0, 1],
            }
            for key, value in expected.items():
                assert history(trainer, key)[step] == pytest.approx(float(value), abs=1e-4), key
            if kind is RLOOTrainer:  # prints its table, and writes no file
                continue
            table = pd.read_parquet(tmp_path / "completions" / f"completions_{step + 1:05d}.parquet")
            assert table["endogenous_reward"].tolist() == pytest.approx(rewards.tolist(), abs=1e-4)
            per_token = (rewards / lengths).tolist()
            assert table["endogenous_reward/per_token"].tolist() == pytest.approx(per_token, abs=1e-4)

    def test_criterion_is_scored_but_not_generated_from(self, tiny_policy_path, tmp_path):
        prompts = [*CONVERSATIONAL["prompt"]]
        dataset = Dataset.from_dict({"prompt": prompts, "domain": ["x", "y"] * (len(prompts) // 2)})
        reward = EndogenousReward(tiny_policy_path, criterion={"x": "k l", "y": "l"})
        recorder = Recorder()
        settings = {"reward_weights": [1.0, 0.0], "shuffle_dataset": False}
        trainer = make_trainer(tiny_policy_path, [reward, recorder], tmp_path, dataset=dataset, **settings)
        trainer.train()
        domains = {prompt[0]["content"]: domain for prompt, domain in zip(prompts, dataset["domain"], strict=True)}
        for call, logged in zip(recorder.calls, history(trainer, "rewards/endogenous_reward/mean"), strict=True):
            assert all(message["role"] == "user" for prompt in call["prompts"] for message in prompt)
            judged = [
                [{"role": "system", "content": {"x": "k l", "y": "l"}[domains[prompt[0]["content"]]]}, *prompt]
                for prompt in call["prompts"]
            ]
            assert logged == pytest.approx(mean_reward(tiny_policy_path, {**call, "prompts": judged}), abs=1e-4)

    def test_evaluation_during_training(self, tiny_policy_path, tmp_path):
        reward, recorder = EndogenousReward(tiny_policy_path), Recorder()
        settings = {"reward_weights": [1.0, 0.0], "eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}
        settings["eval_dataset"] = PLAIN.select(range(4))
        trainer = make_trainer(tiny_policy_path, [reward, recorder], tmp_path, **settings)
        trainer.train()
        # Evaluation follows each step: training call, evaluation call, training call, evaluation call.
        expected = [mean_reward(tiny_policy_path, call) for call in recorder.calls]
        assert history(trainer, "rewards/endogenous_reward/mean") == pytest.approx(expected[::2], abs=1e-4)
        assert history(trainer, "eval_rewards/endogenous_reward/mean") == pytest.approx(expected[1::2], abs=1e-4)
        assert len(history(trainer, "eval_endogenous_reward/entropy")) == 2

    def test_bf16_autocast_does_not_reach_the_own_copy(self, tiny_policy_path, tmp_path):
        train(tiny_policy_path, EndogenousReward(tiny_policy_path), tmp_path, bf16=True)

    def test_loaded_instance_stays_as_it_is(self, tiny_policy_path, tmp_path):
        frozen = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        frozen.train()
        before = weights(frozen)
        train(tiny_policy_path, EndogenousReward(frozen), tmp_path)
        assert_same_to_the_bit(before, frozen.state_dict())
        assert all(module.training for module in frozen.modules())

    def test_completions_that_were_cut_off_are_left_out(self, tiny_policy_path, tmp_path):
        reward, recorder = EndogenousReward(tiny_policy_path, truncation="skip"), Recorder(None)
        settings = {"log_completions": True, "learning_rate": 1e-3}
        trainer = make_trainer(tiny_policy_path, [reward, recorder], tmp_path, **settings)
        trainer.train()
        logged = history(trainer, "rewards/endogenous_reward/mean")
        for step, (call, mean) in enumerate(zip(recorder.calls, logged, strict=True), start=1):
            table = pd.read_parquet(tmp_path / "completions" / f"completions_{step:05d}.parquet")
            rows = reference_scores(tiny_policy_path, call)
            truncated = [row["truncated"] for row in rows]
            assert 0 < sum(truncated) < len(truncated)
            assert table["endogenous_reward"].isna().tolist() == truncated
            assert table["endogenous_reward/per_token"].isna().tolist() == truncated
            assert (table["advantage"][truncated] == 0).all()
            finished = [row["reward"] for row in rows if not row["truncated"]]
            assert mean == pytest.approx(sum(finished) / len(finished), abs=1e-4)


class TestShared:
    """`model=None` and `attach`: the trainer's own frozen weights."""

    @staticmethod
    def batch(path: str) -> dict[str, Any]:
        tokenizer = AutoTokenizer.from_pretrained(path)
        ids = [[10, 11, EOS], [7, 7, 7, 12], [9, EOS], [15]]
        return {
            "prompts": ["a b", "c", "d e f", "l"],
            "completions": tokenizer.batch_decode(ids, skip_special_tokens=True),
            "completion_ids": ids,
        }

    @pytest.mark.parametrize(
        ("kind", "setting", "checkpointing"),
        [
            *((kind, setting, False) for kind in TRAINERS for setting in ("lora", "reference")),
            *((GRPOTrainer, setting, True) for setting in ("lora", "reference")),
        ],
    )
    def test_equals_own_copy(self, checkpointing, setting, kind, tiny_policy_path, tmp_path):
        reward = EndogenousReward(model=None)
        settings: dict[str, Any] = {"beta": 0.1, "gradient_checkpointing": checkpointing, **adapter(setting)}
        trainer, _ = train(tiny_policy_path, reward, tmp_path, kind, CONVERSATIONAL, **settings)
        frozen = trainer.model.get_base_model() if setting == "lora" else trainer.ref_model
        assert reward.is_shared and (trainer.ref_model is None) == (setting == "lora")
        shared = {id(weight) for name, weight in own_model(reward).named_parameters() if "lora_" not in name}
        own_weights = [(name, weight) for name, weight in frozen.named_parameters() if "lora_" not in name]
        assert shared <= {id(weight) for _, weight in own_weights}
        loaded = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        for name, weight in own_weights:
            assert torch.equal(weight, loaded.get_parameter(name.replace(".base_layer", ""))), name
        # The policy has moved, the reward has not.
        batch = self.batch(tiny_policy_path)
        own = EndogenousReward(tiny_policy_path)(**batch)
        assert reward(**batch) == pytest.approx(own, abs=1e-4)
        trained = trainer.model.merge_and_unload() if setting == "lora" else trainer.model
        moved = EndogenousReward(trained, reward.processing_class)(**batch)
        assert max(abs(a - b) for a, b in zip(own, moved, strict=True)) > 0.1

    @pytest.mark.parametrize("setting", ["lora", "reference"])
    def test_a_policy_that_is_compiled(self, setting, tiny_policy_path, tmp_path):
        compiled = {"torch_compile": True, "torch_compile_backend": "eager"}
        train(tiny_policy_path, EndogenousReward(model=None), tmp_path, beta=0.1, **adapter(setting), **compiled)
        torch._dynamo.reset()

    @pytest.mark.parametrize(("kind", "pad"), [(GRPOTrainer, 16), (GRPOTrainer, 12), (OnlineDPOTrainer, 12)])
    def test_two_ends_and_a_pad_token_that_is_a_word(self, pad, kind, tiny_policy_path, tmp_path):
        if Version(version("trl")) < Version("1.15"):
            pytest.skip("TRL 1.12 stops at the tokenizer's own end alone: the other one ends nothing.")
        # The one end may also pad, as Qwen2.5's. Whatever pads, the end is scored, and nothing behind it.
        path, ends = str(tmp_path / "policy"), (EOS, 16)
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path, padding_side="left")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        tokenizer.save_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        model.generation_config.eos_token_id = list(ends)
        model.save_pretrained(path)
        reward, recorder = EndogenousReward(model=None), Recorder()
        settings = {"beta": 0.1, "max_steps": 1, "reward_weights": [1.0, 0.0], "per_device_train_batch_size": 32}
        trainer = make_trainer(path, [reward, recorder], tmp_path, kind, **settings)
        reward.attach(trainer)
        trainer.train()
        (call,) = recorder.calls
        assert {row["last"] for row in reference_scores(path, call, ends)} >= set(ends)
        key = "objective/scores" if kind is OnlineDPOTrainer else "rewards/endogenous_reward/mean"
        assert history(trainer, key) == pytest.approx([mean_reward(path, call, ends=ends)], abs=1e-4)

    @pytest.mark.parametrize(
        "precision",
        [{"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}, "cast_lm_head_to_fp32": True}],
        ids=["autocast", "weights, but for the head"],
    )
    def test_bf16_base(self, precision, tiny_policy_path, tmp_path):
        # Autocast is TRL's default, as in its own reference pass. The rounding is bfloat16's.
        reward = EndogenousReward(model=None)
        trainer = make_trainer(tiny_policy_path, reward, tmp_path, peft_config=LORA, **precision)
        reward.attach(trainer)
        trainer.train()
        batch = self.batch(tiny_policy_path)
        own = EndogenousReward(tiny_policy_path)(**batch)
        for shared_reward, own_reward, ids in zip(reward(**batch), own, batch["completion_ids"], strict=True):
            assert shared_reward == pytest.approx(own_reward, abs=0.05 * len(ids))

    @pytest.mark.parametrize("setting", ["lora", "reference"])
    def test_dropout_is_off_and_training_mode_comes_back(self, setting, tiny_dropout_policy_path, tmp_path):
        path = tiny_dropout_policy_path
        reward = EndogenousReward(model=None)
        trainer, _ = train(path, reward, tmp_path, beta=0.1, **adapter(setting, dropout=0.5))
        trainer.model.train()
        trainer.model.get_submodule("base_model.model.model.norm" if setting == "lora" else "model.norm").eval()
        modes = {name: module.training for name, module in trainer.model.named_modules()}
        batch = self.batch(path)
        first, second = reward(**batch), reward(**batch)
        assert first == second
        assert first == pytest.approx(EndogenousReward(path)(**batch), abs=1e-4)
        assert {name: module.training for name, module in trainer.model.named_modules()} == modes
        if setting == "lora":  # and the adapter is active again, and trains
            assert all(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" in name)
            assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if "lora_" not in name)

    @pytest.mark.parametrize(
        ("kind", "setting"), [(GRPOTrainer, "lora"), (GRPOTrainer, "reference"), (RLOOTrainer, "lora")]
    )
    def test_no_forward_of_its_own(self, setting, kind, tiny_policy_path, tmp_path):
        # TRL has just run its reference pass over the completions: the reward reads that.
        counter = CountingReward()
        train(tiny_policy_path, counter, tmp_path, kind, beta=0.1, **adapter(setting, dropout=0.1))
        assert len(counter.forwards) == 2 and counter.forwards[1] == 0  # only the checks of the first call run it
        assert counter.reward._placement.recorder._passes == []  # what was recorded is given up with the reward

    def test_what_the_trainer_did_not_run_is_run(self, tiny_policy_path, tmp_path):
        # A criterion: the reward's prompts are not the trainer's.
        counter = CountingReward(criterion="b")
        trainer = make_trainer(tiny_policy_path, counter, tmp_path, dataset=CONVERSATIONAL, beta=0.1)
        counter.attach(trainer)
        trainer.train()
        assert counter.forwards[1] == 1

    def test_policy_and_old_passes_are_not_taken_for_the_reference(self, tiny_policy_path, tmp_path):
        # The same rows under the adapter that is trained, and passes of another step.
        reward = EndogenousReward(model=None)
        trainer = make_trainer(tiny_policy_path, reward, tmp_path, beta=0.1, peft_config=LORA)
        reward.attach(trainer)
        recorder, ids = reward._placement.recorder, torch.tensor([[7, 8, 9, EOS]])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        row, other = ((7, 8, 9, EOS), None), ((8, 9, 10, EOS + 1), None)
        with torch.no_grad():
            trainer.model(**inputs)
            assert recorder.take([row]) == [None]
            with trainer.model.disable_adapter():
                trainer.model(**inputs)
                (states,) = recorder.take([row])
                assert states is not None
                trainer.model(**inputs)
                trainer.state.global_step += 1
                trainer.model(**{**inputs, "input_ids": ids + 1})
        before, now = recorder.take([row, other])
        assert before is None and now is not None

    def test_pickled_shared_reward_must_be_attached_again(self, tiny_policy_path, tmp_path):
        reward = EndogenousReward(model=None)
        trainer = make_trainer(tiny_policy_path, reward, tmp_path, peft_config=LORA)
        reward.attach(trainer)
        batch = self.batch(tiny_policy_path)
        clone = pickle.loads(pickle.dumps(reward))
        with pytest.raises(RuntimeError, match="not attached"):
            clone(**batch)
        assert clone.attach(trainer)(**batch) == reward(**batch)


@pytest.mark.parametrize("kind", [GRPOTrainer, RLOOTrainer])
def test_trainers_without_frozen_weights(kind, tiny_policy_path, tmp_path):
    reward = EndogenousReward(None)
    trainer = make_trainer(tiny_policy_path, reward, tmp_path, kind, beta=0.0)
    with pytest.raises(ValueError, match="The trainer holds no frozen weights to share"):
        reward.attach(trainer)


def test_policy_with_an_adapter_as_its_own_reward(tiny_policy_path, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    trainer = make_trainer(policy, EndogenousReward(policy), tmp_path, peft_config=LORA)
    with pytest.raises(RuntimeError, match=r"EndogenousReward\(model=None\)"):
        trainer.train()
    assert trainer.state.global_step == 0
    # What the message says.
    reward = EndogenousReward(model=None)
    trainer = make_trainer(trainer.model.unload(), reward, tmp_path, peft_config=LORA)
    reward.attach(trainer)
    trainer.train()
