# SPDX-License-Identifier: Apache-2.0
"""What heat maps colour: contributions of tokens. That they sum to the reward, in every form: `test_endogenous.py`."""

import re
from typing import Any

import pytest

from endotrl import EndogenousReward
from endotrl.reporting import heat_maps
from endotrl.rewards import ClipTokens, InformationGain
from endotrl.rewards.corrections import one_minus_probability
from endotrl.rewards.scored import heat_map_row


PROMPTS = ["a b c"] * 3 + ["d e"] * 3
# Tokens 7 to 18 are words, 2 is EOS.
IDS = [[7, 8, 2], [9, 2], [10, 11, 12, 13], [8] * 7, [2], [14, 7, 2]]
TEXTS = [" ".join("abcdefghijkl"[i - 7] for i in ids if i != 2) for ids in IDS]
BATCH: dict[str, Any] = {"prompts": PROMPTS, "completions": TEXTS, "completion_ids": IDS}


@pytest.mark.parametrize(
    "correction", ["length", ClipTokens(-2.5, -1.0), lambda path: InformationGain(path, weight=one_minus_probability)]
)
@pytest.mark.parametrize("aggregate", ["sum", "mean", "discounted"])
def test_corrections_are_in_the_contributions(correction, aggregate, tiny_policy_path):
    if callable(correction):
        correction = correction(tiny_policy_path)
    reward = EndogenousReward(tiny_policy_path, token_reward="log_prob", aggregate=aggregate, correction=correction)
    rewards = reward(**BATCH)
    rows = [heat_map_row(reward, s, length_slope=reward.length_slope) for s in reward.score(**BATCH)]
    assert [row.total for row in rows] == pytest.approx(rewards, abs=1e-5)
    assert [sum(row.contributions) for row in rows] == pytest.approx(rewards, abs=1e-5)
    plain = EndogenousReward(tiny_policy_path, token_reward="log_prob", aggregate=aggregate)(**BATCH)
    assert rewards != pytest.approx(plain, abs=1e-3)


def test_bellman_rewards_are_coloured_by_log_probability(tiny_policy_path):
    bellman, log_prob = (EndogenousReward(tiny_policy_path, token_reward=form) for form in ("bellman", "log_prob"))
    for theirs, ours in zip(log_prob.score(**BATCH), bellman.score(**BATCH), strict=True):
        row = heat_map_row(bellman, ours)
        assert row.contributions == pytest.approx(theirs.log_probs.tolist(), abs=1e-5)
        # The Bellman rewards themselves are there to be pointed at.
        assert row.columns["token reward"] == bellman.token_rewards_from(ours).tolist()
    page = heat_maps([heat_map_row(bellman, stats) for stats in bellman.score(**BATCH)])
    assert "</span>0.0</span>" in page and 'class="t p' not in page  # of one sign: a sequential scale


@pytest.mark.slow
def test_the_wrong_word_has_the_strongest_colour(smollm2_path):
    reward = EndogenousReward(smollm2_path, device="cpu", dtype="float32")
    prompts = [[{"role": "user", "content": "What is the capital of France?"}]] * 2
    answers = [[{"role": "assistant", "content": f"The capital of France is {city}."}] for city in ("Paris", "Rome")]
    page = heat_maps([heat_map_row(reward, stats) for stats in reward.score(prompts, answers)])

    words = {word: shade for shade, word in re.findall(r'<span class="t ?(\w*)[^>]*>(Paris|Rome)<', page)}
    assert words == {"Paris": "", "Rome": "n8"}
