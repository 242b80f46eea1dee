# SPDX-License-Identifier: Apache-2.0
"""What a notebook shows of scored completions, and what a table holds."""

import math
import pickle
import re

import pytest
import torch

from endotrl import EndogenousReward, TokenStats
from endotrl.reporting import heat_maps
from endotrl.rewards.scored import heat_map_row


PROMPTS = [[{"role": "user", "content": "<b>What</b> is the capital?"}]] * 2 + [[{"role": "user", "content": "Hello"}]]
ANSWERS = [[{"role": "assistant", "content": text}] for text in ("Paris, the <script>city</script>.", "Paris", "Hi é")]


@pytest.fixture(scope="module")
def reward(tiny_model_path):
    return EndogenousReward(tiny_model_path, device="cpu", dtype="float32")


def test_columns_per_completion_and_per_token(reward):
    scored = reward.score(PROMPTS, ANSWERS)
    columns = scored.to_dict()
    assert columns["reward"] == pytest.approx(reward(prompts=PROMPTS, completions=ANSWERS), abs=1e-4)
    assert columns["prompt"] == ["<b>What</b> is the capital?"] * 2 + ["Hello"]
    assert {len(column) for column in columns.values()} == {3}
    for stats, total in zip(scored, scored.rewards, strict=True):
        tokens = stats.to_dict()
        assert {len(column) for column in tokens.values()} == {len(stats.token_ids)}
        assert all(isinstance(value, str | int | float) for column in tokens.values() for value in column)
        assert math.fsum(tokens["log_prob"]) == pytest.approx(total, abs=1e-4)
        assert "".join(stats.tokens) == stats.text
    assert columns["log_prob_per_token"][1] == pytest.approx(columns["reward"][1] / columns["num_tokens"][1], abs=1e-5)
    assert repr(scored).splitlines()[1] == f"{scored.rewards[1]:10.3f}  Paris".replace("-", "−")
    assert pickle.loads(pickle.dumps(scored)).rewards == scored.rewards


def test_a_notebook_shows_the_best_answer_to_a_prompt_first(reward):
    scored = reward.score(PROMPTS, ANSWERS)
    html = scored._repr_html_()
    cells = [re.findall(r'<td class="r">(.*?)</td>', row) for row in re.findall(r"<tr>(.*?)</tr>", html)[1:]]
    rewards = [float(row[0].replace("−", "-")) for row in cells]
    assert rewards[0] > rewards[1] and [row[1] for row in cells][::2] == ["0.000"] * 2
    assert float(cells[1][1].replace("−", "-")) == pytest.approx(rewards[1] - rewards[0], abs=2e-3)
    assert html.count('class="heat"') == 3 and html.count('class="legend"') == 1  # one scale
    assert "<script>" not in html and "<b>" not in html and "&lt;script&gt;" in html


def test_a_completion_by_itself(reward):
    (stats,) = reward.score(PROMPTS[:1], ANSWERS[:1])
    assert f"log-probability −{-reward.rule.outcome(stats):.3f} · {len(stats.tokens)} tokens" in stats._repr_html_()
    assert stats._repr_html_().count('class="t ') == len(stats.tokens)
    ids, values = torch.tensor([1, 2]), torch.zeros(3)
    bare = TokenStats(ids, ids, values[:2], values, None, finished=True, alpha=1.0, num_completion_tokens=2)
    assert bare.tokens == ["", ""] and "entropy" not in bare.to_dict() and bare._repr_html_() is None


def test_a_completion_without_a_reward_stands_last(tiny_model_path):
    reward = EndogenousReward(tiny_model_path, truncation="skip", device="cpu", dtype="float32")
    ids = reward.processing_class(["Paris", "Paris<|im_end|>"], add_special_tokens=False)["input_ids"]
    scored = reward.score(["a", "a"], ["Paris", "Paris"], completion_ids=ids)
    assert scored.rewards[0] is None and scored.rewards[1] is not None
    html = scored._repr_html_()
    assert html.index("no reward") > html.index("reward −") and "–</td>" in html


def test_bellman_rewards_are_coloured_by_log_probability(reward, tiny_model_path):
    log_prob = EndogenousReward(tiny_model_path, token_reward="log_prob", device="cpu", dtype="float32")
    scored = reward.score(PROMPTS, ANSWERS)
    for theirs, ours in zip(log_prob.score(PROMPTS, ANSWERS), scored, strict=True):
        row = heat_map_row(reward, ours)
        assert row.contributions == pytest.approx(theirs.log_probs.tolist(), abs=1e-5)
        # The Bellman rewards themselves are in the tooltips.
        assert row.columns["token reward"] == reward.token_rewards_from(ours).tolist()
    page = heat_maps([heat_map_row(reward, stats) for stats in scored])
    assert "</span>0.0</span>" in page and 'class="t p' not in page  # of one sign: a sequential scale
