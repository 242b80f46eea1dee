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
                f"{r['sampled']:.1%}",
                f"{r['forecast']['accuracy']:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{r['trained']:.1%}",
                f"{100 * (r['trained'] - r['forecast']['accuracy']):+.1f}",
                f"{r['forecast']['ess']:.0f}",
                f"{r['forecast']['kl']:.2f}, {r['kl']:.2f}",
                f"{short_of_optimum(r):.2f}" if r["arm"] == "rloo" else "",
            ]
        )
    return rows


def page(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    sure = [r for r in results if r["forecast"]["ess"] >= 5]
    close = [r for r in sure if abs(r["trained"] - r["forecast"]["accuracy"]) <= 0.03]
    lines = [
        "# Forecast against truth",
        "",
        machine_line(settings),
        "",
        f"{' '.join(str(__doc__).split('    python')[0].split())}",
        "",
        f"Forecast: {NUM_QUESTIONS} questions that were never trained on, {SAMPLES} samples each. Training: TRL as it "
        f"is, {settings['steps']} steps of {TRAINING['per_device_train_batch_size']} answers in groups of "
        f"{TRAINING['num_generations']}, learning rate {settings['learning_rate']:g} (cosine), reward "
        f"`EndogenousReward(base)`. Trained: {EVALUATIONS} sampled answers to each of the same questions.",
        "",
        f"**{len(close)} of {len(sure)} runs with at least 5 effective samples end within 3 points of the forecast.**",
        "",
        markdown_table(HEADER, table_rows(results)),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Runs what is not there yet, and writes figures and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Number of seeds.")
    parser.add_argument("--steps", type=int, default=200, help="Training steps.")
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
    results = [
        r for r in read_lines(log, KEYS) if (r["steps"], r["learning_rate"]) == (args.steps, args.learning_rate)
    ]
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
                    done = {(r["base"], r["seed"], r["arm"], r["beta"]) for r in results}
                    if (name, seed, arm, row["beta"]) in done:
                        continue
                    result = run(base, name, seed, arm, row, args)
                    result |= {"sampled": predicted.alternatives["sampled"], "alternatives": predicted.alternatives}
                    append_lines(log, [result])
                    results.append(result)
                    Console().print(", ".join(table_rows([result])[0]), markup=False)
    settings = {
        **describe_run("studies.forecast", "cpu"),
        "seconds": time.perf_counter() - started,
        "steps": args.steps,
        "learning_rate": args.learning_rate,
    }
    write_figures(args.output / "forecast.json.gz", {"settings": settings, "results": results})
    (args.output / "forecast.md").write_text(page(results, settings), encoding="utf-8")
    shown = [0, 1, 2, 4, 6, 7]  # 80 columns
    rows = [[row[i] for i in shown] for row in table_rows(results)]
    Console().print(terminal_table([HEADER[i] for i in shown], rows))


if __name__ == "__main__":
    main()
