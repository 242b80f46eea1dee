# SPDX-License-Identifier: Apache-2.0
"""Corrections of the endogenous reward: closed forms, and against the naive reference."""

import math
import pickle
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

import endotrl
from endotrl import EndogenousReward
from endotrl.rewards import ClipTokens, InformationGain, LengthControl
from endotrl.rewards.corrections import length_shares, length_slope_sums, one_minus_probability

from ..support.reference import scores_from_logits, state_logits


PROMPTS = ["a b c"] * 4 + ["d e"] * 4
# Tokens 7 to 18 are words, 2 is EOS; lengths differ within and between prompts.
IDS = [[7, 8, 2], [9, 2], [10, 11, 12, 13, 2], [8] * 7, [2], [14, 2], [7, 8, 9, 10, 11, 2], [15, 16, 17]]
TEXTS = [" ".join("abcdefghijkl"[i - 7] for i in ids if i != 2) for ids in IDS]
BATCH = {"prompts": PROMPTS, "completions": TEXTS, "completion_ids": IDS}


@pytest.fixture(scope="module")
def other_policy_path(tiny_policy_path, tmp_path_factory):
    """Another model with the same tokenizer."""
    path = tmp_path_factory.mktemp("other")
    config = LlamaConfig.from_pretrained(tiny_policy_path)
    torch.manual_seed(7)
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny_policy_path).save_pretrained(path)
    return str(path)


def log_probs(path: str) -> list[list[float]]:
    """Naively: log-probabilities of the completions' tokens."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    rows = []
    for prompt, ids in zip(PROMPTS, IDS, strict=True):
        logits = state_logits(model, tokenizer(prompt)["input_ids"], ids)
        rows.append(scores_from_logits(logits, ids, 1.0).log_probs)
    return rows


class Sums(TrainerCallback):
    """Notes the running sums after each step and each evaluation."""

    def __init__(self, reward: EndogenousReward, calls: list[tuple[Any, Any]]) -> None:
        self.reward, self.calls = reward, calls

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append(("train", self.reward.state_dict()["length_sums"]))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.calls.append(("eval", self.reward.state_dict()["length_sums"]))


class TestLengthControl:
    def test_what_is_only_length_is_nothing(self):
        # s = c_g - 0.7 log H exactly, with a constant of the prompt.
        lengths, groups = [1, 2, 8, 3, 5, 40], ["x"] * 3 + ["y"] * 3
        outcomes: list[float | None] = [
            {"x": -4.0, "y": 9.0}[g] - 0.7 * math.log(n) for n, g in zip(lengths, groups, strict=True)
        ]
        xy, xx = length_slope_sums(outcomes, lengths, groups)
        assert xy / xx == pytest.approx(-0.7)

    def test_slope_is_least_squares_with_an_intercept_a_prompt(self):
        generator = np.random.default_rng(0)
        lengths, groups = generator.integers(1, 200, 24), np.repeat([0, 1, 2], 8)
        outcomes = generator.normal(size=24) - lengths * 0.3 + groups * 50
        design = np.column_stack([np.log(lengths), groups == 0, groups == 1, groups == 2]).astype(float)
        expected = np.linalg.lstsq(design, outcomes, rcond=None)[0][0]
        xy, xx = length_slope_sums(outcomes.tolist(), lengths.tolist(), groups.tolist())
        assert xy / xx == pytest.approx(expected)
        # A completion without a reward or a token has no say.
        xy_more, xx_more = length_slope_sums([*outcomes, None, 5.0], [*lengths, 9, 0], [*groups, 0, 0])
        assert (xy_more, xx_more) == pytest.approx((xy, xx))

    def test_shares_sum_to_the_correction(self):
        for length in (1, 2, 17, 3000):
            assert length_shares(length, -0.8).sum().item() == pytest.approx(0.8 * math.log(length), rel=1e-5)
        assert length_shares(0, 1.0).shape == (0,)
        # What a token gets does not depend on what follows.
        assert torch.equal(length_shares(9, 1.3)[:4], length_shares(4, 1.3))

    @pytest.mark.parametrize("aggregate", ["sum", "mean", "discounted"])
    def test_residuals_do_not_know_length(self, aggregate, tiny_policy_path):
        plain = EndogenousReward(tiny_policy_path, aggregate=aggregate)(**BATCH)
        corrected = EndogenousReward(tiny_policy_path, aggregate=aggregate, correction="length")(**BATCH)
        lengths = [len(ids) for ids in IDS]
        xy, xx = length_slope_sums(plain, lengths, PROMPTS)
        assert abs(xy / xx) > 0.01
        expected = [s - xy / xx * math.log(n) for s, n in zip(plain, lengths, strict=True)]
        assert corrected == pytest.approx(expected, abs=1e-4)
        assert length_slope_sums(corrected, lengths, PROMPTS)[0] == pytest.approx(0.0, abs=1e-3)

    def test_running_sums(self, tiny_policy_path):
        halves = [
            {key: values[:4] for key, values in BATCH.items()},
            {key: values[4:] for key, values in BATCH.items()},
        ]
        lengths = [len(ids) for ids in IDS]
        plain = EndogenousReward(tiny_policy_path)(**BATCH)
        first, second = (
            length_slope_sums(plain[part], lengths[part], PROMPTS[part]) for part in (slice(4), slice(4, 8))
        )
        slope = (0.5 * first[0] + second[0]) / (0.5 * first[1] + second[1])
        reward = EndogenousReward(tiny_policy_path, correction=LengthControl(decay=0.5))
        reward(**halves[0])
        expected = [s - slope * math.log(n) for s, n in zip(plain[4:], lengths[4:], strict=True)]
        state = reward.state_dict()
        assert reward(**halves[1]) == pytest.approx(expected, abs=1e-4)
        resumed = EndogenousReward(tiny_policy_path, correction=LengthControl(decay=0.5))
        resumed.load_state_dict(state)
        assert resumed(**halves[1]) == pytest.approx(expected, abs=1e-4)

    @pytest.mark.parametrize("kind", ["GRPO", "RLOO", "DenseGRPO", "PPO"])
    def test_evaluations_leave_the_running_sums(self, kind, tiny_policy_path, tmp_path):
        module = trl if kind in ("GRPO", "RLOO") else endotrl
        if module is endotrl and Version(trl.__version__) < Version("1.15"):
            pytest.skip("The trainers of endotrl need TRL 1.15.")
        reward = EndogenousReward(tiny_policy_path, correction=LengthControl(decay=0.5))
        dataset = Dataset.from_dict({"prompt": ["a b c", "d e", "f", "g h i j"] * 2})
        args = getattr(module, f"{kind}Config")(
            str(tmp_path),
            **{"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "num_generations": 4},
            **{"max_steps": 1, "max_completion_length": 8, "beta": 0.0, "eval_on_start": True},
            **{"eval_strategy": "steps", "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True},
        )
        trainer = getattr(module, f"{kind}Trainer")(
            tiny_policy_path, reward_funcs=reward, args=args, train_dataset=dataset, eval_dataset=dataset
        )
        trainer.evaluate()
        assert reward.state_dict() == {"length_sums": (0.0, 0.0)}
        calls: list[tuple[Any, Any]] = []
        trainer.add_callback(Sums(reward, calls))
        trainer.train()
        assert [mode for mode, _ in calls] == ["eval", "train", "eval"]
        assert calls[0][1] == (0.0, 0.0)
        assert calls[1][1] == calls[2][1] != (0.0, 0.0)

    def test_evaluations_use_the_running_sums(self, tiny_policy_path):
        halves = [{key: values[part] for key, values in BATCH.items()} for part in (slice(4), slice(4, 8))]
        trainer = object.__new__(trl.GRPOTrainer)
        trainer.model = torch.nn.Linear(1, 1).eval()
        trainer._pending_metrics = defaultdict(list)
        trained, evaluated = (
            EndogenousReward(tiny_policy_path, correction=LengthControl(decay=0.5)) for _ in range(2)
        )
        for reward in (trained, evaluated):
            reward(**halves[0])
        state = evaluated.state_dict()
        expected = trained(**halves[1])
        assert evaluated(**halves[1], log_metric=trainer._log_metric) == pytest.approx(expected)
        assert evaluated.state_dict() == state != trained.state_dict()

    def test_equal_lengths_stay(self, tiny_policy_path):
        batch = {"prompts": ["a"] * 2, "completions": ["b", "c"], "completion_ids": [[8, 2], [9, 2]]}
        plain, corrected = (EndogenousReward(tiny_policy_path, correction=c)(**batch) for c in (None, "length"))
        assert corrected == pytest.approx(plain)

    def test_the_slope_is_logged(self, tiny_policy_path):
        logged: dict[str, float] = {}
        reward = EndogenousReward(tiny_policy_path, correction="length")
        corrected = reward(**BATCH, log_metric=logged.__setitem__)
        lengths = [len(ids) for ids in IDS]
        plain = EndogenousReward(tiny_policy_path)(**BATCH)
        xy, xx = length_slope_sums(plain, lengths, PROMPTS)
        assert logged["endogenous_reward/length_slope"] == pytest.approx(xy / xx, rel=1e-3)
        assert logged["endogenous_reward/correction"] == pytest.approx(np.mean(corrected) - np.mean(plain), abs=1e-4)
        assert logged["endogenous_reward/length_correlation"] == pytest.approx(
            np.corrcoef(corrected, lengths)[0, 1], abs=1e-4
        )


class TestClipTokens:
    def test_against_the_reference(self, tiny_policy_path):
        reward = EndogenousReward(tiny_policy_path, token_reward="log_prob", correction=ClipTokens(-3.0, -1.0))
        expected = [[min(max(p, -3.0), -1.0) for p in row] for row in log_probs(tiny_policy_path)]
        assert any(p in (-3.0, -1.0) for row in expected for p in row)
        logged: dict[str, float] = {}
        given = reward(**BATCH, log_metric=logged.__setitem__)
        assert given == pytest.approx([sum(row) for row in expected], abs=1e-4)
        without = [sum(row) for row in log_probs(tiny_policy_path)]
        assert logged["endogenous_reward/correction"] == pytest.approx(np.mean(given) - np.mean(without), abs=1e-4)
        for rewards, row in zip(reward.token_rewards(**BATCH), expected, strict=True):
            assert rewards.tolist() == pytest.approx(row, abs=1e-4)

    def test_bellman_rewards_are_refused(self, tiny_policy_path):
        with pytest.raises(ValueError, match="arbitrary constants"):
            EndogenousReward(tiny_policy_path, correction="clip")


class TestInformationGain:
    def gain(self, path: str, **kwargs: Any) -> EndogenousReward:
        return EndogenousReward(path, token_reward="log_prob", correction=InformationGain(**kwargs))

    def test_log_ratio(self, tiny_policy_path, other_policy_path):
        ours, theirs = log_probs(tiny_policy_path), log_probs(other_policy_path)
        expected = [sum(a) - sum(b) for a, b in zip(ours, theirs, strict=True)]
        assert self.gain(tiny_policy_path, generalist=other_policy_path)(**BATCH) == pytest.approx(expected, abs=1e-3)

    def test_weight(self, tiny_policy_path, other_policy_path):
        reward = self.gain(tiny_policy_path, generalist=other_policy_path, weight=one_minus_probability)
        ours, theirs = log_probs(tiny_policy_path), log_probs(other_policy_path)
        for rewards, a, b in zip(reward.token_rewards(**BATCH), ours, theirs, strict=True):
            expected = [(1 - math.exp(p)) * (p - q) for p, q in zip(a, b, strict=True)]
            assert rewards.tolist() == pytest.approx(expected, abs=1e-4)

    def test_a_loaded_generalist(self, tiny_policy_path, other_policy_path):
        loaded = AutoModelForCausalLM.from_pretrained(other_policy_path)
        expected = self.gain(tiny_policy_path, generalist=other_policy_path)(**BATCH)
        reward = self.gain(tiny_policy_path, generalist=loaded)
        assert reward(**BATCH) == pytest.approx(expected, abs=1e-4)
        packed = pickle.dumps(reward)
        assert len(packed) < 100_000  # no weights
        assert pickle.loads(packed)(**BATCH) == pytest.approx(expected, abs=1e-4)

    def test_another_tokenizer_is_refused(self, tiny_policy_path, tiny_model_path):
        with pytest.raises(ValueError, match="another tokenizer"):
            self.gain(tiny_policy_path, generalist=tiny_model_path)(**BATCH)
        with pytest.raises(ValueError, match="another tokenizer"):  # before there is data, too
            self.gain(tiny_policy_path, generalist=tiny_model_path).load()

    @pytest.mark.parametrize("form", ["bellman", "centered"])
    def test_other_forms_are_refused(self, form, tiny_policy_path):
        with pytest.raises(ValueError, match="difference of log-probabilities"):
            EndogenousReward(tiny_policy_path, token_reward=form, correction=InformationGain(tiny_policy_path))


@pytest.mark.parametrize("aggregate", ["sum", "discounted"])
@pytest.mark.parametrize(
    ("form", "correction"),
    [
        ("bellman", "length"),
        ("log_prob", LengthControl(decay=0.5)),
        ("log_prob", "clip"),
        ("centered", ClipTokens(-1.0, 1.0)),
        ("log_prob", "gain"),
    ],
)
def test_token_rewards_sum_to_the_outcome(form, correction, aggregate, tiny_policy_path, other_policy_path):
    if correction == "gain":
        correction = InformationGain(other_policy_path, weight=one_minus_probability)
    make = lambda: EndogenousReward(  # noqa: E731
        tiny_policy_path, token_reward=form, aggregate=aggregate, correction=correction
    )
    outcomes, token_rewards, _ = make().outcome_and_token_rewards(**BATCH)
    assert outcomes == pytest.approx(make()(**BATCH), abs=1e-4)
    initial = [0.0] * 8
    if form == "bellman" and aggregate == "sum":
        initial = [stats.soft_values[0].item() for stats in make().score(**BATCH)]
    for outcome, rewards, value in zip(outcomes, token_rewards, initial, strict=True):
        assert rewards.sum().item() - value == pytest.approx(outcome, abs=1e-3)


@pytest.mark.parametrize("correction", ["longer", 3, LengthControl], ids=str)
def test_unknown_corrections(correction, tiny_policy_path):
    with pytest.raises(ValueError, match="`correction` is"):
        EndogenousReward(tiny_policy_path, correction=correction)


def test_bad_settings():
    with pytest.raises(ValueError, match=r"`decay` is 1\.0"):
        LengthControl(decay=1.0)
    with pytest.raises(ValueError, match=r"`low` is 2\.0 and `high` 1\.0"):
        ClipTokens(2.0, 1.0)


def test_no_reward_model_of_a_batch(tiny_policy_path):
    with pytest.raises(ValueError, match="single responses"):
        EndogenousReward(tiny_policy_path, correction="length").as_reward_model()
