# SPDX-License-Identifier: Apache-2.0
"""Token rewards: what reward functions may return, what TRL gets of it, and what is refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from endotrl import EndogenousReward
from endotrl.rewards import DenseReward, LengthReward
from endotrl.sentence import RuleSegmenter
from endotrl.sentence.tokens import token_segments
from endotrl.trainers.scored_batch import RewardRecorder

from ..support.reference import scores_from_logits, state_logits, token_rewards


IDS = [[5, 6, 7], [8], [9, 9]]
BATCH: dict[str, Any] = {"prompts": ["p"] * 3, "completions": ["c"] * 3, "completion_ids": IDS}
ROWS = [torch.ones(3), torch.ones(1), torch.ones(2)]
NAN = torch.tensor([math.nan])
LONG = [ROWS[0], torch.ones(5), ROWS[2]]
SPLIT = [[1.0, 2.0, 4.0], [0.0], [0.5, 0.25]]


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


def returning(output: Any) -> Any:
    return lambda **columns: output


class TestRecorder:
    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize(
        ("reward", "outcomes", "token_rewards", "state_values"),
        [
            # Numbers go through,
            *(
                (returning(output), output, None, None)
                for output in ([1.0, None, 2], [torch.tensor(1.0), np.float32(2), None], [None] * 3)
            ),
            # lists are summed,
            *(
                (returning([kind(SPLIT[0]), None, kind(SPLIT[2])]), [7.0, None, 0.75], SPLIT, None)
                for kind in (list, tuple, np.array, torch.tensor)
            ),
            # and of dense rewards TRL gets the outcomes; where there is none, anything may come with it.
            (Dense([10.0, None, 30.0], ROWS, ROWS), [10.0, None, 30.0], [[1.0] * 3, [0.0], [1.0] * 2], True),
            (Dense([1.0] * 3, ROWS), [1.0] * 3, [[1.0] * 3, [1.0], [1.0] * 2], None),
            (Dense([1.0, None, 1.0], [ROWS[0], NAN, ROWS[2]]), [1.0, None, 1.0], [[1.0] * 3, [0.0], [1.0] * 2], None),
        ],
    )
    def test_what_is_kept(self, reward, outcomes, token_rewards, state_values, keep):
        recorder = RewardRecorder(reward, "mine", keep_token_rewards=keep)
        found = recorder(**BATCH)
        if not keep:  # the credit of outcomes calls as TRL does
            assert found == ([-1.0, -2.0, -3.0] if isinstance(reward, Dense) else outcomes)
            assert recorder.scores is None
        else:
            assert found == outcomes and (recorder.scores is None) == (token_rewards is None)
        if recorder.scores is not None:
            assert [row.tolist() for row in recorder.scores.token_rewards] == token_rewards
            assert all(row.dtype == torch.float32 for row in recorder.scores.token_rewards)
            values = recorder.scores.state_values
            assert (values and [row.tolist() for row in values]) == (token_rewards if state_values else None)

    @pytest.mark.parametrize(
        ("reward", "error", "message"),
        [
            (returning([[1.0] * 4, [1.0], [1.0] * 2]), ValueError, r"'mine'.*\(4,\) for row 0.* 3 tokens"),
            (returning([[1.0] * 3, [1.0]]), ValueError, "3 completions"),
            (returning([[1.0] * 3, 0.5, None]), TypeError, r"for some completions, but 0\.5 for row 1"),
            (returning([[1.0] * 3, [1.0], [0.0, math.nan]]), ValueError, "token_rewards of nan for token 1 of row 2"),
            (returning([[1.0] * 3, [1.0], [0.0, math.inf]]), ValueError, "token_rewards of inf for token 1 of row 2"),
            (Dense([1.0] * 3, LONG), ValueError, r"token_rewards of shape \(5,\) for row 1.* 1 tokens"),
            (Dense([1.0] * 3, ROWS, LONG), ValueError, r"state_values of shape \(5,\) for row 1.* 1 tokens"),
        ],
    )
    def test_what_is_refused(self, reward, error, message):
        with pytest.raises(error, match=message):
            RewardRecorder(reward, "mine")(**BATCH)

    def test_protocol(self):
        assert isinstance(Dense(), DenseReward) and isinstance(EndogenousReward(model=None), DenseReward)
        assert not isinstance(LengthReward(), DenseReward)


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
            logits = state_logits(model, reward._tokenizer(prompt)["input_ids"], ids[i])
            reference = scores_from_logits(logits, ids[i], alpha=0.8)
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

    def test_tokens_of_another_tokenizer(self, tiny_model_path, tiny_policy_path):
        reward = EndogenousReward(tiny_model_path)
        with pytest.raises(ValueError, match=r"row 0 was re-encoded .* instead of 2"):
            reward.outcome_and_token_rewards(["a b"], ["c d"], [[9, 10]])
        assert reward._scorer is None


@pytest.mark.parametrize(
    ("parts", "expected"),  # texts, and `None` for the end-of-sequence token
    [
        (["It is. The capital is Paris. Yes!", None], ["It is. ", "The capital is Paris. ", "Yes!<|im_end|>"]),
        (["One \N{GRINNING FACE}. Two \N{GRINNING FACE}."], ["One \N{GRINNING FACE}. ", "Two \N{GRINNING FACE}."]),
        ([None, "It is.", None, " Paris is."], ["<|im_end|>It is.<|im_end|>", " Paris is."]),
        ([""], []),
        (["", None], ["<|im_end|>"]),
        (["", None, None, None], ["<|im_end|>" * 3]),
    ],
)
def test_tokens_belong_to_their_sentence(parts, expected, tiny_model_path):
    tokenizer = EndogenousReward(tiny_model_path)._tokenizer
    ids: list[int] = []
    for part in parts:
        ids += [tokenizer.eos_token_id] if part is None else tokenizer(part)["input_ids"]
    numbers = token_segments(tokenizer, ids, RuleSegmenter()).tolist()
    assert len(numbers) == len(ids) and numbers == sorted(numbers)
    found = [[i for i, n in zip(ids, numbers, strict=True) if n == k] for k in range(max(numbers, default=-1) + 1)]
    assert [tokenizer.decode(sentence) for sentence in found] == expected
