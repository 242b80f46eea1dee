# SPDX-License-Identifier: Apache-2.0
"""Micro-batches by token budget, and their padding."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def plan_batches(lengths: Sequence[int], max_tokens: int, kinds: Sequence[Hashable] | None = None) -> list[list[int]]:
    """
    Groups sequences of similar length into micro-batches whose padded size stays within a budget.

    Sequences are taken from the longest to the shortest, so that little is padded and the largest batch comes first:
    if memory does not suffice, it shows at once. A sequence longer than the budget makes a batch of its own.

    Args:
        lengths (`Sequence[int]`):
            Length of every sequence, in tokens.
        max_tokens (`int`):
            Budget: rows times the longest length of a batch, in tokens.
        kinds (`Sequence[Hashable]`, *optional*):
            Kind of every sequence. Sequences of different kinds are not batched together.

    Returns:
        `list[list[int]]`: indices into `lengths`, each exactly once. Depends on lengths and kinds only.

    Raises:
        `ValueError`: If `max_tokens` is less than 1.

    Example:
    ```python
    >>> from endotrl.scoring.batching import plan_batches

    >>> plan_batches([3, 10, 4, 9], max_tokens=20)
    [[1, 3], [2, 0]]
    ```
    """
    _check_budget(max_tokens)
    batches: list[list[int]] = []
    last: dict[Hashable, list[int]] = {}  # batch of each kind
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
    """
    Padding of token ids.

    Args:
        rows (`Sequence[Sequence[int]]`):
            Token ids of every row.
        pad_token_id (`int`, *optional*, defaults to `0`):
            Fills the rows, on the right, or with `left` on the left.
        left (`bool`, *optional*, defaults to `False`):
            See `pad_token_id`.
        multiple (`int`, *optional*, defaults to `1`):
            The width is a multiple of it.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `(B, T)`: `input_ids` and `attention_mask`, 1 for tokens.
    """
    width = -(-max(map(len, rows)) // multiple) * multiple
    input_ids = torch.full((len(rows), width), pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        input_ids[i, place] = torch.tensor(row, dtype=torch.long)
        attention_mask[i, place] = 1
    return input_ids, attention_mask


def plan_packs(
    prompt_lengths: Sequence[int], continuation_lengths: Sequence[Sequence[int]], max_tokens: int
) -> list[list[tuple[int, list[int]]]]:
    """
    Groups prompts with their continuations into micro-batches of at most `max_tokens` tokens, in which every prompt
    counts once. The continuations of a prompt that do not fit together are spread over several micro-batches, each
    with the prompt. A single continuation that does not fit makes a micro-batch of its own. The largest come first, as
    in
    [`plan_batches`].

    Args:
        prompt_lengths (`Sequence[int]`):
            Length of every prompt, in tokens.
        continuation_lengths (`Sequence[Sequence[int]]`):
            For every prompt, the length of each of its continuations.
        max_tokens (`int`):
            Budget of a micro-batch, in tokens.

    Returns:
        `list[list[tuple[int, list[int]]]]`: micro-batches of (index of the prompt, indices of its continuations).
        Depends on the lengths only.

    Raises:
        `ValueError`: If `max_tokens` is less than 1.

    Example:
    ```python
    >>> from endotrl.scoring.batching import plan_packs

    >>> plan_packs([4, 2], [[3, 5, 3], [1]], max_tokens=12)
    [[(0, [1, 0])], [(0, [2]), (1, [0])]]
    ```
    """
    _check_budget(max_tokens)
    pieces: list[tuple[int, int, list[int]]] = []  # (tokens, prompt, continuations)
    for prompt, lengths in enumerate(continuation_lengths):
        size = prompt_lengths[prompt]
        members: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            if members and size + lengths[index] > max_tokens:
                pieces.append((size, prompt, members))
                size, members = prompt_lengths[prompt], []
            size += lengths[index]
            members.append(index)
        pieces.append((size, prompt, members))
    packs: list[list[tuple[int, list[int]]]] = []
    used = 0
    for size, prompt, members in sorted(pieces, key=lambda piece: (-piece[0], piece[1], piece[2])):
        if not packs or used + size > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append((prompt, members))
        used += size
    return packs


def _check_budget(max_tokens: int) -> None:
    if not isinstance(max_tokens, int | float) or max_tokens < 1:
        raise ValueError(f"`max_tokens_per_batch` is {max_tokens!r}, but a micro-batch must hold at least one token.")
