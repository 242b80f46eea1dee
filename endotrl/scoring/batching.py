# SPDX-License-Identifier: Apache-2.0
"""Micro-batches by token budget, and their padding."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def plan_batches(lengths: Sequence[int], max_tokens: int, kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
    """
    Plans micro-batches, as indices of sequences of similar length and of the same kind, whose padded size stays within
    a budget. A sequence longer than the budget gets a micro-batch of its own. The largest micro-batch comes first, so
    that running out of memory shows at once.
    """
    if not isinstance(max_tokens, int | float) or max_tokens < 1:
        raise ValueError(f"`max_tokens_per_batch` is {max_tokens!r}, but a micro-batch must hold at least one token.")
    batches: list[list[int]] = []
    last: dict[Hashable, list[int]] = {}  # batch per kind
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        kind = None if kinds is None else kinds[index]
        # The first of a batch is its longest.
        if kind in last and (len(last[kind]) + 1) * lengths[last[kind][0]] <= max_tokens:
            last[kind].append(index)
        else:
            last[kind] = [index]
            batches.append(last[kind])
    return batches


def pad_ids(
    rows: Sequence[Sequence[int]], pad_token_id: int = 0, left: bool = False, multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """`input_ids` and `attention_mask` (1 for tokens), `(B, T)`; `T` is a multiple of `multiple`."""
    width = -(-max(map(len, rows)) // multiple) * multiple
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        input_ids[i, place] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, place] = 1
    return input_ids, attention_mask
