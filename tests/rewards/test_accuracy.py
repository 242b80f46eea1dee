# SPDX-License-Identifier: Apache-2.0
"""Accuracy as a reward. The grader itself is tested in `tests/grading`."""

import pickle

import pytest

from endotrl.rewards import AccuracyReward


@pytest.mark.parametrize("math", [False, True])
@pytest.mark.parametrize(
    ("completion", "answers", "expected"),
    [
        ("It is PARIS.", "Paris", {False: 1, True: 1}),
        ("It is Rome.", ["Paris", "Lyon"], {False: 0, True: 0}),
        ("New York City", ["NYC", "New York"], {False: 1, True: 1}),
        ("12", 12, {False: 1, True: 1}),  # columns may hold numbers
        (r"\boxed{(x+1)^2}", "x^2+2x+1", {False: 0, True: 1}),
    ],
)
def test_answers(completion, answers, expected, math):
    if math:
        pytest.importorskip("math_verify")
    accuracy = pickle.loads(pickle.dumps(AccuracyReward("gold", math=math)))
    assert accuracy.__name__ == "accuracy"
    assert accuracy(completions=[completion], gold=[answers], prompts=["a"]) == [expected[math]]
    assert accuracy(completions=[[{"role": "assistant", "content": completion}]], gold=[answers]) == [expected[math]]


def test_without_math_verify(monkeypatch):
    monkeypatch.setattr("endotrl.grading.symbolic.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"math-verify.*pip install 'endotrl\[eval\]'"):
        AccuracyReward("gold", math=True)
    assert AccuracyReward("gold")(completions=[r"\boxed{\frac{1}{2}}"], gold=["0.5"]) == [1]


def test_a_row_without_an_answer_has_no_accuracy():
    assert AccuracyReward("gold")(completions=["a"] * 5, gold=[None, [], "", "a", ["b"]]) == [None] * 3 + [1, 0]
