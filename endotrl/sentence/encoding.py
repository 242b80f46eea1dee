# SPDX-License-Identifier: Apache-2.0
"""Encoding of prompts and responses, as text, messages or token ids, for a sentence reward model."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..frozen.names import model_renderer
from ..rendering.messages import Completions, Prompts, TokenIds
from ..rendering.policy import PolicyRow, Reading, special_token_ids, tokenizer_of
from ..rendering.renderer import Overlong, Rendered, fit
from ..scoring.batching import pad_ids
from .configuration import SentenceRewardConfig
from .segmentation import Segmenter, load_segmenter
from .tokens import SentenceTokens, find_sentences


logger = logging.getLogger(__name__)

# Fills `input_ids` at a marker, where the model ignores it.
PLACEHOLDER = 0


@dataclass(frozen=True)
class EncodedResponse:
    """One prompt and response, ready for a [`SentenceRewardModel`]."""

    input_ids: list[int]  # of prompt and response, with `PLACEHOLDER` at markers
    sentence_ends: list[int]  # positions of the states: right before the response, then at the end of each sentence
    sentences: SentenceTokens
    completion_ids: list[int]  # of the response, without markers
    cut: bool = False  # whether the row was too long, and its prompt or response was truncated


class SentenceEncoder:
    """
    Renders rows by the rules of [`~endotrl.rendering.renderer.Renderer`], splits the responses into sentences, and
    inserts the markers. Sentences are found in the decoded tokens and markers inserted between tokens, so that the
    policy's tokens stay unchanged, and no text, whatever it contains, becomes a marker.

    If a token extends beyond the end of a sentence, the sentence ends after it. In a response with more than
    `config.max_sentences` sentences, all further ones form a single last sentence, with a one-time warning. A response
    without text is one sentence if it has a token (EOS), and none if it has not.

    `processing_class` is the tokenizer of the backbone, or a processor that contains it; `segmenter` defaults to the
    one named by `config.segmenter`. Rows longer than `max_length` tokens and markers (no limit by default) are handled
    by `overlong_prompt`, see [`~endotrl.rendering.renderer.fit`]; `chat_template_kwargs` and `**kwargs` are fields of
    [`~endotrl.rendering.policy.Reading`].
    """

    def __init__(
        self,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        config: SentenceRewardConfig,
        segmenter: Segmenter | None = None,
        max_length: int | None = None,
        overlong_prompt: Overlong = "error",
        chat_template_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.tokenizer = tokenizer_of(processing_class)
        self.config = config
        self.segmenter = load_segmenter(config.segmenter) if segmenter is None else segmenter
        self.max_length = max_length
        self.overlong_prompt = overlong_prompt
        eos = config.get_text_config().eos_token_id
        eos_token_ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        self._renderer = model_renderer(
            config, eos_token_ids, Reading(processing_class, chat_template_kwargs or {}, **kwargs)
        )
        self._special = special_token_ids(self.tokenizer)
        self._said_limit = False

    def __call__(
        self,
        prompts: Prompts,
        completions: Completions,
        completion_ids: TokenIds | None = None,
        policy_rows: Sequence[PolicyRow] | None = None,
    ) -> list[EncodedResponse]:
        """Encodes a batch; see [`~endotrl.rendering.renderer.Renderer.render`] for the arguments and exceptions."""
        rows = self._renderer.render(prompts, completions, completion_ids, policy_rows=policy_rows)
        return [self._encode(number, row) for number, row in enumerate(rows)]

    def _encode(self, number: int, row: Rendered) -> EncodedResponse:
        encoded = self._with_markers(row)
        while self.max_length is not None and len(encoded.input_ids) > self.max_length:
            # Fewer tokens mean fewer sentences, and so fewer markers; rarely more.
            markers = len(encoded.input_ids) - len(row.prompt_ids) - len(row.completion_ids)
            row = fit(number, row, self.max_length, self.overlong_prompt, markers)
            encoded = self._with_markers(row)
        return encoded

    def _with_markers(self, row: Rendered) -> EncodedResponse:
        found = find_sentences(self.tokenizer, self.segmenter, row.completion_ids, row.action_positions)
        sentences = self._limit(found)
        marker = [PLACEHOLDER] if self.config.marker else []
        input_ids = [*row.prompt_ids, *marker]
        sentence_ends = [len(input_ids) - 1]
        start = 0
        for last in sentences.last_tokens:
            text = last  # the end of a sentence with its own value is read before EOS
            while not self.config.differences and text > start and row.completion_ids[text] in self._special:
                text -= 1
            input_ids += [*row.completion_ids[start : text + 1], *marker]
            sentence_ends.append(len(input_ids) - 1)
            input_ids += row.completion_ids[text + 1 : last + 1]
            start = last + 1
        return EncodedResponse(input_ids, sentence_ends, sentences, row.completion_ids, row.cut)

    def _limit(self, sentences: SentenceTokens) -> SentenceTokens:
        limit = self.config.max_sentences
        if len(sentences.spans) <= limit:
            return sentences
        if not self._said_limit:
            logger.warning(
                f"A response has {len(sentences.spans)} sentences, more than `max_sentences={limit}`. All sentences "
                f"from number {limit} on are treated as one. (Shown once.)"
            )
            self._said_limit = True
        spans, tokens = sentences.spans, sentences.last_tokens
        last = spans[limit - 1][0], spans[-1][1]
        return SentenceTokens(sentences.text, [*spans[: limit - 1], last], [*tokens[: limit - 1], tokens[-1]])


def pad_batch(
    rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_token_id: int, multiple: int = 1
) -> dict[str, Tensor]:
    """
    A batch for [`SentenceRewardModel.forward`], from `input_ids` and `sentence_ends` of every row: `input_ids` and
    `attention_mask` of shape `(batch_size, seq_len)`, padded on the right to a multiple of `multiple`, and
    `sentence_ends` of shape `(batch_size, N)`, filled with -1.
    """
    input_ids, attention_mask = pad_ids([ids for ids, _ in rows], pad_token_id, multiple=multiple)
    sentence_ends = torch.full((len(rows), max(len(ends) for _, ends in rows)), -1)
    for i, (_, ends) in enumerate(rows):
        sentence_ends[i, : len(ends)] = torch.tensor(ends)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "sentence_ends": sentence_ends}


def pad_states(rows: Sequence[Tensor], width: int = 0) -> Tensor:
    """States of rows as `(B, T, D)`, padded with zeros on the right, to at least `width`."""
    padded = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    return nn.functional.pad(padded, (0, 0, 0, max(0, width - padded.shape[1])))
