# SPDX-License-Identifier: Apache-2.0
"""
What is known of the policy's token ids: whose they are, and what ends and pads them. Expected ids are written out by
hand.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl.chat_template_utils import add_response_schema, parse_response, qwen3_chat_template

from endotrl.rendering.policy import PolicyTokens, foreign_token_ids, special_token_ids
from endotrl.rendering.renderer import Renderer

from ..support.helpers import encode
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


OURS = chat_tokenizer()
PARIS = encode(OURS, "Paris")
(MARK,) = encode(OURS, "!")
WITH_ANSWER = chat_tokenizer()
WITH_ANSWER.add_tokens(["<answer>"])
BASE = chat_tokenizer(eos="<|endoftext|>")  # as Qwen2.5's base models, which stop at the other EOS only
OTHER = byte_level(["<|endoftext|>"], "<|endoftext|>")


def policy(stops, tokenizer=OURS, **padded):
    return PolicyTokens(tokenizer, stops, **padded)


OF_ANOTHER = [policy([end], OTHER) for end in (END, START)]
# (ids, text, the frozen model's ends, what is known of the policy, ids that are scored, whether they are finished)
KNOWN = [
    # The text says nothing where the policy's tokenizer is ours,
    *(
        ([START, *encode(OURS, "Par"), PAD, END], text, [END], policy([END]), None, True)
        for text in ("Paris", "", "no such text", "Paris<|im_end|>")
    ),
    # and where it is another one, nothing but the text counts: these would decode to it. The other one's EOS is a
    # special token of ours, and no end.
    *(
        ([*encode(OURS, text), end], text, [PAD], known, [*encode(OURS, text), END], True)
        for text in ("", "Paris")
        for end, known in zip((END, START), OF_ANOTHER, strict=True)
    ),
    # Only rows with tokens that we lack are encoded again.
    (encode(WITH_ANSWER, "Pa"), "Pa", [END], policy([END], WITH_ANSWER), None, False),
    (
        [*encode(WITH_ANSWER, "<answer>Pa"), END], "<answer>Pa", [END], policy([END], WITH_ANSWER),
        [*encode(OURS, "<answer>Pa"), END], True,
    ),
    # OnlineDPO pads. Qwen2.5's generation stops at both ends, and its pad token is the other one.
    *(
        ([*PARIS, END, *[PAD] * number], "Paris", [END, PAD], known, [*PARIS, END], True)
        for number in (0, 1, 2, 5)
        for known in (policy([END, PAD], padded=True), None)
    ),
    ([*PARIS, END, PAD, PAD], "Paris", [END, PAD], policy([PAD], padded=True), [*PARIS, END, PAD], True),
    # A pad token that is not special. Where it is not known who pads, it may have been generated.
    ([*PARIS, END, MARK, MARK], "Paris!!", [END], policy([END], padded=True), [*PARIS, END], True),
    ([*PARIS, END, MARK, MARK], "Paris!!", [END], None, None, False),
    # GRPO does not pad.
    *(
        ([*PARIS, *tail], "Paris", [PAD, END], policy([PAD], padded=False), None, finished)
        for tail, finished in (([END] * 3, False), ([END, PAD, PAD], True), ([END, 10, 10, 10], False))
    ),
    # Without a trainer, only the text tells whose ids they are: special tokens that it keeps are no doubt of it.
    *(
        (encode(OURS, written), text, [END], None, None, written.endswith("<|im_end|>"))
        for written, text in (
            (" Paris<|endoftext|> is", " Paris<|endoftext|> is"),
            (" Paris<|endoftext|> is<|im_end|>", " Paris<|endoftext|> is"),
            (" Paris<|im_end|>", " Paris<|im_end|>"),
            ("Hm.</think>Paris<|im_start|>!<|im_end|>", "Paris<|im_start|>!"),
            ("<|im_end|>", ""),
            ("", ""),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(("ids", "text", "stops", "known", "written", "finished"), KNOWN)
def test_what_is_scored(ids, text, stops, known, written, finished, warnings_logged):
    renderer = Renderer(OURS, stops, len(OURS), policy_tokens=known)
    (row,) = renderer.render([USER], [[{"role": "assistant", "content": text}]], [ids])
    written = ids if written is None else written
    assert (row.completion_ids, row.finished) == (written, finished)
    assert row.action_positions == list(range(len(written)))
    assert written != ids or known in OF_ANOTHER or not warnings_logged()


@pytest.mark.parametrize("known", [policy([PAD], BASE, padded=False), None], ids=["known", "not known"])
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
def test_generation_that_goes_on_behind_the_end_of_a_turn(tail, finished, known):
    ids = [*PARIS, *tail]
    message = {"role": "assistant", "content": BASE.decode(ids, skip_special_tokens=True)}
    (row,) = Renderer(BASE, [PAD], len(BASE), policy_tokens=known).render([USER], [[message]], [ids])
    assert (row.completion_ids, row.finished) == (ids, finished)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, len(QWEN3) - 1), min_size=1, max_size=12))
def test_whatever_ids_a_policy_writes_and_however_they_are_parsed(ids):
    message = parse_response(QWEN3, ids)
    renderer = Renderer(QWEN3, [END], len(QWEN3), policy_tokens=PolicyTokens(QWEN3, [END], padded=False))
    (row,) = renderer.render([USER], [[message]], [ids])
    assert row.completion_ids == ids and row.action_positions == list(range(len(ids)))
    assert row.finished == (ids[-1] == END)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        (chat_tokenizer(), frozenset()),  # of two copies
        (WITH_ANSWER, {len(OURS)}),  # what only one of them has
        (byte_level([*SPECIAL[:2], "<|eot|>"], "<|eot|>"), {END}),  # one id of two added tokens
        (byte_level(SPECIAL[:2], "<|endoftext|>"), None),  # of two vocabularies
    ],
)
def test_ids_that_are_foreign(theirs, expected):
    assert foreign_token_ids(OURS, theirs) == expected
    assert expected is None or foreign_token_ids(theirs, OURS) == expected - {len(OURS)}


def test_special_tokens_without_a_name():
    tokenizer = byte_level(SPECIAL, "<|im_end|>")
    assert START not in tokenizer.all_special_ids
    assert special_token_ids(tokenizer) == {PAD, START, END}


@pytest.mark.parametrize("foreign", [[START], [START, START], [PAD, START], [10]], ids=str)
def test_an_empty_answer_of_another_tokenizer(foreign):
    # Its EOS is a special token of ours, or a newline, which decode to nothing. Its other answer is read as "wrong".
    tokenizer = chat_tokenizer()
    renderer = Renderer(tokenizer, [END], len(tokenizer))
    ids = [[*encode(tokenizer, "wrong"), START], foreign]
    rows = renderer.render(["Where?"] * 2, ["Paris", ""], ids)
    assert [row.completion_ids for row in rows] == [[*encode(tokenizer, "Paris"), END], [END]]


@pytest.mark.parametrize("ids_of", ["<|im_start|>", "<|im_start|><|endoftext|><|im_start|>", "\n\n", " "])
@pytest.mark.parametrize("neighbours", [0, 1], ids=["alone", "not alone"])
def test_an_empty_answer_of_ours_that_has_no_end(ids_of, neighbours, warnings_logged):
    tokenizer = chat_tokenizer()
    renderer = Renderer(tokenizer, [END], len(tokenizer))
    ids, paris = encode(tokenizer, ids_of), [*encode(tokenizer, "Paris"), END]
    batch = (["Where?"] * 2, ["", "Paris"], [ids, paris])
    rows = renderer.render(*(column[: 1 + neighbours] for column in batch))
    assert rows[0].completion_ids == ids and not rows[0].finished
    said = warnings_logged()
    assert len(said) == 1 - neighbours and all("empty texts, so the tokenizer" in message for message in said)
