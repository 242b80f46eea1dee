# SPDX-License-Identifier: Apache-2.0
import random

import pytest

from endotrl.rendering.offsets import decode_with_offsets
from endotrl.sentence import RuleSegmenter, find_sentences, last_tokens

from ..rendering.tokenizers_of_all_kinds import tokenizer_named
from ..support.helpers import encode


# (tokens, sentences, index of the token that ends each)
LAST_TOKENS = [
    (["Hi", ".", " You", "."], ["Hi. ", "You."], [1, 3]),
    (["Hi", ".", " ", "You"], ["Hi. ", "You"], [2, 3]),  # a space of its own goes with the sentence before
    (["Hi", ".\n\nYou", " go"], ["Hi.\n\n", "You go"], [1, 2]),  # reaches over the border: ends the first
    (["a.b.c.", " d"], ["a.", "b.", "c. ", "d"], [0, 0, 0, 1]),  # one token writes three sentences
    ([" a", "b"], [" ", "ab"], [0, 1]),  # nothing before the first token
    (["好", "", "", "。", "", "吗"], ["好。", "吗"], [3, 5]),  # empty: a part of a character that a later token ends
    (["a", " ", "\n", "b", ""], ["a \n", "b"], [2, 4]),
]


@pytest.mark.parametrize(("tokens", "sentences", "expected"), LAST_TOKENS, ids=str)
def test_last_tokens(tokens, sentences, expected):
    def spans(pieces: list[str]) -> list[tuple[int, int]]:
        ends = [len("".join(pieces[: i + 1])) for i in range(len(pieces))]
        return list(zip([0, *ends], ends, strict=False))

    assert "".join(tokens) == "".join(sentences)
    assert last_tokens("".join(tokens), spans(sentences), spans(tokens)) == expected


def test_last_tokens_needs_tokens():
    assert last_tokens("", [], []) == []
    with pytest.raises(ValueError, match="1 sentences, but no tokens"):
        last_tokens("a", [(0, 1)], [])


@pytest.mark.parametrize("kind", ["byte-level", "llama 2", "bpe metaspace first"])
def test_sentences_of_real_tokenizers_end_at_their_tokens(kind):
    tokenizer = tokenizer_named(kind)
    pieces = ["The", "a", "好。", "😀!", "so", "etc.", "on.", "no...", "!", "\n", "é.", "न।", "\n\n", "1.5"]
    rng = random.Random(0)
    for _ in range(100):
        original = "".join(rng.choice(pieces) + rng.choice(["", " "]) for _ in range(12)).strip()
        ids = tokenizer(original, add_special_tokens=False)["input_ids"]
        text, offsets = decode_with_offsets(tokenizer, ids)
        spans = RuleSegmenter()(text)
        ends = last_tokens(text, spans, offsets)
        for (_, end), token in zip(spans[:-1], ends, strict=False):
            # Up to that token the whole sentence is written, and no token after it writes a letter of the sentence.
            assert offsets[token][1] >= len(text[:end].rstrip())
            rest = text[offsets[token][1] :]
            assert len(text) - len(rest.lstrip()) >= end
        assert ends == sorted(ends)
        assert ends[-1] == len(ids) - 1


def test_a_token_that_writes_several_sentences_ends_one(tokenizer):
    ids = encode(tokenizer, "The capital of")
    found = find_sentences(tokenizer, lambda text: [(i, i + 1) for i in range(len(text))], ids)
    assert [found.text[start:end] for start, end in found.spans] == ["The ", "capital ", "of"]
    assert found.last_tokens == [0, 1, 2] == list(range(len(ids)))


def test_tools_are_in_no_sentence(tokenizer):
    texts = ("Wait. I ask<|im_end|>", "\ntool. It says. ", "So. Done<|im_end|>")
    first, tool, second = (encode(tokenizer, text) for text in texts)
    positions = [*range(len(first)), *range(len(first) + len(tool), len(first) + len(tool) + len(second))]
    sentences = find_sentences(tokenizer, RuleSegmenter(), [*first, *tool, *second], positions)
    found = [sentences.text[start:end] for start, end in sentences.spans]
    assert found == ["Wait. ", "I ask<|im_end|>", "So. ", "Done<|im_end|>"]
    assert set(sentences.last_tokens) <= set(positions)
    assert sentences.last_tokens[1] == len(first) - 1
