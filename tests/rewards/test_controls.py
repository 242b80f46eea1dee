# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest

from endotrl.rewards import FormatReward, LengthReward, RandomReward


def test_random_reward():
    batch = {"prompts": ["a"] * 4000, "completions": ["b"] * 4000}
    reward = RandomReward(seed=1)
    draws = reward(**batch)
    assert all(0 <= draw < 1 for draw in draws)
    # The mean of 4000 draws from U(0, 1) has a standard deviation of 1 / sqrt(12 * 4000) = 0.0046.
    assert sum(draws) / 4000 == pytest.approx(0.5, abs=0.02)
    assert draws == RandomReward(seed=1)(prompts=["x"] * 4000, completions=["longer text"] * 4000)
    assert draws != RandomReward()(**batch) == RandomReward(seed=0)(**batch)
    copies = [pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)]
    assert {other.__name__ for other in copies} == {"random_reward"}
    more = reward(**batch)
    assert more != draws and all(other(**batch) == more for other in copies)  # they continue the sequence


@pytest.mark.parametrize(("prefer", "expected"), [("short", [-3, 0, -1]), ("long", [3, 0, 1])])
def test_lengths_in_tokens(prefer, expected):
    reward = LengthReward(prefer)
    batch = {"prompts": ["a"] * 3, "completions": ["long text", "", "b"], "completion_ids": [[5, 6, 7], [], [8]]}
    assert reward(**batch, answer=[1, 2, 3]) == expected
    assert reward.__name__ == f"{prefer}_length_reward"


def test_format_reward():
    reward = FormatReward()
    completions = [r"So it is \boxed{42}.", r"\boxed{\frac{1}{2}}", r"\boxed{}", r"\boxed{ }", "boxed{42}", "42"]
    prompts, expected = ["a"] * 6, [1, 1, 0, 0, 0, 0]
    assert reward(prompts=prompts, completions=completions, answer=[1] * 6) == expected
    question = {"role": "user", "content": "no"}
    messages = [[question, {"role": "assistant", "content": completion}] for completion in completions]
    assert reward(prompts=prompts, completions=messages) == expected
    assert reward.__name__ == "format_reward"
    reward = pickle.loads(pickle.dumps(FormatReward("^<think>.*</think>.+$")))
    completions = ["<think>a\nb</think>c", "<think>a</think>", "x<think>a</think>c", ""]
    assert reward(prompts=["a"] * 4, completions=completions) == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="`pattern` must be a regular expression, got '\\('"):
        FormatReward("(")
