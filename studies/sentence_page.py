# SPDX-License-Identifier: Apache-2.0
"""The page of [`studies.sentence_reward`]: summaries, tables and plot."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import machine_line, markdown_table
from endotrl.reporting.plots import as_png, pyplot

from . import sentence_ablation
from .sentence_layers import CENTERING, TRAINING
from .sentence_states import DEPTHS, MAX_TOKENS, SOLUTIONS
from .sentence_statistics import BOOTSTRAP, auc, by_sentences, percent, resample, right_by_pair, with_interval


LABELS = {
    "response": "response-level (TRL's `RewardTrainer`)",
    "own-sum": "sentences: own values, sum",
    "own": "sentences: own values, attention from equal weights",
    "equal": "sentences: differences, attention from equal weights",
    "paper": "sentences: differences, attention, as in the paper",
    "endogenous": "endogenous reward by sentence, untrained",
    "told": "own values, told which sentences are right (a bound for heads)",
    "response-layers": "response-level, layers trained",
    "own-sum-layers": "sentences: own values, sum, layers trained",
}
LAYERS = {"response-layers": "response", "own-sum-layers": "own-sum"}  # the arms that they start from
OWN = "own-sum", "own-sum-layers"  # that the verdict is about
ARMS = tuple(arm for arm in LABELS if arm not in ("endogenous", "told", *LAYERS))
HEADERS = ["", "pairs in order, %", "to response-level", "wrong sentences, AUC"]
TITLES = {
    "facts": "Facts: answers of sentences that are right or wrong",
    "fresh": "Fresh facts, of other kinds than those learned from",
    "helpful": "HH-RLHF helpful",
    "webgpt": "WebGPT comparisons",
    "prmbench": "PRMBench: solutions with a wrong step",
    "processbench": "ProcessBench (GSM8K): right solutions, and wrong ones of other problems",
}
STEPS = {"own-sum": "own values", "response": "response-level", "endogenous": "endogenous reward, untrained"}
ADVICE = (
    "**When to use one:** where sentences are right or wrong on their own (claims, facts, list items), with "
    '`differences=False, aggregator="sum"`. Where an answer is judged as a whole (tone, helpfulness), or steps follow '
    "from each other, a response-level model is as good and simpler."
)
SENTENCES = "Pairs by the number of sentences of their longer answer; columns of arms are points next to the first.\n"
HOW = f"""\
- **Models.** Heads on the states of the frozen SmolLM2-135M-Instruct, at one of the layers
  {", ".join(map(str, DEPTHS))} of 30, by the Bradley-Terry loss, L-BFGS and an L2 penalty. The response-level loss is
  that of TRL's `RewardTrainer`; its model is read at the ends of sentences, by differences. The endogenous reward is
  summed over sentences.
- **Normalised states.** States are scaled to length 1, and whitened by a covariance that is shrunk to that of
  independent features (1000: not at all), so that the penalty is one on the variance of values: the answers of a pair
  are about the same, and nothing else keeps the value of a sentence from depending on its subject.
  `center_sentences_coefficient` of the trainer penalises that, too. Whitening was found on development pairs; before
  it, own values had an AUC of 0.80 on the facts.
- **Choices.** Depth, shrinkage and penalty are chosen on pairs that are in no other figure (below; with attention, the
  depth is that of the arm without), for WebGPT those of HH-RLHF, for PRMBench and ProcessBench those of the facts.
- **Intervals**, in brackets: 95%, by bootstrap over test pairs, of means over five seeds, each with training pairs of
  its own (nine tenths of them, or its own five folds).
- **Facts** of the test are in no training pair; but the candidate layers, own values among the arms and the optimiser
  came about by looking at answers about these very facts: the figures are those of a task known before. **Fresh facts**
  were written afterwards, of other kinds (currencies, authors, chemical symbols, rivers, and others); arms, layers,
  penalties and training pairs are those of the facts. They were run twice: before states were whitened, own values had
  67.1% and an AUC of 0.66, response-level 60.4% and 0.51.
- **Steps** are lines, of solutions of up to {MAX_TOKENS[True]} tokens, told apart within the wrong solutions
  only. ProcessBench has one solution per problem: a pair is a right solution and a wrong one of another problem, and
  steps after the first wrong one count neither as right nor as wrong. (Its `gsm8k.json` goes into `DIR/processbench`.)
- **Trained layers** are the five below the head (9 to 13 of own values, 12 to 16 of the response-level model), trained
  by `SentenceRewardTrainer` with `freeze_layers`: {TRAINING["num_train_epochs"]} epochs in batches of
  {TRAINING["per_device_train_batch_size"]} pairs at a learning rate of {TRAINING["learning_rate"]:g} in bfloat16, from
  the head on (and with `center_sentences_coefficient={CENTERING:g}` for own values): the first settings that were
  tried. One epoch of a trial had been looked at on development and test pairs; nothing was changed after it.
- RL on these models: [sentence-rl.md](sentence-rl.md). Not measured: training of layers on other data than the facts,
  and models beyond 135M parameters."""


def rival_of(arm: str) -> str:
    """The response-level arm with as much trained."""
    return "response-layers" if arm == "own-sum-layers" else "response"


def summarize(figures: dict[str, Any], dataset: str) -> dict[str, dict[str, Any]]:
    """Accuracy and AUC of each arm, means over seeds, and paired differences of the rivals, with intervals."""
    cells = figures["cells"][dataset]
    arms = [arm for arm in LABELS if any(cell["arm"] == arm for cell in cells)]
    count = len(cells[0]["pairs"])
    right = {arm: right_by_pair([cell["margins"] for cell in cells if cell["arm"] == arm]) for arm in arms}
    summary: dict[str, dict[str, Any]] = {}
    for arm in arms:
        mean, rival = right[arm], right[rival_of(arm)]
        summary[arm] = {
            "accuracy": mean.mean().item(),
            "interval": resample(count, lambda i, m=mean: m[i].mean().item(), BOOTSTRAP),
        }
        if arm != "response":
            difference = mean - rival
            summary[arm]["difference"] = difference.mean().item()
            summary[arm]["difference_interval"] = resample(
                count, lambda i, d=difference: d[i].mean().item(), BOOTSTRAP
            )
    if dataset in figures["endogenous"]:
        # Of solutions only those with a wrong step, so that their other steps are what it is told from.
        answers = (1,) if dataset in SOLUTIONS else (0, 1)
        truth = figures["endogenous"][dataset]["right"]
        tables = {arm: [cell["worth"] for cell in cells if cell["arm"] == arm] for arm in arms}
        tables["endogenous"] = [figures["endogenous"][dataset]["worth"]]
        marks = [[flag for a in answers for flag in pair[a]] for pair in truth]
        known = torch.tensor([flag is not None for row in marks for flag in row])
        worth = {
            arm: torch.tensor([[v for pair in table for a in answers for v in pair[a]] for table in seeds])[:, known]
            for arm, seeds in tables.items()
        }  # (seeds, sentences)
        flags = torch.tensor([flag for row in marks for flag in row if flag is not None])
        places = torch.arange(len(flags)).split([sum(flag is not None for flag in row) for row in marks])

        def mean_auc(arm: str, pairs: Sequence[int]) -> float:
            chosen = torch.cat([places[i] for i in pairs])
            return statistics.mean(auc(values, flags[chosen]) for values in worth[arm][:, chosen])

        for arm in worth:
            summary.setdefault(arm, {})["auc"] = mean_auc(arm, range(count))
            summary[arm]["auc_interval"] = resample(count, lambda i, a=arm: mean_auc(a, i), 300)
        for arm in OWN:
            for name, rival in (("response", rival_of(arm)), ("endogenous", "endogenous")):
                if arm in arms:
                    summary[arm][f"auc_over_{name}"] = [
                        summary[arm]["auc"] - summary[rival]["auc"],
                        *resample(count, lambda i, a=arm, r=rival: mean_auc(a, i) - mean_auc(r, i), 300),
                    ]
    return summary


def table_rows(summary: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of a table of one dataset, as text."""
    rows = []
    for arm, figures in summary.items():
        row = [LABELS[arm], "–", "–", "–"]
        if "accuracy" in figures:
            row[1] = with_interval(figures["accuracy"], figures["interval"])
        if "difference" in figures:
            row[2] = with_interval(figures["difference"], figures["difference_interval"], "+")
        if "auc" in figures:
            row[3] = f"{figures['auc']:.2f} ({figures['auc_interval'][0]:.2f} to {figures['auc_interval'][1]:.2f})"
        rows.append(row)
    return rows


def difference_text(figures: dict[str, Any]) -> str:
    """Points next to the response-level model, with their interval."""
    return with_interval(figures["difference"], figures["difference_interval"], "+") + " points"


def verdict(summaries: dict[str, dict[str, dict[str, Any]]]) -> str:
    """What was found, as a list."""
    said = []
    facts = summaries.get("facts", {})
    for arm, start in zip(OWN, ("Heads of own values", "With five layers trained, too, own values"), strict=True):
        if arm in facts:
            (response, *low_high), (endogenous, *ends) = (
                facts[arm][f"auc_over_{rival}"] for rival in ("response", "endogenous")
            )
            said.append(
                f"**Sentences that are right or wrong by themselves.** {start} find the wrong ones with an AUC of "
                f"{facts[arm]['auc']:.2f}: {response:+.2f} ({low_high[0]:+.2f} to {low_high[1]:+.2f}) over the "
                f"response-level model with as much training, {endogenous:+.2f} ({ends[0]:+.2f} to {ends[1]:+.2f}) over "
                f"the endogenous reward. They put {percent(facts[arm]['accuracy'])}% of held-out pairs in order, "
                f"{difference_text(facts[arm])} next to the response-level model."
            )
    if "fresh" in summaries:
        fresh = summaries["fresh"]
        arm = next(arm for arm in reversed(OWN) if arm in fresh)
        said.append(
            f"**Facts of other kinds** than those learned from: {percent(fresh[arm]['accuracy'])}% of pairs, "
            f"{difference_text(fresh[arm])}, AUC {fresh[arm]['auc']:.2f} (response-level "
            f"{fresh[rival_of(arm)]['auc']:.2f}, endogenous {fresh['endogenous']['auc']:.2f})."
        )
    for dataset in ("helpful", "webgpt"):
        if dataset in summaries:
            differences = {a: f for a, f in summaries[dataset].items() if "difference" in f}
            ahead = [LABELS[a] for a, f in differences.items() if f["difference_interval"][0] > 0]
            behind = [LABELS[a] for a, f in differences.items() if f["difference_interval"][1] < 0]
            said.append(
                f"**{TITLES[dataset]}.** Ahead of the response-level model beyond noise: {'; '.join(ahead) or 'none'}. "
                f"Behind: {'; '.join(behind) or 'none'}."
            )
    for dataset in SOLUTIONS:
        if dataset in summaries:
            arms = summaries[dataset]
            found = ", ".join(f"{name} {arms[arm]['auc']:.2f}" for arm, name in STEPS.items())
            said.append(f"**{TITLES[dataset]}.** AUC of the wrong step within its solution: {found}.")
    return "\n".join(f"- {text}" for text in said)


def page(
    figures: dict[str, Any], summaries: dict[str, dict[str, dict[str, Any]]], ablation: dict[str, Any] | None
) -> str:
    """The results as a document."""
    parts = [f"# Sentence-level reward model: does it judge better?\n\n{verdict(summaries)}\n\n{ADVICE}\n"]
    parts.append("![Accuracy and AUC of all arms](sentence.png)\n")
    for dataset, summary in summaries.items():
        size = figures["sizes"][dataset]
        parts.append(
            f"## {TITLES[dataset]}\n\n{markdown_table(HEADERS, table_rows(summary))}\n\n{size['pairs']} held-out "
            f"pairs, {size['training']} to learn from, {size['sentences']:.1f} sentences per answer; the answer with "
            f"more sentences is the better one in {percent(size['longer'])}%.\n"
        )
    parts.append("## By number of sentences\n\n" + SENTENCES)
    for dataset in ("helpful", "webgpt"):
        if "counts" in figures["sizes"].get(dataset, {}):
            cells = figures["cells"][dataset]
            margins = {
                LABELS[a]: [c["margins"] for c in cells if c["arm"] == a] for a in ("response", "own-sum", "equal")
            }
            table = by_sentences(margins, figures["sizes"][dataset]["counts"], LABELS["response"])
            parts.append(markdown_table([f"{TITLES[dataset]}, sentences", "pairs", *margins], table) + "\n")
    if ablation:
        parts.append(f"## Options of the trainer\n\n{sentence_ablation.section(ablation)}\n")
    tried: dict[tuple[str, float], float] = {}
    for key, choice in figures["choices"].items():
        for setting in choice["tried"]:
            place = key, setting["shrinkage"]
            tried[place] = max(tried.get(place, 0.0), setting["accuracy"])
    shrinkages = sorted({shrinkage for _, shrinkage in tried})
    choices = [
        [key, str(c["depth"]), f"{c['shrinkage']:g}", f"{c['penalty']:g}"]
        + [percent(tried[key, shrinkage]) if (key, shrinkage) in tried else "–" for shrinkage in shrinkages]
        for key, c in figures["choices"].items()
    ]
    headers = [
        "chosen",
        "layer",
        "shrinkage",
        "penalty",
        *(f"pairs in order at shrinkage {s:g}, %" for s in shrinkages),
    ]
    parts.append(f"## How\n\n{HOW}\n\n{markdown_table(headers, choices)}\n\n{machine_line(figures['settings'])}\n")
    return "\n".join(parts)


def plot(summaries: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Accuracy and AUC of each arm."""
    plt, arms = pyplot(), list(LABELS)
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4), layout="constrained", sharey=True)
    for panel, (name, title) in zip(
        panels, (("accuracy", "held-out pairs in order"), ("auc", "AUC of wrong sentences")), strict=True
    ):
        for i, (dataset, summary) in enumerate(summaries.items()):
            shown = [(a, f) for a, f in summary.items() if name in f]
            places = [arms.index(a) + 0.15 * (i - 2) for a, _ in shown]
            means = [f[name] for _, f in shown]
            ends = [f["interval" if name == "accuracy" else "auc_interval"] for _, f in shown]
            errors = [
                [m - low for m, (low, _) in zip(means, ends, strict=True)],
                [h - m for m, (_, h) in zip(means, ends, strict=True)],
            ]
            if shown:
                panel.errorbar(means, places, xerr=errors, fmt="o", color=f"C{i}", label=dataset, capsize=2)
        panel.axvline(0.5, color="0.7", linewidth=0.8)
        panel.set_xlabel(title)
    panels[0].set_yticks(range(len(arms)), [LABELS[arm].replace("`", "") for arm in arms], fontsize=8)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path.write_bytes(as_png(figure))
