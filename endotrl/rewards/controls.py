# SPDX-License-Identifier: Apache-2.0
"""
Control rewards: what a reward must beat. On some base models even a random reward raises benchmark accuracy
(https://huggingface.co/papers/2506.10947), so a gain counts only next to the gain of these.
"""

import random
from typing import Any


class RandomReward:
    """
    A reward drawn from U(0, 1), whatever the completion.

    Args:
        seed (`int`, *optional*, defaults to `0`):
            Seed of the draws. Give every process its own in distributed training.

    Example:
    ```python
    >>> from endotrl.rewards import RandomReward

    >>> [round(x, 3) for x in RandomReward(seed=0)(prompts=["a", "b"], completions=["c", "d"])]
    [0.844, 0.758]
    ```
    """

    def __init__(self, seed: int = 0) -> None:
        self.__name__ = "random_reward"
        self._random = random.Random(seed)

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        """Returns one draw a completion."""
        return [self._random.random() for _ in completions]


class LengthReward:
    """
    Minus the length of a completion: shorter wins, the bias that a sum of log-probabilities has.

    Args:
        prefer (`str`, *optional*, defaults to `"short"`):
            `"short"` or `"long"`.

    Raises:
        `ValueError`: If `prefer` is neither.

    Example:
    ```python
    >>> from endotrl.rewards import LengthReward

    >>> LengthReward()(prompts=["a"], completions=["b c"], completion_ids=[[5, 6, 7]])
    [-3.0]
    ```
    """

    def __init__(self, prefer: str = "short") -> None:
        if prefer not in ("short", "long"):
            raise ValueError(f'`prefer` is {prefer!r}, but it must be "short" or "long".')
        self.__name__ = f"{prefer}_length_reward"
        self._sign = -1.0 if prefer == "short" else 1.0

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        """Returns the length in tokens, with its sign."""
        return [self._sign * len(ids) for ids in completion_ids]
