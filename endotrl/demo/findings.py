# SPDX-License-Identifier: Apache-2.0
"""What a part of the demo found, and how the terminal and the report say it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..reporting import HeatMapRow


# Ways to ask a model; the last costs 16 answers per question.
SAMPLED, GREEDY, COOL, MAJORITY = "sampled", "greedy", "T=0.5", "majority"
TITLES = {
    "base": "base model",
    "endogenous": "own reward",
    "random": "random reward",
    "length": "length reward",
    "other_image": "reward for another image",
    "text_alone": "reward for the text alone",
}


@dataclass(frozen=True)
class Policy:
    """A policy's answers to the held-out questions."""

    # One answer per question, sampled at T = 1: text, token ids, whether it is right, and whether it came to an end.
    texts: list[str]
    ids: list[list[int]]
    text_right: list[bool]
    ended: list[bool]
    right: dict[str, list[float]]  # by the way of asking ("sampled", ...): fraction of right answers to each question
    curve: list[float] = field(default_factory=list)  # accuracy of the answers that it was trained on, by step
    seconds: float = 0.0  # of its training

    def accuracy(self, way: str = SAMPLED) -> float:
        """Fraction of right answers."""
        return sum(self.right[way]) / len(self.right[way])

    @property
    def cut_off(self) -> float:
        """Fraction of sampled answers without EOS."""
        return 1 - sum(self.ended) / len(self.ended)


@dataclass(frozen=True)
class Part:
    """What one part of the demo found."""

    name: str
    title: str  # heading in the report
    policies: dict[str, Policy]  # "base" first, and then by the reward of the training, "endogenous" first
    questions: list[str]  # held-out ones, as they are shown
    groups: list[str]  # kind of each
    settings: dict[str, Any]  # what was trained and how
    examples: list[HeatMapRow] = field(default_factory=list)  # scored answers, for the heat map
    forecast: float | None = None  # accuracy of sampled answers that training on the own reward was forecast to reach

    @property
    def metrics(self) -> dict[str, float]:
        """The part's entry in `metrics.json`."""
        names = {"base": "before", "endogenous": "after"}
        known = {} if self.forecast is None else {"sampled_forecast": self.forecast}
        return known | {
            f"{way}_{names.get(name, f'{name}_reward_after')}": policy.accuracy(way)
            for name, policy in self.policies.items()
            for way in policy.right
        }


def summary(part: Part) -> str:
    """The part's result in plain words, the verdict first."""
    base, own = part.policies["base"], part.policies["endogenous"]
    before, after, greedy = base.accuracy(), own.accuracy(), base.accuracy(GREEDY)
    changes = {name: _change(base, policy) for name, policy in part.policies.items() if name != "base"}
    change, sign = changes.pop("endogenous")
    verb = {1: "improved", 0: "stayed", -1: "got worse"}[sign]
    text = f"By its own reward, without a label, the model {verb}: {before:.0%} to {after:.0%} right ({change}). "
    if part.forecast is not None:
        text += (
            f"Where training ends was forecast before its first step: {part.forecast:.0%} (forecast) -> "
            f"{after:.0%} (trained, {len(own.curve)} steps). "
        )
    others = "; ".join(f"{TITLES[name]} {change}" for name, (change, _) in changes.items())
    if others:
        text += f"Rewards that know nothing, on the same footing: {others}. "
    if greedy < after - half_width(own.right[SAMPLED]):
        return text + (
            f"Temperature 0 is no substitute: the base model's greedy answers are {greedy:.0%} right, for its most "
            "probable first step is often wrong, though its most probable whole answer is right."
        )
    return text + (
        f"Asked greedily, the base model is {greedy:.0%} right already: here training brings its samples to what "
        "temperature 0 gives, and teaches nothing new."
    )


def _change(base: Policy, policy: Policy) -> tuple[str, int]:
    """Change in points with its interval in words, and its sign, 0 within noise."""
    difference = policy.accuracy() - base.accuracy()
    noise = half_width([a - b for a, b in zip(policy.right[SAMPLED], base.right[SAMPLED], strict=True)])
    points = f"{100 * difference:+.0f}".replace("-", "\N{MINUS SIGN}")
    sign = 0 if abs(difference) <= noise else 1 if difference > 0 else -1
    return f"{points} ± {100 * noise:.0f} points" + ("" if sign else ", within noise"), sign


def half_width(values: Sequence[float]) -> float:
    """Half width of the 95% confidence interval of a mean over questions, by the normal approximation."""
    number, mean = len(values), sum(values) / len(values)
    return 1.96 * (sum((v - mean) ** 2 for v in values) / number / number) ** 0.5


def accuracy_table(part: Part) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: accuracy of each policy by the way of asking."""
    ways = list(part.policies["base"].right)
    rows = [[TITLES[name], *(f"{p.accuracy(way):.0%}" for way in ways)] for name, p in part.policies.items()]
    return ["policy", *ways], rows
