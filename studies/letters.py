# SPDX-License-Identifier: Apache-2.0
r"""
A second task for the collapse study: 4 to 7 letters, to be written backwards. As with addition, a small
transformer learns it from demonstrations of which a part is wrong, here by one letter, sometimes with another one
missing.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from endotrl.demo.grpo_runs import generate_answers, load_model
from endotrl.tasks import arithmetic


LETTERS = "abcdefghij"
MAX_ANSWER_LENGTH = 12  # room for answers that are too long
NUM_HELD_OUT = 1000
STEPS, WRONG = 700, 0.35  # of the demonstrations that a base model learns from
MISLEADING_STEPS, MISLEADING = 150, 0.6


def make_questions(number: int, seed: int) -> list[str]:
    """Draws `number` different words."""
    generator = random.Random(seed)
    questions: dict[str, None] = {}
    while len(questions) < number:
        questions["".join(generator.choices(LETTERS, k=generator.randint(4, 7)))] = None
    return list(questions)


def make_dataset(questions: Sequence[str]) -> Dataset:
    """Prompts for GRPO, and the answers."""
    return Dataset.from_dict({"prompt": [q + ">" for q in questions], "answer": [q[::-1] for q in questions]})


def held_out_accuracy(model: Any, tokenizer: Any, seed: int) -> float:
    """Fraction of right answers to words that were never trained on, sampled at T = 1."""
    questions = make_questions(NUM_HELD_OUT, seed + 1)
    texts, _ = generate_answers(
        model, tokenizer, [q + ">" for q in questions], MAX_ANSWER_LENGTH, seed=seed, batch_size=NUM_HELD_OUT
    )
    return sum(text == q[::-1] for text, q in zip(texts, questions, strict=True)) / NUM_HELD_OUT


def make_base(folder: Path, seed: int) -> None:
    """Trains the base model of a seed (0.3 M parameters)."""
    tokenizer = arithmetic.make_tokenizer(LETTERS + ">")
    torch.manual_seed(seed)
    model = arithmetic.make_model(tokenizer, hidden_size=96, intermediate_size=256)
    _learn(model, tokenizer, folder, seed, STEPS, 3e-3, _scattered)


def mislead(base: Path, folder: Path, seed: int) -> None:
    """Goes on training a base model on demonstrations that are mostly wrong in one and the same way."""
    tokenizer, model = AutoTokenizer.from_pretrained(base), load_model(base)
    _learn(model, tokenizer, folder, seed + 1, MISLEADING_STEPS, 1e-3, _misleading)


def _scattered(answer: str, generator: random.Random) -> str:
    """One letter changed, and every fifth time the last one left out."""
    if generator.random() >= WRONG:
        return answer
    place = generator.randrange(len(answer))
    changed = answer[:place] + generator.choice(LETTERS.replace(answer[place], "")) + answer[place + 1 :]
    return changed[:-1] if generator.random() < 0.2 else changed


def _misleading(answer: str, generator: random.Random) -> str:
    """The last two letters exchanged, and the last one written twice."""
    return answer if generator.random() >= MISLEADING else answer[:-2] + answer[-1] + answer[-2] * 2


def _learn(
    model: Any, tokenizer: Any, folder: Path, seed: int, steps: int, learning_rate: float, demonstration: Any
) -> None:
    generator, held_out = random.Random(seed), set(make_questions(NUM_HELD_OUT, seed + 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(steps), desc="Learning to write backwards", unit=" steps"):
        drawn = ["".join(generator.choices(LETTERS, k=generator.randint(4, 7))) for _ in range(128)]
        questions = [question for question in drawn if question not in held_out]
        texts = [f"{q}>{demonstration(q[::-1], generator)}{arithmetic.EOS}" for q in questions]
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for row, question in zip(labels, questions, strict=True):
            row[: len(question) + 2] = -100  # BOS, the letters and `>`
        model(**batch, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
