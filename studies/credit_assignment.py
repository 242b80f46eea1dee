# SPDX-License-Identifier: Apache-2.0
r"""
Who finds the token that matters? GRPO with one advantage per completion, DenseGRPO and PPO at equal samples.

The language: a prompt is one of 4 questions, a response 24 words from a vocabulary of 12. One word decides: the third
one must be the answer to the question; what the others are does not matter. The outcome is 1 or 0. The dense reward
gives the same 1 or 0 to the deciding word and 0 to all others, so that all arms maximise the same expected reward,
from the same random transformer, with the same number of responses per step and one optimizer step for each. Every arm
runs with several learning rates, and is shown with the one that is best for it:

- `grpo`: TRL's GRPOTrainer on the outcome. All 24 words get the same advantage.
- `dense`: DenseGRPOTrainer on the dense reward. Words after the deciding one earn nothing, and get no advantage.
- `ppo`: PPOTrainer on the dense reward. A critic is the baseline of each word.
- `ppo_outcome`: PPOTrainer on the outcome, which the last word gets. What the deciding word was worth is for the
  critic to find out.

    python -m studies.credit_assignment                       # about 10 minutes on 2 quiet cores
    python -m studies.credit_assignment --seeds 2 --steps 40  # a look
"""

import argparse
import logging
import random
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import write_figures
from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer
from endotrl.reporting import terminal_table
from endotrl.rewards import DenseScores
from endotrl.runs.record import machine, versions


NUM_QUESTIONS, NUM_ANSWERS = 4, 8
LENGTH, DECIDING = 24, 2
BATCH, GROUP = 64, 8
THRESHOLD, WINDOW = 0.8, 5

QUESTIONS = [f"q{i}" for i in range(NUM_QUESTIONS)]
ANSWERS = [f"a{i}" for i in range(NUM_ANSWERS)]
VOCABULARY = ["<eos>", *QUESTIONS, *ANSWERS]
LABELS = {
    "grpo": "GRPO (TRL), outcome",
    "dense": "DenseGRPO, dense reward",
    "ppo": "PPO, dense reward",
    "ppo_outcome": "PPO, outcome",
}
# Okabe and Ito's colours, told apart with every common colour blindness.
COLORS = {"grpo": "#0072b2", "dense": "#d55e00", "ppo": "#009e73", "ppo_outcome": "#cc79a7"}


class DecidingWord:
    """
    1 for the right word in the deciding place, whatever the others are: for TRL one number, or one for each token.
    """

    __name__ = "deciding_word"

    def __init__(self, answers: dict[str, int]) -> None:
        self.answers = answers

    def __call__(
        self, prompts: Sequence[str], completions: Any, completion_ids: Sequence[Sequence[int]], **kwargs: Any
    ) -> list[float]:
        return [
            float(len(ids) > DECIDING and ids[DECIDING] == self.answers[prompt])
            for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    def outcome_and_token_rewards(
        self, prompts: Sequence[str], completions: Any, completion_ids: Sequence[Sequence[int]], **kwargs: Any
    ) -> DenseScores:
        outcomes = self(prompts, completions, completion_ids)
        rewards = [torch.zeros(len(ids)) for ids in completion_ids]
        for row, outcome in zip(rewards, outcomes, strict=True):
            row[DECIDING : DECIDING + 1] = outcome
        return DenseScores(list(outcomes), rewards)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="<eos>"))
    backend.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<eos>")


def make_model(seed: int) -> LlamaForCausalLM:
    """A random transformer, in whose samples every word is about as frequent."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(VOCABULARY),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


class _SuccessCallback(TrainerCallback):
    """Keeps the success rate of every step's samples."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is not None and "reward" in logs:
            self.rates.append(logs["reward"])


def success_rates(arm: str, seed: int, steps: int, learning_rate: float, output_dir: str) -> list[float]:
    """Trains one arm, and returns the fraction of right responses among the samples of every step."""
    answers = {q: VOCABULARY.index(random.Random(f"{seed} {q}").choice(ANSWERS)) for q in QUESTIONS}
    outcome = DecidingWord(answers)
    shared: dict[str, Any] = {
        "output_dir": output_dir,
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "max_completion_length": LENGTH,
        "generation_kwargs": {"min_new_tokens": LENGTH},  # all responses have the same length
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "num_iterations": 1,
        "beta": 0.0,
        "temperature": 1.0,
        "seed": seed,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    group = {"num_generations": GROUP, "scale_rewards": "none"}
    critic = {
        "value_learning_rate": learning_rate,
        "detach_value": False,
        "vf_coef": 0.5,
        # As for the others: advantages in the unit of the reward. Near the optimum, whitening would blow up what is
        # only noise.
        "whiten_advantages": False,
    }
    args: Any
    if arm == "grpo":
        trainer_class, args, reward = GRPOTrainer, GRPOConfig(**shared, **group), outcome.__call__
    elif arm == "dense":
        trainer_class, args, reward = DenseGRPOTrainer, DenseGRPOConfig(**shared, **group), outcome
    elif arm == "ppo":
        trainer_class, args, reward = PPOTrainer, PPOConfig(**shared, **critic), outcome
    elif arm == "ppo_outcome":
        trainer_class, args, reward = PPOTrainer, PPOConfig(**shared, **critic), outcome.__call__
    else:
        raise ValueError(f"Unknown arm {arm!r}: it must be one of {', '.join(LABELS)}.")
    trainer = trainer_class(
        model=make_model(seed),
        reward_funcs=reward,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": QUESTIONS * BATCH}),
        processing_class=make_tokenizer(),
    )
    callback = _SuccessCallback()
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callback)
    trainer.train()
    return callback.rates


def samples_to_threshold(rates: Sequence[float]) -> int | None:
    """Samples until the success rate, averaged over the last steps, reaches the threshold; `None` if it never does."""
    for step in range(WINDOW, len(rates) + 1):
        if sum(rates[step - WINDOW : step]) / WINDOW >= THRESHOLD:
            return step * BATCH
    return None


def mean_interval(values: torch.Tensor, resamples: int = 2000) -> tuple[list[float], list[float], list[float]]:
    """Mean over the first dimension (seeds) with the 95% interval of a bootstrap over it."""
    chosen = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(0))
    means = values[chosen].mean(dim=1)  # (resample, step)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype), dim=0)
    return values.mean(dim=0).tolist(), low.tolist(), high.tolist()


def best_learning_rate(runs: dict[str, list[list[float]]], reached: dict[str, list[int | None]], budget: int) -> str:
    """
    The learning rate with which an arm gets to the threshold soonest, on average; among equals, the one that ends
    best.
    """

    def cost(rate: str) -> tuple[float, float]:
        # A run that never gets there counts as twice the budget.
        samples = [2 * budget if number is None else number for number in reached[rate]]
        return sum(samples) / len(samples), -_success_at_the_end(runs[rate])

    return min(runs, key=cost)


def _success_at_the_end(runs: Sequence[Sequence[float]]) -> float:
    return sum(sum(run[-WINDOW:]) / len(run[-WINDOW:]) for run in runs) / len(runs)


def summary_rows(results: dict[str, Any], every_rate: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of the table, with each arm's best learning rate or with all of them."""
    budget = results["settings"]["samples"]
    rows = []
    for arm, by_rate in results["success_rates"].items():
        for rate, runs in by_rate.items():
            if not every_rate and rate != results["best_learning_rate"][arm]:
                continue
            reached = results["samples_to_threshold"][arm][rate]
            # A run that never gets there needs more than the budget, which a median can say.
            ordered = sorted(budget + 1 if samples is None else samples for samples in reached)
            median, got_there = _median(ordered), sum(samples is not None for samples in reached)
            rows.append(
                [
                    LABELS[arm],
                    rate,
                    f"> {budget:,}" if median > budget else f"{median:,.0f}",
                    f"{got_there} of {len(reached)}",
                    f"{_success_at_the_end(runs):.0%}",
                ]
            )
    return ["trainer and reward", "rate", "samples (median)", "seeds", "at the end"], rows


def _median(ordered: Sequence[float]) -> float:
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def write_plot(results: dict[str, Any], path: Path) -> None:
    """Success against samples: mean over seeds with 95% bands."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context():
        plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
        fig, axis = plt.subplots(figsize=(7, 3.8), layout="constrained")
        for arm, by_rate in results["success_rates"].items():
            table = torch.tensor(by_rate[results["best_learning_rate"][arm]], dtype=torch.float64)
            window = min(WINDOW, table.shape[1])
            smooth = table.unfold(1, window, 1).mean(-1)
            mean, low, high = mean_interval(smooth)
            samples = [BATCH * (step + window) for step in range(len(mean))]
            axis.plot(samples, mean, color=COLORS[arm], label=LABELS[arm], linewidth=2)
            axis.fill_between(samples, low, high, color=COLORS[arm], alpha=0.2, linewidth=0)
        axis.axhline(THRESHOLD, color="#888888", linewidth=1, linestyle="--")
        axis.set(xlabel="samples (responses)", ylabel=f"right responses, {WINDOW} steps", ylim=(0, 1.02))
        axis.legend(frameon=False)
        fig.savefig(path, dpi=130)
        plt.close(fig)


def _markdown(headers: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [headers, ["---"] * len(headers), *rows])


def write_page(results: dict[str, Any], output: Path) -> Path:
    """Writes `credit.md`, and returns its path."""
    best, every = (_markdown(*summary_rows(results, every_rate)) for every_rate in (False, True))
    settings, environment = results["settings"], results["environment"]
    text = f"""# Credit assignment: who finds the token that matters

Command: `{results["command"]}`. Machine: {environment["machine"]}; torch {environment["torch"]}, transformers
{environment["transformers"]}, TRL {environment["trl"]}, Python {environment["python"]}. Seeds 0 to {settings["seeds"] - 1}. Time: {environment["seconds"]:.0f} s. Numbers behind
this page: `credit.json.gz`, which the command writes beside it.

A prompt is one of {NUM_QUESTIONS} questions, a response {LENGTH} words from a vocabulary of {len(VOCABULARY) - 1}. Word number {DECIDING + 1} must be the answer to the question; the
others do not matter. Outcome: 1 or 0. The dense reward gives the same to the deciding word, and 0 to all others: all arms
maximise the same expectation. A random transformer (2 layers, width 64) is trained with {BATCH} responses a step
(groups of {GROUP} where there are groups), one optimizer step for each, no KL penalty, no scaling of advantages: {settings["samples"]:,} samples per run.

Samples until {THRESHOLD:.0%} of the responses of {WINDOW} steps are right, the number of seeds that get there, and the right responses of
the last {WINDOW} steps. Each arm with its best learning rate:

{best}

![Right responses against samples](credit.png)

Mean over seeds, with the best learning rate of each arm; bands: 95% intervals of a bootstrap over seeds.

What to know when you read this: the deciding word comes early, where dense rewards help most. In DenseGRPO with
`gamma=1` a token is credited with all that is earned from it on, so words *before* the deciding one are as noisy as in
GRPO. PPO makes one optimizer step a batch here,
like the others; its default is four. Its critic shares the policy's trunk (`detach_value=False`), and its advantages are not whitened.

All learning rates:

{every}
"""
    path = output / "credit.md"
    path.write_text(text, encoding="utf-8")
    return path


def _start_worker() -> None:
    """Leaves the terminal to the progress bar, and the other core to the other worker."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")
    transformers_logging.set_verbosity_error()
    logging.getLogger("trl").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", metavar="DIR", default="credit-output", help="folder to write (default: %(default)s)"
    )
    parser.add_argument("--seeds", type=int, default=5, help="runs of each arm (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps of a run (default: %(default)s)")
    parser.add_argument(
        "--learning_rates",
        nargs="+",
        type=float,
        default=[3e-4, 1e-3, 3e-3],
        metavar="RATE",
        help="each arm is shown with its best (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default: %(default)s)")
    parser.add_argument("--arms", nargs="+", choices=list(LABELS), default=list(LABELS), help="what to compare")
    args = parser.parse_args(argv)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    jobs = [(arm, rate, seed) for seed in range(args.seeds) for rate in args.learning_rates for arm in args.arms]
    runs: dict[str, dict[str, list[list[float]]]] = {
        arm: {f"{rate:g}": [[] for _ in range(args.seeds)] for rate in args.learning_rates} for arm in args.arms
    }
    with (
        tempfile.TemporaryDirectory() as scratch,
        # Not forked: torch has threads by now.
        ProcessPoolExecutor(args.workers, get_context("spawn"), initializer=_start_worker) as pool,
        tqdm(total=len(jobs), unit=" runs") as bar,
    ):
        running = {
            pool.submit(success_rates, arm, seed, args.steps, rate, scratch): (arm, rate, seed)
            for arm, rate, seed in jobs
        }
        for run in as_completed(running):
            arm, rate, seed = running[run]
            runs[arm][f"{rate:g}"][seed] = run.result()
            bar.set_description(f"{arm}, learning rate {rate:g}, seed {seed}")
            bar.update()
    reached = {
        arm: {rate: [samples_to_threshold(run) for run in table] for rate, table in by_rate.items()}
        for arm, by_rate in runs.items()
    }
    budget = args.steps * BATCH
    results = {
        "command": shlex.join(
            ["python", "-m", "studies.credit_assignment", *(sys.argv[1:] if argv is None else argv)]
        ),
        "settings": {"seeds": args.seeds, "steps": args.steps, "samples": budget},
        "best_learning_rate": {arm: best_learning_rate(runs[arm], reached[arm], budget) for arm in runs},
        "samples_to_threshold": reached,
        "success_rates": runs,
        "environment": {
            **versions("torch", "transformers", "trl"),
            "machine": f"{machine()}, {args.workers} processes",
            "seconds": round(time.perf_counter() - started, 1),
        },
    }
    write_figures(output / "credit.json.gz", results)
    write_plot(results, output / "credit.png")
    page = write_page(results, output)
    console = Console(width=min(80, Console().width))
    console.print(terminal_table(*summary_rows(results), title=f"Samples to {THRESHOLD:.0%} right responses"))
    console.print(
        f"Page: {page}; figures: {output / 'credit.json.gz'}.", markup=False, highlight=False, soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
