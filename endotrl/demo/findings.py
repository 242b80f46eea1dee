# SPDX-License-Identifier: Apache-2.0
"""Results of a part of the demo: terminal summary and report, one HTML file."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import pstdev
from typing import Any

from markupsafe import Markup

from ..reporting import HeatMapRow, figure, heat_maps, page, paragraph, settings_table, table
from ..reporting.curves import BLUE, GREEN, ORANGE
from ..reporting.plots import as_png, pyplot


# Ways to get an answer; the last costs 16 answers per question.
SAMPLED, GREEDY, COOL, MAJORITY = "sampled", "greedy", "T=0.5", "majority"
TITLES = {
    "base": "base model",
    "endogenous": "own reward",
    "random": "random reward",
    "length": "length reward",
    "other_image": "reward for another image",
    "text_alone": "reward for the text alone",
}
NUM_ANSWERS = 8
# A colour, and a line style for those who see none.
STYLES = {"endogenous": (BLUE, "-"), "random": (ORANGE, "--"), "length": ("#777777", ":")}
STYLES |= {"other_image": (GREEN, "-."), "text_alone": ("#777777", ":")}


@dataclass(frozen=True)
class Policy:
    """A policy's answers to the held-out questions."""

    # One answer per question, sampled at T = 1: text, token ids, and whether it is right.
    texts: list[str]
    ids: list[list[int]]
    text_right: list[bool]
    right: dict[str, list[float]]  # by way of asking ("sampled", ...): fraction of right answers per question
    curve: list[float] = field(default_factory=list)  # accuracy of the training answers, by step

    def accuracy(self, way: str = SAMPLED) -> float:
        """Fraction of right answers."""
        return sum(self.right[way]) / len(self.right[way])


@dataclass(frozen=True)
class Part:
    """Results of one part of the demo."""

    name: str
    title: str  # heading in the report
    policies: dict[str, Policy]  # "base" first, then by training reward, "endogenous" first
    questions: list[str]  # held-out ones, as displayed
    settings: dict[str, Any]  # of the training
    examples: list[HeatMapRow] = field(default_factory=list)  # scored answers, for the heat map
    forecast: float | None = None  # forecast accuracy of sampled answers after training on the own reward

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
    """The part's result in plain words, verdict first."""
    base, own = part.policies["base"], part.policies["endogenous"]
    before, after, greedy = base.accuracy(), own.accuracy(), base.accuracy(GREEDY)
    changes = {name: _change(base, policy) for name, policy in part.policies.items() if name != "base"}
    change, sign = changes.pop("endogenous")
    verb = {1: "improved", 0: "did not change", -1: "got worse"}[sign]
    told = f"the model {verb}: {before:.0%} to {after:.0%} right ({change})"
    sentences = [f"Trained on its own reward, without labels, {told}."]
    if part.forecast is not None:
        forecast = f"its final accuracy was forecast to be {part.forecast:.0%}"
        sentences.append(f"Before training, {forecast}; after {len(own.curve)} steps, it is {after:.0%}.")
    if changes:
        others = "; ".join(f"{TITLES[name]} {change}" for name, (change, _) in changes.items())
        sentences.append(f"Uninformative rewards with the same settings: {others}.")
    if greedy < after - half_width(own.right[SAMPLED]):
        sentences.append(
            f"Temperature 0 is no substitute: the base model's greedy answers are {greedy:.0%} right, because its "
            "most probable first step is often wrong, although its most probable answer as a whole is right."
        )
    else:
        sentences.append(
            f"With greedy decoding, the base model is already {greedy:.0%} right: training brings its samples to the "
            "level of temperature 0, and teaches nothing new."
        )
    return " ".join(sentences)


def _change(base: Policy, policy: Policy) -> tuple[str, int]:
    """Change in points with its interval in words, and its sign, 0 within noise."""
    difference = policy.accuracy() - base.accuracy()
    noise = half_width([a - b for a, b in zip(policy.right[SAMPLED], base.right[SAMPLED], strict=True)])
    points = f"{100 * difference:+.0f}".replace("-", "\N{MINUS SIGN}")
    sign = 0 if abs(difference) <= noise else 1 if difference > 0 else -1
    return f"{points} ± {100 * noise:.0f} points" + ("" if sign else ", within noise"), sign


def half_width(values: Sequence[float]) -> float:
    """Half width of the 95% confidence interval of a mean over questions, by the normal approximation."""
    return 1.96 * pstdev(values) / len(values) ** 0.5


def accuracy_table(part: Part) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: accuracy of each policy by way of asking."""
    ways = list(part.policies["base"].right)
    rows = [[TITLES[name], *(f"{p.accuracy(way):.0%}" for way in ways)] for name, p in part.policies.items()]
    return ["policy", *ways], rows


def write_report(parts: Sequence[Part], metrics: dict[str, Any], output_dir: Path) -> Path:
    """Writes `report.html` and the plots as PNG files, and returns the path of the report."""
    sections: list[tuple[str, Markup | str]] = []
    for part in parts:
        plot = plot_accuracy(part)
        (output_dir / f"{part.name}.png").write_bytes(plot)
        headers, rows = accuracy_table(part)
        costs = " Majority vote over 16 answers per question, at 16 times the cost." if MAJORITY in headers else ""
        verdict, _, rest = summary(part).partition(". ")
        noise = max(half_width(values) for policy in part.policies.values() for values in policy.right.values())
        asked = f"Right answers to {len(part.questions)} held-out questions"
        end = "" if part.forecast is None else "; dotted: the forecast for training on its own reward"
        settings = settings_table({key.replace("_", " "): value for key, value in part.settings.items()})
        blocks = [
            paragraph(rest if part is parts[0] else f"{verdict}. {rest}"),
            paragraph(f"{asked} (95% intervals are at most ± {100 * noise:.0f} points).{costs}"),
            # As `Markup`, names take no extra width, and all columns fit on a phone.
            table(headers, [[Markup("{}").format(name), *cells] for name, *cells in rows]),
            figure(
                plot,
                "Accuracy of the answers sampled during training (logged, not rewarded; averaged over a few steps). "
                f"Horizontal lines: accuracy of the untrained model with other ways of decoding{end}.",
            ),
            _answers(part),
        ]
        if part.examples:
            blocks.append(
                paragraph(_HEAT_MAPS) + Markup('<div class="pairs">{}</div>').format(heat_maps(part.examples))
            )
        blocks.append(Markup("<details><summary>Settings</summary>{}</details>").format(settings))
        sections.append((part.title, Markup("").join(blocks)))
    sections.append(("When not to trust it", _LIMITS))
    used = metrics["environment"]
    software = ", ".join(f"{name} {used[name.lower()]}" for name in ("endotrl", "TRL", "transformers", "torch"))
    minutes = f"{metrics['seconds'] / 60:.1f} minutes"
    footer = f"{software}; {used['machine']}; {minutes}; one run per reward. Created by endotrl demo."
    lead = Markup(
        "<p><strong>{}.</strong> No reward model, no judge, no labels: TRL's GRPO trains each model on the reward "
        "of its own frozen copy.</p>"
    ).format(summary(parts[0]).partition(". ")[0])
    path = output_dir / "report.html"
    path.write_text(page("endotrl demo", sections, lead=lead, footer=footer), encoding="utf-8")
    return path


_HEAT_MAPS = "Contribution of each token to the reward, the frozen model's log-probability, before and after training."
_LIMITS = Markup(
    "<p>The endogenous reward sharpens a model: answers that are probable as a whole become more probable. Where the "
    "most probable answer is wrong, training makes the model wrong more often. The reward rises whatever happens, so "
    "monitor the accuracy on held-out questions and the length and entropy of answers, keep the KL penalty "
    "(<code>beta</code> &gt; 0), and compare with uninformative rewards.</p>"
)


def plot_accuracy(part: Part) -> bytes:
    """Accuracy over training steps, with the base model's accuracy for the other ways of asking, as PNG."""
    plt, base = pyplot(), part.policies["base"]
    with plt.rc_context({"font.size": 11}):
        fig, axes = plt.subplots(figsize=(5.6, 3.5), layout="constrained")
        steps = 1
        for name, policy in part.policies.items():
            if not policy.curve:
                continue
            values, (color, style) = policy.curve, STYLES[name]
            steps = max(steps, len(values))
            window = max(1, len(values) // 12)
            smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
            axes.plot(range(1, len(values) + 1), smooth, style, color=color, linewidth=2.2, label=TITLES[name])
        lines = [(base.accuracy(way), f"base, {way}", "#444444", "-") for way in base.right if way != SAMPLED]
        if part.forecast is not None:
            lines.append((part.forecast, "forecast", STYLES["endogenous"][0], ":"))
        place = 1.15
        for height, label, color, style in sorted(lines, reverse=True):
            axes.axhline(height, color=color, linestyle=style, linewidth=0.8 if style == "-" else 1.6, alpha=0.6)
            place = min(height, place - 0.15)  # labels keep a distance
            axes.text(steps * 1.02, place, f"{label}:\n{height:.0%}", va="center", color=color)
        axes.set(xlabel="GRPO step", ylabel="right answers", ylim=(-0.02, 1.04), xlim=(1, max(2, steps)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.6, 1.18), ncols=3, fontsize=10)
        return as_png(fig)


def _answers(part: Part) -> Markup:
    before, after = part.policies["base"], part.policies["endogenous"]
    # Every k-th question, chosen by position alone.
    step = max(1, len(part.questions) // NUM_ANSWERS)
    shown = range(0, len(part.questions), step)[:NUM_ANSWERS]
    rows = [[part.questions[i], _marked(before, i), _marked(after, i)] for i in shown]
    how = " An answer is the sum in reverse, last digit first." if part.name == "arithmetic" else ""
    caption = f"Sampled answers to held-out questions, one in {step}, not selected. ✓ right, ✗ wrong.{how}"
    return paragraph(caption) + table(["question", "before", "after"], rows)


def _marked(policy: Policy, index: int) -> str:
    return f"{'✓' if policy.text_right[index] else '✗'} {policy.texts[index]}"
