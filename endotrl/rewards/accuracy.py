# SPDX-License-Identifier: Apache-2.0
"""Accuracy against reference answers, for logging next to a reward, or as a reward itself."""

from typing import Any

from ..grading import accepted_answers, is_right, require_math_verify
from ..rendering.messages import text_of


class AccuracyReward:
    r"""
    1.0 for a right final answer, 0.0 for a wrong one, `None` in rows without an answer: see
    [`~endotrl.grading.is_right`].

    Args:
        column (`str`):
            Column of the dataset with the right answer, or with a list of accepted answers. The answer of a solution
            is in `\boxed{}`, after `####` or after "the answer is".
        math (`bool`, *optional*, defaults to `False`):
            Whether to compare expressions that are not numbers by math-verify, which must be installed and knows that
            $(x+1)^2$ is $x^2+2x+1$. If `False`, they must be written alike.

    Example:
    ```python
    >>> from endotrl.rewards import AccuracyReward

    >>> accuracy = AccuracyReward("capital")
    >>> accuracy(completions=["It is Paris.", "It is not Paris."], capital=["Paris", "Paris"])
    [1.0, 0.0]
    ```
    """

    def __init__(self, column: str, math: bool = False) -> None:
        if math:
            require_math_verify()
        self.__name__ = "accuracy"
        self.column, self.math = column, math

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        """Returns one number per completion. `columns` has the dataset's columns."""
        if self.column not in columns:
            raise ValueError(
                f"`AccuracyReward` needs the column {self.column!r}, but the dataset only has {sorted(columns)}. Pass "
                "the name of the column with the right answers."
            )
        answers = list(map(accepted_answers, columns[self.column]))
        return [
            None if row in ([], [None], [""]) else float(is_right(text_of(completion), row, self.math))
            for completion, row in zip(completions, answers, strict=True)
        ]
