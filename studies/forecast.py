# SPDX-License-Identifier: Apache-2.0
"""
Forecast against truth: small transformers that learned addition from faulty demonstrations are forecast, then trained
by TRL's RLOO and GRPO at several beta.

Three base models, which add two numbers of two digits: *scattered* (30% of the demonstrations have one digit
changed), *derailing* (55% have the first written digit one too high, and random digits after it: greedy decoding
fails, the right answer is the most probable one) and *misled* (60% are the sum plus 10: the wrong answer is the most
probable one).

    python -m studies.forecast --seeds 1           # goes on where an earlier run was cut off
"""

import argparse
import itertools
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from benchmarks.measure import describe_run, machine_line, markdown_table, write_figures
from endotrl import EndogenousReward, forecast
from endotrl.demo.grpo_runs import generate_answers, load_model, train_with_grpo
from endotrl.evaluation.plots import CYCLE, as_png, pyplot
from endotrl.reporting import quiet_libraries, terminal_table
from endotrl.runs.jsonl import append_lines, read_lines
from endotrl.tasks import arithmetic
from studies.arithmetic_runs import NUM_HELD_OUT, make_small_base, plus_10


NUM_QUESTIONS, SAMPLES, EVALUATIONS = 500, 64, 4
BETAS = (4.0, 2.0, 1.0, 0.5)
TRAINING: dict[str, Any] = {
    "per_device_train_batch_size": 256,
    "num_generations": 8,
    "max_completion_length": arithmetic.MAX_ANSWER_LENGTH,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 10,
    "bf16": False,
}
ARMS: dict[str, tuple[str, type, type, dict[str, Any]]] = {
    "rloo": ("RLOO", RLOOTrainer, RLOOConfig, {}),
    "grpo_none": ('GRPO, scale_rewards="none"', GRPOTrainer, GRPOConfig, {"scale_rewards": "none"}),
    "grpo_group": ('GRPO, scale_rewards="group"', GRPOTrainer, GRPOConfig, {"scale_rewards": "group"}),
}
ARRIVED = 0.05  # nats
WHY = """## Why a run is off: it has not arrived

A derailing base model of three-digit addition (0.64 M parameters), RLOO, beta 1: forecast 43.5% (41.4% to 45.6%), KL 1.06, of 34
effective samples. It was trained twice, and asked 500 questions that were never trained on and 500 that were:

| steps, learning rate | trained | difference | KL | short of the optimum | the same on questions that were trained on |
| --- | ---: | ---: | ---: | ---: | ---: |
| 100, 1e-3 | 49.1% | +5.5 | 1.35 | 0.26 | +6.1 (of 40.3%) |
| 200, 5e-4 | 44.5% | +1.0 | 1.15 | 0.10 | +2.1 |

With fewer and larger steps the policy earns the reward that was forecast (-2.57 for -2.60) with more KL than it need: it is beside the
path, not behind. It is not the samples (34 of 65 effective), not completions that are cut off (1 in 10 million), not the group factor
(RLOO has none), not the noise of the questions (an interval of 4 points), and not that questions are new. At beta 4, on the small
base model above, the difference shrinks with the distance in the same way: 0.17, 0.08, 0.07 and 0.03 nats short, 6.2, 7.8, 5.4 and 2.9
points off; after 400 steps at 5e-4 it is 1.3.

One seed, and not yet: scattered, GRPO on derailing, `scale_rewards="group"`, beta 2 and 0.5, facts. Runs were made one by one (`--seeds 1
--bases B --arms A --betas X --steps N --learning-rate R`), and this page by `--seeds 0`, which trains nothing. Three derailing rows (250 steps at 5e-4, 100 at 1e-4,
and beta 1) come from scripts that called the study's `run` while its settings were looked for."""
KEYS = ("base", "seed", "arm", "beta", "forecast", "trained", "steps", "learning_rate")


DEMONSTRATIONS: dict[str, tuple[float, Callable[[arithmetic.Question, random.Random], str]]] = {
    "scattered": (0.3, arithmetic.wrong_answer),
    "derailing": (0.55, arithmetic.derailed_answer),
    "misled": (0.6, plus_10),
}


def held_out(seed: int) -> list[arithmetic.Question]:
    """Questions that are never trained on."""
    return arithmetic.make_questions(NUM_HELD_OUT, seed=seed + 1, digits=2)[:NUM_QUESTIONS]


def make_base(folder: Path, name: str, seed: int) -> Path:
    """The folder of a base model, made if it is not there."""
    path = folder / f"{name}-{seed}"
    if not path.exists():
        make_small_base(path, seed, *DEMONSTRATIONS[name])
    return path


def accuracy(model: Any, tokenizer: Any, questions: list[arithmetic.Question], samples: int, seed: int) -> float:
    """Fraction of right answers, sampled at T = 1."""
    prompts = [arithmetic.question_text(q) for q in questions] * samples
    truths = [arithmetic.answer_text(q) for q in questions] * samples
    texts, _ = generate_answers(model, tokenizer, prompts, arithmetic.MAX_ANSWER_LENGTH, seed=seed, batch_size=1000)
    return sum(map(str.__eq__, texts, truths)) / len(texts)


def reward_and_kl(
    model: Any, base: Path, tokenizer: Any, questions: list[arithmetic.Question], seed: int
) -> tuple[float, float]:
    """Mean reward of a policy, and its KL to the base model, in nats per completion."""
    prompts = [arithmetic.question_text(q) for q in questions] * EVALUATIONS
    texts, ids = generate_answers(model, tokenizer, prompts, arithmetic.MAX_ANSWER_LENGTH, seed=seed, batch_size=1000)
    own, frozen = (
        sum(value or 0.0 for value in EndogenousReward(m, tokenizer)(prompts, texts, ids)) / len(ids)
        for m in (model, str(base))
    )
    return frozen, own - frozen


def run(base: Path, name: str, seed: int, arm: str, row: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Trains one arm and asks it what was forecast."""
    beta, optimizer = row["beta"], {"max_steps": args.steps, "learning_rate": args.learning_rate}
    tokenizer, kept_out = AutoTokenizer.from_pretrained(base), set(held_out(seed))
    _, trainer_class, config_class, settings = ARMS[arm]
    trained = train_with_grpo(
        f"{name}-{seed}-{arm}-{beta:g}",
        load_model(base),
        tokenizer,
        EndogenousReward(str(base)),
        arithmetic.accuracy,
        arithmetic.make_dataset([q for q in arithmetic.make_questions(6000, seed + 2, digits=2) if q not in kept_out]),
        args.folder / "trained",
        trainer_class=trainer_class,
        config_class=config_class,
        seed=seed,
        **{**TRAINING, **settings, "beta": beta, **optimizer},
    )
    questions = held_out(seed)
    reward, kl = reward_and_kl(trained.model, base, tokenizer, questions, seed)
    return {
        "base": name,
        "seed": seed,
        "arm": arm,
        "beta": beta,
        "steps": args.steps,
        "learning_rate": args.learning_rate,
        "forecast": row,
        "trained": accuracy(trained.model, tokenizer, questions, EVALUATIONS, seed),
        "reward": reward,
        "kl": kl,
        "curve": [entry["rewards/accuracy/mean"] for entry in trained.history],
        "rewards": [entry["rewards/endogenous_reward/mean"] for entry in trained.history],
        "seconds": trained.seconds,
    }


HEADER = [
    "base",
    "trainer",
    "beta",
    "steps, learning rate",
    "sampled",
    "forecast",
    "95%",
    "trained",
    "difference",
    "effective samples",
    "KL: forecast, trained",
    "short of the optimum",
]


def short_of_optimum(result: dict[str, Any]) -> float:
    r"""
    What the objective of RLOO, $\mathbb{E}[R] - \beta\, \mathrm{KL}$, is below its optimum, over beta: the KL of the
    trained policy to the forecast one, in nats per completion.
    """
    best = result["forecast"]["reward"] / result["beta"] - result["forecast"]["kl"]
    return best - (result["reward"] / result["beta"] - result["kl"])


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """The table of the page."""
    rows = []
    for r in sorted(results, key=lambda r: (r["base"], r["seed"], list(ARMS).index(r["arm"]), -r["beta"])):
        low, high = r["forecast"]["accuracy_interval"]
        rows.append(
            [
                f"{r['base']} {r['seed']}",
                ARMS[r["arm"]][0],
                f"{r['beta']:g}",
                f"{r['steps']}, {r['learning_rate']:.0e}".replace("e-0", "e-"),
                f"{r['sampled']:.1%}",
                f"{r['forecast']['accuracy']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{r['trained']:.1%}",
                f"{difference(r):+.1f}",
                f"{r['forecast']['ess']:.0f}",
                f"{r['forecast']['kl']:.2f}, {r['kl']:.2f}",
                f"{short_of_optimum(r):.2f}" if r["arm"] == "rloo" else "",
            ]
        )
    return rows


def difference(result: dict[str, Any]) -> float:
    """Trained minus forecast, in points."""
    return 100 * (result["trained"] - result["forecast"]["accuracy"])


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Trained over forecast accuracy, with the 95% interval of the forecast, next to equality."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 4.4), layout="constrained")
    axis.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    for (name, arm), marker in zip(itertools.product(DEMONSTRATIONS, ARMS), "os^DvP*Xp", strict=True):
        some = [r for r in results if (r["base"], r["arm"]) == (name, arm)]
        for i, r in enumerate(some):
            x, (low, high) = r["forecast"]["accuracy"], r["forecast"]["accuracy_interval"]
            label = f"{name}, {ARMS[arm][0]}" if i == 0 else None
            axis.errorbar(
                x,
                r["trained"],
                xerr=[[x - low], [high - x]],
                fmt=marker,
                color=CYCLE[list(ARMS).index(arm)],
                label=label,
            )
    axis.set(xlabel="forecast accuracy", ylabel="accuracy after training", xlim=(0, 1), ylim=(0, 1))
    axis.legend(frameon=False, fontsize=8)
    path.write_bytes(as_png(figure))


def page(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    sure = [r for r in results if r["forecast"]["ess"] >= 5]
    close = [r for r in sure if abs(difference(r)) <= 3]
    arrived = [r for r in sure if r["arm"] == "rloo" and short_of_optimum(r) <= ARRIVED]
    lines = [
        "# Forecast against truth",
        "",
        machine_line(settings),
        "",
        f"{' '.join(str(__doc__).split('    python')[0].split())}",
        "",
        f"Forecast: {NUM_QUESTIONS} questions that were never trained on, {SAMPLES} samples each. Training: TRL as it "
        f"is, {TRAINING['per_device_train_batch_size']} answers a step in groups of {TRAINING['num_generations']}, "
        f"cosine learning rate, reward `EndogenousReward(base)`. Trained: {EVALUATIONS} sampled answers to each of "
        "the same questions.",
        "",
        f"**{len(close)} of {len(sure)} runs with at least 5 effective samples end within 3 points of the forecast;** "
        f"of the {len(arrived)} RLOO runs that came within {ARRIVED:g} nats of the optimum of their objective, "
        f"{sum(abs(difference(r)) <= 3 for r in arrived)}. The column *short of the optimum* is what the "
        "objective of a run lacks, over beta: the KL divergence of the trained policy to the forecast one.",
        "",
        markdown_table(HEADER, table_rows(results)),
        "",
        "![Accuracy after training over forecast accuracy](forecast.png)",
        "",
        WHY,
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs what is not there yet, and writes figures and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds.")
    parser.add_argument("--steps", type=int, default=250, help="Training steps.")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="Learning rate.")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="Trainers.")
    parser.add_argument(
        "--bases", nargs="+", choices=list(DEMONSTRATIONS), default=list(DEMONSTRATIONS), help="Bases."
    )
    parser.add_argument("--betas", nargs="+", type=float, default=list(BETAS), help="KL penalties.")
    parser.add_argument("--folder", type=Path, default=Path("forecast-study"), help="Folder of models and results.")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="Folder of the page.")
    args = parser.parse_args()
    os.environ |= {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    quiet_libraries()
    args.folder.mkdir(parents=True, exist_ok=True)
    log = args.folder / "runs.jsonl"
    results = list(read_lines(log, KEYS))
    started = time.perf_counter()
    for seed in range(args.seeds):
        for name in args.bases:
            base = make_base(args.folder, name, seed)
            questions = [
                {"prompt": arithmetic.question_text(q), "answer": arithmetic.answer_text(q)} for q in held_out(seed)
            ]
            for arm in args.arms:
                trainer, _, scale = arm.partition("_")
                predicted = forecast(
                    str(base),
                    questions,
                    betas=args.betas,
                    trainer=trainer,  # type: ignore[arg-type]
                    scale_rewards=scale or "none",  # type: ignore[arg-type]
                    num_generations=TRAINING["num_generations"],
                    samples=SAMPLES,
                    max_new_tokens=arithmetic.MAX_ANSWER_LENGTH,
                    grader="exact",
                    seed=seed,
                    output=args.folder / f"forecast-{name}-{seed}",
                    progress=False,
                )
                Console().print(f"{name} {seed}, {ARMS[arm][0]}: {predicted.verdict}", markup=False)
                for row in predicted.betas:
                    key = {"base": name, "seed": seed, "arm": arm, "beta": row["beta"], "steps": args.steps}
                    key["learning_rate"] = args.learning_rate
                    if any(key.items() <= r.items() for r in results):
                        continue
                    result = run(base, name, seed, arm, row, args)
                    result |= {"sampled": predicted.alternatives["sampled"], "alternatives": predicted.alternatives}
                    append_lines(log, [result])
                    results.append(result)
                    Console().print(", ".join(table_rows([result])[0]), markup=False)
    settings = {
        **describe_run("studies.forecast", "cpu", f"--seeds {args.seeds}"),
        "seconds": time.perf_counter() - started,
    }
    plot(results, args.output / "forecast.png")
    write_figures(args.output / "forecast.json.gz", {"settings": settings, "results": results})
    (args.output / "forecast.md").write_text(page(results, settings), encoding="utf-8")
    shown = [0, 1, 2, 5, 7, 8]  # 80 columns
    rows = [[row[i] for i in shown] for row in table_rows(results)]
    Console().print(terminal_table([HEADER[i] for i in shown], rows))


if __name__ == "__main__":
    main()
