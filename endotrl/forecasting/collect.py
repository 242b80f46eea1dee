# SPDX-License-Identifier: Apache-2.0
"""Graders, and resumable collection of samples with densities, rewards and grades, question by question."""

import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..checks import check_rewards
from ..evaluation.engine import Engine
from ..evaluation.generation import Sample, prompt_rows, seed_of
from ..evaluation.intervals import Unit
from ..evaluation.questions import Question
from ..evaluation.run_folder import RunFolder, in_blocks
from ..grading import accepted_answers, final_answer, is_right, require_math_verify, same_answer
from .sampling import Drawn, Mixture


KEYS = ("key", "texts", "token_ids", "finished", "log_probs", "rewards", "right", "groups", "seconds")
DrawSamples = Callable[[Sequence[Any], Sequence[float], int], list[Drawn]]
Grade = Callable[[str, Any], float]


class Grader:
    """
    Correctness of completions, and groups of equal answers. `name` is `"math"`, [`is_right`] with math-verify;
    `"text"`, the same without; `"exact"`, the completion equals the answer, except for surrounding white space; a
    function of a completion and the question's answer, or its `FILE.py:NAME`. Raises `ValueError` if there is no such
    grader, and `ImportError` if it needs math-verify, which is not installed.
    """

    def __init__(self, name: str | Grade) -> None:
        if name == "math":
            require_math_verify()
        self.name = name if callable(name) or name in ("math", "text", "exact") else _load(name)

    def grade(self, completions: Sequence[str], answer: Any) -> list[float]:
        """Grade per completion: 1.0 for right, 0.0 for wrong."""
        if callable(self.name):
            return [_graded(self.name, text, answer) for text in completions]
        answers = accepted_answers(answer)
        if self.name == "exact":
            accepted = {(right if isinstance(right, str) else final_answer(right)).strip() for right in answers}
            return [float(text.strip() in accepted) for text in completions]
        return [float(is_right(text, answers, math=self.name == "math")) for text in completions]

    def groups(self, completions: Sequence[str]) -> list[int]:
        """For each completion, the index of the first one with the same answer."""
        if self.name in ("math", "text"):
            return same_answer(completions, math=self.name == "math")
        texts = [text.strip() for text in completions]
        return [texts.index(text) for text in texts]


def _graded(grade: Grade, text: str, answer: Any) -> float:
    try:
        value = float(grade(text, answer))
    except Exception as error:
        failed = f"{type(error).__name__}: {error}"
        raise ValueError(f"The grader failed on completion {text!r} and answer {answer!r}: {failed}.") from error
    if not 0.0 <= value <= 1.0:  # catches NaN, too
        raise ValueError(f"A grade must be from 0 (wrong) to 1 (right), but the grader returned {value} for {text!r}.")
    return value


def _load(name: str) -> Grade:
    path, _, function = name.rpartition(":")
    if not path.endswith(".py") or not Path(path).is_file():
        raise ValueError(f"The grader must be math, text, exact or FILE.py:FUNCTION, got {name!r}.")
    found = runpy.run_path(path).get(function)
    if not callable(found):
        raise ValueError(f"The grader's file {path} has no function {function!r}.")
    return found


def collect(
    questions: Sequence[Question],
    engine: Engine,
    draw: DrawSamples,
    mixture: Mixture,
    grader: Grader,
    max_new_tokens: int,
    reward: Any = None,
    folder: RunFolder | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[dict[str, Any]]:
    r"""
    Collects one record per question. Records already in `folder` are kept. `draw` is a [`MixtureSampler`] or
    [`ServedMixtureSampler`]. `reward` is a reward function of TRL's contract; by default the endogenous reward with
    its default settings, $\log \hat\pi(y|x)$. Raises `ValueError` if a prompt and its completion do not fit into the
    model's context, or the grader cannot read an answer, before anything is sampled; or if a completion has no finite
    reward.
    """
    for question in questions:
        if question.answer is not None and not callable(grader.name):
            try:
                grader.grade([""], question.answer)
            except ValueError as error:
                raise ValueError(f"{question.id}: {error}") from error
    prompt_rows(engine, [q.prompt for q in questions], max_new_tokens)
    records = {} if folder is None else _saved(folder)

    def answer(block: list[Question]) -> list[dict[str, Any]]:
        # A block's samples depend on the seed and its first question, not on the blocks before it.
        drawn = draw([q.prompt for q in block], mixture.temperatures, seed_of(seed, block[0].key))
        return [_record(q, row, grader, reward) for q, row in zip(block, drawn, strict=True)]

    path = None if folder is None else folder.answers_path
    made = in_blocks(questions, records, path, answer, "Sampling", progress)
    records = {record["key"]: record for record in made} if folder is None else _saved(folder)
    return [records[q.key] for q in questions]


def _saved(folder: RunFolder) -> dict[str, dict[str, Any]]:
    return {record["key"]: record for record in folder.read_lines("answers", KEYS)}


def unit_of(question: Question, sample: Sample, grader: Grader) -> Unit:
    """One completion per question, as an alternative to training."""
    values = {"length": float(len(sample.token_ids)), "truncated": float(not sample.finished)}
    if question.answer is not None:
        values["accuracy"] = grader.grade([sample.text], question.answer)[0]
    return Unit(question.key, "questions", values)


def _record(question: Question, drawn: Drawn, grader: Grader, reward: Any) -> dict[str, Any]:
    texts = [sample.text for sample in drawn.samples]
    ids = [list(sample.token_ids) for sample in drawn.samples]
    given = drawn.log_probs[1.0]
    if reward is not None:
        as_messages = not isinstance(question.prompt, str)
        given = reward(
            prompts=[question.prompt] * len(texts),
            completions=[[{"role": "assistant", "content": text}] if as_messages else text for text in texts],
            completion_ids=ids,
            **({} if question.answer is None else {"answer": [question.answer] * len(texts)}),
        )
    rewards = [value for value in check_rewards(given, len(texts)) if value is not None]
    if len(rewards) < len(texts):
        what = f"A forecast needs a reward for every completion, but one of {question.id} has none"
        raise ValueError(f'{what}. Do not use `truncation="skip"`.')
    return {
        "key": question.key,
        "id": question.id,
        "texts": texts,
        "token_ids": ids,
        "finished": [sample.finished for sample in drawn.samples],
        "log_probs": {str(t): values for t, values in drawn.log_probs.items()},
        "rewards": list(map(float, rewards)),
        "right": None if question.answer is None else grader.grade(texts, question.answer),
        "groups": grader.groups(texts),
    }
