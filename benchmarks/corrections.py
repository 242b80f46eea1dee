# SPDX-License-Identifier: Apache-2.0
r"""
Corrections of the endogenous reward on the demo's arithmetic task: which of them hold, for how long, at which beta.

GRPO at a constant learning rate. The collapse monitor watches and stops nothing.

    python -m benchmarks.corrections --bases DIR --cells none:0.1                   # the default, 1,000 steps: about 15 minutes on a core
    python -m benchmarks.corrections --bases DIR --answers 64 --cells none:0 length:0 clip:0 centered:0
"""

import argparse
import json
import logging
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from endotrl import CollapseMonitor, EndogenousReward
from endotrl.quickstart.training import quiet
from endotrl.reporting import terminal_table
from endotrl.rewards import InformationGain

from .arithmetic_trainers import NUM_HELD_OUT, make_base
from .collapse import Ask, train


EVERY = 50  # steps between two measurements on held-out questions
# Made for a base model, and for another one as the generalist.
CORRECTIONS: dict[str, tuple[str, Callable[[str, str], EndogenousReward]]] = {
    "none": ("none (default)", lambda base, other: EndogenousReward(base)),
    "centered": ("centered", lambda base, other: EndogenousReward(base, token_reward="centered")),
    "length": ("length control", lambda base, other: EndogenousReward(base, correction="length")),
    "clip": (
        "clipped at -5 nats a token",
        lambda base, other: EndogenousReward(base, token_reward="log_prob", correction="clip"),
    ),
    "gain": (
        "gain over another base model",
        lambda base, other: EndogenousReward(base, token_reward="log_prob", correction=InformationGain(other)),
    ),
}


class AskSeldom(Ask):
    """Asks every 50 steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % EVERY == 0:
            self.ask(model, state.global_step)


def run(cell: str, bases: Path, seed: int, steps: int, answers: int, learning_rate: float) -> dict[str, Any]:
    """Trains one cell of the grid, `<correction>:<beta>`."""
    name, _, beta = cell.partition(":")
    base, other = (str(bases / f"base-{s}") for s in (seed, 1 - seed % 2))
    ask, monitor = AskSeldom(AutoTokenizer.from_pretrained(base), seed), CollapseMonitor()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(
            CORRECTIONS[name][1](base, other),
            base,
            seed,
            steps,
            folder,
            [ask],
            monitor,
            beta=float(beta),
            per_device_train_batch_size=answers,
            learning_rate=learning_rate,
        )
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "cell": cell,
        "seed": seed,
        "steps": steps,
        "answers": answers,
        "learning_rate": learning_rate,
        "held_out": ask.accuracies,
        "alarms": monitor.alarms,
        "log": [
            {key: entry[key] for key in ("step", "reward", "entropy", "completions/mean_length")}
            for entry in log[:: max(1, steps // 100)]
        ],
    }


HEADER = ["correction", "β", "answers a step", "steps", "accuracy: first, best, last", "alarm at step"]


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """One row a cell."""
    rows = []
    for result in results:
        name, _, beta = result["cell"].partition(":")
        values = list(result["held_out"].values())
        rows.append(
            [
                CORRECTIONS[name][0],
                beta,
                str(result["answers"]),
                f"{result['steps']:,}",
                f"{values[0]:.1%}, {max(values):.1%}, {values[-1]:.1%}",
                str(result["alarms"][0][0]) if result["alarms"] else "none",
            ]
        )
    return rows


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for result in results:
        name, _, beta = result["cell"].partition(":")
        points = sorted((int(step), accuracy) for step, accuracy in result["held_out"].items())
        axes.plot(*zip(*points, strict=True), label=f"{CORRECTIONS[name][0]}, β = {beta}", linewidth=1.5)
    axes.set(xlabel="step", ylabel="accuracy on held-out questions")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    lines = [
        "# Which corrections hold",
        "",
        f"Last command: `{settings['command']}`. Machine: {settings['machine']}. {settings['versions']}. "
        f"CPU time: {settings['cpu_seconds'] / 60:.0f} minutes.",
        "",
        "The arithmetic task of `endotrl demo`: GRPO, constant learning rate "
        f'{results[0]["learning_rate"]:g}, `scale_rewards="group"`. One seed. Accuracy on {NUM_HELD_OUT:,} questions that were never '
        f"trained on, sampled at T = 1, every {EVERY} steps (standard error 1.5 points or less). The collapse monitor, with accuracy on "
        "the training questions as a reward of weight 0, only watches.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in table_rows(results)),
        "",
        "![Accuracy on held-out questions over steps](../images/corrections.png)",
        "",
    ]
    missing = sorted(set(CORRECTIONS) - {result["cell"].partition(":")[0] for result in results})
    if missing:
        lines += [f"Not run yet, for lack of time: {', '.join(CORRECTIONS[name][0] for name in missing)}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Runs the cells and writes figures, plot and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bases", type=Path, required=True, help="Folder where base models are kept (made if missing)."
    )
    parser.add_argument(
        "--cells",
        nargs="+",
        default=[f"{name}:{beta}" for beta in (0.1, 0.05, 0) for name in CORRECTIONS],
        help="Which: <correction>:<beta>.",
    )
    parser.add_argument("--steps", type=int, default=1000, help="Training steps.")
    parser.add_argument("--answers", type=int, default=256, help="Answers a step, 8 of them to a question.")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="Learning rate.")
    parser.add_argument("--seed", type=int, default=0, help="Seed, which has a base model of its own.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="Folder of `results/` and `images/`.")
    args = parser.parse_args()
    for cell in args.cells:
        name, _, beta = cell.partition(":")
        if name not in CORRECTIONS or not beta.replace(".", "", 1).isdigit():
            parser.error(f"{cell!r} is no cell: it must be <correction>:<beta> with one of {', '.join(CORRECTIONS)}.")
    os.environ["TQDM_DISABLE"] = "1"
    quiet()
    logging.getLogger("endotrl").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    for folder in ("results", "images"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    file = args.output / "results" / "corrections.json"
    known = (
        json.loads(file.read_text(encoding="utf-8"))
        if file.exists()
        else {"settings": {"cpu_seconds": 0.0}, "results": []}
    )
    results, seconds, started = known["results"], known["settings"]["cpu_seconds"], time.process_time()
    for seed in {args.seed, 1 - args.seed % 2}:
        if not (args.bases / f"base-{seed}").exists():
            make_base(args.bases / f"base-{seed}", seed)
    for cell in tqdm(args.cells, desc="Cells of the grid", unit=" runs", disable=False):
        result = json.loads(json.dumps(run(cell, args.bases, args.seed, args.steps, args.answers, args.learning_rate)))
        key = ("cell", "seed", "steps", "answers")
        results = [r for r in results if [r[k] for k in key] != [result[k] for k in key]] + [result]
        settings = {
            "command": shlex.join(["python", "-m", "benchmarks.corrections", *sys.argv[1:]]),
            "machine": f"{platform.system()} {platform.machine()}, one thread",
            "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "trl")),
            "cpu_seconds": seconds + time.process_time() - started,
        }
        file.write_text(json.dumps({"settings": settings, "results": results}, indent=1) + "\n", encoding="utf-8")
        plot(results, args.output / "images" / "corrections.png")
        (args.output / "results" / "corrections.md").write_text(page(results, settings), encoding="utf-8")
    Console().print(terminal_table(HEADER, table_rows(results)))


if __name__ == "__main__":
    main()
