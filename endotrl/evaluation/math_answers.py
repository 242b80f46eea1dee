# SPDX-License-Identifier: Apache-2.0
"""Questions with known answers, from local files."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..data.sources import Row, read_rows
from ..grading import final_answer


QUESTION_KEYS = ("question", "problem", "input", "prompt", "Question")
ANSWER_KEYS = ("answer", "final_answer", "target", "Answer", "solution")


@dataclass(frozen=True)
class Question:
    """A question with its right answer, as LaTeX or a number."""

    id: str
    text: str
    answer: str

    @property
    def key(self) -> str:
        """Digest by which the question is known again."""
        return hashlib.sha256(json.dumps([self.text, self.answer]).encode()).hexdigest()[:20]


def read_questions(
    path: str, question: str | None = None, answer: str | None = None, limit: int | None = None
) -> list[Question]:
    r"""
    Questions of whatever [`~endotrl.data.sources.Reader`] reads, by default from the first key that a row has of
    `question`, `problem`, `input`, `prompt`, and answers of `answer`, `final_answer`, `target`, `solution`. A text
    `Body` (SVAMP) goes before the question. Of an answer, what follows `####` (GSM8K) or stands in the last `\boxed{}`
    counts.
    """
    questions = []
    for row in read_rows(path):
        text = row.text(question or _first_key(row, QUESTION_KEYS, "question"))
        if question is None and isinstance(row.data.get("Body"), str):
            text = f"{row.data['Body'].rstrip('. ')}. {text}"
        gold = final_answer(row.get(answer or _first_key(row, ANSWER_KEYS, "answer")))
        if not gold:
            raise row.error("the answer is empty.")
        questions.append(Question(row.name("id", "idx", "ID"), text, gold))
        if limit is not None and len(questions) == limit:
            break
    return questions


def _first_key(row: Row, keys: Sequence[str], what: str) -> str:
    for key in keys:
        if row.data.get(key) is not None:
            return key
    raise row.error(f"there is no {what}: none of the keys {', '.join(keys)}. Name the key with --{what}.")
