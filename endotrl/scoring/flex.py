# SPDX-License-Identifier: Apache-2.0
"""Attention of a packed row by FlexAttention: one kernel, which skips what no token of a block sees."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from .forward_pass import compiled
from .packing import PackedRow


# Queries and keys of a block of the mask: FlexAttention's own default.
BLOCK = 128
# Shapes for which the kernel may be compiled: lengths are powers of two, so one model has no more than about ten.
MAX_COMPILED = 64


def has_flex_attention(query: Tensor) -> bool:
    """Whether Triton can compile the kernel: heads of 16 or wider on a GPU of compute capability 8.0 or newer."""
    return query.is_cuda and query.shape[-1] >= 16 and torch.cuda.get_device_capability(query.device) >= (8, 0)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """As [`~kernels.attend`]. Compiled once per power of two of the row's length, to which it is padded."""
    num_tokens = query.shape[2]
    length = max(BLOCK, 2 ** math.ceil(math.log2(num_tokens)))
    mask = row.kept(("flex", query.device), lambda: block_mask(row, length, query.device))
    query, key, value = (pad(states, (0, 0, 0, length - num_tokens)) for states in (query, key, value))
    with compiled(), torch._dynamo.config.patch(recompile_limit=MAX_COMPILED):
        output = _kernel()(
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
    return output[:, :, :num_tokens].transpose(1, 2)


@cache
def _kernel() -> Callable[..., Tensor]:
    # Imported late: it takes a second.
    from torch.nn.attention.flex_attention import flex_attention as kernel

    # The whole graph: without it, a shape too many would quietly get all scores at once.
    return torch.compile(kernel, dynamic=False, fullgraph=True)


def block_mask(row: PackedRow, length: int, device: torch.device) -> Any:
    """
    FlexAttention's `BlockMask` of a row that is padded to `length` tokens, a multiple of [`BLOCK`]. Made from the
    spans, as the pairs of 32,768 tokens would take a gigabyte.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # A token sees two ranges: [prompt start, prompt end), and [own start, itself]. Padding sees nothing.
    own, start, end = torch.full((length,), length), torch.zeros(length), torch.zeros(length)
    for first, prompt_end, continuations in row.spans:
        own[first:prompt_end] = first
        for begin, stop in continuations:
            own[begin:stop], start[begin:stop], end[begin:stop] = begin, first, prompt_end
    own, start, end = (bounds.to(device, torch.int32) for bounds in (own, start, end))

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k >= own[q]) | ((k >= start[q]) & (k < end[q])))

    edges = torch.arange(0, length + 1, BLOCK, dtype=torch.int32, device=device)
    past = torch.arange(1, length + 1, dtype=torch.int32, device=device)

    def seen(first: Tensor, stop: Tensor) -> Tensor:
        """Pairs of a block of queries and one of keys in ranges of `N` queries, of shape `(N / BLOCK, blocks)`."""
        upper = torch.minimum(stop[:, None], edges[None, 1:])
        keys = (upper - torch.maximum(first[:, None], edges[None, :-1])).clamp_(min=0)
        return keys.unflatten(0, (-1, BLOCK)).sum(dim=1)

    parts = zip(*(bounds.split(32 * BLOCK) for bounds in (start, end, own, past)), strict=True)  # bounds the memory
    pairs = torch.cat([seen(first, stop) + seen(begin, after) for first, stop, begin, after in parts])
    full = pairs == BLOCK * BLOCK
    (num_partial, partial), (num_full, whole) = (
        (
            chosen.sum(dim=-1, dtype=torch.int32)[None, None],
            chosen.int().argsort(dim=-1, descending=True, stable=True).int()[None, None],
        )
        for chosen in ((pairs > 0) & ~full, full)
    )
    return BlockMask.from_kv_blocks(num_partial, partial, num_full, whole, BLOCK_SIZE=BLOCK, mask_mod=visible)
