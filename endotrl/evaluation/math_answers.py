# SPDX-License-Identifier: Apache-2.0
"""Maths questions from local files, and whether an answer is right (math-verify)."""

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sources import Row, read_file


QUESTION_KEYS = ("question", "problem", "input", "prompt", "Question")
ANSWER_KEYS = ("answer", "final_answer", "target", "Answer", "solution")


@dataclass(frozen=True)
class Question:
    """
    A question with its right answer.

    Attributes:
        id (`str`):
            The row's own id, or its place.
        text (`str`):
            The question.
        answer (`str`):
            The right answer, as LaTeX or a number.
    """

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
    """
    Questions of a file.

    Args:
        path (`str`):
            JSON Lines, JSON or Parquet file.
        question (`str`, *optional*), answer (`str`, *optional*):
            Keys. By default the first that a row has of `question`, `problem`, `input`, `prompt` and of `answer`,
            `final_answer`, `target`, `solution`. A text `Body` (SVAMP) goes before the question. Of an answer, what follows
            `####` (GSM8K) or stands in the last `\\boxed{}` counts.
        limit (`int`, *optional*):
            Only the first questions.

    Raises:
        `FormatError`: If a row has no question or no answer.
        `ValueError`: If there is no such file.
    """
    if not Path(path).is_file():
        raise ValueError(f"--data {path}: there is no such file.")
    questions = []
    for row in read_file(Path(path)):
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


def final_answer(value: Any) -> str:
    r"""
    The answer itself out of what a file has for it.

    Example:
    ```python
    >>> from endotrl.evaluation.math_answers import final_answer

    >>> [final_answer(x) for x in (27.0, "6 * 3 = 18\n#### 18", r"so \boxed{\frac{1}{2}}", ["2"])]
    ['27', '18', '\\frac{1}{2}', '2']
    ```
    """
    if isinstance(value, list):
        return ", ".join(final_answer(part) for part in value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    if "####" in text:
        return text.rpartition("####")[2].strip().replace(",", "")
    return _last_boxed(text) or text.strip().strip("$")


def is_right(texts: Sequence[str], gold: str) -> list[bool]:
    """
    Whether each text ends in the right answer, by math-verify. Of an answer that it cannot read, only the same text is right.

    Raises:
        `ImportError`: If math-verify is not installed.
    """
    _, verify = _math_verify()
    target = _parse(f"${gold}$")
    if not target:
        return [final_answer(text) == gold for text in texts]
    timeout = _timeout(5)
    return [bool(verify(target, _parse(text), timeout_seconds=timeout)) for text in texts]


def same_answer(texts: Sequence[str]) -> list[int]:
    """
    Groups texts by their final answer, for a majority vote: the index of the first text with an equal one. A text without an
    answer is alone.
    """
    _, verify = _math_verify()
    timeout = _timeout(5)
    parsed = [_parse(text) for text in texts]
    groups: list[int] = []
    for i, expression in enumerate(parsed):
        found = i
        if expression:
            for j in dict.fromkeys(groups):
                if parsed[j] and (parsed[j] == expression or verify(parsed[j], expression, timeout_seconds=timeout)):
                    found = j
                    break
        groups.append(found)
    return groups


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig

    parse, _ = _math_verify()
    # What stands in \boxed{} goes before other formulas.
    configs = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    return parse(text, extraction_config=configs, parsing_timeout=_timeout(5))


def _timeout(seconds: int) -> int | None:
    # math-verify's timeouts are signals, which only the main thread gets.
    if threading.current_thread() is threading.main_thread():
        return seconds
    for name in ("math_verify.parser", "math_verify.grader"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return None


def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise ImportError(
            'Answers are graded with math-verify, which is not installed: pip install "endotrl[eval]".'
        ) from error
    return parse, verify


def _first_key(row: Row, keys: Sequence[str], what: str) -> str:
    for key in keys:
        if row.data.get(key) is not None:
            return key
    raise row.error(f"there is no {what}: none of the keys {', '.join(keys)}. Name the key with --{what}.")


def _last_boxed(text: str) -> str:
    start = text.rfind("\\boxed{")
    if start < 0:
        return ""
    depth, begin = 0, start + len("\\boxed{")
    for i in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if depth == 0:
            return text[begin:i].strip()
    return ""
