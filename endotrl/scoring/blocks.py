# SPDX-License-Identifier: Apache-2.0
"""Attention of a packed row by `scaled_dot_product_attention`, sequence by sequence: on any device, in any dtype."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .packed_row import PackedRow


# CPU kernels of `scaled_dot_product_attention` take about half the time if the number of keys is a multiple of it.
KEY_MULTIPLE = 32
# Queries for which one mask is made: bounds a mask to 1024 times the length of the sequence.
QUERY_BLOCK = 1024
# Masks are the same in every layer and are kept for all of them, up to this many elements (64 MB in bfloat16).
KEPT_MASK_ELEMENTS = 2**25


def block_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """As [`~kernels.attend`]."""
    # On CUDA, attention with a mask has no kernel for grouped queries.
    grouped = query.device.type == "cpu"
    if not grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Laid out as it is returned, so that nothing is copied at the end.
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)

    def attend(queries: slice, seen: list[slice], first_visible: int | None) -> None:
        """One call of the kernel; causal without `first_visible`, which is the number of keys the first query sees."""
        count = sum(part.stop - part.start for part in seen)
        padding = -count % KEY_MULTIPLE
        mask = None
        if first_visible is not None:
            mask = visible_keys(row, queries.stop - queries.start, first_visible, count + padding, query)
        output[:, :, queries] = scaled_dot_product_attention(
            query[:, :, queries],
            _join(key, seen, padding),
            _join(value, seen, padding),
            attn_mask=mask,
            # It hides the padding, which comes after all queries.
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )

    for start, prompt_end, continuations in row.spans:
        if len(continuations) == 1:
            whole = slice(start, continuations[0][1])
            attend(whole, [whole], first_visible=None)
            continue
        prompt = slice(start, prompt_end)
        attend(prompt, [prompt], first_visible=None)
        for first, end in continuations:
            for block_start in range(first, end, QUERY_BLOCK):
                block_end = min(block_start + QUERY_BLOCK, end)
                seen_before = prompt_end - start + block_start - first
                attend(slice(block_start, block_end), [prompt, slice(first, block_end)], first_visible=seen_before + 1)
    return output.transpose(1, 2)


def visible_keys(row: PackedRow, num_queries: int, first_visible: int, num_keys: int, like: Tensor) -> Tensor:
    """Additive mask of shape `(num_queries, num_keys)`: query `i` sees the first `first_visible + i` keys."""
    masks: dict[object, Tensor] = row.kept("masks", dict)
    key = (num_queries, first_visible, num_keys, like.device)  # layers may be spread over devices
    if key in masks:
        return masks[key]
    visible = torch.arange(first_visible, first_visible + num_queries, device=like.device)
    hidden = torch.arange(num_keys, device=like.device)[None] >= visible[:, None]
    mask = like.new_zeros(num_queries, num_keys).masked_fill_(hidden, -torch.inf)
    if sum(kept.numel() for kept in masks.values()) + mask.numel() <= KEPT_MASK_ELEMENTS:
        masks[key] = mask
    return mask


def _join(states: Tensor, parts: list[slice], padding: int) -> Tensor:
    """Parts of the keys or values one after another, and zeros."""
    zeros = states.new_zeros(*states.shape[:2], padding, states.shape[-1])
    return torch.cat([*(states[:, :, part] for part in parts), zeros], dim=2)
