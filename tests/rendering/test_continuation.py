# SPDX-License-Identifier: Apache-2.0
"""Prompt and completion together decode to what they say, whatever the tokenizer does at the beginning of a text."""

from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from endotrl.rendering.messages import Template

from .tokenizers_of_all_kinds import NAMES, tokenizer_named


# Words, parts of words, white space, bytes of other scripts: what can stand at a border.
PIECES = st.sampled_from(
    ["The", " capital", "cap", "ital", " is", " ", "  ", "\n", "\n\n", "Paris", ".", "12", " 3", "é", "中文", "'s"]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=5).map("".join)


@cache
def cached(name):
    return tokenizer_named(name)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(prompt=TEXTS, completion=TEXTS)
@example("The cap", "ital of France")  # one token joins them
@example("The capital is ", "Paris.")
@example("The capital is", " Paris.")
@example("12", "34")
def test_they_decode_to_both(name, prompt, completion):
    tokenizer = cached(name)
    template = Template(tokenizer)
    prompt_ids = template.encode(prompt)
    ids = template.continuation(prompt, prompt_ids, completion, special=False)
    # Some tokenizers cannot write every text: they drop a space, or write <unk>.
    both = decode(tokenizer, template.encode(prompt + completion))
    if decode(tokenizer, prompt_ids) == prompt and both == prompt + completion:
        assert decode(tokenizer, prompt_ids + ids) == prompt + completion


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_other_tokens(name):
    # As a policy may have read it: letter by letter.
    tokenizer = cached(name)
    template = Template(tokenizer)
    the = template.encode("The")
    prompt_ids = [the[0], *template.continuation("The", the, " cap", special=False)]
    prompt = decode(tokenizer, prompt_ids)
    ids = template.continuation("Some other prompt", prompt_ids, "ital of", special=False)
    assert decode(tokenizer, prompt_ids + ids) == prompt + "ital of"


def test_no_merge_is_lost():
    # Alone, "ital" is "▁" and "ital" to this tokenizer; inside of the word, it is one token, as of all its other
    # words.
    tokenizer = cached("bpe metaspace always")
    template = Template(tokenizer)
    ids = template.continuation("The cap", template.encode("The cap"), "ital", special=False)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == "ital"
    assert len(ids) < len("ital")
