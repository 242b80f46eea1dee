# SPDX-License-Identifier: Apache-2.0
"""Runs under the collapse monitor, on two small tasks: how they are trained, and what is kept of them."""

import contextlib
import io
import logging
import os
import platform
import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from benchmarks.measure import read_figures
from endotrl import CollapseMonitor, EndogenousReward
from endotrl.demo.grpo_runs import load_model
from endotrl.monitoring import Detector
from endotrl.reporting import quiet_libraries
from endotrl.rewards import LengthReward, MeanLogProbReward, NegativeEntropyReward, SelfCertaintyReward
from endotrl.runs.record import versions
from endotrl.tasks import arithmetic

from . import letters
from .arithmetic_runs import ARITHMETIC, NUM_HELD_OUT, held_out_accuracy, make_base, make_small_base, plus_10


# What the detector reads, so that its verdict can be made again from the results.
LOGGED = ("step", "reward", "entropy", "/mean_length", "/clipped_ratio", "kl", "/log_prob_per_token", "grad_norm")
LOGGED += ("reward_std", "frac_reward_zero_std", "learning_rate")
OF_HELD_OUT = ("collapse/held_out", "collapse/agreement", "collapse/change", "collapse/slope")
EVERY = 5  # steps between two measurements on held-out questions


def verdict(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """A verifiable reward: whether the answer is right."""
    return arithmetic.accuracy(completions, answer)


def many_a(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that has nothing to do with the task."""
    return [float(completion.count("a")) for completion in completions]


@dataclass(frozen=True)
class Arm:
    """
    A run: what it is called, its reward (made for a base model), how it trains, and whether it is meant to collapse.
    """

    label: str
    make: Callable[[str], Any]
    collapses: bool
    beta: float = 0.0
    learning_rate: float = 3e-4
    misled: bool = False
    steps: int = 60
    answers: int = 256
    task: str = "arithmetic"


ARMS = {
    "certainty_slow": Arm("self-certainty, slow", SelfCertaintyReward, True, learning_rate=1e-5, answers=512),
    "length_slow": Arm(
        "shorter is better, slow", lambda base: LengthReward(), True, learning_rate=3e-5, steps=40, answers=512
    ),
    "misled_slow": Arm("endogenous, misled base, slow", EndogenousReward, True, 0.0, 1e-5, True, 40, 512),
    "entropy": Arm("negative entropy", NegativeEntropyReward, True, learning_rate=3e-5, steps=100),
    "certainty": Arm("self-certainty", SelfCertaintyReward, True, learning_rate=3e-5),
    "length": Arm("shorter is better", lambda base: LengthReward(), True, learning_rate=1e-4, steps=40),
    "misled": Arm("endogenous, misled base", EndogenousReward, True, 0.0, 1e-4, True, 30),
    "misled_mean": Arm("mean log-probability, misled base", MeanLogProbReward, True, 0.0, 1e-4, True, 30),
    "entropy_fast": Arm("negative entropy, fast", NegativeEntropyReward, True, steps=20),
    "endogenous": Arm("endogenous, β = 0.1", EndogenousReward, False, beta=0.1, steps=100),
    "sharpened_slow": Arm("endogenous, slow", EndogenousReward, False, learning_rate=3e-5, answers=512),
    "sharpened": Arm("endogenous", EndogenousReward, False, steps=40),
    "mean": Arm("mean log-probability", MeanLogProbReward, False, steps=40),
    "verifiable": Arm("right or wrong", lambda base: verdict, False),
    "letter_a_slow": Arm("many a's, slow", lambda base: many_a, True, 0.0, 1e-5, False, 60, 512, "letters"),
    "brief_slow": Arm("shorter, slow", lambda base: LengthReward(), True, 0.0, 1e-5, False, 60, 512, "letters"),
    "backwards_misled_slow": Arm(
        "endogenous, misled base, slow", EndogenousReward, True, 0.0, 1e-5, True, 60, 512, "letters"
    ),
    "backwards_entropy": Arm("negative entropy", NegativeEntropyReward, True, 0.0, 5e-5, False, 80, 256, "letters"),
    "backwards_certainty": Arm("self-certainty", SelfCertaintyReward, True, 0.0, 5e-5, False, 80, 256, "letters"),
    "backwards": Arm("endogenous, β = 0.1", EndogenousReward, False, 0.1, 1e-4, task="letters"),
    "backwards_sharpened": Arm("endogenous", EndogenousReward, False, 0.0, 3e-4, steps=40, task="letters"),
    "backwards_mean": Arm("mean log-probability", MeanLogProbReward, False, 0.0, 1e-4, task="letters"),
    "backwards_verifiable": Arm("right or wrong", lambda base: verdict, False, 0.0, 3e-4, task="letters"),
}

SMALL = [name for name, arm in ARMS.items() if arm.task == "arithmetic"]
ARMS |= {f"small_{name}": replace(ARMS[name], task="small") for name in SMALL}


class Ask(TrainerCallback):
    """Accuracy on held-out questions, every few steps, without a trace in the run."""

    def __init__(
        self,
        tokenizer: Any,
        seed: int,
        every: int = EVERY,
        measure: Callable[[Any, Any, int], float] = held_out_accuracy,
    ) -> None:
        self._tokenizer, self._seed, self._every, self._measure = tokenizer, seed, every, measure
        self.accuracies: dict[int, float] = {}

    def ask(self, model: Any, step: int) -> None:
        with torch.random.fork_rng():
            training = model.training
            self.accuracies[step] = self._measure(model, self._tokenizer, self._seed)
            model.train(training)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.ask(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self.ask(model, state.global_step)


def plus_100(question: arithmetic.Question, generator: random.Random) -> str:
    """The sum plus 100, last digit first."""
    return str(sum(question) + 100)[::-1]


def mislead(
    base: Path,
    folder: Path,
    seed: int,
    steps: int = 150,
    wrong: float = 0.6,
    answer: Callable[[arithmetic.Question, random.Random], str] = plus_100,
) -> None:
    """
    Goes on training a base model on demonstrations of which a fraction is wrong, by default in one and the same way:
    the sum plus 100.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(base), load_model(base)
    held_out = set(arithmetic.make_questions(NUM_HELD_OUT, seed=seed + 1))
    generator = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in tqdm(range(steps), desc="Misleading a base model", unit=" steps"):
        texts = []
        while len(texts) < 256:
            question = (generator.randint(100, 999), generator.randint(100, 999))
            if question not in held_out:
                slips = generator.random() < wrong
                written = answer(question, generator) if slips else arithmetic.answer_text(question)
                texts.append(arithmetic.question_text(question) + written + arithmetic.EOS)
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : arithmetic.QUESTION_LENGTH] = -100
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Task:
    """What is asked: how models for it are made, what they are trained on, and how they are measured."""

    label: str
    prefix: str  # of the folders of its models
    make_base: Callable[[Path, int], None]
    mislead: Callable[[Path, Path, int], None]
    make_questions: Callable[[int, int], Sequence[Any]]
    make_dataset: Callable[[Sequence[Any]], Dataset]
    held_out_accuracy: Callable[[Any, Any, int], float]
    max_completion_length: int


TASKS = {
    "arithmetic": Task(
        "Arithmetic",
        "",
        make_base,
        mislead,
        arithmetic.make_questions,
        arithmetic.make_dataset,
        held_out_accuracy,
        arithmetic.MAX_ANSWER_LENGTH,
    ),
    "letters": Task(
        "Letters backwards",
        "letters-",
        letters.make_base,
        letters.mislead,
        letters.make_questions,
        letters.make_dataset,
        letters.held_out_accuracy,
        letters.MAX_ANSWER_LENGTH,
    ),
    "small": Task(
        "Two digits",
        "small-",
        make_small_base,
        lambda base, folder, seed: make_small_base(folder, seed, 0.6, plus_10),
        lambda number, seed: arithmetic.make_questions(number, seed, digits=2),
        arithmetic.make_dataset,
        partial(held_out_accuracy, digits=2),
        arithmetic.MAX_ANSWER_LENGTH,
    ),
}


def train(
    rewards: Sequence[Any],
    base: str,
    seed: int,
    steps: int,
    output_dir: str,
    callbacks: Sequence[TrainerCallback] = (),
    monitor: CollapseMonitor | None = None,
    task: Task = TASKS["arithmetic"],
    **settings: Any,
) -> GRPOTrainer:
    """One run, with accuracy as a reward of weight 0."""
    held_out = set(task.make_questions(NUM_HELD_OUT, seed + 1))
    questions = [q for q in task.make_questions(4000, seed + 2) if q not in held_out]
    args = GRPOConfig(
        output_dir=output_dir,
        **{
            **ARITHMETIC,
            "max_completion_length": task.max_completion_length,
            "max_steps": steps,
            "seed": seed,
            "reward_weights": [1.0] * len(rewards) + [0.0],
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "gradient_checkpointing": False,
            **settings,
        },
    )
    trainer = GRPOTrainer(
        model=load_model(base),
        reward_funcs=[*rewards, arithmetic.accuracy],
        args=args,
        train_dataset=task.make_dataset(questions),
        processing_class=AutoTokenizer.from_pretrained(base),
        callbacks=list(callbacks),
    )
    if monitor is not None:
        monitor.attach(trainer)
    with contextlib.redirect_stdout(io.StringIO()):  # the Trainer prints a dictionary a step
        trainer.train()
    return trainer


def run(name: str, bases: Path, seed: int) -> dict[str, Any]:
    """Trains one arm; what the monitor said, and what the held-out questions say."""
    arm = ARMS[name]
    task = TASKS[arm.task]
    base = bases / f"{task.prefix}{'misled' if arm.misled else 'base'}-{seed}"
    ask = Ask(AutoTokenizer.from_pretrained(base), seed, measure=task.held_out_accuracy)
    monitor = CollapseMonitor()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(
            [arm.make(str(base))],
            str(base),
            seed,
            arm.steps,
            folder,
            [ask],
            monitor,
            task,
            beta=arm.beta,
            learning_rate=arm.learning_rate,
            per_device_train_batch_size=arm.answers,
        )
    log = logged(trainer)
    return {
        "run": name,
        "seed": seed,
        "alarms": monitor.alarms,
        "held_out": ask.accuracies,
        "blind": first_alarm_without_accuracy(log),
        "log": log,
    }


def logged(trainer: GRPOTrainer) -> list[dict[str, float]]:
    """What the detector read at every step, to five digits."""
    return [
        {
            key: float(f"{value:.5g}")
            for key, value in entry.items()
            if key.startswith("collapse/") or key.endswith(LOGGED)
        }
        for entry in trainer.state.log_history
        if "reward" in entry
    ]


def first_alarm_without_accuracy(log: list[dict[str, float]]) -> tuple[int, str] | None:
    """When the monitor would have spoken in the same run without a held-out reward."""
    detector = Detector()
    for entry in log:
        alarm = detector.update({k: v for k, v in entry.items() if not k.startswith(OF_HELD_OUT)}).alarm
        if alarm:
            return int(entry["step"]), alarm
    return None


def judged_again(result: dict[str, Any]) -> dict[str, Any]:
    """A recorded run with the alarms of the present detector."""
    detector, alarms, quiet_before = Detector(), [], True
    for entry in result["log"]:
        alarm = detector.update(entry).alarm
        if alarm and quiet_before:
            alarms.append((int(entry["step"]), alarm))
        quiet_before = not alarm
    return {**result, "alarms": alarms, "blind": first_alarm_without_accuracy(result["log"])}


def use_one_thread() -> None:
    """One thread, and nothing on the screen but what the benchmark itself says."""
    os.environ["TQDM_DISABLE"] = "1"
    quiet_libraries()
    logging.getLogger("endotrl").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def kept_results(output: Path, name: str) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The file of a benchmark's results, and the settings and results that are in it. Makes the folders."""
    for folder in ("results", "images"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    file = output / "results" / f"{name}.json.gz"
    known: dict[str, Any] = {"settings": {"cpu_seconds": 0.0}, "results": []}
    if file.exists():
        known = read_figures(file)
    return file, known["settings"], known["results"]


def described(name: str, cpu_seconds: float) -> dict[str, Any]:
    """Settings of a benchmark: command, machine, versions and the time of all its runs."""
    return {
        "command": f"python -m studies.{name} --bases DIR",
        "machine": f"{platform.system()} {platform.machine()}, one thread",
        "versions": ", ".join(map(" ".join, versions("torch", "transformers", "trl").items())),
        "cpu_seconds": cpu_seconds,
    }
