# SPDX-License-Identifier: Apache-2.0
r"""
Addition, learned from scattered errors, under every trainer, at equal samples: TRL's GRPO, DenseGRPO, PPO with a
critic and without one.

The task is that of `studies.arithmetic_runs`, in which a greedy answer is right already: 100 steps of 256
answers, one optimizer step for each batch, learning rate 3e-4. All arms but the two with `scale_rewards="group"`
(TRL's default) have the same objective, E[log pi_hat] - 0.1 KL.

    python -m studies.arithmetic_trainers                       # about 20 minutes on 2 cores
    python -m studies.arithmetic_trainers --seeds 1 --steps 10  # a look
"""

import argparse
import logging
import os
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import describe_run, machine_line, write_figures
from endotrl import DenseGRPOConfig, DenseGRPOTrainer, EndogenousReward, PPOConfig, PPOTrainer
from endotrl.demo.grpo_runs import load_model, train_with_grpo
from endotrl.reporting import quiet_libraries, terminal_table
from endotrl.tasks import arithmetic
from studies.arithmetic_runs import (
    ARITHMETIC,
    LEARNED,
    PPO,
    as_they_come,
    held_out_accuracy,
    make_base,
    mean_and_interval,
    training_questions,
)


ARMS: dict[str, tuple[str, type, type, dict[str, Any]]] = {
    "grpo_group": ('GRPO (TRL), scale_rewards="group"', GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}),
    "dense_group": ('DenseGRPO, scale_rewards="group"', DenseGRPOTrainer, DenseGRPOConfig, {"scale_rewards": "group"}),
    "grpo": ("GRPO (TRL)", GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}),
    "dense": ("DenseGRPO", DenseGRPOTrainer, DenseGRPOConfig, {"scale_rewards": "none"}),
    "ppo": ("PPO, value head", PPOTrainer, PPOConfig, {**PPO, "value_learning_rate": 1e-3}),
    "ppo_soft_value": ("PPO, no critic (soft value)", PPOTrainer, PPOConfig, {**PPO, "critic": "none"}),
}
COLORS = {
    "grpo_group": "#999999",
    "dense_group": "#e69f00",
    "grpo": "#0072b2",
    "dense": "#d55e00",
    "ppo": "#009e73",
    "ppo_soft_value": "#cc79a7",
}


def run(arm: str | None, seed: int, steps: int, folder: str) -> dict[str, Any]:
    """Trains one arm from the base model of a seed (`None`: makes the base model, and asks it)."""
    quiet_libraries()
    logging.getLogger("endotrl").setLevel(logging.ERROR)
    base = Path(folder) / f"base-{seed}"
    if arm is None:
        if not base.exists():
            make_base(base, seed)
        tokenizer, model = AutoTokenizer.from_pretrained(base), load_model(base)
        return {
            "arm": "base",
            "seed": seed,
            "accuracy": held_out_accuracy(model, tokenizer, seed),
            "greedy": held_out_accuracy(model, tokenizer, seed, greedy=True),
        }
    _, trainer_class, config_class, settings = ARMS[arm]
    tokenizer = AutoTokenizer.from_pretrained(base)
    trained = train_with_grpo(
        f"{arm}-{seed}",
        load_model(base),
        tokenizer,
        EndogenousReward(str(base)),
        arithmetic.accuracy,
        arithmetic.make_dataset(training_questions(seed, 4000)),
        Path(folder),
        trainer_class=trainer_class,
        config_class=config_class,
        seed=seed,
        **{**ARITHMETIC, **settings, "max_steps": steps},
    )
    return {
        "arm": arm,
        "seed": seed,
        "accuracy": held_out_accuracy(trained.model, tokenizer, seed),
        "curve": [entry["rewards/accuracy/mean"] for entry in trained.history],
        "reward": [entry["rewards/endogenous_reward/mean"] for entry in trained.history],
        "seconds": trained.seconds,
    }


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table of the results page, one row an arm."""
    rows = []
    for arm in ["base", *ARMS]:
        of_arm = sorted((r for r in results if r["arm"] == arm), key=lambda r: r["seed"])
        mean, half = mean_and_interval([r["accuracy"] for r in of_arm])
        row = ["base model" if arm == "base" else ARMS[arm][0], f"{mean:.1%} ± {half:.1%}"]
        if arm == "base":
            rows.append([*row, "", ""])
            continue
        scalar = "grpo_group" if arm.endswith("group") else "grpo"
        paired = [
            r["accuracy"] - next(s["accuracy"] for s in results if s["arm"] == scalar and s["seed"] == r["seed"])
            for r in of_arm
        ]
        difference, margin = mean_and_interval(paired)
        halfway, _ = mean_and_interval([sum(r["curve"]) / len(r["curve"]) for r in of_arm])
        rows.append([*row, "" if arm == scalar else f"{100 * difference:+.1f} ± {100 * margin:.1f}", f"{halfway:.1%}"])
    return rows


HEADER = ["policy", "held-out accuracy", "minus GRPO (points)", "mean over training"]


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Learning curves: mean and range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for arm, (label, *_) in ARMS.items():
        curves = torch.tensor([r["curve"] for r in results if r["arm"] == arm], dtype=torch.float64)  # (seeds, steps)
        steps = torch.arange(1, curves.shape[1] + 1)
        low, mean, high = curves.amin(0), curves.mean(0), curves.amax(0)
        axes.plot(steps, mean, color=COLORS[arm], label=label, linewidth=1.5)
        axes.fill_between(steps, low, high, color=COLORS[arm], alpha=0.12, linewidth=0)
    axes.set(xlabel="step (256 sampled answers each)", ylabel="accuracy of the sampled answers")
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    lines = [
        "# Addition, learned from scattered errors, under every trainer",
        "",
        f"{machine_line(settings)} Time: {settings['seconds'] / 60:.0f} minutes, runs side by side, one thread each.",
        "",
        "Three-digit addition; 30% of the demonstrations have one wrong digit, so a greedy answer is right already; "
        f"{settings['steps']} steps of 256 answers, one optimizer step for each, "
        f"learning rate {ARITHMETIC['learning_rate']:g}, `beta={ARITHMETIC['beta']}`. {settings['seeds']} seeds, each "
        "with "
        f"a base model of its own that answers at least {LEARNED:.0%} right when greedy. Accuracy on 1,000 questions "
        "that were never trained on, sampled at T = 1; ± is the 95% "
        "interval over seeds (Student's t). Differences are paired by seed, to GRPO with the same `scale_rewards`.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(row) + " |" for row in table_rows(results)),
        "",
        "![Accuracy of the sampled answers over steps: mean and range over seeds](../images/arithmetic-trainers.png)",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs all arms and writes figures, plot and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds.")
    parser.add_argument("--steps", type=int, default=ARITHMETIC["max_steps"], help="Training steps.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Runs side by side, one thread each.")
    parser.add_argument(
        "--bases", type=Path, help="Folder where base models are kept, and taken from if they are there."
    )
    parser.add_argument("--output", type=Path, default=Path("docs"), help="Folder of `results/` and `images/`.")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["WANDB_MODE"] = "disabled"
    os.environ["TQDM_DISABLE"] = "1"
    for folder in ("results", "images"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    results: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as temporary,
        ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=args.seeds * (1 + len(ARMS)), desc="Runs", unit=" runs", disable=False) as bar,
    ):
        folder = str(args.bases or temporary)
        pending = {pool.submit(run, None, seed, args.steps, folder) for seed in range(args.seeds)}

        def arms_on(base: dict[str, Any]) -> set[Future[dict[str, Any]]]:
            return {pool.submit(run, arm, base["seed"], args.steps, folder) for arm in ARMS}

        for result in as_they_come(pending, arms_on):
            results.append(result)
            bar.set_postfix(last=f"{result['arm']} {result['accuracy']:.1%}")
            bar.update()
            save(results, args, started)
    Console().print(terminal_table(HEADER, table_rows(results)))


def save(results: list[dict[str, Any]], args: argparse.Namespace, started: float) -> None:
    """Writes what is there after every run: JSON always, plot and page at the end."""
    settings = {
        **describe_run("studies.arithmetic_trainers", "cpu"),
        "threads": 1,  # of every run
        "seconds": time.perf_counter() - started,
        "steps": args.steps,
        "seeds": args.seeds,
    }
    results.sort(key=lambda r: (r["seed"], r["arm"]))
    write_figures(args.output / "results" / "arithmetic-trainers.json.gz", {"settings": settings, "results": results})
    if len(results) < args.seeds * (1 + len(ARMS)):
        return
    plot(results, args.output / "images" / "arithmetic-trainers.png")
    (args.output / "results" / "arithmetic-trainers.md").write_text(page(results, settings), encoding="utf-8")


if __name__ == "__main__":
    main()
