# SPDX-License-Identifier: Apache-2.0
r"""
Corrections of the endogenous reward on three-digit addition: which of them hold, for how long, at which beta.

GRPO with the settings of `studies.arithmetic_runs`, but 64 answers per step and a constant learning rate without a warm-up, which never lets
go: a third of theirs, and theirs, which is too high for so few answers. A cell of the grid is
`<reward>:<beta>`. The default (`none:0.1`) is trained for 1,000 steps, all others for 250. Runs that are in the
results are kept.

    python -m studies.corrections --bases DIR                        # about 15 minutes on one core
    python -m studies.corrections --bases DIR --learning-rate 3e-4   # the same once more
    python -m studies.corrections --bases DIR --seed 1               # with another base model
    python -m studies.corrections --bases DIR --cells none:0 clip:0  # some of them
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from benchmarks.measure import write_figures
from endotrl import CollapseMonitor, EndogenousReward
from endotrl.reporting import terminal_table
from endotrl.reporting.plots import as_png, label_rows, pyplot
from endotrl.rewards import InformationGain
from endotrl.tasks import arithmetic

from .arithmetic_runs import NUM_HELD_OUT, WRONG_DEMONSTRATIONS, draw_dots, make_base
from .collapse_runs import Ask, described, kept_results, train, use_one_thread, verdict


ANSWERS = 64  # a step, 8 of them to a question
STEPS = 250
LONG = {"none:0.1": 1000}  # the default
EVERY = 25  # steps between two measurements on held-out questions
LOST = 0.05  # below its best, from which on a run has not held
EARLY_STEPS = 100  # of the pretraining, after which the generalist stops; base models have 800
# Rewards made for a base model, with a model that was trained less as the generalist, and settings of the trainer.
REWARDS: dict[str, tuple[str, Callable[[str, str], list[Any]], dict[str, Any]]] = {
    "none": ("endogenous (default)", lambda base, early: [EndogenousReward(base)], {}),
    "centered": ("centered", lambda base, early: [EndogenousReward(base, token_reward="centered")], {}),
    "length": ("length control", lambda base, early: [EndogenousReward(base, correction="length")], {}),
    "clip": (
        "clipped at -5 nats per token",
        lambda base, early: [EndogenousReward(base, token_reward="log_prob", correction="clip")],
        {},
    ),
    "gain": (
        "gain over a model trained less",
        lambda base, early: [EndogenousReward(base, token_reward="log_prob", correction=InformationGain(early))],
        {},
    ),
    "mixed": (
        "mixed with right or wrong, 1 : 0.3",
        lambda base, early: [EndogenousReward(base), verdict],
        {"reward_weights": [1.0, 0.3, 0.0], "multi_objective_aggregation": "normalize_then_sum"},
    ),
}
CELLS = [
    "none:0.1",
    *(f"{name}:{beta}" for beta in (0, 0.1, 0.02) for name in REWARDS if (name, beta) != ("none", 0.1)),
]


def make_early(folder: Path, seed: int) -> None:
    """A base model whose pretraining stopped early: it knows what an answer looks like, and little about sums."""
    torch.manual_seed(seed)
    tokenizer = arithmetic.make_tokenizer()
    model = arithmetic.make_model(tokenizer)
    held_out = arithmetic.make_questions(NUM_HELD_OUT, seed=seed + 1)
    arithmetic.pretrain(model, tokenizer, EARLY_STEPS, WRONG_DEMONSTRATIONS, seed, held_out)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run(cell: str, bases: Path, seed: int, learning_rate: float) -> dict[str, Any]:
    """Trains one cell."""
    name, _, beta = cell.partition(":")
    base, early = str(bases / f"base-{seed}"), str(bases / f"early-{seed}")
    _, make, settings = REWARDS[name]
    ask = Ask(AutoTokenizer.from_pretrained(base), seed, EVERY)
    monitor = CollapseMonitor()
    with tempfile.TemporaryDirectory() as folder:
        train(
            make(base, early),
            base,
            seed,
            LONG.get(cell, STEPS),
            folder,
            [ask],
            monitor,
            beta=float(beta),
            learning_rate=learning_rate,
            per_device_train_batch_size=ANSWERS,
            **settings,
        )
    return {
        "cell": cell,
        "seed": seed,
        "learning_rate": learning_rate,
        "held_out": ask.accuracies,
        "alarms": monitor.alarms,
    }


def lost(result: dict[str, Any]) -> tuple[int | None, int | None]:
    """
    The first measured step at which held-out accuracy is 5 points below its best until then, and the first from which
    on it stays there; `None` if there is none.
    """
    best, steps, below = 0.0, [], []
    for step, accuracy in sorted((int(s), a) for s, a in result["held_out"].items()):
        best = max(best, accuracy)
        steps.append(step)
        below.append(accuracy < best - LOST)
    first = next((step for step, is_below in zip(steps, below, strict=True) if is_below), None)
    return first, next((step for i, step in enumerate(steps) if all(below[i:])), None)


HEADER = [
    "reward",
    "β",
    "learning rate",
    "seed",
    "steps",
    "held-out accuracy: first, best, last",
    "5 points below its best",
    "alarm",
]


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """One row a cell."""
    rows = []
    for result in sorted(results, key=lambda r: (r["learning_rate"], CELLS.index(r["cell"]), r["seed"])):
        name, _, beta = result["cell"].partition(":")
        points = sorted((int(s), a) for s, a in result["held_out"].items())
        values = [accuracy for _, accuracy in points]
        once, for_good = lost(result)
        rows.append(
            [
                REWARDS[name][0],
                beta,
                f"{result['learning_rate']:.0e}".replace("e-0", "e-"),
                str(result["seed"]),
                f"{points[-1][0]:,}",
                f"{values[0]:.1%}, {max(values):.1%}, {values[-1]:.1%}",
                "never" if once is None else f"step {once}" if for_good is None else f"step {for_good}, for good",
                str(result["alarms"][0][0]) if result["alarms"] else "none",
            ]
        )
    return rows


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy at the start, at the end and at its lowest of each reward, means of seeds, a panel a beta."""
    betas = sorted({result["cell"].partition(":")[2] for result in results}, key=float)
    rates = sorted({result["learning_rate"] for result in results})
    figure, panels = pyplot().subplots(
        len(rates),
        len(betas),
        figsize=(3.2 * len(betas) + 2, 0.9 + 2.2 * len(rates)),
        layout="constrained",
        sharex=True,
        sharey=True,
        squeeze=False,
    )
    for rate, row in zip(rates, panels, strict=True):
        for beta, panel in zip(betas, row, strict=True):
            series: dict[str, list[float | None]] = {"end": [], "lowest": [], "start": []}
            for name in REWARDS:
                runs = [r for r in results if (r["cell"], r["learning_rate"]) == (f"{name}:{beta}", rate)]
                curves = [
                    [accuracy for _, accuracy in sorted((int(s), a) for s, a in r["held_out"].items())] for r in runs
                ]
                for label, of in (("start", lambda c: c[0]), ("lowest", min), ("end", lambda c: c[-1])):
                    series[label].append(sum(map(of, curves)) / len(curves) if curves else None)
            label_rows(panel, [title for title, *_ in REWARDS.values()])
            draw_dots(panel, series)
            panel.set_title(f"β = {beta}, learning rate {rate:g}", fontsize=10)
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            panel.set_visible(any(value is not None for value in series["end"]))
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside upper center")
    figure.supxlabel("accuracy on held-out questions (end right of start: it learned; lowest far left: it collapsed)")
    path.write_bytes(as_png(figure))


def page(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    studies = sorted({(result["seed"], result["learning_rate"]) for result in results})
    seeds = {seed for seed, _ in studies}
    there = {(result["cell"], result["seed"], result["learning_rate"]) for result in results}
    commands = ", ".join(f"`--learning-rate {rate:g} --seed {seed}`" for seed, rate in studies)
    lines = [
        "# Which corrections hold?",
        "",
        f"Command: `python -m studies.corrections --bases DIR`, with {commands}. Machine: {settings['machine']}. "
        f"{settings['versions']}. "
        f"CPU time: {settings['cpu_seconds'] / 60:.0f} minutes.",
        "",
        f"Three-digit addition, learned from scattered errors: GRPO, {ANSWERS} answers per step, constant learning "
        'rate, `scale_rewards="group"`. '
        f"{'One seed' if len(seeds) == 1 else f'{len(seeds)} seeds, each with a base model of its own'}. Accuracy on "
        f"{NUM_HELD_OUT:,} questions that are never trained on, sampled at T = 1, every {EVERY} steps (standard error "
        "at most 1.5 points). *5 points below its best*: the first measurement, and from which on all are, if any. "
        "*Alarm*: the first step at which `CollapseMonitor` raised it. The generalist of the information gain is the "
        f"base model's pretraining, stopped after {EARLY_STEPS} of 800 steps.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in table_rows(results)),
        "",
        "![Accuracy on held-out questions at start, end and lowest](../images/corrections.png)",
        "",
    ]
    from_log = sorted({r["learning_rate"] for r in results if r.get("alarms_from_log")})
    if from_log:
        lines += [
            f"The alarms at {', '.join(f'{rate:g}' for rate in from_log)} were made afterwards from the logs of the "
            "runs, which lack the comparison with the first policy.",
            "",
        ]
    for seed, rate in studies:
        missing = ", ".join(f"`{cell}`" for cell in CELLS if (cell, seed, rate) not in there)
        if missing:
            lines += [f"Not run at {rate:g} with seed {seed}: {missing}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Runs the cells and writes figures, plot and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bases", type=Path, required=True, help="Folder where base models are kept (made if missing)."
    )
    parser.add_argument("--cells", nargs="*", choices=CELLS, default=CELLS, help="Which; none: only the page.")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="Constant learning rate.")
    parser.add_argument("--seed", type=int, default=0, help="Seed, which has a base model of its own.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="Folder of `results/` and `images/`.")
    args = parser.parse_args()
    use_one_thread()
    file, settings, results = kept_results(args.output, "corrections")
    there = {(result["cell"], result["seed"], result["learning_rate"]) for result in results}
    todo = [cell for cell in args.cells if (cell, args.seed, args.learning_rate) not in there]
    for name, make in (("base", make_base), ("early", make_early)):
        if todo and not (args.bases / f"{name}-{args.seed}").exists():
            make(args.bases / f"{name}-{args.seed}", args.seed)
    for cell in tqdm(todo, desc="Cells", unit=" runs", disable=False):
        started = time.process_time()
        results.append(json.loads(json.dumps(run(cell, args.bases, args.seed, args.learning_rate))))
        settings = described("corrections", settings["cpu_seconds"] + time.process_time() - started)
        write_figures(file, {"settings": settings, "results": results})
    plot(results, args.output / "images" / "corrections.png")
    (args.output / "results" / "corrections.md").write_text(page(results, settings), encoding="utf-8")
    Console().print(terminal_table(HEADER, table_rows(results)))


if __name__ == "__main__":
    main()
