# SPDX-License-Identifier: Apache-2.0
import math

import pytest
from datasets import Dataset
from trl import is_conversational
from trl.data_utils import extract_prompt

from endotrl import EndogenousReward, best_of_n, preference_pairs, rank, score_dataset
from endotrl.selection import top_fraction


def by_length(completions, **kwargs):
    """A reward whose numbers are known: characters."""
    return [
        float(len(completion if isinstance(completion, str) else completion[0]["content"]))
        for completion in completions
    ]


def chat(text, role="assistant"):
    return [{"role": role, "content": text}]


@pytest.fixture(scope="module")
def reward(tiny_model_path):
    return EndogenousReward(tiny_model_path, device="cpu", aggregate="discounted=0.9")


class TestRank:
    def test_order(self):
        assert rank(by_length, ["p", "q"], [["aa", "a", "aaa"], ["b"]]) == [[2, 0, 1], [0]]
        assert best_of_n(by_length, ["p", "q"], [["aa", "a", "aaa"], ["b"]]) == ["aaa", "b"]

    def test_ties_keep_their_order_and_no_reward_comes_last(self):
        some = lambda completions, **_: [None if c == "x" else 1.0 for c in completions]  # noqa: E731
        assert rank(some, ["p"], [["x", "b", "a"]]) == [[1, 2, 0]]

    def test_agrees_with_the_reward_and_many_prompts_make_many_batches(self, reward):
        prompts = [f"{i} + 1 =" for i in range(30)]
        candidates = [[f" {i}", " Paris", f" is {i} of"][: 1 + i % 3] for i in range(30)]
        expected = [reward(prompts=[p] * len(c), completions=c) for p, c in zip(prompts, candidates, strict=True)]
        order = [sorted(range(len(row)), key=lambda i: -row[i]) for row in expected]
        assert rank(reward, prompts, candidates) == order

    def test_token_ids_are_scored(self, reward, tiny_model_path):
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(tiny_model_path)(" is")["input_ids"]
        order = rank(reward, ["The"], [[" is", " is"]], completion_ids=[[ids, [*ids, 1]]])
        cut, whole = reward(prompts=["The"] * 2, completions=[" is"] * 2, completion_ids=[ids, [*ids, 1]])
        assert order == [[0, 1] if cut >= whole else [1, 0]] and cut != whole

    @pytest.mark.parametrize(
        ("prompts", "candidates", "ids", "message"),
        [
            (["p"], [["a"], ["b"]], None, "`candidates` one entry per prompt: it has 2, for 1 prompt"),
            (["p"], [[]], None, "a list of one or more whole responses"),
            ("p", [["a"]], None, "a list of prompts, and for each of them a list of candidates"),
            (["p"], ["ab"], None, "a list of prompts, and for each of them a list of candidates"),
            (["p"], [["a"]], [[[1]]] * 2, "`completion_ids` one entry per prompt: it has 2, for 1 prompt"),
        ],
    )
    def test_errors(self, prompts, candidates, ids, message):
        with pytest.raises((TypeError, ValueError), match=message):
            rank(by_length, prompts, candidates, completion_ids=ids)

    @pytest.mark.parametrize(
        ("rewards", "message"),
        [
            ([1.0], "returned 1 rewards for 2"),
            ([1.0, math.nan], "completion 1 is nan"),
            (["1", 2.0], "completion 0 is '1'"),
        ],
    )
    def test_a_reward_function_that_gives_no_numbers(self, rewards, message):
        with pytest.raises(ValueError, match=message):
            rank(lambda **_: rewards, ["p"], [["a", "b"]])

    def test_length_control_of_a_batch_is_refused(self, tiny_model_path):
        with pytest.raises(ValueError, match='`residual="residual"`'):
            rank(EndogenousReward(tiny_model_path, correction="length"), ["p"], [["a"]])

    def test_residual_takes_out_length(self, reward):
        """By hand: within prompts, the corrected scores do not correlate with log length, and differences are s - b x."""
        prompts = [f"{i}?" for i in range(6)]
        candidates = [[" a" * (1 + (i + 2 * j) % 5) + "b" for j in range(3)] for i in range(6)]
        rows = [(p, c) for p, row in zip(prompts, candidates, strict=True) for c in row]
        stats = reward.score([p for p, _ in rows], [c for _, c in rows])
        s = [round(reward.aggregate_from(row), 6) for row in stats]
        x = [math.log(len(row.token_ids)) for row in stats]
        center = lambda v: [a - sum(v[i // 3 * 3 : i // 3 * 3 + 3]) / 3 for i, a in enumerate(v)]  # noqa: E731
        cs, cx = center(s), center(x)
        slope = sum(a * b for a, b in zip(cs, cx, strict=True)) / sum(a * a for a in cx)
        left = [a - slope * b for a, b in zip(s, x, strict=True)]
        expected = [sorted(range(3), key=lambda j: -left[3 * i + j]) for i in range(6)]
        assert rank(reward, prompts, candidates, residual="residual") == expected
        assert expected != rank(reward, prompts, candidates)
        with pytest.raises(ValueError, match="needs lengths in tokens"):
            rank(by_length, prompts, candidates, residual="residual")


class TestPreferencePairs:
    ROWS = [
        {"prompt": "p", "completions": ["aa", "a", "aaaa", "aaa"], "id": 7},
        {"prompt": "q", "completions": ["b", "b"], "id": 8},
        {"prompt": "r", "completions": ["cc", "c"], "id": 9},
    ]

    def test_best_with_worst(self):
        pairs = preference_pairs(by_length, self.ROWS)
        assert pairs.to_list() == [
            {"prompt": "p", "chosen": "aaaa", "rejected": "a", "id": 7, "score_chosen": 4.0, "score_rejected": 1.0},
            {"prompt": "r", "chosen": "cc", "rejected": "c", "id": 9, "score_chosen": 2.0, "score_rejected": 1.0},
        ]

    def test_margin_and_several_pairs(self):
        pairs = preference_pairs(by_length, self.ROWS, num_pairs=5)
        assert [(row["chosen"], row["rejected"]) for row in pairs] == [("aaaa", "a"), ("aaa", "aa"), ("cc", "c")]
        pairs = preference_pairs(by_length, self.ROWS, num_pairs=5, margin=1.0)  # more than, not at least
        assert [(row["chosen"], row["rejected"]) for row in pairs] == [("aaaa", "a")]
        with pytest.raises(ValueError, match="none gives a row. Left out: 1 prompt with fewer .*; 2 prompts whose"):
            preference_pairs(by_length, self.ROWS, margin=3.0)

    def test_formats(self):
        flat = [{"prompt": "p", "completion": text} for text in ("aa", "a")] + [{"prompt": "q", "completion": "a"}]
        labelled = [{"prompt": "p", "chosen": "a", "rejected": "aa", "score_chosen": 9.0}]
        implicit = [{"chosen": "p b", "rejected": "p aa"}]
        for rows in (flat, Dataset.from_list(flat), labelled):
            (row,) = preference_pairs(by_length, rows)
            assert (row["prompt"], row["chosen"], row["rejected"], row["score_chosen"]) == ("p", "aa", "a", 2.0)
        (row,) = preference_pairs(by_length, implicit)
        assert {key: row[key] for key in ("prompt", "chosen", "rejected")} == extract_prompt(
            {"chosen": "p aa", "rejected": "p b"}
        )
        messages = [{"prompt": chat("p", "user"), "completions": [chat("a"), chat("aa")]}]
        texts = [{"prompt": chat("p", "user"), "completions": ["a", "aa"]}]
        for rows in (messages, texts, Dataset.from_list(messages)):
            (row,) = preference_pairs(by_length, rows)
            assert is_conversational(row) and (row["chosen"], row["rejected"]) == (chat("aa"), chat("a"))

    def test_what_was_cut_off_is_left_out(self, reward, tiny_model_path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        texts = [" a", " b", " c d"]
        ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * (i != 0) for i, text in enumerate(texts)]
        rows = [{"prompt": "The", "completions": texts, "completion_ids": ids}]
        (row,) = preference_pairs(reward, rows)
        assert {row["chosen"], row["rejected"]} == {" b", " c d"}
        (row,) = preference_pairs(reward, rows, unfinished=True)
        assert row["chosen"] == " a"  # what has not ended pays for no end

    def test_bad_rows_are_named(self):
        with pytest.raises(ValueError, match='Row 1 cannot be scored: The key "completion" is missing'):
            preference_pairs(by_length, [self.ROWS[0], {"prompt": "p"}])


def test_top_fraction():
    rows = [{"prompt": "p", "completion": "a" * n, "id": n} for n in (1, 3, 2, 4)] + [
        {"prompt": "q", "completion": "b", "id": 9}
    ]
    top = top_fraction(by_length, rows, 0.5)
    assert [(row["prompt"], row["id"], row["score"]) for row in top] == [("p", 4, 4.0), ("p", 3, 3.0), ("q", 9, 1.0)]
    with pytest.raises(ValueError, match="`fraction` is 0"):
        top_fraction(by_length, rows, 0.0)


@pytest.mark.parametrize(("fraction", "num", "kept"), [(0.55, 20, 11), (0.14, 50, 7), (0.26, 10, 3), (1e-12, 4, 1)])
def test_a_fraction_is_rounded_up_and_no_further(fraction, num, kept):
    rows = [{"prompt": "p", "completion": "a" * (n + 1)} for n in range(num)]
    assert len(top_fraction(by_length, rows, fraction)) == kept


class TestScoreDataset:
    def test_columns_of_every_format(self, reward):
        plain = Dataset.from_list([{"prompt": f"{i} =", "completion": f" {i}", "response": "x"} for i in range(70)])
        scored = score_dataset(reward, plain)
        assert scored.column_names == ["prompt", "completion", "response", "reward", "num_tokens", "finished"]
        assert scored["reward"][69] == pytest.approx(reward(prompts=["69 ="], completions=[" 69"])[0], abs=1e-4)
        pairs = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "ccc"}])
        assert score_dataset(by_length, pairs)[0] == {**pairs[0], "score_chosen": 1.0, "score_rejected": 3.0}
        candidates = Dataset.from_list([{"prompt": "a", "completions": ["b", "ccc"]}] * 2)
        assert score_dataset(by_length, candidates)["scores"][1] == [1.0, 3.0]
        with pytest.raises(ValueError, match=r"columns \['reward'\] already"):
            score_dataset(reward, scored.remove_columns(["num_tokens", "finished"]))
