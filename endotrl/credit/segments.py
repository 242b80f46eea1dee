# SPDX-License-Identifier: Apache-2.0
"""
Token values per segment, such as a sentence: indices, sums, broadcast back to tokens.

`values`, `segment_ids` (int64, from 0) and `mask` (bool, `True` where the policy wrote the token) have shape `(B, T)`,
and `K` is the largest number of segments per row. Anything else raises `ValueError`.
"""

from typing import Literal

import torch
from torch import Tensor


def segment_ids_from_ends(ends: Tensor) -> Tensor:
    """
    Segment index of each token, from 0, of shape `(B, T)`, int64, from `ends`, bool: `True` at the last token of each
    segment. Tokens after the last end form one more segment.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import segment_ids_from_ends

    >>> segment_ids_from_ends(torch.tensor([[False, True, False, True, False]]))
    tensor([[0, 0, 1, 1, 2]])
    ```
    """
    return ends.long().cumsum(dim=1) - ends.long()


def sum_by_segment(values: Tensor, segment_ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """
    Sum of the token values, such as rewards, of each segment, and a mask, `True` for segments with at least one token
    of the policy: both of shape `(B, K)`.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import sum_by_segment

    >>> sum_by_segment(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, True]]))
    (tensor([[3., 4.]]), tensor([[True, True]]))
    ```
    """
    values = masked("values", values, mask)
    ids = _segments(segment_ids, mask)
    num_segments = int(ids.max()) + 1 if ids.numel() else 0
    sums = values.new_zeros(values.shape[0], num_segments).scatter_add_(1, ids, values)
    counts = torch.zeros_like(sums).scatter_add_(1, ids, mask.to(sums.dtype))
    return sums, counts > 0


def spread_over_segments(segment_values: Tensor, segment_ids: Tensor, mask: Tensor) -> Tensor:
    """
    Gives every token, of shape `(B, T)`, the value of its segment, of shape `(B, K)`.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import spread_over_segments

    >>> spread_over_segments(torch.tensor([[3.0, 4.0]]), torch.tensor([[0, 0, 1]]), torch.tensor([[True, True, True]]))
    tensor([[3., 3., 4.]])
    ```
    """
    ids = _segments(segment_ids, mask)
    num_segments = int(ids.max()) + 1 if ids.numel() else 0
    if segment_values.ndim != 2 or len(segment_values) != len(ids) or segment_values.shape[1] < num_segments:
        raise ValueError(
            f"`segment_values` has shape {tuple(segment_values.shape)}, but it must have a value for each of the "
            f"{num_segments} segments of the {len(ids)} completions."
        )
    return torch.where(mask, segment_values.gather(1, ids), 0.0)


def start_of_segment(values: Tensor, segment_ids: Tensor, mask: Tensor) -> Tensor:
    """
    Value, such as that of the state before it, at the first token of each segment that the policy wrote: of shape `(B,
    K)`, 0 for segments without such a token.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import start_of_segment

    >>> values, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[True, True, True]])
    >>> start_of_segment(values, torch.tensor([[0, 0, 1]]), mask)
    tensor([[1., 4.]])
    ```
    """
    values = masked("values", values, mask)
    starts, _ = sum_by_segment(torch.where(_at_end(segment_ids, mask, "first"), values, 0.0), segment_ids, mask)
    return starts


def pool_by_segment(values: Tensor, segment_ids: Tensor, mask: Tensor, at: Literal["last", "all"] = "last") -> Tensor:
    """
    Replaces token values, of shape `(B, T)`, by the sum of their segment: at `"last"`, the last token of the segment
    that the policy wrote, with 0 at the others, so that the completion's total is kept; or at `"all"` of its tokens.

    Example:
    ```python
    >>> import torch
    >>> from endotrl.credit import pool_by_segment

    >>> mask = torch.tensor([[True, True, True]])
    >>> pool_by_segment(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0, 0, 1]]), mask)
    tensor([[0., 3., 4.]])
    ```
    """
    if at not in ("last", "all"):
        raise ValueError(f'`at` is {at!r}, but it must be "last" or "all".')
    sums, _ = sum_by_segment(values, segment_ids, mask)
    pooled = spread_over_segments(sums, segment_ids, mask)
    if at == "all":
        return pooled
    return torch.where(_at_end(segment_ids, mask, "last"), pooled, 0.0)


def masked(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """`values` in float32, and 0 where `mask` is `False`."""
    if values.ndim != 2 or values.shape != mask.shape:
        raise ValueError(
            f"`{name}` has shape {tuple(values.shape)} and `mask` has shape {tuple(mask.shape)}, but both must have "
            "shape (completions, tokens)."
        )
    if mask.dtype != torch.bool:
        raise ValueError(f"`mask` is {mask.dtype}, but it must be bool: `True` where the policy wrote the token.")
    return torch.where(mask, values.float(), 0.0)


def _segments(segment_ids: Tensor, mask: Tensor) -> Tensor:
    """Segment index of each token, and 0 where `mask` is `False`, where ids are arbitrary."""
    dtypes = segment_ids.dtype, mask.dtype
    if segment_ids.shape != mask.shape or mask.ndim != 2 or dtypes != (torch.int64, torch.bool):
        raise ValueError(
            f"`segment_ids` is {segment_ids.dtype} of shape {tuple(segment_ids.shape)} and `mask` {mask.dtype} of "
            f"shape {tuple(mask.shape)}, but they must be int64 and bool, both of shape (completions, tokens)."
        )
    ids = torch.where(mask, segment_ids, 0)
    if ids.numel() and ids.min() < 0:
        raise ValueError(f"`segment_ids` contains {int(ids.min())}, but segments must be numbered from 0.")
    return ids


def _at_end(segment_ids: Tensor, mask: Tensor, end: Literal["first", "last"]) -> Tensor:
    """`True` at the first or the last token of each segment that the policy wrote."""
    positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    ids = _segments(segment_ids, mask)
    outside, reduce = (mask.shape[1], "amin") if end == "first" else (-1, "amax")
    num_segments = int(ids.max()) + 1 if ids.numel() else 0
    extreme = positions.new_full((len(mask), num_segments), outside).scatter_reduce(
        1, ids, torch.where(mask, positions, outside), reduce=reduce
    )
    return extreme.gather(1, ids) == positions
