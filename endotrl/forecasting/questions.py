# SPDX-License-Identifier: Apache-2.0
"""Questions of a forecast, with or without accepted answers, and graders."""

import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.sources import Row, read_rows, text_only
from ..evaluation.math_answers import ANSWER_KEYS, QUESTION_KEYS, with_body
from ..grading import is_right, require_math_verify, same_answer
from ..rendering.messages import Prompt


Grade = Callable[[str, Any], float]


@dataclass(frozen=True)
class Question:
    """A prompt, as a policy would be trained on it, and what graders compare with."""

    id: str  # the row's own, or its place
    prompt: Prompt
    answer: Any = None  # an answer, or a list of accepted ones

    @property
    def key(self) -> str:
        """Digest by which the question is known again."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer], default=str).encode()).hexdigest()[:20]


def read_questions(
    data: str | Iterable[Any],
    question: str | None = None,
    answer: str | None = None,
    limit: int | None = None,
    instruction: str = "",
    chat: bool = False,
) -> list[Question]:
    """
    Questions of files, a dataset on the hub, or objects.

    Args:
        data (`str` or `Iterable`):
            As `--data` of `endotrl eval` (see [`read_rows`]); or rows: dictionaries, such as a
            [`~datasets.Dataset`] has, or prompts.
        question (`str`, *optional*), answer (`str`, *optional*):
            Keys. By default the first that a row has of `question`, `problem`, `input`, `prompt`, and of `answer`,
            `answers`, `final_answer`, `target`, `solution`; without any of these, the questions have no labels.
        limit (`int`, *optional*):
            Only the first questions.
        instruction (`str`, *optional*):
            What is added to each question that is text, in a line of its own.
        chat (`bool`, *optional*, defaults to `False`):
            Whether a question that is text is the message of a user; `False` to continue it, as TRL does.

    Raises:
        `FormatError`: If a row has no question, or only some have answers.
        `ValueError`: If there is no such file, or no question.
    """
    rows = text_only(read_rows(data, None, "forecast") if isinstance(data, str) else _rows(data))
    questions: list[Question] = []
    for row in rows:
        name = question or next((key for key in QUESTION_KEYS if row.data.get(key) is not None), None)
        if name is None:
            raise row.error(f"there is no question: none of the keys {', '.join(QUESTION_KEYS)}. Name its key.")
        prompt = row.get(name)
        if isinstance(prompt, str):
            prompt = with_body(row, row.text(name)) if question is None else row.text(name)
            prompt = f"{prompt}\n{instruction}" if instruction else prompt
            prompt = [{"role": "user", "content": prompt}] if chat else prompt
        keys = [answer] if answer else [key for key in ("answer", "answers", *ANSWER_KEYS) if key != name]
        right = row.get(answer) if answer else next((row.data[k] for k in keys if row.data.get(k) is not None), None)
        if questions and (right is None) != (questions[0].answer is None):
            raise row.error(f"the answer is missing here, or in {questions[0].id}: label all questions, or none.")
        questions.append(Question(row.name("id", "idx"), prompt, right))
        if limit is not None and len(questions) == limit:
            break
    if not questions:
        raise ValueError("There are no questions.")
    return questions


def _rows(data: Iterable[Any]) -> Iterable[Row]:
    for number, row in enumerate(data, start=1):
        yield Row(dict(row) if isinstance(row, Mapping) else {"prompt": row}, "questions", f"row {number}", "question")


@dataclass(frozen=True)
class Grader:
    """
    Whether completions are right, and which of them give the same answer.

    Args:
        name (`str` or `Callable`):
            `"math"`: [`is_right`] with math-verify; `"text"`: the same without; `"exact"`: the completion is the
            answer, but for white space around it; a function of a completion and the question's answer, or its
            `FILE.py:NAME`.

    Raises:
        `ValueError`: If there is no such grader. `ImportError`: If it needs math-verify, which is not installed.
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
            return [float(self.name(text, answer)) for text in completions]
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


def _load(name: str) -> Grade:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(
            f"The grader is {name!r}, but it must be math, text, exact, or FILE.py:NAME, a function of a completion "
            "and the answer of its question."
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None and spec.loader is not None  # of a file that ends with .py
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ValueError(f"{path} has no function {function!r} for a grader.")
    return getattr(module, function)
