# SPDX-License-Identifier: Apache-2.0
"""Corrections of the endogenous reward: closed forms, and against the naive reference."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from endotrl import EndogenousReward
from endotrl.rewards import ClipTokens, InformationGain, LengthControl
from endotrl.rewards.corrections import length_shares, length_slope, one_minus_probability
from endotrl.rewards.scored import heat_map_row

from ..support.reference import completion_log_probs


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
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return [completion_log_probs(model, prompt, ids) for prompt, ids in zip(prompts, IDS, strict=True)]


class TestLengthControl:
    def test_slope_is_least_squares_with_an_intercept_a_prompt(self):
        generator = np.random.default_rng(0)
        lengths, groups = generator.integers(1, 200, 24), np.repeat([0, 1, 2], 8)
        outcomes = generator.normal(size=24) - lengths * 0.3 + groups * 50
        design = np.column_stack([np.log(lengths), groups == 0, groups == 1, groups == 2]).astype(float)
        expected = np.linalg.lstsq(design, outcomes, rcond=None)[0][0]
        assert length_slope(outcomes.tolist(), lengths.tolist(), groups.tolist()) == pytest.approx(expected)
        # Completions without a reward or a token are ignored.
        more = [*outcomes, None, 5.0], [*lengths, 9, 0], [*groups, 0, 0]
        assert length_slope(*more) == pytest.approx(expected)
        assert length_slope([1.0, 2.0, 3.0], [5, 5, 7], [0, 0, 1]) == 0.0  # equal lengths within groups

    def test_shares_sum_to_the_correction(self):
        for length in (1, 2, 17, 3000):
            assert length_shares(length, -0.8).sum().item() == pytest.approx(0.8 * math.log(length), rel=1e-5)
        assert length_shares(0, 1.0).shape == (0,)
        # The share of a token does not depend on later tokens.
        assert torch.equal(length_shares(9, 1.3)[:4], length_shares(4, 1.3))

    @pytest.mark.parametrize("aggregate", ["sum", "mean", "discounted"])
    def test_residuals_do_not_know_length(self, aggregate, tiny_policy_path):
        logged: dict[str, float] = {}
        plain = EndogenousReward(tiny_policy_path, aggregate=aggregate)(**BATCH)
        reward = EndogenousReward(tiny_policy_path, aggregate=aggregate, correction="length")
        corrected = reward(**BATCH, log_metric=logged.__setitem__)
        lengths = [len(ids) for ids in IDS]
        slope = length_slope(plain, lengths, PROMPTS)
        assert abs(slope) > 0.01
        expected = [s - slope * math.log(n) for s, n in zip(plain, lengths, strict=True)]
        assert corrected == pytest.approx(expected, abs=1e-4)
        assert length_slope(corrected, lengths, PROMPTS) == pytest.approx(0.0, abs=1e-3)
        figures = {
            "length_slope": slope,
            "correction": np.mean(corrected) - np.mean(plain),
            "length_correlation": np.corrcoef(corrected, lengths)[0, 1],
        }
        assert {key: logged[f"endogenous_reward/{key}"] for key in figures} == pytest.approx(figures, abs=1e-4)


FORMULAS: dict[str, Any] = {  # of a token's log-probability, and of that by another model
    "clip": (lambda other: ClipTokens(-3.0, -2.0), lambda p, q: min(max(p, -3.0), -2.0)),
    "gain": (lambda other: InformationGain(other), lambda p, q: p - q),
    "weighted gain": (
        lambda other: InformationGain(other, weight=one_minus_probability),
        lambda p, q: (1 - math.exp(p)) * (p - q),
    ),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_tokens_against_the_reference(name, tiny_policy_path, other_policy_path):
    make, formula = FORMULAS[name]
    reward = EndogenousReward(tiny_policy_path, token_reward="log_prob", correction=make(other_policy_path))
    ours, theirs = log_probs(tiny_policy_path), log_probs(other_policy_path)
    expected = [[formula(p, q) for p, q in zip(*row, strict=True)] for row in zip(ours, theirs, strict=True)]
    assert name != "clip" or {-3.0, -2.0} <= {p for row in expected for p in row}  # both bounds count
    logged: dict[str, float] = {}
    totals = reward(**BATCH, log_metric=logged.__setitem__)
    assert totals == pytest.approx([sum(row) for row in expected], abs=1e-4)
    without = [sum(row) for row in ours]
    assert logged["endogenous_reward/correction"] == pytest.approx(np.mean(totals) - np.mean(without), abs=1e-4)
    for rewards, row in zip(reward.token_rewards(**BATCH), expected, strict=True):
        assert rewards.tolist() == pytest.approx(row, abs=1e-4)
    if name == "gain":  # no copy of the weights
        assert copy.deepcopy(reward).correction.generalist == other_policy_path


def test_a_generalist_with_another_tokenizer_is_refused(tiny_policy_path, tiny_model_path):
    gain = InformationGain(tiny_model_path)
    reward = EndogenousReward(tiny_policy_path, token_reward="log_prob", correction=gain)
    for use in (lambda: reward(**BATCH), reward.load):  # before there is data, too
        with pytest.raises(ValueError, match="have different tokenizers"):
            use()


@pytest.mark.parametrize("aggregate", ["sum", "mean", "discounted"])
@pytest.mark.parametrize(
    ("form", "correction"),
    [
        ("bellman", "length"),
        ("log_prob", LengthControl()),
        ("log_prob", ClipTokens(-2.5, -1.0)),
        ("centered", ClipTokens(-1.0, 1.0)),
        ("log_prob", "gain"),
    ],
)
def test_token_rewards_and_heat_maps_sum_to_the_outcome(
    form, correction, aggregate, tiny_policy_path, other_policy_path
):
    if correction == "gain":
        correction = InformationGain(other_policy_path, weight=one_minus_probability)
    settings: dict[str, Any] = {"token_reward": form, "aggregate": aggregate}
    reward = EndogenousReward(tiny_policy_path, correction=correction, **settings)
    outcomes = reward(**BATCH)
    assert outcomes != pytest.approx(EndogenousReward(tiny_policy_path, **settings)(**BATCH), abs=1e-3)
    stats = reward.score(**BATCH)
    rows = [heat_map_row(reward, row, length_slope=reward.length_slope) for row in stats]
    assert [row.total for row in rows] == pytest.approx(outcomes, abs=1e-5)
    in_tokens_and_rest = [sum(row.contributions) + sum(row.rest.values()) for row in rows]
    assert in_tokens_and_rest == pytest.approx(outcomes, abs=1e-4)
    if aggregate != "mean":
        again, token_rewards, _ = reward.outcome_and_token_rewards(**BATCH)
        assert again == pytest.approx(outcomes, abs=1e-4)
        has_value = form == "bellman" and aggregate == "sum"
        initial = [row.soft_values[0].item() if has_value else 0.0 for row in stats]
        for outcome, rewards, value in zip(outcomes, token_rewards, initial, strict=True):
            assert rewards.sum().item() - value == pytest.approx(outcome, abs=1e-3)
