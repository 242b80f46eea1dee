# SPDX-License-Identifier: Apache-2.0
"""
What is known of the policy's token ids: whose they are, and what ends and pads them. Expected ids are written out by
hand.
"""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import add_response_schema, parse_response, qwen3_chat_template

from endotrl.rendering.ends import until_first
from endotrl.rendering.policy import PolicyTokens, foreign_token_ids, special_token_ids
from endotrl.rendering.renderer import Renderer

from .tokenizers_of_all_kinds import byte_level


# As Qwen2.5 names them: PAD is the EOS of its base models and pads, END ends turns.
PAD, START, END = 0, 1, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
USER = [{"role": "user", "content": "Where?"}]
QWEN3 = add_response_schema(byte_level([*SPECIAL, "<tool_call>"], "<|im_end|>", qwen3_chat_template))


def chat_tokenizer(eos="<|im_end|>"):
    tokenizer = byte_level(SPECIAL, eos, CHATML)
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def scored(tokenizer, ids, text, **kwargs):
    renderer = Renderer(tokenizer, kwargs.pop("stops"), len(tokenizer), **kwargs)
    (row,) = renderer.render([USER], [[{"role": "assistant", "content": text}]], [ids])
    assert row.action_positions == list(range(len(row.completion_ids)))
    return row.completion_ids, row.finished


class TestSameTokenizer:
    def test_of_two_copies(self):
        assert foreign_token_ids(chat_tokenizer(), chat_tokenizer()) == frozenset()

    def test_tokens_that_only_one_of_them_has(self):
        ours, theirs = chat_tokenizer(), chat_tokenizer()
        theirs.add_special_tokens({"pad_token": "[PAD]"})
        assert foreign_token_ids(ours, theirs) == {theirs.pad_token_id}
        assert foreign_token_ids(theirs, ours) == frozenset()

    def test_one_id_of_two_added_tokens(self):
        ours, theirs = chat_tokenizer(), byte_level([*SPECIAL[:2], "<|eot|>"], "<|eot|>")
        assert foreign_token_ids(ours, theirs) == {END}

    def test_of_two_vocabularies(self):
        assert foreign_token_ids(chat_tokenizer(), byte_level(SPECIAL[:2], "<|endoftext|>")) is None

    def test_special_tokens_without_a_name(self):
        tokenizer = byte_level(SPECIAL, "<|im_end|>")
        assert START not in tokenizer.all_special_ids
        assert special_token_ids(tokenizer) == {PAD, START, END}

    @pytest.mark.parametrize("text", ["Paris", "", "no such text", "Paris<|im_end|>"])
    def test_the_text_says_nothing_where_the_policy_is_known(self, text, caplog):
        tokenizer = chat_tokenizer()
        ids = [START, *encode(tokenizer, "Par"), PAD, END]
        with caplog.at_level(logging.WARNING, logger="endotrl"):
            known = PolicyTokens(chat_tokenizer(), [END])
            assert scored(tokenizer, ids, text, stops=[END], policy_tokens=known) == (ids, True)
        assert not caplog.records

    @pytest.mark.parametrize("text", ["", "Paris"])
    def test_ids_of_another_one_that_would_decode_to_the_text(self, text):
        ours, other = chat_tokenizer(), byte_level(["<|endoftext|>"], "<|endoftext|>")
        ids = [*encode(ours, text), END]
        known = PolicyTokens(other, [END])
        assert scored(ours, ids, text, stops=[PAD], policy_tokens=known)[0] == [*encode(ours, text), END]
        ids = [*encode(ours, text), START]  # the other one's EOS is a special token of ours, and no end
        known = PolicyTokens(other, [START])
        assert scored(ours, ids, text, stops=[PAD], policy_tokens=known) == ([*encode(ours, text), END], True)

    def test_only_rows_with_tokens_that_we_lack_are_encoded_again(self):
        ours, theirs = chat_tokenizer(), chat_tokenizer()
        theirs.add_tokens(["<answer>"])
        known = PolicyTokens(theirs, [END])
        ids = encode(theirs, "Pa")
        assert scored(ours, ids, "Pa", stops=[END], policy_tokens=known) == (ids, False)
        ids = [*encode(theirs, "<answer>Pa"), END]
        again = [*encode(ours, "<answer>Pa"), END]
        assert len(again) > len(ids)
        assert scored(ours, ids, "<answer>Pa", stops=[END], policy_tokens=known) == (again, True)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.integers(0, len(QWEN3) - 1), min_size=1, max_size=12))
    def test_whatever_ids_a_policy_writes_and_however_they_are_parsed(self, ids):
        message = parse_response(QWEN3, ids)
        renderer = Renderer(QWEN3, [END], len(QWEN3), policy_tokens=PolicyTokens(QWEN3, [END], padded=False))
        (row,) = renderer.render([USER], [[message]], [ids])
        assert row.completion_ids == ids and row.action_positions == list(range(len(ids)))
        assert row.finished == (ids[-1] == END)


class TestWithoutATrainer:
    """Only the text tells whose ids they are."""

    @pytest.mark.parametrize(
        ("ids_of", "text"),
        [
            (" Paris<|endoftext|> is", " Paris<|endoftext|> is"),
            (" Paris<|endoftext|> is<|im_end|>", " Paris<|endoftext|> is"),
            (" Paris<|im_end|>", " Paris<|im_end|>"),
            ("Hm.</think>Paris<|im_start|>!<|im_end|>", "Paris<|im_start|>!"),
            ("<|im_end|>", ""),
            ("", ""),
        ],
    )
    def test_text_that_keeps_special_tokens(self, ids_of, text):
        tokenizer = chat_tokenizer()
        ids = encode(tokenizer, ids_of)
        assert scored(tokenizer, ids, text, stops=[END])[0] == ids

    @pytest.mark.parametrize("foreign", [[START], [START, START], [PAD, START], [10]], ids=str)
    def test_an_empty_answer_of_another_tokenizer(self, foreign):
        # Its EOS is a special token of ours, or a newline, which decode to nothing. Its other answer is read as "wrong".
        tokenizer = chat_tokenizer()
        renderer = Renderer(tokenizer, [END], len(tokenizer))
        ids = [[*encode(tokenizer, "wrong"), START], foreign]
        rows = renderer.render(["Where?"] * 2, ["Paris", ""], ids)
        assert [row.completion_ids for row in rows] == [[*encode(tokenizer, "Paris"), END], [END]]

    @pytest.mark.parametrize("ids_of", ["<|im_start|>", "<|im_start|><|endoftext|><|im_start|>", "\n\n", " "])
    @pytest.mark.parametrize("neighbours", [0, 1], ids=["alone", "not alone"])
    def test_an_empty_answer_of_ours_that_has_no_end(self, ids_of, neighbours, caplog):
        tokenizer = chat_tokenizer()
        renderer = Renderer(tokenizer, [END], len(tokenizer))
        ids, paris = encode(tokenizer, ids_of), [*encode(tokenizer, "Paris"), END]
        with caplog.at_level(logging.WARNING, logger="endotrl"):
            rows = renderer.render(
                ["Where?"] * (1 + neighbours), ["", "Paris"][: 1 + neighbours], [ids, paris][: 1 + neighbours]
            )
        assert rows[0].completion_ids == ids and not rows[0].finished
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == 1 - neighbours and all("empty texts, which do not tell" in message for message in said)


class TestPadding:
    """The answer is "Paris", END; whatever follows, only what the policy wrote is scored."""

    def ids(self, *more):
        return [*encode(chat_tokenizer(), "Paris"), *more]

    @pytest.mark.parametrize("number", [0, 1, 2, 5])
    @pytest.mark.parametrize("known", [True, False], ids=["known", "not known"])
    def test_of_online_dpo_with_another_eos(self, number, known):
        # Qwen2.5's generation stops at both, and its pad token is the other one.
        tokenizer = chat_tokenizer()
        policy = PolicyTokens(tokenizer, [END, PAD], padded=True) if known else None
        ids = self.ids(END, *[PAD] * number)
        assert scored(tokenizer, ids, "Paris", stops=[END, PAD], policy_tokens=policy) == (self.ids(END), True)

    def test_of_online_dpo_that_stops_elsewhere_than_the_frozen_model(self):
        tokenizer = chat_tokenizer()
        policy = PolicyTokens(tokenizer, [PAD], padded=True)
        ids = self.ids(END, PAD, PAD)
        assert scored(tokenizer, ids, "Paris", stops=[END, PAD], policy_tokens=policy) == (self.ids(END, PAD), True)

    def test_a_pad_token_that_is_not_special(self):
        tokenizer = chat_tokenizer()
        (pad,) = encode(tokenizer, "!")
        policy = PolicyTokens(tokenizer, [END], padded=True)
        assert scored(tokenizer, self.ids(END, pad, pad), "Paris!!", stops=[END], policy_tokens=policy)[0] == self.ids(
            END
        )
        # Where it is not known who pads, this may have been generated.
        ids = self.ids(END, pad, pad)
        assert scored(tokenizer, ids, "Paris!!", stops=[END]) == (ids, False)

    @pytest.mark.parametrize("tail", [[END] * 3, [END, PAD, PAD], [END, 10, 10, 10]], ids=str)
    def test_of_grpo_there_is_none(self, tail):
        tokenizer = chat_tokenizer()
        policy = PolicyTokens(tokenizer, [PAD], padded=False)
        assert scored(tokenizer, self.ids(*tail), "Paris", stops=[PAD, END], policy_tokens=policy)[0] == self.ids(
            *tail
        )

    @pytest.mark.parametrize("known", [True, False], ids=["known", "not known"])
    @pytest.mark.parametrize(
        ("tail", "finished"),
        [
            ([END], True),
            ([END] * 3, False),  # up to the longest length
            ([END, 10, 10, 10, 10], False),
            ([END, 10, PAD], True),
        ],
        ids=str,
    )
    def test_generation_that_goes_on_behind_the_end_of_a_turn(self, tail, finished, known):
        # As Qwen2.5's base models, which stop at the other EOS only.
        tokenizer = chat_tokenizer(eos="<|endoftext|>")
        ids = self.ids(*tail)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        policy = PolicyTokens(tokenizer, [PAD], padded=False) if known else None
        assert scored(tokenizer, ids, text, stops=[PAD], policy_tokens=policy) == (ids, finished)

    def test_until_first(self):
        assert until_first([5, 1, 2, 1], {1, 2}) == [5, 1]
        assert until_first([5, 6], {1}) == [5, 6]
        assert until_first([], {1}) == []
