# SPDX-License-Identifier: Apache-2.0
"""What a part of the demo found, and how the terminal and the report say it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..reporting import HeatMapRow
from .grpo_runs import Run


@dataclass(frozen=True)
class Answers:
    """
    Answers of one policy to the held-out questions: text, token ids, whether right, and whether they came to an end.
    """

    texts: list[str]
    ids: list[list[int]]
    right: list[bool]
    ended: list[bool]

    @property
    def accuracy(self) -> float:
        """Fraction of right answers."""
        return sum(self.right) / len(self.right)

    @property
    def cut_off(self) -> float:
        """Fraction of answers without EOS."""
        return 1 - sum(self.ended) / len(self.ended)


@dataclass(frozen=True)
class Part:
    """
    What one part of the demo found.

    Attributes:
        title (`str`):
            Heading in the report.
        runs (`list[Run]`):
            GRPO runs, the endogenous reward first.
        before (`Answers`), greedy (`Answers`), after (`dict[str, Answers]`):
            Answers of the base model, sampled and greedy, and sampled ones of each run's policy, by the run's name.
        questions (`list[str]`), groups (`list[str]`):
            Held-out questions as they are shown, and the kind of each.
        examples (`list[HeatMapRow]`):
            Scored answers, for the heat map.
        settings (`dict[str, Any]`):
            What was trained and how.
    """

    title: str
    runs: list[Run]
    before: Answers
    greedy: Answers
    after: dict[str, Answers]
    questions: list[str]
    groups: list[str]
    examples: list[HeatMapRow] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, float]:
        """The part's entry in `metrics.json`."""
        own, *controls = self.runs
        return {
            "accuracy_before": self.before.accuracy,
            "accuracy_after": self.after[own.name].accuracy,
            "greedy_before": self.greedy.accuracy,
            **{f"{run.reward}_reward_after": self.after[run.name].accuracy for run in controls},
        }


def summary(part: Part) -> str:
    """The part's result in plain words."""
    before = part.before.accuracy

    def change(after: Answers) -> str:
        points = f"{100 * (after.accuracy - before):+.0f}".replace("-", "\N{MINUS SIGN}")
        noise = paired_half_width(part.before.right, after.right)
        verdict = "" if abs(after.accuracy - before) > noise else ", which is within noise"
        return f"{points} ± {100 * noise:.0f} points{verdict}"

    own, *controls = part.runs
    others = "; ".join(f"the {run.reward} reward, {change(part.after[run.name])}" for run in controls)
    return (
        f"Sampled accuracy on held-out questions went from {before:.0%} to {part.after[own.name].accuracy:.0%} by the "
        "model's own reward, "
        f"without a label: {change(part.after[own.name])}. On the same footing: {others}. (One run each.) The reward "
        "makes a model more "
        f"itself: it approaches its most probable answers (greedy before: {part.greedy.accuracy:.0%}), and "
        "teaches it nothing that it does not know."
    )


def paired_half_width(before: Sequence[bool], after: Sequence[bool]) -> float:
    """
    Half width of the 95% confidence interval of the difference of two accuracies on the same questions (normal
    approximation; only questions whose answer changed tell anything).
    """
    differences = [float(a) - float(b) for a, b in zip(after, before, strict=True)]
    number, mean = len(differences), sum(differences) / len(differences)
    return 1.96 * (sum((d - mean) ** 2 for d in differences) / number / number) ** 0.5


def half_width(accuracy: float, number: int) -> float:
    """Half width of the 95% confidence interval of an accuracy over `number` questions (normal approximation)."""
    return 1.96 * (accuracy * (1 - accuracy) / number) ** 0.5


def accuracy_rows(part: Part) -> list[list[str]]:
    """Table: policy, accuracy with its 95% interval, fraction of answers that were cut off, seconds of training."""
    number = len(part.questions)

    def cell(accuracy: float) -> str:
        return f"{accuracy:.1%} ± {half_width(accuracy, number):.1%}"

    rows = [
        ["base model", cell(part.before.accuracy), f"{part.before.cut_off:.0%}", ""],
        ["base model, greedy", cell(part.greedy.accuracy), "", ""],
    ]
    for run in part.runs:
        after = part.after[run.name]
        rows.append(
            [f"GRPO on the {run.reward} reward", cell(after.accuracy), f"{after.cut_off:.0%}", f"{run.seconds:.0f} s"]
        )
    return rows
