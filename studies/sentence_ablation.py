# SPDX-License-Identifier: Apache-2.0
"""
Which options of [`~endotrl.SentenceRewardTrainer`] matter, by the trainer itself with all layers frozen: each from the
paper's defaults on, and from sums of own values on. Judged on pairs that are in no figure of
[`studies.sentence_reward`]: its development pairs of facts, and HH-RLHF harmless.

    python -m studies.sentence_ablation --data shared/data    # about 40 minutes on one core; what is there is kept
"""

import argparse
import gzip
import itertools
import json
import math
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks.measure import describe_run, markdown_table, read_figures, write_figures
from endotrl import SentenceRewardTrainer
from endotrl.frozen.quickstart_model import quickstart_model_path
from endotrl.reporting import quiet_libraries
from endotrl.sentence import SentenceRewardTrainerConfig

from .sentence_layers import as_dataset
from .sentence_states import FACTS_PAIRS, Pair, load_pairs, pair_of_dialogues
from .sentence_statistics import BOOTSTRAP, auc, by_sentences, percent, resample, right_by_pair, with_interval


SEEDS = 5
LAYERS = {"facts": 13, "harmless": 16}  # the depths that heads on frozen states chose for facts and for preferences
HARMLESS = {"train": 700, "dev": 350}  # pairs
MAX_CHARACTERS = 600  # of prompt and answer
WINDOWS = 20  # of the logs of weights
ATTENTION_DIM = 256
TRAINING: dict[str, Any] = {
    "learning_rate": 1e-2,
    "num_train_epochs": 5,
    "per_device_train_batch_size": 16,
    "per_device_eval_batch_size": max(HARMLESS.values()),
    "warmup_steps": 10,
    "bf16": True,
}
RESPONSE = {"marker": False, "aggregator": "sum"}
OWN = {**RESPONSE, "differences": False}
EQUAL = {"attention_init": "equal"}
# Of the attention, unless a variant says otherwise; a quarter of it is the trainer's default, by this study.
STEP = TRAINING["learning_rate"] / math.sqrt(ATTENTION_DIM)
NO_MARKERS = {"marker": False}
QUARTER = {"attention_learning_rate": STEP / 4}
SIXTEENTH = {"attention_learning_rate": STEP / 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "response-level, as TRL's `RewardTrainer`": RESPONSE,
    "the same, at a marker": {"aggregator": "sum"},
    "as in the paper": {},
    "attention's learning rate x 4": {"attention_learning_rate": STEP * 4},
    "attention's learning rate / 4": QUARTER,
    "attention's learning rate / 16": SIXTEENTH,
    "attention's learning rate / 64": {"attention_learning_rate": STEP / 64},
    "no markers": NO_MARKERS,
    "no markers, / 4": {**NO_MARKERS, **QUARTER},
    "equal weights at first": EQUAL,
    "equal weights at first, / 4": {**EQUAL, **QUARTER},
    "equal weights at first, no markers": {**EQUAL, **NO_MARKERS},
    "equal weights at first, no markers, / 4": {**EQUAL, **NO_MARKERS, **QUARTER},
    "equal weights at first, no markers, / 16": {**EQUAL, **NO_MARKERS, **SIXTEENTH},
    "weights stay equal, no markers": {**EQUAL, **NO_MARKERS, "attention_learning_rate": 0.0},
    "own values, markers": {"differences": False},
    "own values, equal weights at first, no markers": {"differences": False, **EQUAL, **NO_MARKERS},
    "own values, sum": OWN,
    "own values, sum, markers": {**OWN, "marker": True},
    "own values, sum, `center_sentences_coefficient=0.02`": {**OWN, "center_sentences_coefficient": 0.02},
}
BASE = next(iter(VARIANTS))
FILE = "sentence-ablation.json.gz"
COMPARED = ("own values, sum", "equal weights at first, no markers, / 16")
SHOWN = ("as in the paper", "attention's learning rate / 4", "equal weights at first, no markers, / 16")
INTRODUCTION = f"""\
Heads on states that the trainer keeps on disk (`freeze_layers` of all that are left, {LAYERS["facts"]} for facts and
{LAYERS["harmless"]} for HH-RLHF harmless), {TRAINING["num_train_epochs"]} epochs of Adam at {TRAINING["learning_rate"]:g},
five seeds, judged by pairs that are in no table above: {FACTS_PAIRS["dev"]} of facts after {FACTS_PAIRS["train"]}, and
{HARMLESS["dev"]} of harmless answers after {HARMLESS["train"]} (`python -m studies.sentence_ablation --data DIR`). The
marker is frozen, too. Attention learns at `learning_rate` / $\\sqrt d$, or at the part of it that a line says.

At the full rate, most runs on facts end with all weight at one place of every response, and some at the one before the
response, where both answers of a pair are equal and no gradient is left. A quarter of it, which is the trainer's default
for that reason, mends this, but for random weights without markers on harmless answers; equal weights at first and no
markers help further on facts, and own values as much without any attention. On harmless answers, nothing is ahead of the response-level model beyond noise."""
MOMENTS = (0, WINDOWS // 4, WINDOWS // 2, -1)


def variants_of(dataset: str) -> list[str]:
    """Of harmless answers, all but those that are read in a fourth way, for which all states would be made once more."""
    if dataset == "facts":
        return [*VARIANTS]
    return [name for name, v in VARIANTS.items() if v.get("differences", True) or not v.get("marker", True)]


def load(dataset: str, data: Path) -> dict[str, list[Pair]]:
    """Pairs to learn from and to judge by."""
    if dataset == "facts":
        pairs = load_pairs("facts", data)
        return {part: [pair for pair in pairs if pair.part == part] for part in ("train", "dev")}
    with gzip.open(data / "hh_rlhf" / "harmless-base.test.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    found = [pair for row in rows if (pair := pair_of_dialogues(row)) is not None]
    sizes = [sum(len(turn["content"]) for turn in pair.prompt) + max(map(len, pair.answers)) for pair in found]
    pairs = [pair for pair, size in zip(found, sizes, strict=True) if size <= MAX_CHARACTERS]
    random.Random(0).shuffle(pairs)
    cut = HARMLESS["train"]
    return {"train": pairs[:cut], "dev": pairs[cut : cut + HARMLESS["dev"]]}


def run(dataset: str, variant: str, seed: int, parts: dict[str, list[Pair]], path: str) -> dict[str, Any]:
    """Trains heads, and judges the development pairs; with what attention paid to each place meanwhile."""
    settings = {"attention_dim": ATTENTION_DIM, "attention_learning_rate": STEP, **TRAINING, **VARIANTS[variant]}
    with tempfile.TemporaryDirectory() as folder:
        args = SentenceRewardTrainerConfig(
            folder,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=seed,
            logging_strategy="no",
            freeze_layers=LAYERS[dataset],
            model_init_kwargs={"num_hidden_layers": LAYERS[dataset]},
            **settings,
        )
        trainer = SentenceRewardTrainer(
            path,
            args,
            train_dataset=as_dataset(parts["train"]),
            eval_dataset=as_dataset(parts["dev"]),
            processing_class=AutoTokenizer.from_pretrained(path),
        )
        outputs: list[tuple[Any, Tensor]] = []  # with numbers of states
        trainer.model.register_forward_hook(
            lambda module, args, kwargs, output: outputs.append((output, (kwargs["sentence_ends"] >= 0).sum(dim=1))),
            with_kwargs=True,
        )
        trainer.train()
        history = [weights_of(output.weights.detach(), counts) for output, counts in outputs]
        outputs.clear()
        trainer.evaluate()
    ((judged, states),) = outputs  # one batch: the chosen answers, then the rejected ones
    scores = judged.logits[:, 0].double()
    chosen, rejected = scores.chunk(2)
    counts = states - 1  # but the one before the response
    terms = judged.weights * judged.sentence_rewards
    margins = [round(margin, 4) for margin in (chosen - rejected).tolist()]  # where all weight is at one place: ties
    result = {"dataset": dataset, "variant": variant, "seed": seed, "margins": margins}
    result["sentences"] = [list(both) for both in zip(*(part.tolist() for part in counts.chunk(2)), strict=True)]
    width = max(len(history) // WINDOWS, 1)
    windows = [history[i : i + width] for i in range(0, len(history), width)]
    result["weights"] = [
        [round(statistics.mean(column), 4) for column in zip(*window, strict=True)] for window in windows
    ]
    if parts["dev"][0].right is not None:
        flags = [pair.right[which] for which in (0, 1) for pair in parts["dev"] if pair.right]
        rows = [row for row in zip(terms.detach(), counts.tolist(), flags, strict=True) if row[1] == len(row[2])]
        worth = torch.cat([row[1 : n + 1] for row, n, _ in rows])
        result["auc"] = auc(worth, torch.tensor([flag for *_, row in rows for flag in row]))
    return result


def weights_of(weights: Tensor, counts: Tensor) -> list[float]:
    """Mean weights of a batch: before the response, of the first sentence, of the last; and of equal weights."""
    last = weights.gather(1, (counts - 1)[:, None])
    return [part.mean().item() for part in (weights[:, 0], weights[:, 1], last, 1 / counts.float())]


def summarize(results: list[dict[str, Any]], dataset: str) -> dict[str, dict[str, Any]]:
    """Accuracy and AUC of every variant, and the paired difference from the response-level model."""
    some = [r for r in results if r["dataset"] == dataset]
    right = {
        name: right_by_pair([r["margins"] for r in some if r["variant"] == name])
        for name in VARIANTS
        if any(r["variant"] == name for r in some)
    }
    summary = {}
    for name, mean in right.items():
        difference = mean - right[BASE]
        found = [r["auc"] for r in some if r["variant"] == name and "auc" in r]
        summary[name] = {
            "accuracy": mean.mean().item(),
            "difference": difference.mean().item(),
            "interval": resample(len(mean), lambda i, d=difference: d[i].mean().item(), BOOTSTRAP),
            "auc": statistics.mean(found) if found else None,
        }
    return summary


def section(figures: dict[str, Any]) -> str:
    """The tables, for the page."""
    summaries = {name: summarize(figures["results"], name) for name in LAYERS}
    headers = ["", "facts: pairs in order, %", "to response-level", "wrong sentences, AUC"]
    headers += ["harmless: pairs in order, %", "to response-level"]
    rows = []
    for variant in VARIANTS:
        row = [variant]
        for name, summary in summaries.items():
            if variant not in summary:
                row += ["–", "–"]
                continue
            found = summary[variant]
            row += [percent(found["accuracy"]), with_interval(found["difference"], found["interval"], "+")]
            row += [f"{found['auc']:.2f}"] if name == "facts" else []
        rows.append(row)
    weights = []
    for variant in SHOWN:
        runs = [r["weights"] for r in figures["results"] if (r["dataset"], r["variant"]) == ("facts", variant)]
        for place, title in enumerate(("before the response", "first sentence", "last sentence")):
            means = [statistics.mean(run[moment][place] for run in runs) for moment in MOMENTS]
            weights.append([f"{variant}: {title}", *(f"{value:.2f}" for value in means)])
    parts = [INTRODUCTION, markdown_table(headers, rows)]
    parts.append("Mean weights on the facts, over training and five seeds (a place of equal weights has 0.19):")
    parts.append(markdown_table(["weight of", "start", "a quarter", "half", "end"], weights))
    for name, title in (("facts", "Facts"), ("harmless", "HH-RLHF harmless")):
        some = [r for r in figures["results"] if r["dataset"] == name]
        margins = {v: [r["margins"] for r in some if r["variant"] == v] for v in (BASE, *COMPARED)}
        table = by_sentences(margins, some[0]["sentences"], BASE)
        parts.append(markdown_table([f"{title}, sentences", "pairs", BASE, *COMPARED], table))
    return "\n\n".join(parts)


def main() -> None:
    """Runs what is missing, and writes figures and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with `hh_rlhf/`")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="folder of figures and page")
    args = parser.parse_args()
    quiet_libraries()
    file = args.output / FILE
    figures = read_figures(file) if file.exists() else {"results": []}
    figures["settings"] = describe_run("studies.sentence_ablation", "cpu", "--data DIR")
    path = quickstart_model_path()
    for dataset in LAYERS:
        parts = load(dataset, args.data)
        done = {(r["variant"], r["seed"]) for r in figures["results"] if r["dataset"] == dataset}
        jobs = [job for job in itertools.product(variants_of(dataset), range(SEEDS)) if job not in done]
        for variant, seed in tqdm(jobs, desc=f"Options, {dataset}", unit=" runs"):
            figures["results"].append(run(dataset, variant, seed, parts, path))
            write_figures(file, figures)
    Console().print(Markdown(section(figures)))


if __name__ == "__main__":
    main()
