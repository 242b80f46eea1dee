# SPDX-License-Identifier: Apache-2.0
"""Micro-batches by token budget."""

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """
    Groups sequences of similar length into micro-batches whose padded size stays within a budget.

    Sequences are taken from the longest to the shortest, so that little is padded and the largest batch comes first: if
    memory does not suffice, it shows at once. A sequence longer than the budget makes a batch of its own.

    Args:
        lengths (`Sequence[int]`):
            Length of every sequence, in tokens.
        max_tokens (`int`):
            Budget: rows times the longest length of a batch, in tokens.

    Returns:
        `list[list[int]]`: indices into `lengths`, each exactly once. Depends on the lengths only.

    Raises:
        `ValueError`: If `max_tokens` is less than 1.

    Example:
    ```python
    >>> from endotrl.scoring.batching import plan_batches

    >>> plan_batches([3, 10, 4, 9], max_tokens=20)
    [[1, 3], [2, 0]]
    ```
    """
    if max_tokens < 1:
        raise ValueError(f"`max_tokens_per_batch` is {max_tokens}, but a micro-batch must hold at least one token.")
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        # The first of a batch is its longest.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= max_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
