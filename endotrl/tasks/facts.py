# SPDX-License-Identifier: Apache-2.0
"""
Short factual questions for a real pretrained model. It is never shown an answer: they only measure accuracy, on facts
that no training question is about.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from datasets import Dataset

from ..rewards import AccuracyReward


@dataclass(frozen=True)
class Question:
    """One question about one fact."""

    relation: str  # type of fact, such as `"capital"`
    text: str
    answers: list[str]
    statement: str  # sentence that states it, with `{answer}` as the placeholder

    @property
    def prompt(self) -> list[dict[str, str]]:
        """The question as a conversation."""
        return [{"role": "user", "content": self.text}]


def load_questions(held_out_fraction: float = 1 / 3, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """
    The facts that ship with endotrl (`facts.json`, CC0), split by subject within each relation: training questions
    (each fact in all phrasings, shuffled), and held-out questions (each fact once, the phrasings in turn).
    """
    relations = json.loads(files("endotrl.tasks").joinpath("facts.json").read_text(encoding="utf-8"))["relations"]
    generator = random.Random(seed)
    train, held_out = [], []
    for relation in relations:
        facts = list(relation["facts"])
        generator.shuffle(facts)
        num_held_out = round(held_out_fraction * len(facts))
        for i, (subject, answers) in enumerate(facts):
            texts = [template.format(subject=subject) for template in relation["templates"]]
            statement = relation["statement"].replace("{subject}", subject)
            statement = statement[0].upper() + statement[1:]  # "the Louvre"
            if i < num_held_out:
                held_out.append(Question(relation["name"], texts[i % len(texts)], answers, statement))
            else:
                train += [Question(relation["name"], text, answers, statement) for text in texts]
    generator.shuffle(train)
    return train, held_out


def make_dataset(questions: Sequence[Question]) -> Dataset:
    """Prompts for GRPO. The column `answers` is for the logged accuracy (weight 0), not for the reward."""
    return Dataset.from_dict({"prompt": [q.prompt for q in questions], "answers": [q.answers for q in questions]})


def make_preferences(questions: Sequence[Question]) -> Dataset:
    """
    Right and wrong answers as pairs for a reward model, in one sentence in the model's own words, or in two: the wrong
    answer is the right one to another question of the same relation.
    """
    rows = []
    for i, question in enumerate(questions):
        others = [
            other.answers[0]
            for other in (*questions[i + 1 :], *questions[:i])
            if other.relation == question.relation and not set(other.answers) & set(question.answers)
        ]
        second = " I am sure of it." if i % 2 else ""
        chosen, rejected = (
            [{"role": "assistant", "content": question.statement.replace("{answer}", answer) + second}]
            for answer in (question.answers[0], others[0])
        )
        rows.append({"prompt": question.prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


accuracy = AccuracyReward("answers")
