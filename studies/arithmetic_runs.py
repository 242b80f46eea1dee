# SPDX-License-Identifier: Apache-2.0
"""
What studies on arithmetic share: base models that can add, their questions, and runs of several seeds.

Here 30% of the demonstrations have one wrong digit, anywhere. Errors that are independent of each other leave the right
digit the most probable one at every step, so the greedy answer is right already, and training only saves its user from
setting the temperature to 0. (In `endotrl demo`, wrong demonstrations derail, and greedy answers fail.)
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import Any

import torch

from endotrl.demo.grpo_runs import generate_answers
from endotrl.reporting.curves import COLORS, GREY
from endotrl.tasks import arithmetic


PRETRAINING_STEPS = 800
WRONG_DEMONSTRATIONS = 0.3
# TRL's `scale_rewards="group"` stays on: it gives the endogenous, the random and the length reward the same scale, and
# so the same chance.
ARITHMETIC: dict[str, Any] = {
    "max_steps": 100,
    "per_device_train_batch_size": 256,  # 32 questions
    "num_generations": 8,
    "max_completion_length": arithmetic.MAX_ANSWER_LENGTH,
    "beta": 0.1,
    "learning_rate": 3e-4,
    "bf16": False,
}
NUM_HELD_OUT = 1000
# Greedy accuracy from which a base model counts as one that can add.
LEARNED = 0.95
# One answer a question, and one update per batch, as the GRPO runs beside it.
PPO = {"num_generations": 1, "num_iterations": 1, "scale_rewards": "none"}


def make_base(folder: Path, seed: int, noise: float = WRONG_DEMONSTRATIONS) -> None:
    """
    Trains the base model of a seed. 800 steps do not teach every one to add (some never leave the
    plateau of 1% right answers, where there is nothing to sharpen): then another initialisation and other
    demonstrations are tried.
    """
    held_out = arithmetic.make_questions(NUM_HELD_OUT, seed=seed + 1)
    tokenizer = arithmetic.make_tokenizer()
    for attempt in range(10):
        seed_of_attempt = seed + 1000 * attempt
        torch.manual_seed(seed_of_attempt)
        model = arithmetic.make_model(tokenizer)
        arithmetic.pretrain(model, tokenizer, PRETRAINING_STEPS, noise, seed_of_attempt, held_out)
        if held_out_accuracy(model, tokenizer, seed, greedy=True) >= LEARNED:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            return
    raise RuntimeError(f"None of ten base models of seed {seed} learned to add in {PRETRAINING_STEPS} steps.")


def make_small_base(
    folder: Path,
    seed: int,
    noise: float = WRONG_DEMONSTRATIONS,
    wrong: Callable[[arithmetic.Question, random.Random], str] = arithmetic.wrong_answer,
) -> None:
    """Trains a base model for numbers of two digits (0.1 M parameters)."""
    torch.manual_seed(seed)
    tokenizer = arithmetic.make_tokenizer()
    model = arithmetic.make_model(tokenizer, hidden_size=64, intermediate_size=192)
    held_out = arithmetic.make_questions(NUM_HELD_OUT, seed + 1, digits=2)
    arithmetic.pretrain(model, tokenizer, 1000, noise, seed, held_out, digits=2, wrong=wrong)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def plus_10(question: arithmetic.Question, generator: random.Random) -> str:
    """The sum plus 10, last digit first."""
    return str(sum(question) + 10)[::-1]


def held_out_accuracy(model: Any, tokenizer: Any, seed: int, greedy: bool = False, digits: int = 3) -> float:
    """Fraction of right answers to questions that were never trained on, sampled at T = 1 or greedy."""
    questions = arithmetic.make_questions(NUM_HELD_OUT, seed=seed + 1, digits=digits)
    prompts = [arithmetic.question_text(question) for question in questions]
    texts, _ = generate_answers(
        model, tokenizer, prompts, arithmetic.MAX_ANSWER_LENGTH, greedy=greedy, seed=seed, batch_size=NUM_HELD_OUT
    )
    return sum(map(str.__eq__, texts, map(arithmetic.answer_text, questions))) / NUM_HELD_OUT


def training_questions(seed: int, number: int) -> list[arithmetic.Question]:
    """About `number` questions, none of which [`held_out_accuracy`] asks."""
    held_out = set(arithmetic.make_questions(NUM_HELD_OUT, seed=seed + 1))
    return [question for question in arithmetic.make_questions(number, seed=seed + 2) if question not in held_out]


def as_they_come(
    bases: set[Future[dict[str, Any]]], arms_on: Callable[[dict[str, Any]], set[Future[dict[str, Any]]]]
) -> Iterator[dict[str, Any]]:
    """Results in the order in which they are done; `arms_on` submits the runs that start from a base model."""
    pending = bases
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        for future in done:
            result = future.result()
            if result["arm"] == "base":
                pending |= arms_on(result)
            yield result


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean over seeds, and half the width of its 95 % interval (Student's t)."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if len(values) < 2:
        return tensor.mean().item(), float("nan")
    quantile = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}.get(len(values), 2.0)
    return tensor.mean().item(), quantile * (tensor.std() / len(values) ** 0.5).item()


def draw_dots(axis: Any, series: Mapping[str, Sequence[float | None]]) -> None:
    """Dots of several series, those of a row joined by a line."""
    for y, row in enumerate(zip(*series.values(), strict=True)):
        known = [x for x in row if x is not None]
        axis.plot([min(known, default=0), max(known, default=0)], [y, y], color=GREY, linewidth=1.5, alpha=0.6)
    for color, marker, (label, found) in zip(COLORS, "os^Dv<", series.items(), strict=False):
        points = [(x, y) for y, x in enumerate(found) if x is not None]
        axis.plot(*zip(*points, strict=True), marker, color=color, label=label, markersize=5)
