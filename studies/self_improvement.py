# SPDX-License-Identifier: Apache-2.0
r"""
What a language model gains by its own reward, and what it does not: three-digit addition, with more or fewer wrong
demonstrations, by several trainers, next to controls and to training with labels.

A base model learns addition from demonstrations of which a fraction (the noise) is wrong, and is then trained for 60
steps of 256 answers (`beta=0.1`, learning rate 3e-4, no warm-up):

- `grpo`, `dense`, `ppo`: on its own endogenous reward, by TRL's GRPOTrainer, DenseGRPOTrainer and PPOTrainer.
- `some_digits`: as `grpo`, but no question that it trains on has a digit 7, 8 or 9.
- `majority`: GRPO on agreement with the most frequent of the 8 answers to a question
  (https://huggingface.co/papers/2504.16084).
- `random`, `length`: controls that know nothing of the question.
- `labels`: GRPO on whether the answer is right, which is what no label-free reward should beat.

Each is asked 500 new questions, 16 times: pass@k, and the majority of the 16. Then other numbers: all with a digit
from 7 to 9, and numbers of two and of four digits, of which it has never seen any.

    python -m studies.self_improvement                     # 15 base models and 120 runs: 2 hours on 2 cores
    python -m studies.self_improvement --noise 0.3 --arms grpo random labels --seeds 2

Finished runs are kept in `--folder`, and not run again: the command can be interrupted, and extended.
"""

import argparse
import json
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import describe_run, machine_line, markdown_table, write_figures
from endotrl import DenseGRPOConfig, DenseGRPOTrainer, EndogenousReward, PPOConfig, PPOTrainer
from endotrl.demo.grpo_runs import generate_answers, load_model, train_with_grpo
from endotrl.evaluation.generation import pass_at_k
from endotrl.reporting import quiet_libraries, terminal_table
from endotrl.reporting.curves import GREY
from endotrl.reporting.plots import as_png, label_rows, pyplot
from endotrl.rewards import LengthReward, RandomReward
from endotrl.runs.files import replace_text
from endotrl.tasks import arithmetic
from studies.arithmetic_runs import (
    ARITHMETIC,
    NUM_HELD_OUT,
    PPO,
    as_they_come,
    draw_dots,
    make_base,
    mean_and_interval,
    training_questions,
)


GRPO = (GRPOTrainer, GRPOConfig, {"scale_rewards": "none"})
ARMS: dict[str, tuple[str, type, type, dict[str, Any]]] = {
    "grpo": ("endogenous, GRPO", *GRPO),
    "dense": ("endogenous, DenseGRPO", DenseGRPOTrainer, DenseGRPOConfig, {"scale_rewards": "none"}),
    "ppo": ("endogenous, PPO", PPOTrainer, PPOConfig, {**PPO, "value_learning_rate": 1e-3}),
    "some_digits": ("endogenous, GRPO, digits 0 to 6", *GRPO),
    "majority": ("majority of 8, GRPO", *GRPO),
    "random": ("random, GRPO", *GRPO),
    "length": ("length, GRPO", *GRPO),
    "labels": ("labels, GRPO", *GRPO),
}
STEPS = 60
NUM_QUESTIONS, NUM_SAMPLES = 500, 16
KS = (1, 4, 16)
HIGH_DIGITS = frozenset("789")
FIGURES = {
    "pass@1": "pass@1",
    "greedy": "greedy",
    "pass@4": "pass@4",
    "pass@16": "pass@16",
    "majority": "majority of 16",
    "high_digits": "7 to 9",
    "two_digits": "2 digits",
    "four_digits": "4 digits",
}


# On the page; the others are in the stored figures.
SHOWN = ("pass@1", "greedy", "pass@16", "majority", "high_digits")
OTHER_LENGTHS = ("two_digits", "four_digits")
HEADER = ["reward, trainer", "seeds", "gain", *(FIGURES[key] for key in SHOWN)]


def majority_reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:
    """1.0 for the most frequent completion of a prompt (the first of several)."""
    votes: dict[str, Counter[str]] = {}
    for prompt, completion in zip(prompts, completions, strict=True):
        votes.setdefault(prompt, Counter())[completion] += 1
    return [float(votes[p].most_common(1)[0][0] == c) for p, c in zip(prompts, completions, strict=True)]


def reward_of(arm: str, seed: int) -> Any:
    """What an arm is trained on."""
    rewards = {
        "majority": majority_reward,
        "random": RandomReward(seed=seed),
        "length": LengthReward(),
        "labels": _is_right,
    }
    # Shared: it reads the reference pass that TRL runs for `beta` anyway.
    return rewards[arm] if arm in rewards else EndogenousReward(model=None)


def _is_right(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    # Not `arithmetic.accuracy` itself, which is the second reward of every run, and TRL tells rewards apart by their
    # names.
    return arithmetic.accuracy(completions, answer)


def has_high_digit(number: int) -> bool:
    """Whether a number has a digit 7, 8 or 9."""
    return not HIGH_DIGITS.isdisjoint(str(number))


def measure(model: Any, tokenizer: Any, seed: int) -> dict[str, float]:
    """All figures of a model: fractions of right answers."""
    questions = arithmetic.make_questions(NUM_HELD_OUT, seed=seed + 1)
    generator = random.Random(seed)

    def numbers(low: int, high: int) -> list[arithmetic.Question]:
        return [(generator.randint(low, high), generator.randint(low, high)) for _ in range(NUM_QUESTIONS)]

    some = questions[:NUM_QUESTIONS]
    samples = [answers(model, tokenizer, some, seed + 10_000 * i) for i in range(NUM_SAMPLES)]
    truths = [arithmetic.answer_text(question) for question in some]
    right = [sum(texts[i] == truth for texts in samples) for i, truth in enumerate(truths)]
    majorities = [Counter(texts[i] for texts in samples).most_common(1)[0][0] for i in range(NUM_QUESTIONS)]
    high = [q for q in questions if all(map(has_high_digit, q))]
    return {
        **{f"pass@{k}": sum(pass_at_k(NUM_SAMPLES, n, k) for n in right) / NUM_QUESTIONS for k in KS},
        "greedy": accuracy(model, tokenizer, some, seed, greedy=True),
        "majority": sum(map(str.__eq__, majorities, truths)) / NUM_QUESTIONS,
        "high_digits": accuracy(model, tokenizer, high, seed),
        "two_digits": accuracy(model, tokenizer, numbers(10, 99), seed),
        "four_digits": accuracy(model, tokenizer, numbers(1000, 9999), seed),
    }


def answers(
    model: Any, tokenizer: Any, questions: Sequence[arithmetic.Question], seed: int, greedy: bool = False
) -> list[str]:
    """One answer a question."""
    prompts = [arithmetic.question_text(question) for question in questions]
    # One token more than the longest answer to numbers of four digits, so that none is right because it was cut off.
    return generate_answers(model, tokenizer, prompts, 7, greedy=greedy, seed=seed, batch_size=len(prompts))[0]


def accuracy(
    model: Any, tokenizer: Any, questions: Sequence[arithmetic.Question], seed: int, greedy: bool = False
) -> float:
    """Fraction of right answers, one per question."""
    texts = answers(model, tokenizer, questions, seed, greedy)
    return sum(map(str.__eq__, texts, map(arithmetic.answer_text, questions))) / len(questions)


def run(noise: float, seed: int, arm: str | None, steps: int, folder: Path) -> dict[str, Any]:
    """Makes and measures a base model (`arm=None`), or what one arm makes of it; a result that is there is taken."""
    file = folder / f"noise-{noise:g}-seed-{seed}-{arm or 'base'}-{steps}.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))
    quiet_libraries()
    logging.getLogger("endotrl").setLevel(logging.ERROR)
    base = folder / f"base-{noise:g}-{seed}"
    started = time.perf_counter()
    if arm is None:
        if not (base / "tokenizer.json").exists():
            make_base(base, seed, noise)
        tokenizer, model = AutoTokenizer.from_pretrained(base), load_model(base)
    else:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = trained(arm, base, tokenizer, seed, steps, folder)
    result = {
        "noise": noise,
        "seed": seed,
        "arm": arm or "base",
        "figures": measure(model, tokenizer, seed),
        "seconds": time.perf_counter() - started,
    }
    replace_text(file, json.dumps(result))
    return result


def trained(arm: str, base: Path, tokenizer: Any, seed: int, steps: int, folder: Path) -> Any:
    """The policy of an arm."""
    _, trainer_class, config_class, settings = ARMS[arm]
    questions = training_questions(seed, 20_000)
    if arm == "some_digits":
        questions = [q for q in questions if not any(map(has_high_digit, q))]
    return train_with_grpo(
        f"{base.name}-{arm}",
        load_model(base),
        tokenizer,
        reward_of(arm, seed),
        arithmetic.accuracy,
        arithmetic.make_dataset(questions[:4000]),
        folder,
        trainer_class=trainer_class,
        config_class=config_class,
        seed=seed,
        **{**ARITHMETIC, **settings, "max_steps": steps},
    ).model


def table(results: list[dict[str, Any]], noise: float) -> list[list[str]]:
    """One row an arm, of one noise level: mean and 95% interval over seeds, in percent; the gain is paired by seed."""
    by_arm = {
        arm: {r["seed"]: r["figures"] for r in results if r["noise"] == noise and r["arm"] == arm}
        for arm in ["base", *ARMS]
    }
    rows = []
    for arm, of_seed in by_arm.items():
        figures = list(of_seed.values())
        if not figures:
            continue
        gain, half = mean_and_interval([f["pass@1"] - by_arm["base"][seed]["pass@1"] for seed, f in of_seed.items()])
        cells = ["" if arm == "base" else f"{100 * gain:+.1f}" + ("" if len(figures) < 2 else f" ± {100 * half:.1f}")]
        for key in SHOWN:
            mean, half = mean_and_interval([f[key] for f in figures])
            cells.append(f"{100 * mean:.1f}" + ("" if len(figures) < 2 else f" ± {100 * half:.1f}"))
        rows.append(["base model" if arm == "base" else ARMS[arm][0], str(len(figures)), *cells])
    return rows


def page(results: list[dict[str, Any]], run: dict[str, Any], steps: int) -> str:
    """The results page, in Markdown."""
    highest = max(result["figures"][key] for result in results for key in OTHER_LENGTHS)
    blocks = [
        "# Self-improvement on arithmetic: what improves, what does not",
        machine_line(run),
        f"A small transformer learns three-digit addition from demonstrations, and is then trained for {steps} steps "
        "of "
        "256 answers on its own reward or on another one. Percent of right answers to 500 new questions, each asked "
        "16 "
        "times; ± is the 95% interval over seeds (Student's t). Each seed has a base model of its own, with which the "
        "gain in pass@1 is paired. *7 to 9*: both numbers have a digit 7, 8 or 9. Of numbers of two or four digits, "
        f"which the model has never seen, no arm gets more than {highest:.1%} right.",
    ]
    for noise in sorted({r["noise"] for r in results}):
        blocks += [
            f"## {noise:.0%} of the demonstrations wrong",
            markdown_table(HEADER, table(results, noise)),
        ]
    blocks.append("![Right answers at the first and within 16 tries](../images/self-improvement.png)")
    return "\n\n".join(blocks) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """pass@1 and pass@16 of every arm, one panel a noise level: is it better, and does it still know several ways?"""
    noises, ends = sorted({r["noise"] for r in results}), (f"pass@{KS[0]}", f"pass@{KS[-1]}")
    names = {arm: "base model" if arm == "base" else ARMS[arm][0] for arm in ["base", *ARMS]}
    arms = [arm for arm in names if any(r["arm"] == arm for r in results)]
    figure, panels = pyplot().subplots(
        1, len(noises), figsize=(3.2 * len(noises) + 1.6, 3.6), layout="constrained", sharey=True, squeeze=False
    )
    for axis, noise in zip(panels[0], noises, strict=True):
        label_rows(axis, [names[arm] for arm in arms])
        found = {arm: [r["figures"] for r in results if r["noise"] == noise and r["arm"] == arm] for arm in arms}
        means = {k: [sum(f[k] for f in found[a]) / len(found[a]) if found[a] else None for a in arms] for k in ends}
        draw_dots(axis, means)
        base = dict(zip(arms, means[ends[0]], strict=True)).get("base")
        if base is not None:
            axis.axvline(base, color=GREY, linestyle=":", linewidth=1)
        axis.set(title=f"{noise:.0%} wrong demonstrations", xlim=(-0.02, 1.03))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.supxlabel("right answers to new questions; dotted: the base model at the first try", fontsize=10)
    figure.legend(*panels[0][0].get_legend_handles_labels(), frameon=False, ncols=2, loc="outside upper center")
    path.write_bytes(as_png(figure))


def run_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs what is not there yet, seed by seed."""
    results: list[dict[str, Any]] = []
    total = len(args.noise) * args.seeds * (1 + len(args.arms))
    with (
        ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=total, desc="Runs", unit=" runs", disable=False) as bar,
    ):

        def bases(seed: int) -> set[Future[dict[str, Any]]]:
            return {pool.submit(run, noise, seed, None, args.steps, args.folder) for noise in args.noise}

        made: Counter[int] = Counter()

        def follow(base: dict[str, Any]) -> set[Future[dict[str, Any]]]:
            seed = base["seed"]
            arms = {pool.submit(run, base["noise"], seed, arm, args.steps, args.folder) for arm in args.arms}
            made[seed] += 1
            # Seed by seed, so that what is there after an interruption can be compared.
            last = made[seed] == len(args.noise) and seed + 1 < args.seeds
            return arms | bases(seed + 1) if last else arms

        for result in as_they_come(bases(0), follow):
            results.append(result)
            bar.set_postfix(last=f"{result['arm']} {result['figures']['pass@1']:.1%}")
            bar.update()
    return results


def main() -> None:
    """Runs what is not there yet, and writes figures, plot and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.1, 0.3, 0.5], help="Fractions of wrong answers.")
    parser.add_argument("--seeds", type=int, default=5, help="Number of seeds.")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="What to train.")
    parser.add_argument("--steps", type=int, default=STEPS, help="Training steps.")
    parser.add_argument("--page", action="store_true", help="Run nothing: the page, of all runs in the folder.")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="Runs side by side, one thread each.")
    parser.add_argument("--folder", type=Path, default=Path("self-improvement"), help="Where runs are kept.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="Folder of `results/` and `images/`.")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
    for folder in (args.folder, args.output / "results", args.output / "images"):
        folder.mkdir(parents=True, exist_ok=True)
    if args.page:
        files = sorted(args.folder.glob(f"noise-*-{args.steps}.json"))
        results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    else:
        results = run_all(args)
    order = ["base", *ARMS]
    results.sort(key=lambda r: (r["noise"], r["seed"], order.index(r["arm"])))
    described = describe_run("studies.self_improvement", "cpu", "" if args.steps == STEPS else f"--steps {args.steps}")
    write_figures(
        args.output / "results" / "self-improvement.json.gz",
        {"run": described, "steps": args.steps, "results": results},
    )
    plot(results, args.output / "images" / "self-improvement.png")
    (args.output / "results" / "self-improvement.md").write_text(
        page(results, described, args.steps), encoding="utf-8"
    )
    for noise in sorted({r["noise"] for r in results}):
        rows = [row[:4] for row in table(results, noise)]
        Console().print(terminal_table(HEADER[:4], rows, title=f"{noise:.0%} of the demonstrations wrong"))


if __name__ == "__main__":
    main()
