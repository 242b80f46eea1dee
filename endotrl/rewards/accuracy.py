# SPDX-License-Identifier: Apache-2.0
"""Accuracy against known answers: to be looked at beside a reward, or a reward itself."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ..scoring.messages import text_of


def is_right(completion: str, answers: Sequence[str]) -> bool:
    """Whether an accepted answer occurs in the completion as whole words, ignoring case."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", completion, re.IGNORECASE) for answer in answers)


class AccuracyReward:
    """
    1.0 for a right answer, 0.0 for a wrong one.

    Args:
        column (`str`):
            Column of the dataset with the right answer, or a list of accepted ones.
        math (`bool`, *optional*, defaults to `False`):
            Whether to compare by math-verify, as TRL's `accuracy_reward` does: the completion must have its answer in
            LaTeX. Answers that are no mathematical expression are matched as text. If `False`, all are: an accepted
            answer must occur as whole words, in any case.

    Raises:
        `ImportError`: If `math=True`, and math-verify is not installed.
        `ValueError`: When called, if the dataset has no such column.

    Example:
    ```python
    >>> from endotrl.rewards import AccuracyReward

    >>> accuracy = AccuracyReward("capital")
    >>> accuracy(completions=["It is Paris.", "It is Parisian."], capital=["Paris", "Paris"])
    [1.0, 0.0]
    ```
    """

    def __init__(self, column: str, math: bool = False) -> None:
        if math and find_spec("math_verify") is None:
            raise ImportError(
                "Accuracy by math-verify needs the package `math-verify`, which is not installed. Install it with "
                "`pip install 'endotrl[eval]'`, or match answers as text."
            )
        self.__name__ = "accuracy"
        self.column, self.math = column, math

    def __call__(self, completions: list[Any], **columns: Any) -> list[float]:
        """Returns one number a completion. `columns` has the dataset's columns."""
        if self.column not in columns:
            raise ValueError(
                f"The reward compares with the column {self.column!r}, which the dataset does not have. It has "
                f"{sorted(columns)}."
            )
        texts = [text_of(completion) for completion in completions]
        answers = [[str(a) for a in (given if isinstance(given, list) else [given])] for given in columns[self.column]]
        if not self.math:
            return [float(is_right(text, accepted)) for text, accepted in zip(texts, answers, strict=True)]
        from trl.rewards import accuracy_reward

        rewards = []
        for text, accepted in zip(texts, answers, strict=True):
            verdicts = accuracy_reward([[{"role": "assistant", "content": text}]] * len(accepted), accepted)
            rewards.append(
                max(
                    float(is_right(text, [answer])) if verdict is None else verdict
                    for verdict, answer in zip(verdicts, accepted, strict=True)
                )
            )
        return rewards
