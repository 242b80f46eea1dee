# SPDX-License-Identifier: Apache-2.0
"""Samples with densities, rewards and grades, question by question, resumable."""

from collections.abc import Callable, Sequence
from typing import Any

from ..checks import check_rewards
from ..evaluation.engine import Engine
from ..evaluation.generation import Sample, prompt_rows, seed_of
from ..evaluation.intervals import Unit
from ..evaluation.questions import Question
from ..evaluation.run_folder import RunFolder, in_blocks
from .grades import Grader
from .sampling import Drawn, Mixture


KEYS = ("key", "texts", "token_ids", "finished", "log_probs", "rewards", "right", "groups", "seconds")
DrawSamples = Callable[[Sequence[Any], Sequence[float], int], list[Drawn]]


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
    One record per question. What a `folder` has already is kept. `draw` is a [`MixtureSampler`] or
    [`ServedMixtureSampler`]. Without a `reward` function of TRL's contract, it is the endogenous reward with its
    default settings, $\log \hat\pi(y|x)$. Raises `ValueError` if a prompt and its completion do not fit the model's
    context, before anything is sampled; or a completion has no finite reward.
    """
    prompt_rows(engine, [q.prompt for q in questions], max_new_tokens)
    records = {} if folder is None else _saved(folder)

    def answer(block: list[Question]) -> list[dict[str, Any]]:
        # What a block draws depends on the seed and its first question, not on what was done before it.
        drawn = draw([q.prompt for q in block], mixture.temperatures, seed_of(seed, block[0].key))
        return [_record(q, row, grader, reward) for q, row in zip(block, drawn, strict=True)]

    todo = list({q.key: q for q in questions if q.key not in records}.values())
    path, done = None if folder is None else folder.answers_path, len(questions) - len(todo)
    made = in_blocks(todo, path, answer, "Sampling", progress, done)
    records = {record["key"]: record for record in made} if folder is None else _saved(folder)
    return [records[q.key] for q in questions]


def _saved(folder: RunFolder) -> dict[str, dict[str, Any]]:
    return {record["key"]: record for record in folder.read_lines("answers", KEYS)}


def unit_of(question: Question, sample: Sample, grader: Grader) -> Unit:
    """One completion of a question, as an alternative to training."""
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
        what = f"A completion of {question.id} has no reward, but a forecast needs a number for each"
        raise ValueError(f'{what}: no `truncation="skip"`.')
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
