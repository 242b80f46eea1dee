# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from studies.sentence_rl import BATCH, Facts, TrueReward, correlation, credited, random_model, samples_to
from studies.sentence_states import load_pairs


PROMPT = "The_capital_of_Serbia_is_?. The_capital_of_Peru_is_?. :"
TEXT = "The capital of Serbia is Belgrade. The capital of Peru is Oslo. The capital of Serbia is Belgrade."


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch) -> Facts:
    from endotrl.tasks import facts

    questions = [
        facts.Question("capital", "", [answer], f"The capital of {subject} is {{answer}}.")
        for subject, answer in (("Serbia", "Belgrade"), ("Peru", "Lima"))
    ]
    monkeypatch.setattr(facts, "load_questions", lambda: ([], questions))
    return Facts()


def test_a_fact_counts_once(task: Facts) -> None:
    assert task.right(PROMPT, TEXT.replace(". ", ". |").split("|")) == [True, False, False]


def test_truth_stands_at_the_ends_of_sentences(task: Facts) -> None:
    words = sorted({*TEXT.split(), *PROMPT.split()})
    _, tokenizer = random_model(words, 8, seed=0)
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    reward = TrueReward(task, tokenizer)
    outcomes, token_rewards, _ = reward.outcome_and_token_rewards([PROMPT], [TEXT], completion_ids=[ids])
    assert token_rewards[0].nonzero().flatten().tolist() == [5]  # of six words
    assert outcomes == reward([PROMPT], [TEXT]) == [1.0]


def test_credit_by_hand() -> None:
    rewards = [1.0, 0.0, 2.0]
    assert credited(rewards, "outcome") == [3.0, 3.0, 3.0]
    assert credited(rewards, "sentence") == [3.0, 2.0, 2.0]
    assert credited(rewards, "sentence", gamma=0.5) == [1.5, 1.0, 2.0]


def test_correlation_leaves_prompts_out() -> None:
    # Prompts differ, and what differs within them is the same but for the sign.
    truth = [[1.0], [0.0], [1.0], [0.0]]
    assert correlation(["a", "a", "b", "b"], [[5.0], [3.0], [-1.0], [-3.0]], truth) == pytest.approx(1.0)
    assert correlation(["a", "a", "b", "b"], [[3.0], [5.0], [-3.0], [-1.0]], truth) == pytest.approx(-1.0)


def test_samples_to_a_share() -> None:
    # The mean of five steps is 0.5 first at the eighth step, and the first five do not count before they are there.
    assert samples_to([1.0, 0.0, 0.0, 0.0, 0.0, 0.5, 1.0, 1.0, 1.0], 0.5) == 8 * BATCH
    assert samples_to([0.0] * 9, 0.5) is None


def test_fresh_facts_are_of_other_kinds() -> None:
    pairs = {name: load_pairs(name, Path()) for name in ("facts", "fresh")}
    old, fresh = (
        {sentence for pair in pairs[name] for text in pair.answers for sentence in text.split(". ")} for name in pairs
    )
    assert not old & fresh
    assert {pair.part for pair in pairs["fresh"]} == {"test"}
