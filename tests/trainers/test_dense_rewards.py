# SPDX-License-Identifier: Apache-2.0
"""Token rewards: what reward functions may return, what TRL gets of it, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from endotrl import EndogenousReward
from endotrl.rewards import DenseReward, DenseScores, LengthReward
from endotrl.sentence import RuleSegmenter
from endotrl.sentence.tokens import token_segments
from endotrl.trainers.scored_batch import RewardRecorder, ScoredBatch

from ..support.reference import scores_from_logits, state_logits, token_rewards


IDS = [[5, 6, 7], [8], [9, 9]]
BATCH: dict[str, Any] = {"prompts": ["p"] * 3, "completions": ["c"] * 3, "completion_ids": IDS}


def record(output: Any, **kwargs: Any) -> tuple[Any, DenseScores | None]:
    recorder = RewardRecorder(lambda **columns: output, "mine", **kwargs)
    return recorder(**BATCH), recorder.scores


class Dense:
    """A [`DenseReward`] that returns what it is given."""

    def __init__(self, *scores: Any) -> None:
        self.scores = scores

    def __call__(self, **kwargs: Any) -> list[float]:
        return [-1.0, -2.0, -3.0]

    def outcome_and_token_rewards(
        self, prompts: Any, completions: Any, completion_ids: Any = None, **kwargs: Any
    ) -> Any:
        return self.scores


class TestPlainCallables:
    def test_numbers_go_through(self):
        for output in ([1.0, None, 2], [torch.tensor(1.0), np.float32(2), None], [None, None, None]):
            assert record(output) == (output, None)

    @pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
    def test_lists_are_summed(self, kind):
        totals, scores = record([kind([1.0, 2.0, 4.0]), None, kind([0.5, 0.25])])
        assert totals == [7.0, None, 0.75]
        assert scores is not None and scores.state_values is None
        assert [row.tolist() for row in scores.token_rewards] == [[1.0, 2.0, 4.0], [0.0], [0.5, 0.25]]
        assert all(row.dtype == torch.float32 for row in scores.token_rewards)

    def test_one_tensor_for_all_rows_of_equal_length(self):
        recorder = RewardRecorder(lambda **columns: torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "mine")
        assert recorder(completion_ids=[[1, 2], [3, 4]]) == [3.0, 7.0]

    def test_arguments_arrive(self):
        seen: dict[str, Any] = {}
        RewardRecorder(lambda **columns: seen.update(columns) or [0.0] * 3, "mine")(**BATCH, answer=["x"] * 3)
        assert seen == {**BATCH, "answer": ["x"] * 3}

    def test_wrong_length(self):
        with pytest.raises(ValueError, match=r"'mine'.*\(4,\) for row 0.* 3 tokens.*completion_ids\[0\]"):
            record([[1.0] * 4, [1.0], [1.0] * 2])
        with pytest.raises(ValueError, match="3 completions"):
            record([[1.0] * 3, [1.0]])

    def test_numbers_among_lists(self):
        with pytest.raises(
            TypeError, match=r"'mine' gave one number a token for some completions, and for row 1 0\.5"
        ):
            record([[1.0] * 3, 0.5, None])

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_not_finite(self, value):
        with pytest.raises(ValueError, match=f"'mine' returned token_rewards of {value} for token 1 of row 2"):
            record([[1.0] * 3, [1.0], [0.0, value]])

    def test_outcome_credit_keeps_nothing(self):
        assert record([[1.0] * 3, [1.0], None], keep_token_rewards=False) == ([3.0, 1.0, None], None)


class TestDenseRewards:
    ROWS = [torch.ones(3), torch.ones(1), torch.ones(2)]

    def test_protocol(self):
        assert isinstance(Dense(), DenseReward)
        assert isinstance(EndogenousReward(model=None), DenseReward)
        assert not isinstance(LengthReward(), DenseReward)

    def test_outcomes_are_what_trl_gets(self):
        recorder = RewardRecorder(Dense([10.0, None, 30.0], self.ROWS, self.ROWS), "mine")
        assert recorder(**BATCH) == [10.0, None, 30.0]
        assert recorder.scores is not None and recorder.scores.state_values is not None
        for rows in (recorder.scores.token_rewards, recorder.scores.state_values):
            assert [row.tolist() for row in rows] == [[1.0] * 3, [0.0], [1.0] * 2]

    def test_state_values_are_optional(self):
        recorder = RewardRecorder(Dense([1.0] * 3, self.ROWS), "mine")
        recorder(**BATCH)
        assert recorder.scores is not None and recorder.scores.state_values is None

    def test_no_outcome_may_come_with_anything(self):
        recorder = RewardRecorder(
            Dense([1.0, None, 1.0], [*self.ROWS[:1], torch.tensor([math.nan]), self.ROWS[2]]), "m"
        )
        recorder(**BATCH)
        assert recorder.scores is not None and recorder.scores.token_rewards[1].tolist() == [0.0]

    @pytest.mark.parametrize("field", ["token_rewards", "state_values"])
    def test_wrong_shape(self, field):
        wrong = [self.ROWS[0], torch.ones(5), self.ROWS[2]]
        scores = (self.ROWS, wrong) if field == "state_values" else (wrong,)
        with pytest.raises(ValueError, match=rf"'mine' returned {field} of shape \(5,\) for row 1.* 1 tokens"):
            RewardRecorder(Dense([1.0] * 3, *scores), "mine")(**BATCH)

    def test_outcome_credit_calls_it_as_trl_does(self):
        recorder = RewardRecorder(Dense([1.0] * 3, self.ROWS), "mine", keep_token_rewards=False)
        assert recorder(**BATCH) == [-1.0, -2.0, -3.0]
        assert recorder.scores is None


def test_scored_batch_sums_by_weight():
    scored = ScoredBatch(
        rewards_per_func=torch.tensor([[9.0, 9.0, 9.0], [9.0, 9.0, 9.0], [1.0, 2.0, 3.0], [1.0, math.nan, math.nan]]),
        reward_weights=torch.tensor([1.0, 10.0, 0.5]),
        local=slice(2, 4),
        token_rewards={0: torch.tensor([[1.0, 0.0], [0.5, 0.5]]), 2: torch.tensor([[1.0, 2.0], [0.0, 0.0]])},
        state_values={2: torch.tensor([[4.0, 6.0], [0.0, 0.0]])},
        mask=torch.ones(2, 2, dtype=torch.bool),
        completion_ids=[[3, 3], [3, 3]],
    )
    assert scored.weighted(scored.token_rewards).tolist() == [[1.5, 1.0], [0.5, 0.5]]
    assert scored.weighted(scored.state_values).tolist() == [[2.0, 3.0], [0.0, 0.0]]
    assert scored.weighted_outcomes.tolist() == [20.0, 0.0]  # only the function that is not dense
    assert scored.scorable.tolist() == [True] * 4


class TestEndogenousReward:
    PROMPTS = ["The capital of France", "What is"]

    def completions(self, reward: EndogenousReward) -> tuple[list[str], list[list[int]]]:
        tokenizer = reward._tokenizer
        texts = [" is Paris.", " the capital of Italy?"]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        ids[0].append(tokenizer.eos_token_id)  # finished; the second one was cut off
        return texts, ids

    @pytest.mark.parametrize("truncation", ["terminal", "bootstrap"])
    @pytest.mark.parametrize("form", ["bellman", "log_prob", "centered"])
    @pytest.mark.parametrize("aggregate", ["sum", "discounted"])
    def test_against_the_reference(self, aggregate, form, truncation, tiny_model_path):
        reward = EndogenousReward(
            tiny_model_path, alpha=0.8, token_reward=form, aggregate=aggregate, discount=0.9, truncation=truncation
        )
        texts, ids = self.completions(reward)
        scores = reward.outcome_and_token_rewards(self.PROMPTS, texts, ids)
        assert scores.outcomes == pytest.approx(reward(prompts=self.PROMPTS, completions=texts, completion_ids=ids))
        model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
        assert (scores.state_values is None) == (form != "bellman")
        for i, prompt in enumerate(self.PROMPTS):
            reference = scores_from_logits(
                state_logits(model, reward._tokenizer(prompt)["input_ids"], ids[i]), ids[i], alpha=0.8
            )
            expected = token_rewards(reference, form, 0.8, 1.0, finished=i == 0, truncation=truncation)
            weights = [0.9**h if aggregate == "discounted" else 1.0 for h in range(len(ids[i]))]
            weighted = [w * r for w, r in zip(weights, expected, strict=True)]
            assert scores.token_rewards[i].tolist() == pytest.approx(weighted, abs=1e-4)
            # They sum to the outcome, up to V(s_1).
            constant = reference.values[0] if (aggregate, form) == ("sum", "bellman") else 0.0
            assert scores.token_rewards[i].sum().item() - constant == pytest.approx(scores.outcomes[i], abs=1e-4)
            if scores.state_values is not None:
                values = [w * v for w, v in zip(weights, reference.values[:-1], strict=True)]
                assert scores.state_values[i].tolist() == pytest.approx(values, abs=1e-4)

    def test_one_pass_logs_the_same(self, tiny_model_path):
        reward = EndogenousReward(tiny_model_path)
        texts, ids = self.completions(reward)
        batch = {"prompts": self.PROMPTS, "completions": texts, "completion_ids": ids, "answer": ["x", "y"]}
        logged: list[dict[str, Any]] = [{}, {}]
        passes = []
        scorer = reward.load()._scorer
        reward._scorer = lambda *args, **kwargs: passes.append(1) or scorer(*args, **kwargs)
        for call, seen in zip((reward, reward.outcome_and_token_rewards), logged, strict=True):
            call(**batch, log_extra=seen.__setitem__, log_metric=seen.__setitem__)
        assert logged[0] == logged[1] and len(logged[0]) > 3
        assert len(passes) == 2

    def test_skipped(self, tiny_model_path):
        reward = EndogenousReward(tiny_model_path, truncation="skip")
        texts, ids = self.completions(reward)
        recorder = RewardRecorder(reward, "endo")
        outcomes = recorder(prompts=self.PROMPTS, completions=texts, completion_ids=ids)
        assert outcomes[0] is not None and outcomes[1] is None
        assert recorder.scores is not None and recorder.scores.token_rewards[1].tolist() == [0.0] * len(ids[1])

    def test_mean_has_no_token_rewards(self, tiny_model_path):
        reward = EndogenousReward(tiny_model_path, aggregate="mean")
        with pytest.raises(ValueError, match='`aggregate="mean"` cannot be credited to single tokens'):
            reward.outcome_and_token_rewards(["a"], ["b"])
        assert reward._scorer is None  # said before anything was computed

    def test_tokens_of_another_tokenizer(self, tiny_model_path, tiny_policy_path):
        reward = EndogenousReward(tiny_model_path)
        with pytest.raises(ValueError, match=r"row 0 was encoded again .* in place of 2"):
            reward.outcome_and_token_rewards(["a b"], ["c d"], [[9, 10]])
        assert reward._scorer is None


class TestSentences:
    def segments(self, tiny_model_path: str, text: str, ends: int = 1) -> list[tuple[str, int]]:
        tokenizer = EndogenousReward(tiny_model_path)._tokenizer
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * ends
        numbers = token_segments(tokenizer, ids, RuleSegmenter()).tolist()
        return list(zip((tokenizer.decode([token_id]) for token_id in ids), numbers, strict=True))

    def test_words_belong_to_their_sentence(self, tiny_model_path):
        rows = self.segments(tiny_model_path, "It is. The capital is Paris. Yes!")
        sentences = ["".join(token for token, number in rows if number == k).strip() for k in range(3)]
        assert sentences == ["It is.", "The capital is Paris.", "Yes!<|im_end|>"]

    def test_tokens_inside_a_character(self, tiny_model_path):
        rows = self.segments(tiny_model_path, "\N{GRINNING FACE}. \N{GRINNING FACE} is.", ends=0)
        assert [number for _, number in rows] == sorted(number for _, number in rows)
        assert rows[-1][1] == len(RuleSegmenter()("\N{GRINNING FACE}. \N{GRINNING FACE} is.")) - 1

    @pytest.mark.parametrize("ends", [0, 1, 3])
    def test_nothing_written(self, ends, tiny_model_path):
        assert [number for _, number in self.segments(tiny_model_path, "", ends)] == [0] * ends

    def test_special_tokens_within(self, tiny_model_path):
        tokenizer = EndogenousReward(tiny_model_path)._tokenizer
        eos = tokenizer.eos_token_id
        first, second = (tokenizer(text)["input_ids"] for text in ("It is.", " Paris is."))
        numbers = token_segments(tokenizer, [eos, *first, eos, *second], RuleSegmenter()).tolist()
        assert numbers == [0] * (len(first) + 2) + [1] * len(second)

    def test_spans_must_tile(self, tiny_model_path):
        tokenizer = EndogenousReward(tiny_model_path)._tokenizer
        with pytest.raises(ValueError, match="do not tile"):
            token_segments(tokenizer, tokenizer("It is.")["input_ids"], lambda text: [(0, 2)])
