# SPDX-License-Identifier: Apache-2.0
"""Questions with or without reference answers, from files or objects."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

from ..data.sources import Row, read_rows, text_only
from ..grading import accepted_answers, final_answer
from ..rendering.messages import Prompt


QUESTION_KEYS = ("question", "problem", "input", "prompt", "Question")
ANSWER_KEYS = ("answer", "answers", "final_answer", "target", "Answer", "solution")


@dataclass(frozen=True)
class Question:
    """A prompt and its reference for graders: an answer, a list of accepted ones, or `None`."""

    id: str  # the row's own, or its place
    prompt: Prompt
    answer: Any = None

    @property
    def key(self) -> str:
        """Digest that identifies the question."""
        return hashlib.sha256(json.dumps([self.prompt, self.answer], default=str).encode()).hexdigest()[:20]


def read_questions(
    data: str | Iterable[Any],  # as `--data` of `endotrl eval`, or rows: dictionaries (of a dataset), or prompts
    question: str | None = None,  # key; by default the first of [`QUESTION_KEYS`] in a row
    answer: str | None = None,  # key; by default the first of [`ANSWER_KEYS`] in a row
    limit: int | None = None,  # only the first questions
    instruction: str = "",  # added to each text question, on a line of its own
    chat: bool = False,  # a text question is a user message; `False` to continue it, as TRL does
    labelled: bool = False,  # each is text or one message, with answers: after `####`, or in the last `\boxed{}`
) -> list[Question]:
    """
    Reads questions from files, a dataset on the hub, or objects. A text `Body` (SVAMP) goes before the question.
    Raises `ValueError` if there are none, a row has none, or only some rows have answers, and `TypeError` for one row.
    """
    if isinstance(data, Mapping):
        raise TypeError(f"`questions` must be rows, such as a dataset or a list, got a single row: {data!r}.")
    rows = text_only(read_rows(data) if isinstance(data, str) else map(_row, data, count(1)))
    questions: list[Question] = []
    for row in rows:
        name = question or _first_key(row, QUESTION_KEYS)
        if name is None:
            raise row.error(f"the question is not in {', '.join(QUESTION_KEYS)}. Pass its key as `question`.")
        prompt = row.get(name)
        if not isinstance(prompt, str | list):
            raise row.error(f"{json.dumps(name)} must be text or a list of messages, got {prompt!r}.")
        if labelled:
            match prompt:
                case [{"role": "user", "content": str() as text}]:  # as in TRL's conversational datasets
                    row.data[name] = text
            prompt = row.text(name)
        if isinstance(prompt, str):
            prompt = row.text(name)  # checks that it is not empty
            body = row.data.get("Body")
            if question is None and isinstance(body, str):
                prompt = f"{body.rstrip('. ')}. {prompt}"
            prompt = f"{prompt}\n{instruction}" if instruction else prompt
            prompt = [{"role": "user", "content": prompt}] if chat else prompt
        key = answer or _first_key(row, [key for key in ANSWER_KEYS if key != name])
        right = None if key is None else row.get(key)
        if isinstance(right, float) and not math.isfinite(right):
            raise row.error(f"{json.dumps(key)} must be text or a finite number, got {right}.")
        if labelled and key is None:
            raise row.error(f"the answer is not in {', '.join(ANSWER_KEYS)}. Pass its key as `answer`.")
        if labelled and right is not None:
            right = _labels(row, right)
        if right in ("", []):
            raise row.error("the answer is empty.")
        if questions and (right is None) != (questions[0].answer is None):
            raise row.error(f"either this question or {questions[0].id} has no answer. Label all questions, or none.")
        questions.append(Question(row.name("id", "idx", "ID"), prompt, right))
        if len(questions) == limit:
            break
    if not questions:
        raise ValueError("The data has no questions.")
    return questions


def _first_key(row: Row, keys: Iterable[str]) -> str | None:
    return next((key for key in keys if row.data.get(key) is not None), None)


def _labels(row: Row, given: Any) -> str | list[str]:
    """The answer, or several accepted ones, from a data set's answer field."""
    try:
        answers = list(filter(None, map(final_answer, accepted_answers(given))))
    except ValueError as error:
        raise row.error(str(error)) from error
    return answers if len(answers) > 1 else "".join(answers)


def _row(given: Any, number: int) -> Row:
    data = dict(given) if isinstance(given, Mapping) else {"prompt": given}
    return Row(data, "questions", f"row {number}", "question")
