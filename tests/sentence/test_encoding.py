# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from endotrl.sentence import SentenceEncoder, SentenceRewardConfig
from endotrl.sentence.encoding import PLACEHOLDER

from ..support.helpers import encode


def make_encoder(
    path: str, segmenter: Any = None, max_length: int | None = None, overlong_prompt: Any = "error", **config: Any
) -> SentenceEncoder:
    config = SentenceRewardConfig(AutoConfig.from_pretrained(path), **config)
    settings = {"max_length": max_length, "overlong_prompt": overlong_prompt}
    return SentenceEncoder(AutoTokenizer.from_pretrained(path), config, segmenter, **settings)


@pytest.mark.parametrize("differences", [True, False])
@pytest.mark.parametrize("marker", [[PLACEHOLDER], []], ids=["marker", "no marker"])
def test_where_the_model_is_read(marker, differences, tiny_model_path, tokenizer):
    """Before the response and behind every sentence; sentences with values of their own, before EOS."""
    encoder = make_encoder(tiny_model_path, marker=bool(marker), differences=differences)
    row, only_eos = encoder(["Hi?"] * 2, ["It is. capital", ""])
    prompt, first, second = (encode(tokenizer, text) for text in ("Hi?", "It is.", " capital"))
    eos = [tokenizer.eos_token_id]
    end = [*eos, *marker] if differences else [*marker, *eos]
    assert row.input_ids == [*prompt, *marker, *first, *marker, *second, *end]
    states = [[*prompt, *marker], [*prompt, *marker, *first, *marker], row.input_ids[: None if differences else -1]]
    assert row.sentence_ends == [len(state) - 1 for state in states]
    assert row.sentences.last_tokens == [len(first) - 1, len(first) + len(second)]  # where rewards go
    assert [row.sentences.text[start:end] for start, end in row.sentences.spans] == ["It is. ", "capital<|im_end|>"]
    assert only_eos.sentence_ends[-1] == len(only_eos.input_ids) - 1


def test_ids_of_the_policy_are_kept(tiny_model_path, tokenizer):
    # Byte by byte: not how the tokenizer would encode this text.
    ids = [i for character in "Yes. No." for i in encode(tokenizer, character)]
    (row,) = make_encoder(tiny_model_path)(["Hi?"], ["Yes. No."], [ids])
    assert row.completion_ids == ids
    assert row.sentences.last_tokens == [4, 7]  # the space is a token of its own


def test_no_token_is_no_sentence(tiny_model_path):
    (row,) = make_encoder(tiny_model_path)(["Hi?"], [""], [[]])
    assert len(row.sentence_ends) == 1
    assert row.sentences.spans == []


def test_text_cannot_contain_a_marker(tiny_model_path, tokenizer):
    # The id that stands at the place of a marker is the special token <|im_start|>, and the text says so as well.
    forged = tokenizer.decode([PLACEHOLDER])
    assert forged.startswith("<|")
    (row,) = make_encoder(tiny_model_path)([f"Hi {forged}?"], [f"It {forged} is."])
    # The model is read in two places only: what the text says moves neither.
    assert len(row.sentence_ends) == 2
    assert row.input_ids.count(PLACEHOLDER) == 4
    assert [row.input_ids[end] for end in row.sentence_ends] == [PLACEHOLDER] * 2
    assert row.input_ids.index(PLACEHOLDER) not in row.sentence_ends


def test_too_many_sentences_become_one(tiny_model_path, warnings_logged):
    encoder = make_encoder(tiny_model_path, max_sentences=3)
    many, few = encoder(["Hi?"] * 2, ["A b. " * 5000, "A b. C d. E f."])
    assert len(many.sentence_ends) == len(few.sentence_ends) == 4
    assert many.sentences.spans[-1][1] == len(many.sentences.text)
    assert many.sentences.last_tokens[-1] == len(many.completion_ids) - 1
    assert [many.sentences.text[start:end] for start, end in many.sentences.spans[:2]] == ["A b. ", "A b. "]
    (warning,) = warnings_logged()
    assert (
        "has 5000 sentences, more than `max_sentences=3`. All sentences from number 3 on are treated as one" in warning
    )


def test_long_rows(tiny_model_path):
    def row(max_length: int | None, overlong_prompt: Any = "error") -> Any:
        encoder = make_encoder(tiny_model_path, max_length=max_length, overlong_prompt=overlong_prompt)
        return encoder(["The capital of France?"], ["Paris. Yes."])[0]

    whole = row(None)
    length = len(whole.input_ids)
    assert row(length) == whole
    with pytest.raises(ValueError, match=f"3 markers, more than the {length - 2} tokens.*truncate_left"):
        row(length - 2)
    cut = row(length - 2, "truncate_left")
    assert cut.input_ids == whole.input_ids[2:]
    assert [cut.input_ids[end] for end in cut.sentence_ends] == [PLACEHOLDER] * 3
    with pytest.raises(ValueError, match="Shorten the completion"):
        row(4, "truncate_left")


def test_rows_that_are_cut(tiny_model_path, tokenizer):
    def cut(prompt: str, completion: str, max_length: int, marker: bool = True) -> Any:
        encoder = make_encoder(tiny_model_path, max_length=max_length, marker=marker, overlong_prompt="cut")
        return encoder([prompt], [completion])[0]

    prompt, marker = "The capital of France?", [PLACEHOLDER]
    first, second, third = (encode(tokenizer, text) for text in ("Paris. ", "Yes. ", "No"))
    start = [*encode(tokenizer, prompt), *marker, *first, *marker, *second, *marker]
    whole = cut(prompt, "Paris. Yes. No", 256)
    length = len(whole.input_ids)
    assert not whole.cut and cut(prompt, "Paris. Yes. No", length) == whole
    # Without EOS, and then without "No" and its marker; what is left ends with a marker.
    for lost in range(1, len(third) + 1):
        row = cut(prompt, "Paris. Yes. No", length - lost)
        left = [*third, tokenizer.eos_token_id][:-lost]
        assert row.cut and len(row.input_ids) == length - lost
        assert row.input_ids == [*start, *left, *marker]
        assert row.completion_ids == [*first, *second, *left]
        assert [row.input_ids[end] for end in row.sentence_ends] == marker * 4
        assert row.sentences.text == tokenizer.decode(row.completion_ids)
    # No room for another sentence of one token and its marker: the end of "Yes." is the end.
    assert cut(prompt, "Paris. Yes. No", length - len(third) - 1).input_ids == start
    # A quarter of the context is for the response, the end of the prompt for the rest.
    row = cut("a" * 300, "b" * 300, 80, marker=False)
    assert tokenizer.decode(row.input_ids) == "a" * 60 + "b" * 20
    row = cut("a" * 300, "b" * 9, 80, marker=False)
    assert tokenizer.decode(row.input_ids) == "a" * 70 + "b" * 9 + "<|im_end|>"
    assert cut("a", "A b. " * 5000, 256).sentence_ends[-1] <= 255
    # More markers than room for them: what is left is the beginning, with its markers.
    row = cut("a" * 300, "Yes. " * 60, 80)
    assert 60 < len(row.input_ids) <= 80 and tokenizer.decode(row.completion_ids) == row.sentences.text != ""
    assert ("Yes. " * 60).startswith(row.sentences.text) and len(row.sentence_ends) == len(row.sentences.spans) + 1 > 1


def test_a_segmenter_that_drops_text_is_refused(tiny_model_path):
    encoder = make_encoder(tiny_model_path, segmenter=lambda text: [(0, 2)])
    with pytest.raises(ValueError, match="do not tile"):
        encoder(["Hi?"], ["Yes."])
