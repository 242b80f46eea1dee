# SPDX-License-Identifier: Apache-2.0
import copy
import pickle

import pytest

from endotrl.rewards import FormatReward, LengthReward, RandomReward


class TestRandomReward:
    def test_uniform_and_blind(self):
        draws = RandomReward(seed=1)(prompts=["a"] * 4000, completions=["b"] * 4000)
        assert all(0 <= draw < 1 for draw in draws)
        # The mean of 4000 draws from U(0, 1) has a standard deviation of 1 / sqrt(12 * 4000) = 0.0046.
        assert sum(draws) / 4000 == pytest.approx(0.5, abs=0.02)
        assert draws == RandomReward(seed=1)(prompts=["x"] * 4000, completions=["longer text"] * 4000)

    def test_seeds(self):
        batch = {"prompts": ["a"] * 3, "completions": ["b"] * 3}
        reward = RandomReward(seed=0)
        first = reward(**batch)
        assert first == RandomReward()(**batch)
        assert first != RandomReward(seed=1)(**batch)
        assert first != reward(**batch)  # every call draws anew

    def test_a_pickle_goes_on_where_it_was(self):
        reward = RandomReward()
        reward(prompts=["a"] * 5, completions=["b"] * 5)
        copies = [pickle.loads(pickle.dumps(reward)), copy.deepcopy(reward)]
        expected = reward(prompts=["a"] * 3, completions=["b"] * 3)
        for other in copies:
            assert other.__name__ == "random_reward"
            assert other(prompts=["a"] * 3, completions=["b"] * 3) == expected


@pytest.mark.parametrize(("prefer", "expected"), [("short", [-3, 0, -1]), ("long", [3, 0, 1])])
def test_lengths_in_tokens(prefer, expected):
    reward = LengthReward(prefer)
    batch = {"prompts": ["a"] * 3, "completions": ["long text", "", "b"], "completion_ids": [[5, 6, 7], [], [8]]}
    assert reward(**batch, answer=[1, 2, 3]) == expected
    assert reward.__name__ == f"{prefer}_length_reward"


class TestFormatReward:
    @pytest.mark.parametrize(
        ("completion", "expected"),
        [
            (r"So it is \boxed{42}.", 1),
            (r"\boxed{\frac{1}{2}}", 1),
            (r"\boxed{}", 0),
            (r"\boxed{ }", 0),
            ("boxed{42}", 0),
            ("42", 0),
        ],
    )
    def test_box(self, completion, expected):
        reward = FormatReward()
        assert reward(prompts=["a"], completions=[completion], answer=[1]) == [expected]
        messages = [{"role": "user", "content": "no"}, {"role": "assistant", "content": completion}]
        assert reward(prompts=["a"], completions=[messages]) == [expected]
        assert reward.__name__ == "format_reward"

    def test_own_pattern(self):
        reward = pickle.loads(pickle.dumps(FormatReward("^<think>.*</think>.+$")))
        completions = ["<think>a\nb</think>c", "<think>a</think>", "x<think>a</think>c", ""]
        assert reward(prompts=["a"] * 4, completions=completions) == [1, 0, 0, 0]

    def test_no_pattern(self):
        with pytest.raises(ValueError, match="`pattern` must be a regular expression, got '\\('"):
            FormatReward("(")
