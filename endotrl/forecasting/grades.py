# SPDX-License-Identifier: Apache-2.0
"""What says whether a completion is right."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..grading import is_right, require_math_verify, same_answer


Grade = Callable[[str, Any], float]


@dataclass(frozen=True)
class Grader:
    """
    Whether completions are right, and which of them give the same answer. By its `name`: `"math"`, [`is_right`] with
    math-verify; `"text"`, the same without; `"exact"`, the completion is the answer, but for white space around it; a
    function of a completion and the question's answer, or its `FILE.py:NAME`. Raises `ValueError` if there is no such
    grader, and `ImportError` if it needs math-verify, which is not installed.
    """

    name: str | Grade

    def __post_init__(self) -> None:
        if self.name == "math":
            require_math_verify()
        elif not callable(self.name) and self.name not in ("text", "exact"):
            object.__setattr__(self, "name", _load(self.name))

    def grade(self, completions: Sequence[str], answer: Any) -> list[float]:
        """1.0 for right, 0.0 for wrong, per completion."""
        if callable(self.name):
            return [_graded(self.name, text, answer) for text in completions]
        answers = list(answer) if isinstance(answer, Sequence) and not isinstance(answer, str) else [answer]
        if self.name == "exact":
            accepted = {str(right).strip() for right in answers}
            return [float(text.strip() in accepted) for text in completions]
        return [float(is_right(text, answers, math=self.name == "math")) for text in completions]

    def groups(self, completions: Sequence[str]) -> list[int]:
        """For each completion, the index of the first that gives the same answer."""
        if self.name in ("math", "text"):
            return same_answer(completions, math=self.name == "math")
        texts = [text.strip() for text in completions]
        return [texts.index(text) for text in texts]


def _graded(grade: Grade, text: str, answer: Any) -> float:
    try:
        value = float(grade(text, answer))
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"The grader fails on the completion {text!r} and the answer {answer!r}: {failed}."
        ) from error
    if not 0.0 <= value <= 1.0:  # nor is NaN
        raise ValueError(f"The grader gives {value} to {text!r}, but a grade is a number from 0, wrong, to 1, right.")
    return value


def _load(name: str) -> Grade:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"The grader is {name!r}, but must be math, text, exact, or FILE.py:NAME of a function.")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None  # of a file that ends with .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}.") from error
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{path} has no function {function!r} for a grader.")
    return getattr(module, function)
