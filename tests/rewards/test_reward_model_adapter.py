# SPDX-License-Identifier: Apache-2.0
"""
`EndogenousReward.as_reward_model()` under TRL's `get_reward`, which is all that TRL's PPO trainer asks of a reward
model. The trainer itself, which TRL had up to 1.12: `tests/compat/test_trl_ppo.py`.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl.experimental.utils import get_reward

from endotrl import EndogenousReward

from ..support.helpers import assert_same_to_the_bit, weights
from ..support.reference import chatml


PAD, EOS = 0, 2  # of the tiny policy
PROMPTS = ["a b c", "d", "e f g h i j", "a b c", "k l"]
# Ended, cut off, nothing but EOS, EOS on the way (without a stop token TRL generates on), and a repetition.
RESPONSES = [[7, 8, EOS], [9, 10, 11, 12, 13], [EOS], [7, EOS, 9, 10], [8, 8, 8, EOS]]


@pytest.fixture(scope="module")
def tokenizer(tiny_policy_path):
    return AutoTokenizer.from_pretrained(tiny_policy_path)


def make_batch(
    queries: list[list[int]], responses: list[list[int]], pad: int, extra_left: int = 0, extra_right: int = 0
) -> tuple[Tensor, int]:
    """Query-responses as TRL's trainer pads them, and the context length."""
    context = max(map(len, queries)) + extra_left
    width = max(map(len, responses)) + extra_right
    rows = [
        [pad] * (context - len(query)) + query + response + [pad] * (width - len(response))
        for query, response in zip(queries, responses, strict=True)
    ]
    return torch.tensor(rows), context


def scores_of(model: torch.nn.Module, batch: Tensor, pad: int, context: int) -> Tensor:
    """What the trainer uses of `get_reward`, of shape (B,)."""
    logits, scores, _ = get_reward(model, batch, pad, context)
    assert logits.shape == (*batch.shape, 1)
    assert scores.dtype == torch.float32 and scores.shape == batch.shape[:1] and not scores.requires_grad
    return scores


def queries_of(tokenizer: PreTrainedTokenizerBase, prompts: list[str] = PROMPTS) -> list[list[int]]:
    return [tokenizer(prompt)["input_ids"] for prompt in prompts]


@pytest.fixture(scope="module")
def model(tiny_policy_path):
    return EndogenousReward(tiny_policy_path).as_reward_model()


@pytest.fixture(scope="module")
def batch(tokenizer):
    """Query-responses, and the context length."""
    return make_batch(queries_of(tokenizer), RESPONSES, PAD)


class TestEquality:
    @pytest.mark.parametrize(
        "settings",
        [
            *({"aggregate": aggregate} for aggregate in ("sum", "mean", "discounted")),
            *({"token_reward": form} for form in ("log_prob", "centered")),
            {"truncation": "bootstrap"},
        ],
        ids=str,
    )
    def test_the_rewards_of_the_reward_function(self, tiny_policy_path, tokenizer, batch, settings):
        reward = EndogenousReward(tiny_policy_path, alpha=0.7, gamma=0.9, discount=0.8, **settings)
        scores = scores_of(reward.as_reward_model(), batch[0], PAD, batch[1])
        texts = tokenizer.batch_decode(RESPONSES, skip_special_tokens=True)
        expected = reward(prompts=PROMPTS, completions=texts, completion_ids=RESPONSES)
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)

    def test_where_responses_end(self, model, tokenizer):
        (query,) = queries_of(tokenizer, ["a b"])
        # TRL overwrites what follows the stop token with padding. A policy can sample the pad token: for TRL the
        # response ends there.
        responses = [[7, EOS, 9, 10], [7, EOS, PAD, PAD], [7, EOS], [7, 8, PAD, 9], [7, 8, PAD, 10], [7, 8], [PAD, 7]]
        batch, context = make_batch([query] * len(responses), responses, PAD)
        whole, *ended, first, second, bare, empty = scores_of(model, batch, PAD, context).tolist()
        assert ended[0] == pytest.approx(ended[1], abs=1e-5) and ended[0] > whole + 1
        assert first == pytest.approx(bare, abs=1e-5) and second == pytest.approx(bare, abs=1e-5)
        assert empty == 0.0 > bare

    def test_long_queries_are_cut_as_in_the_reward_function(self, tiny_policy_path, tokenizer):
        prompt = " ".join("abcdefghij" * 8)  # 80 tokens; the context has 64
        batch, context = make_batch(queries_of(tokenizer, [prompt, "a"]), [[7, EOS], [8]], PAD)
        with pytest.raises(ValueError, match="Row 0 has 8. prompt tokens.*64 tokens"):
            scores_of(EndogenousReward(tiny_policy_path).as_reward_model(), batch, PAD, context)
        reward = EndogenousReward(tiny_policy_path, overlong_prompt="truncate_left")
        expected = reward(prompts=[prompt, "a"], completions=["a", "b"], completion_ids=[[7, EOS], [8]])
        scores = scores_of(reward.as_reward_model(), batch, PAD, context)
        torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-5, rtol=0)


class TestInvariance:
    def test_padding(self, model, tokenizer, batch):
        expected = scores_of(model, batch[0], PAD, batch[1])
        queries = queries_of(tokenizer)
        # TRL hides the padding from the policy wherever it stands.
        padded_right = [query + [PAD] * (batch[1] - len(query)) for query in queries]
        # `tokenizer.add_special_tokens({"pad_token": "[PAD]"})`, as in TRL's examples, without growing the model.
        outside = len(tokenizer)
        for given, pad, left, right in (
            (queries, PAD, 0, 1), (queries, PAD, 3, 0), (queries, PAD, 2, 4),
            (padded_right, PAD, 0, 0), (queries, outside, 0, 0),
        ):  # fmt: skip
            other, context = make_batch(given, RESPONSES, pad, left, right)
            torch.testing.assert_close(scores_of(model, other, pad, context), expected, atol=1e-5, rtol=0)

    def test_batch_size_and_order(self, model, batch):
        expected = scores_of(model, batch[0], PAD, batch[1])
        alone = torch.cat([scores_of(model, row[None], PAD, batch[1]) for row in batch[0]])
        torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)
        order = [3, 0, 4, 2, 1]
        reordered = scores_of(model, batch[0][order], PAD, batch[1])
        torch.testing.assert_close(reordered, expected[order], atol=1e-5, rtol=0)


class TestPadIsEos:
    """The other tiny model pads with the `<|im_end|>` that ends turns, in its prompts too."""

    def test_equality(self, tiny_model_path, warnings_logged):
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        end = tokenizer.eos_token_id
        assert tokenizer.pad_token_id == end
        texts = ["Paris.", "four, I th"]
        answers = [tokenizer(text)["input_ids"] for text in texts]
        answers[0].append(end)  # ended; the other was cut off
        assert len(answers[0]) < len(answers[1])
        question = {"role": "user", "content": "Capital of France?"}
        prompts = [[question], [{"role": "system", "content": "Be brief."}, question]]
        queries = [tokenizer(chatml(messages, generation_prompt=True))["input_ids"] for messages in prompts]
        batch, context = make_batch(queries, answers, end, extra_left=2)
        reward = EndogenousReward(tiny_model_path)
        expected = reward(prompts=prompts, completions=texts, completion_ids=answers)
        model = reward.as_reward_model()
        for _ in range(2):
            scores = scores_of(model, batch, end, context)
            torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-4, rtol=0)
        assert [message.count("another `tokenizer.pad_token`") for message in warnings_logged()] == [1]

    def test_two_ends(self, tiny_policy_path):
        # Padding with one end after another end adds no token.
        tokenizer = AutoTokenizer.from_pretrained(tiny_policy_path)
        model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        model.generation_config.eos_token_id = [EOS, 18]
        adapter = EndogenousReward(model, tokenizer).as_reward_model()
        (query,) = queries_of(tokenizer, ["a b"])
        ended, context = make_batch([query], [[7, EOS]], 18)
        padded, _ = make_batch([query], [[7, EOS, 18, 18]], 18)
        assert scores_of(adapter, padded, 18, context) == scores_of(adapter, ended, 18, context)

    def test_padding_that_cannot_be_told_from_text(self, model, tiny_model_path, tiny_policy_path):
        end = AutoTokenizer.from_pretrained(tiny_model_path).eos_token_id
        with pytest.raises(ValueError, match="query of row 1 ends with the pad token.*padding_side='left'"):
            scores_of(
                EndogenousReward(tiny_model_path).as_reward_model(), torch.tensor([[5, 6, 7], [5, end, 7]]), end, 2
            )
        (first,) = AutoTokenizer.from_pretrained(tiny_policy_path)("a")["input_ids"]  # stands for a BOS
        with pytest.raises(ValueError, match=rf"starts every text with its pad token \({first}\)"):
            scores_of(model, torch.tensor([[first, 8, 9]]), first, 2)


class TestModule:
    def test_frozen_model_is_no_part_of_it(self, tiny_policy_path, tokenizer, batch):
        lm = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
        before = weights(lm)
        model = EndogenousReward(lm, tokenizer).as_reward_model()
        expected = scores_of(model, batch[0], PAD, batch[1])
        assert list(model.state_dict()) == ["placeholder"]
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.config.hidden_size == 16 and next(model.parameters()).dtype == torch.float32  # for DeepSpeed
        model.load_state_dict(model.state_dict())
        model = model.to(torch.float16).train()
        assert lm.dtype == torch.float32
        assert torch.equal(scores_of(model, batch[0], PAD, batch[1]), expected)
        assert_same_to_the_bit(before, weights(lm))

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, tiny_policy_path, batch, duplicate):
        model = EndogenousReward(tiny_policy_path, alpha=0.7).as_reward_model()
        expected = scores_of(model, batch[0], PAD, batch[1])
        assert len(pickle.dumps(model)) < 100_000  # no weights
        assert torch.equal(scores_of(duplicate(model), batch[0], PAD, batch[1]), expected)


class TestRefused:
    @pytest.mark.parametrize(
        ("settings", "error", "message"),
        [
            ({"truncation": "skip"}, ValueError, "truncation='skip'.*missing_eos_penalty"),
            ({"criterion": "Be brief."}, ValueError, "`criterion`.*tokenize the queries with it"),
            ({"criterion": {"law": "Be exact."}}, ValueError, "`criterion`"),
            ({"correction": "length"}, ValueError, "single responses"),
            ({"model": None}, RuntimeError, r"reward\.attach\(trainer\)"),
        ],
    )
    def test_settings(self, tiny_policy_path, settings, error, message):
        with pytest.raises(error, match=message):
            EndogenousReward(**{"model": tiny_policy_path, **settings}).as_reward_model()

    def test_another_caller_and_ids_of_another_vocabulary(self, model):
        with pytest.raises(RuntimeError, match=r"not called by TRL's `get_reward`.*reward_model\(query_responses"):
            model.endogenous_backbone(input_ids=torch.tensor([[7, 8]]))
        with pytest.raises(ValueError, match="another tokenizer"):
            scores_of(model, torch.tensor([[7, 8, 300]]), PAD, 2)
