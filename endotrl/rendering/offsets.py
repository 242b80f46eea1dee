# SPDX-License-Identifier: Apache-2.0
"""Character offsets of tokens."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def decode_with_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """
    Text of token ids, including special tokens, and the characters `(start, end)` of each token, which tile the text.
    A token that ends inside a character (a byte of an emoji) has an empty span; the one that completes it gets all of
    it.
    """

    def decode(start: int, end: int) -> str:
        return tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    text, offsets = "", []
    # Decoding needs a little context on the left (a leading space belongs to a word only inside a text): a window from
    # `context` to `done`, which is already written.
    context = done = 0
    for end in range(1, len(ids) + 1):
        window = decode(context, end)
        if window.endswith("\ufffd") and end < len(ids):
            offsets.append((len(text), len(text)))
            continue
        piece = window[len(decode(context, done)) :]
        offsets.append((len(text), len(text) + len(piece)))
        text += piece
        context, done = done, end
    return text, offsets
