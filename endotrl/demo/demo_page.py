# SPDX-License-Identifier: Apache-2.0
"""The demo's report: plots, tables and token rewards in one HTML file."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .. import __version__
from ..reporting import figure, heat_maps, page, table
from .findings import Answers, Part, accuracy_rows, half_width, summary


NUM_ANSWERS = 12
# Okabe and Ito's colours, told apart with every common colour blindness.
COLORS = {"endogenous": "#0072b2", "random": "#d55e00", "length": "#999999"}


def write_report(parts: Sequence[Part], metrics: dict[str, Any], output_dir: Path) -> Path:
    """Writes `report.html` and the plots as PNG files, and returns the path of the report."""
    sections: list[tuple[str, Markup | str]] = []
    for part in parts:
        name = part.runs[0].name.split("-")[0]
        plot = plot_accuracy(part)
        (output_dir / f"{name}.png").write_bytes(plot)
        blocks = [
            Markup("<p>{}</p>").format(summary(part)),
            figure(
                plot,
                "Left: accuracy of the answers sampled in training (weight 0: measured, not rewarded), thin by step, "
                "thick "
                "averaged; a step has "
                f"{part.settings['per_device_train_batch_size'] // part.settings['num_generations']} "
                "questions, the same in every run. Right: held-out accuracy before and after, with 95% intervals.",
            ),
            table(
                ["policy", "accuracy on held-out questions", "cut off", "training"],
                accuracy_rows(part),
                caption=f"{len(part.questions)} questions on which nothing was trained, sampled at T = 1 unless "
                "greedy; "
                "± is the 95% interval of one sample of answers. Cut off: answers that did not end within the limit.",
            ),
        ]
        if len(set(part.groups)) > 1:
            blocks.append(_by_group(part))
        blocks.append(_answers(part))
        if part.examples:
            blocks.append(_heat_maps(part))
        blocks.append(_settings(part))
        sections.append((part.title, Markup("").join(blocks)))
    sections.append(("When not to trust it", _LIMITS))
    environment = metrics["environment"]
    footer = (
        f"endotrl {__version__}, TRL {environment['trl']}, transformers {environment['transformers']}, torch "
        f"{environment['torch']}; {environment['machine']}; {metrics['seconds'] / 60:.1f} minutes. Made by `endotrl "
        "demo`."
    )
    path = output_dir / "report.html"
    lead = (
        "Language models that improve by their own reward: no reward model, no judge, no labels. Each is trained by "
        "TRL's "
        "GRPO on the endogenous reward of its own frozen copy, and, on the same footing, on rewards that know nothing."
    )
    path.write_text(page("endotrl demo", sections, lead=lead, footer=footer), encoding="utf-8")
    return path


_LIMITS = Markup(
    "<p>The endogenous reward sharpens a model: what it thinks probable becomes more probable. Where its most "
    "probable "
    "answer is wrong, training makes it wrong more often. The reward rises whatever happens, so watch an accuracy on "
    "held-out "
    "questions, the length of answers and their entropy, keep the KL penalty (<code>beta</code> &gt; 0), and compare "
    "with "
    "rewards that know nothing, as this page does.</p>"
)


def plot_accuracy(part: Part) -> bytes:
    """Accuracy over training steps, and held-out accuracy before and after, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    fig, (curves, bars) = plt.subplots(1, 2, figsize=(9, 3.4), width_ratios=[1.6, 1], layout="constrained")
    for run in part.runs:
        values = [entry["rewards/accuracy/mean"] for entry in run.history]
        window = max(1, len(values) // 12)
        smooth = [sum(values[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(values))]
        curves.plot(range(1, len(values) + 1), values, color=COLORS[run.reward], alpha=0.25, linewidth=1)
        curves.plot(
            range(1, len(values) + 1), smooth, color=COLORS[run.reward], linewidth=2, label=f"{run.reward} reward"
        )
    curves.set(xlabel="GRPO step", ylabel="accuracy of sampled answers", ylim=(0, 1))
    curves.legend(frameon=False, loc="best")
    labels = ["base"] + [run.reward for run in part.runs]
    heights = [part.before.accuracy] + [part.after[run.name].accuracy for run in part.runs]
    errors = [half_width(height, len(part.questions)) for height in heights]
    bars.bar(labels, heights, yerr=errors, capsize=3, color=["#444444"] + [COLORS[label] for label in labels[1:]])
    bars.axhline(part.greedy.accuracy, color="#444444", linestyle=":", linewidth=1)
    bars.text(len(labels) - 0.5, part.greedy.accuracy - 0.01, "base, greedy", ha="right", va="top", fontsize=8)
    bars.set(ylabel="held-out accuracy", ylim=(0, 1.05))
    bars.tick_params(axis="x", labelsize=8)
    for x, height in enumerate(heights):
        bars.text(x, 0.02, f"{height:.0%}", ha="center", color="white", fontsize=9)
    buffer = BytesIO()
    fig.savefig(buffer, format="png", dpi=144)
    plt.close(fig)
    return buffer.getvalue()


def _by_group(part: Part) -> Markup:
    rows = []
    for group in dict.fromkeys(part.groups):
        members = [i for i, g in enumerate(part.groups) if g == group]
        after = [sum(answers.right[i] for i in members) / len(members) for answers in part.after.values()]
        before = sum(part.before.right[i] for i in members) / len(members)
        rows.append([group.replace("_", " "), str(len(members)), f"{before:.0%}", *[f"{a:.0%}" for a in after]])
    headers = ["held-out questions", "number", "before", *[run.reward for run in part.runs]]
    return table(headers, rows, caption="Accuracy by kind of question, sampled.")


def _answers(part: Part) -> Markup:
    own = part.runs[0]
    after = part.after[own.name]
    # Every k-th question, chosen by position alone.
    step = max(1, len(part.questions) // NUM_ANSWERS)
    rows = [
        [part.questions[i], _marked(part.before, i), _marked(after, i)] for i in range(0, len(part.questions), step)
    ][:NUM_ANSWERS]
    return table(
        ["question", "before", f"after ({own.reward} reward)"],
        rows,
        caption=f"Sampled answers to held-out questions, chosen by position alone: one in {step}. ✓ is right, ✗ "
        "wrong.",
    )


def _marked(answers: Answers, index: int) -> str:
    return f"{'✓' if answers.right[index] else '✗'} {answers.texts[index]}"


def _heat_maps(part: Part) -> Markup:
    text = Markup(
        "<p>What each token contributes to the endogenous reward: α log π of the frozen model. A wrong answer from "
        "before "
        "and the answer from after, to three questions whose answer was mended.</p>"
    )
    return text + heat_maps(part.examples)


def _settings(part: Part) -> Markup:
    return table(
        ["setting", "value"], [[key, str(value)] for key, value in part.settings.items()], caption="Settings."
    )
