# SPDX-License-Identifier: Apache-2.0
"""Last tokens of sentences, and sentence indices of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..rendering.offsets import decode_with_offsets
from ..rendering.policy import special_token_ids
from .segmentation import Segmenter, check_tiling


@dataclass(frozen=True)
class SentenceTokens:
    """
    Sentences of one completion: its `text`, decoded with its special tokens; `spans` of characters in it, where
    special tokens after a sentence, such as EOS, belong to it; and the positions of the tokens that end them,
    increasing.
    """

    text: str
    spans: list[tuple[int, int]]
    last_tokens: list[int]


def find_sentences(
    tokenizer: PreTrainedTokenizerBase,
    segmenter: Segmenter,
    ids: Sequence[int],
    positions: Sequence[int] | None = None,
) -> SentenceTokens:
    """
    Finds the sentences in the token ids of a completion. `positions` are those that the policy wrote, increasing; all
    by default. Sentences consist of these only: a tool's text in between separates them and is in none.
    """
    text, offsets = decode_with_offsets(tokenizer, ids)
    special = special_token_ids(tokenizer)
    spans: dict[int, tuple[int, int]] = {}  # of each sentence, by the position of its last token
    for first, last in _runs(range(len(ids)) if positions is None else positions):
        end = last  # of the text: special tokens that follow belong to the last sentence
        while end >= first and ids[end] in special:
            end -= 1
        run_start, run_end = offsets[first][0], offsets[last][1]
        run_text = text[run_start : offsets[end][1]] if end >= first else ""
        found = segmenter(run_text)
        check_tiling(run_text, found)
        starts, stops = [start + run_start for start, _ in found], [stop + run_start for _, stop in found]
        if not found:  # nothing but special tokens: of the sentence before a tool's turn, if there is one
            starts, stops = [spans.popitem()[1][0] if spans else run_start], [run_end]
        ends = last_tokens(text, list(zip(starts, stops, strict=True)), offsets[first : end + 1]) if found else []
        # Everything up to the end of the run belongs to its last sentence.
        stops[-1:], ends[-1:] = [run_end], [last - first]
        for start, stop, token in zip(starts, stops, ends, strict=True):
            # Two sentences that end with the same token are one.
            spans[first + token] = (spans.get(first + token, (start, stop))[0], stop)
    return SentenceTokens(text, list(spans.values()), list(spans))


def last_tokens(text: str, spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """
    Index of the token that ends each sentence.

    A token belongs to the sentence that contains its first character other than whitespace: " The" to that of "The",
    though its space follows the full stop before. A token that crosses a boundary (".\\n\\nThe") therefore ends the
    earlier sentence, and one that writes only whitespace belongs to the one in which it starts.

    `spans` of the sentences and `offsets` of the tokens are in characters of `text`, which both tile. The returned
    indices, one per sentence, never decrease: a sentence without its own token (one token writes several) gets that of
    the sentence before it; if that has none either, the first token that writes a part of it.

    Example:
    ```python
    >>> from endotrl.sentence import last_tokens

    >>> last_tokens("Hi. You", [(0, 4), (4, 7)], [(0, 2), (2, 3), (3, 7)])  # "Hi", ".", " You"
    [1, 2]
    ```
    """
    if spans and not offsets:
        raise ValueError(f"There are {len(spans)} sentences, but no tokens.")
    ends: list[int] = []
    token = 0
    for _, end in spans:
        while token < len(offsets) and _first_character(text, *offsets[token]) < end:
            token += 1
        # Before its first token: the text starts with whitespace that a later sentence's token writes.
        ends.append(max(token - 1, 0))
    if ends:
        ends[-1] = len(offsets) - 1
    return ends


def transfer(
    sentences: SentenceTokens, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]
) -> tuple[list[int], bool]:
    """
    Transfers sentences to tokens of another tokenizer: returns the position in `ids` of the token that ends each
    sentence, and whether the ids write the text of the sentences. If they do not, positions are approximate.
    """
    text, offsets = decode_with_offsets(tokenizer, ids)
    # Templates and tokenizers differ in whitespace: positions are matched by the number of other characters before.
    visible = [position for position, character in enumerate(text) if not character.isspace()]
    pieces = ["".join(sentences.text[start:end].split()) for start, end in sentences.spans[:-1]]
    ends = [visible[count] if count < len(visible) else len(text) for count in accumulate(map(len, pieces))]
    tokens = last_tokens(text, list(zip([0, *ends], [*ends, len(text)], strict=True)), offsets)
    return tokens, "".join(text.split()).startswith("".join(pieces))


def token_segments(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], segmenter: Segmenter) -> Tensor:
    """
    Sentence index of each token of a completion: shape `(H,)`, int64, never decreasing, from 0. See [`last_tokens`].
    Special tokens, such as EOS, are hidden from the segmenter, and belong to the sentence of the token before them.
    """
    special = special_token_ids(tokenizer)
    written = [position for position, token_id in enumerate(ids) if token_id not in special]
    text, offsets = decode_with_offsets(tokenizer, [ids[position] for position in written])
    spans = segmenter(text)
    check_tiling(text, spans)
    starts = torch.zeros(len(ids), dtype=torch.int64)  # 1 at the first written token of each sentence but the first
    starts[[written[token + 1] for token in last_tokens(text, spans, offsets) if token + 1 < len(written)]] = 1
    return starts.cumsum(0)


def _first_character(text: str, start: int, end: int) -> int:
    """Position of the first character that is not whitespace; `start` if there is none."""
    visible = text[start:end].lstrip()
    return end - len(visible) if visible else start


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """First and last position of each run of consecutive positions."""
    given = set(positions)
    firsts, lasts = ([p for p in positions if p + step not in given] for step in (-1, 1))
    return list(zip(firsts, lasts, strict=True))
