# SPDX-License-Identifier: Apache-2.0
"""The demo's report: verdict, table, curve, answers and token rewards in one HTML file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..evaluation.plots import as_png, pyplot
from ..reporting import figure, heat_maps, page, settings_table, table
from .findings import MAJORITY, SAMPLED, TITLES, Part, Policy, accuracy_table, half_width, summary


NUM_ANSWERS = 8
# Okabe and Ito's colours, told apart with every common colour blindness, and a line style each for those who see none.
STYLES = {"endogenous": ("#0072b2", "-"), "random": ("#d55e00", "--"), "length": ("#777777", ":")}
STYLES |= {"other_image": ("#009e73", "-."), "text_alone": ("#777777", ":")}


def write_report(parts: Sequence[Part], metrics: dict[str, Any], output_dir: Path) -> Path:
    """Writes `report.html` and the plots as PNG files, and returns the path of the report."""
    sections: list[tuple[str, Markup | str]] = []
    for part in parts:
        plot = plot_accuracy(part)
        (output_dir / f"{part.name}.png").write_bytes(plot)
        headers, rows = accuracy_table(part)
        costs = " Majority: of 16 answers to each question, at 16 times the cost." if MAJORITY in headers else ""
        verdict, _, rest = summary(part).partition(". ")
        noise = max(half_width(values) for policy in part.policies.values() for values in policy.right.values())
        asked = f"Right answers to {len(part.questions)} questions on which nothing was trained"
        blocks = [
            _paragraph(rest if part is parts[0] else f"{verdict}. {rest}"),
            _paragraph(f"{asked} (95% intervals are at most ± {100 * noise:.0f} points).{costs}"),
            # As `Markup`, names are no wider than they are, and all columns fit a phone.
            table(headers, [[Markup("{}").format(name), *cells] for name, *cells in rows]),
            figure(
                plot,
                "Accuracy of the answers sampled in training (measured, not rewarded; averaged over a few steps). "
                "Horizontal lines: what the untrained model gives when asked in other ways.",
            ),
            _answers(part),
        ]
        if part.examples:
            blocks.append(
                Markup(
                    "<p>What each token adds to the reward, the frozen model's log-probability: answers from before "
                    'and after training.</p><div class="pairs">{}</div>'
                ).format(heat_maps(part.examples))
            )
        blocks.append(_details(part))
        sections.append((part.title, Markup("").join(blocks)))
    sections.append(("When not to trust it", _LIMITS))
    used, minutes = metrics["environment"], f"{metrics['seconds'] / 60:.1f} minutes"
    software = ", ".join(f"{name} {used[name.lower()]}" for name in ("endotrl", "TRL", "transformers", "torch"))
    footer = f"{software}; {used['machine']}; {minutes}; one run of each. Made by the command endotrl demo."
    verdict, _, _ = summary(parts[0]).partition(". ")
    lead = Markup(
        "<p><strong>{}.</strong> No reward model, no judge, no labels: each model is trained by TRL's GRPO on "
        "the reward that its own frozen copy gives.</p>"
    ).format(verdict)
    path = output_dir / "report.html"
    path.write_text(page("endotrl demo", sections, lead=lead, footer=footer), encoding="utf-8")
    return path


_LIMITS = Markup(
    "<p>The endogenous reward sharpens a model: whole answers that it thinks probable become more probable. Where its "
    "most probable answer is wrong, training makes it wrong more often. The reward rises whatever happens, so watch "
    "an accuracy on held-out questions, the length of answers and their entropy, keep the KL penalty "
    "(<code>beta</code> &gt; 0), and compare with rewards that know nothing.</p>"
)


def plot_accuracy(part: Part) -> bytes:
    """Accuracy over training steps, with what the base model gives when asked in other ways, as PNG."""
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
        heights: list[float] = []
        for way in sorted((way for way in base.right if way != SAMPLED), key=base.accuracy):
            height = base.accuracy(way)
            axes.axhline(height, color="#444444", linewidth=0.8, alpha=0.6)
            heights.append(max(height, heights[-1] + 0.15) if heights else height)  # labels keep a distance
            axes.text(steps * 1.02, heights[-1], f"base, {way}:\n{height:.0%}", va="center", color="#444444")
        axes.set(xlabel="GRPO step", ylabel="right answers", ylim=(-0.02, 1.04), xlim=(1, max(2, steps)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.6, 1.18), ncols=3, fontsize=10)
        return as_png(fig)


def _paragraph(text: str) -> Markup:
    return Markup("<p>{}</p>").format(text)


def _answers(part: Part) -> Markup:
    before, after = part.policies["base"], part.policies["endogenous"]
    # Every k-th question, chosen by position alone.
    step = max(1, len(part.questions) // NUM_ANSWERS)
    shown = range(0, len(part.questions), step)[:NUM_ANSWERS]
    rows = [[part.questions[i], _marked(before, i), _marked(after, i)] for i in shown]
    how = " An answer is the sum with its last digit first." if part.name == "arithmetic" else ""
    caption = f"Sampled answers, chosen by position alone: one in {step} of the held-out ones. ✓ right, ✗ wrong.{how}"
    return _paragraph(caption) + table(["question", "before", "after"], rows)


def _marked(policy: Policy, index: int) -> str:
    return f"{'✓' if policy.text_right[index] else '✗'} {policy.texts[index]}"


def _details(part: Part) -> Markup:
    """By kind of question, and the settings, folded away."""
    blocks = []
    if len(set(part.groups)) > 1:
        rows = []
        for group in dict.fromkeys(part.groups):
            members = [i for i, g in enumerate(part.groups) if g == group]
            shares = [sum(p.right[SAMPLED][i] for i in members) / len(members) for p in part.policies.values()]
            rows.append([group.replace("_", " "), str(len(members)), *[f"{share:.0%}" for share in shares]])
        headers = ["kind of question", "number", *[TITLES[name] for name in part.policies]]
        blocks.append(table(headers, rows, caption="Accuracy by kind of question, sampled."))
    ends = {f"answers cut off, {TITLES[name]}": f"{p.cut_off:.0%}" for name, p in part.policies.items()}
    seconds = {f"seconds, {TITLES[n]}": f"{p.seconds:.0f}" for n, p in part.policies.items() if p.curve}
    settings = {**part.settings, **ends, **seconds}
    blocks.append(settings_table({key.replace("_", " "): value for key, value in settings.items()}))
    return Markup("<details><summary>Settings and details</summary>{}</details>").format(Markup("").join(blocks))
