# SPDX-License-Identifier: Apache-2.0
import pickle

import pytest

from endotrl.rewards import AccuracyReward


class TestMatch:
    @pytest.mark.parametrize(
        ("completion", "answers", "expected"),
        [
            ("It is PARIS.", "Paris", 1),
            ("Parisian", "Paris", 0),
            ("New York City", ["NYC", "New York"], 1),
            ("Rome", ["Paris", "Lyon"], 0),
            ("It costs 3.50 (net).", "3.50 (net)", 1),  # no regular expression
            ("12", 12, 1),  # columns may hold numbers
            ("120", "12", 0),
            ("", "a", 0),
            ("It is not Paris.", "Paris", 0),
            ("Paris or Rome", "Paris", 0),
        ],
    )
    def test_whole_words(self, completion, answers, expected):
        accuracy = AccuracyReward("gold")
        assert accuracy(completions=[completion], gold=[answers], prompts=["a"]) == [expected]
        assert accuracy(completions=[[{"role": "assistant", "content": completion}]], gold=[answers]) == [expected]

    def test_a_row_without_an_answer_has_no_accuracy(self):
        assert AccuracyReward("gold")(completions=["a"] * 5, gold=[None, [], "", "a", ["b"]]) == [None] * 3 + [1, 0]

    def test_pickle(self):
        accuracy = pickle.loads(pickle.dumps(AccuracyReward("gold")))
        assert accuracy.__name__ == "accuracy"
        assert accuracy(completions=["a", "b"], gold=["a", "a"]) == [1, 0]


class TestMath:
    @pytest.mark.parametrize(
        ("completion", "answers", "expected"),
        [
            (r"It is \boxed{\frac{1}{2}}.", "0.5", 1),
            (r"\boxed{0.25}", r"$\frac{1}{4}$", 1),
            (r"\boxed{\frac{1}{3}}", "0.5", 0),
            ("no answer", "0.5", 0),
            (r"\boxed{3}", ["2", "3"], 1),
            ("42", "42", 1),  # bare
            ("42", 42.0, 1),
            ("The answer is 40, 41 or 42.", "42", 0),
            (r"\boxed{(x+1)^2}", "x^2+2x+1", 1),
            ("It is Paris.", "Paris", 1),  # no mathematical expression
            ("It is Rome.", "Paris", 0),
        ],
    )
    def test_math(self, completion, answers, expected):
        pytest.importorskip("math_verify")
        assert AccuracyReward("gold", math=True)(completions=[completion], gold=[answers]) == [expected]

    def test_without_math_verify(self, monkeypatch):
        monkeypatch.setattr("endotrl.grading.symbolic.find_spec", lambda name: None)
        with pytest.raises(ImportError, match=r"math-verify.*pip install 'endotrl\[eval\]'"):
            AccuracyReward("gold", math=True)
        assert AccuracyReward("gold")(completions=[r"\boxed{\frac{1}{2}}"], gold=["0.5"]) == [1]
