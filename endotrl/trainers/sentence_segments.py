# SPDX-License-Identifier: Apache-2.0
"""Which sentence each token of a completion belongs to."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..credit import segment_ids_from_ends
from ..rendering.offsets import decode_with_offsets
from ..rendering.policy_tokens import special_token_ids
from ..sentence.segmentation import Segmenter, check_tiling
from ..sentence.tokens import last_tokens


def token_segments(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], segmenter: Segmenter) -> Tensor:
    """
    Index of the sentence of each token of a completion: shape `(H,)`, int64, never decreasing, from 0. See
    [`last_tokens`]. Special tokens, such as EOS, are kept from the segmenter, and belong to the sentence of the token
    before them.
    """
    special = special_token_ids(tokenizer)
    written = [position for position, token_id in enumerate(ids) if token_id not in special]
    text, offsets = decode_with_offsets(tokenizer, [ids[position] for position in written])
    spans = segmenter(text)
    check_tiling(text, spans)
    ends = torch.zeros(1, len(ids), dtype=torch.bool)
    # All but the last end: what follows the last written token belongs with it.
    ends[0, [written[token] for token in last_tokens(text, spans, offsets)[:-1]]] = True
    segments = segment_ids_from_ends(ends)[0]
    for position, token_id in enumerate(ids):
        if token_id in special and position > 0:
            segments[position] = segments[position - 1]
    return segments
