# SPDX-License-Identifier: Apache-2.0
import itertools

import pytest
import torch

from endotrl.evaluation.generation import Sampler, accuracy_of_choice, majority_scores, pass_at_k
from endotrl.evaluation.questions import read_questions
from endotrl.grading import is_right

from .rows import real_file, write


@pytest.mark.parametrize(("n", "c", "k"), [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 4), (5, 3, 5)])
def test_pass_at_k_over_all_subsets(n, c, k):
    subsets = list(itertools.combinations([i < c for i in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match=f"must be from 1 to the number of samples, {n}, got {n + 1}"):
        pass_at_k(n, c, n + 1)


def test_choices():
    assert accuracy_of_choice([1.0, 3.0, 3.0, 2.0], [True, True, False, False]) == 0.5  # ties are drawn
    votes = majority_scores([0, 1, 0, 3, 0])
    assert votes == [3, 1, 3, 1, 3]
    assert accuracy_of_choice(votes, [True, False, True, False, True]) == 1.0


class TestSampler:
    prompts = (
        [{"role": "user", "content": "Hi"}],
        [{"role": "user", "content": "What is the capital of France, please?"}],
        [{"role": "user", "content": "1"}],
    )

    def test_greedy_equals_argmax_alone(self, engine, model, monkeypatch):
        with engine.placement.active() as sampled:  # Qwen2.5's has one of 1.05, and more
            monkeypatch.setattr(sampled.generation_config, "repetition_penalty", 5.0)
        samples = Sampler(engine, max_new_tokens=6, temperature=0.0)(self.prompts, num_samples=1)
        ends = engine.renderer.eos_token_ids
        for prompt, (sample,) in zip(self.prompts, samples, strict=True):
            ids = engine.renderer.render([prompt], [""])[0].prompt_ids
            expected = []
            while len(expected) < 6 and not (expected and expected[-1] in ends):
                with torch.no_grad():
                    expected.append(model(torch.tensor([ids + expected])).logits[0, -1].argmax().item())
            assert list(sample.token_ids) == expected
            assert sample.finished == (expected[-1] in ends)

    def test_seeds(self, engine):
        sampler = Sampler(engine, max_new_tokens=8)
        first = sampler(self.prompts, num_samples=3, seed=1)
        assert first == sampler(self.prompts, num_samples=3, seed=1)
        assert first != sampler(self.prompts, num_samples=3, seed=2)
        assert [len(row) for row in first] == [3, 3, 3]
        assert len({sample.token_ids for sample in first[0]}) > 1

    def test_errors(self, engine):
        with pytest.raises(ValueError, match="`temperature` must be at least 0"):
            Sampler(engine, 4, temperature=-1.0)


class TestQuestions:
    def test_keys(self, tmp_path):
        rows = [
            {"question": "q1", "answer": "... #### 4"},
            {"problem": "q2", "answer": 3.0, "solution": "long", "id": 0},
            {"input": "q3", "target": 2},
            {"Body": "There are 3.", "Question": "How many?", "Answer": 3.0},
            {"question": "q5", "final_answer": ["7"], "solution": ["long"]},
            {"prompt": [{"role": "user", "content": "q6"}], "answer": "8"},
            {"question": "q7", "answers": ["Paris", "The answer is\n#### Lutetia"]},
            {"question": "q8", "answer": False},
        ]
        questions = read_questions(write(tmp_path / "f.jsonl", rows), labelled=True)
        assert [(q.prompt, q.answer) for q in questions] == [
            ("q1", "4"), ("q2", "3"), ("q3", "2"), ("There are 3. How many?", "3"), ("q5", "7"), ("q6", "8"),
            ("q7", ["Paris", "Lutetia"]), ("q8", "no"),
        ]  # fmt: skip
        assert questions[1].id == "0"
        assert len(read_questions(write(tmp_path / "g.jsonl", rows), limit=2, labelled=True)) == 2

    def test_errors(self, tmp_path):
        path = write(tmp_path / "f.jsonl", [{"text": "q", "answer": 1}])
        with pytest.raises(ValueError, match="f.jsonl, line 1: the question is not in question, problem"):
            read_questions(path, labelled=True)
        assert read_questions(path, question="text", labelled=True)[0].prompt == "q"
        turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        path = write(tmp_path / "t.jsonl", [{"prompt": turns, "answer": "1"}])
        with pytest.raises(ValueError, match='t.jsonl, line 1: "prompt" must be text'):
            read_questions(path, labelled=True)
        for labelled, nothing in ((True, ""), (False, ""), (False, [])):
            path = write(tmp_path / "e.jsonl", [{"question": "q", "answer": nothing}])
            with pytest.raises(ValueError, match="e.jsonl, line 1: the answer is empty"):
                read_questions(path, labelled=labelled)
        path = write(tmp_path / "d.jsonl", [{"question": "q", "answer": {"value": "a"}}])
        with pytest.raises(ValueError, match="d.jsonl, line 1: an answer must be text"):
            read_questions(path, labelled=True)

    @pytest.mark.parametrize("name", ["gsm8k", "svamp", "aime24", "amc23", "minerva_math", "olympiadbench"])
    def test_real_files(self, name):
        questions = read_questions(real_file(f"math/{name}/test.jsonl"), labelled=True)
        assert len({q.key for q in questions}) > 0.9 * len(questions) >= 27
        assert all(q.answer and len(q.answer) < 300 for q in questions), name
        # Given as a model would write it, the right answer is right.
        for question in questions[:: max(1, len(questions) // 10)]:
            for text in (rf"The answer is $\boxed{{{question.answer}}}$.", f"Answer: {question.answer}"):
                assert is_right(text, [question.answer], math=True), question.answer

    def test_rows(self):
        talk = [{"role": "user", "content": "a b"}]
        found = read_questions([{"question": "q", "answers": ["a", "b"]}, {"prompt": talk, "answer": 3}], chat=True)
        assert [q.prompt for q in found] == [[{"role": "user", "content": "q"}], talk]
        assert [q.answer for q in found] == [["a", "b"], 3]
        assert read_questions(["1+1="], instruction="Think.")[0].prompt == "1+1=\nThink."
        with pytest.raises(ValueError, match="questions, row 2: either this question or .* has no answer"):
            read_questions([{"prompt": "a", "answer": "1"}, {"prompt": "b"}])
        with pytest.raises(ValueError, match='row 1: "question" must be text or a list of messages, got 312'):
            read_questions([{"question": 312}])
        with pytest.raises(TypeError, match="got a single row: {'question': 'q'}"):
            read_questions({"question": "q"})
