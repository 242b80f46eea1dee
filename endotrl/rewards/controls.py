# SPDX-License-Identifier: Apache-2.0
"""
Control rewards: baselines for another reward. On some base models, even a random reward raises benchmark accuracy
(https://huggingface.co/papers/2506.10947), so a gain only means something relative to theirs.
"""

import random
import re
from typing import Any

from ..checks import check_choice
from ..rendering.messages import text_of


class RandomReward:
    """Random reward from U(0, 1), whatever the completion. Give every process of a run its own `seed`."""

    def __init__(self, seed: int = 0) -> None:
        self.__name__ = "random_reward"
        self._random = random.Random(seed)

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        """One draw per completion."""
        return [self._random.random() for _ in completions]

    def state_dict(self) -> dict[str, Any]:
        """State of the random generator, for checkpoints."""
        return {"random": self._random.getstate()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the random generator from a `state_dict`."""
        self._random.setstate(state_dict["random"])


class LengthReward:
    """
    Minus the length of a completion in tokens: shorter wins, the bias of a sum of log-probabilities; or, with
    `prefer="long"`, the length.
    """

    def __init__(self, prefer: str = "short") -> None:
        check_choice("prefer", prefer, ("short", "long"))
        self.__name__ = f"{prefer}_length_reward"
        self._sign = -1.0 if prefer == "short" else 1.0

    def __call__(
        self, prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **kwargs: Any
    ) -> list[float]:
        """Signed length in tokens, per completion."""
        return [self._sign * len(ids) for ids in completion_ids]


class FormatReward:
    r"""
    1.0 for a completion that matches a pattern, and 0.0 otherwise: a model's gain by form alone. The default, a
    non-empty `\boxed{...}`, is the format reward of https://huggingface.co/papers/2506.10947. `pattern` is a regular
    expression that is searched for in the last message; `.` matches line breaks too.

    Example:
    ```python
    >>> from endotrl.rewards import FormatReward

    >>> FormatReward(r"^[A-Z].*\.$")(prompts=["a", "a"], completions=["It is Paris.", "it is Paris"])
    [1.0, 0.0]
    ```
    """

    BOXED = r"\\boxed\{[^{}]*[^{}\s]"

    def __init__(self, pattern: str = BOXED) -> None:
        try:
            self._pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise ValueError(f"`pattern` must be a regular expression, got {pattern!r}: {error}.") from error
        self.__name__ = "format_reward"

    def __call__(self, prompts: list[Any], completions: list[Any], **kwargs: Any) -> list[float]:
        """1.0 or 0.0 per completion."""
        return [float(self._pattern.search(text_of(completion)) is not None) for completion in completions]
