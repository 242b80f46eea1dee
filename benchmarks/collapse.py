# SPDX-License-Identifier: Apache-2.0
r"""
Runs driven into collapse on purpose, and healthy ones, under the collapse monitor: when it speaks, and what was lost by then.

The demo's arithmetic task, by TRL's GRPO at a constant learning rate. Some runs are driven hard, and lose 20 points in one update, which
no monitor can prevent; *slow* ones move as a real run does: 512 answers a step, a learning rate so low that five points take ten
steps or more. The *misled* base model was shown, for some
more steps, demonstrations of which 60% have one digit too many carried: it is sure of what is wrong, and sharpening it makes it wrong
more often. Accuracy is a reward of weight 0, on the questions that are trained on; what is lost is measured on 1,000 others.

    python -m benchmarks.collapse --bases DIR                     # about 12 minutes on one core; finished runs are kept
    python -m benchmarks.collapse --bases DIR --runs entropy      # one of the runs
"""

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from endotrl import CollapseMonitor, EndogenousReward
from endotrl.monitoring import Detector
from endotrl.quickstart import arithmetic
from endotrl.quickstart.parts import ARITHMETIC
from endotrl.quickstart.training import load_model, quiet
from endotrl.reporting import terminal_table
from endotrl.rewards import LengthReward, MeanLogProbReward, NegativeEntropyReward, SelfCertaintyReward

from .arithmetic_runs import NUM_HELD_OUT, held_out_accuracy, make_base, training_questions


# What the detector reads, so that its verdict can be made again from the results.
LOGGED = ("step", "reward", "entropy", "/mean_length", "/clipped_ratio", "kl", "/log_prob_per_token")
OF_HELD_OUT = ("collapse/held_out", "collapse/agreement", "collapse/change")
EVERY = 5  # steps between two measurements on held-out questions


def verdict(completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    """A verifiable reward: whether the answer is right."""
    return arithmetic.accuracy(completions, answer)


@dataclass(frozen=True)
class Arm:
    """A run: what it is called, its reward (made for a base model), how it trains, and whether it is meant to collapse."""

    label: str
    make: Callable[[str], Any]
    collapses: bool
    beta: float = 0.0
    learning_rate: float = 3e-4
    misled: bool = False
    steps: int = 60
    answers: int = 256


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
}


class Ask(TrainerCallback):
    """Accuracy on held-out questions, every few steps, without a trace in the run."""

    def __init__(self, tokenizer: Any, seed: int, every: int = EVERY) -> None:
        self._tokenizer, self._seed, self._every = tokenizer, seed, every
        self.accuracies: dict[int, float] = {}

    def ask(self, model: Any, step: int) -> None:
        with torch.random.fork_rng():
            training = model.training
            self.accuracies[step] = held_out_accuracy(model, self._tokenizer, self._seed)
            model.train(training)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.ask(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self._every == 0:
            self.ask(model, state.global_step)


def mislead(base: Path, folder: Path, seed: int, steps: int = 150, wrong: float = 0.6) -> None:
    """Goes on training a base model on demonstrations of which a fraction is wrong in one and the same way: the sum plus 100."""
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
                answer = sum(question) + (100 if generator.random() < wrong else 0)
                texts.append(arithmetic.question_text(question) + str(answer)[::-1] + arithmetic.EOS)
        batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, : arithmetic.QUESTION_LENGTH] = -100
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(
    rewards: Sequence[Any],
    base: str,
    seed: int,
    steps: int,
    output_dir: str,
    callbacks: Sequence[TrainerCallback] = (),
    monitor: CollapseMonitor | None = None,
    **settings: Any,
) -> GRPOTrainer:
    """One run on the arithmetic task, with accuracy as a reward of weight 0."""
    args = GRPOConfig(
        output_dir=output_dir,
        **{
            **ARITHMETIC,
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
        train_dataset=arithmetic.make_dataset(training_questions(seed, 4000)),
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
    base = bases / (f"misled-{seed}" if arm.misled else f"base-{seed}")
    ask, monitor = Ask(AutoTokenizer.from_pretrained(base), seed), CollapseMonitor()
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(
            [arm.make(str(base))],
            str(base),
            seed,
            arm.steps,
            folder,
            [ask],
            monitor,
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
    return {**result, "alarms": alarms}


def held_out_at(result: dict[str, Any], step: int) -> float:
    """Held-out accuracy at a step, between two measurements by a straight line."""
    points = sorted((int(s), a) for s, a in result["held_out"].items())
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if before <= step <= after:
            return low + (high - low) * (step - before) / (after - before)
    return points[-1][1]


def lost_by(result: dict[str, Any], step: int) -> float:
    """Held-out accuracy lost at a step, from the best measurement until then."""
    best = max(a for s, a in result["held_out"].items() if int(s) <= step)
    return best - held_out_at(result, step)


def five_lost(result: dict[str, Any]) -> int | None:
    """The first measured step at which five points were lost for good."""
    steps = sorted(map(int, result["held_out"]))
    below = [lost_by(result, step) > 0.05 for step in steps]
    return next((step for i, step in enumerate(steps) if all(below[i:])), None)


HEADER = [
    "run",
    "seed",
    "answers, learning rate",
    "accuracy: first, best, last",
    "5 points lost at step",
    "alarm at step",
    "lost by then",
    "without held-out reward",
]


def table_rows(results: list[dict[str, Any]]) -> list[list[str]]:
    """One row a run: those meant to collapse first."""
    rows = []
    for result in sorted(results, key=lambda r: (list(ARMS).index(r["run"]), r["seed"])):
        values = list(result["held_out"].values())
        alarm = result["alarms"][0][0] if result["alarms"] else None
        blind = result["blind"]
        arm, late = ARMS[result["run"]], five_lost(result)
        rows.append(
            [
                arm.label,
                str(result["seed"]),
                f"{arm.answers}, {arm.learning_rate:.0e}".replace("e-0", "e-"),
                f"{values[0]:.1%}, {max(values):.1%}, {values[-1]:.1%}",
                "" if late is None else str(late),
                "none" if alarm is None else str(alarm),
                "" if alarm is None else f"{100 * lost_by(result, alarm):.1f} points",
                "none" if blind is None else f"step {blind[0]} ({100 * lost_by(result, blind[0]):.1f} points)",
            ]
        )
    return rows


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Held-out accuracy over steps, with the alarm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    colors = plt.get_cmap("tab10").colors
    for panel, collapses in zip(panels, (True, False), strict=True):
        arms = [name for name, arm in ARMS.items() if arm.collapses is collapses]
        for result in results:
            if result["run"] not in arms:
                continue
            color = colors[arms.index(result["run"])]
            points = sorted((int(step), accuracy) for step, accuracy in result["held_out"].items())
            label = ARMS[result["run"]].label if result["seed"] == min(r["seed"] for r in results) else None
            panel.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.5)
            if result["alarms"]:
                step = result["alarms"][0][0]
                panel.plot(step, held_out_at(result, step), "v", color=color, markersize=9, markeredgecolor="black")
        panel.set(title="meant to collapse (▼ alarm)" if collapses else "healthy", xlabel="step")
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("accuracy on held-out questions")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results page, in Markdown."""
    reasons = [
        f"- *{ARMS[r['run']].label}*, seed {r['seed']}, step {r['alarms'][0][0]}: {r['alarms'][0][1]}"
        for r in results
        if r["alarms"]
    ]
    return "\n".join(
        [
            "# Is a collapse caught?",
            "",
            f"Command: `{settings['command']}`. Machine: {settings['machine']}. {settings['versions']}. "
            f"CPU time: {settings['cpu_seconds'] / 60:.0f} minutes.",
            "",
            "The arithmetic task of `endotrl demo` under `CollapseMonitor()` with its default thresholds, live: GRPO, constant learning "
            'rate, `scale_rewards="group"`, β = 0 unless it says otherwise. *Slow* runs move as real ones do; the others are driven so '
            "hard that some lose 20 points in one update. Accuracy on the questions that are trained on is a reward of weight 0, which the "
            f"monitor sees; what was lost is measured on {NUM_HELD_OUT:,} other questions, asked every {EVERY} steps (standard error 1.5 "
            "points; between, a straight line), from the best measurement on. The last column is what the monitor would have said in the "
            "same run without a held-out reward. The misled base model gives, 60% of the time, the sum plus 100. The thresholds were "
            "chosen on runs of these kinds: this shows what the monitor does, and is no test of it on others.",
            "",
            "| " + " | ".join(HEADER) + " |",
            "|" + "---|" * len(HEADER),
            *("| " + " | ".join(row) + " |" for row in table_rows(results)),
            "",
            "![Accuracy on held-out questions over steps, with alarms](../images/collapse.png)",
            "",
            "What the monitor said:",
            "",
            *reasons,
            "",
        ]
    )


def use_one_thread() -> None:
    """One thread, and nothing on the screen but what the benchmark itself says."""
    os.environ["TQDM_DISABLE"] = "1"
    quiet()
    logging.getLogger("endotrl").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def kept_results(output: Path, name: str) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The file of a benchmark's results, and the settings and results that are in it. Makes the folders."""
    for folder in ("results", "images"):
        (output / folder).mkdir(parents=True, exist_ok=True)
    file = output / "results" / f"{name}.json"
    known: dict[str, Any] = {"settings": {"cpu_seconds": 0.0}, "results": []}
    if file.exists():
        known = json.loads(file.read_text(encoding="utf-8"))
    return file, known["settings"], known["results"]


def described(name: str, cpu_seconds: float) -> dict[str, Any]:
    """Settings of a benchmark: command, machine, versions and the time of all its runs."""
    return {
        "command": f"python -m benchmarks.{name} --bases DIR",
        "machine": f"{platform.system()} {platform.machine()}, one thread",
        "versions": ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "trl")),
        "cpu_seconds": cpu_seconds,
    }


def main() -> None:
    """Runs all arms and writes figures, plot and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--bases", type=Path, required=True, help="Folder where base models are kept (made if missing)."
    )
    parser.add_argument("--runs", nargs="*", choices=list(ARMS), default=list(ARMS), help="Which runs.")
    parser.add_argument("--again", action="store_true", help="Run again what has been run.")
    parser.add_argument(
        "--judge-again", action="store_true", help="Judge the runs recorded before with the detector as it is now."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="Seeds; each has a base model of its own.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="Folder of `results/` and `images/`.")
    args = parser.parse_args()
    use_one_thread()
    file, settings, results = kept_results(args.output, "collapse")
    if args.judge_again:
        results = [judged_again(result) for result in results]
    there = set() if args.again or args.judge_again else {(result["run"], result["seed"]) for result in results}
    todo = [(name, seed) for seed in args.seeds for name in args.runs if (name, seed) not in there]
    with tqdm([] if args.judge_again else todo, desc="Runs", unit=" runs", disable=False) as bar:
        for name, seed in bar:
            started = time.process_time()
            if not (args.bases / f"base-{seed}").exists():
                make_base(args.bases / f"base-{seed}", seed)
            if not (args.bases / f"misled-{seed}").exists():
                mislead(args.bases / f"base-{seed}", args.bases / f"misled-{seed}", seed)
            result = json.loads(json.dumps(run(name, args.bases, seed)))
            results = [r for r in results if (r["run"], r["seed"]) != (name, seed)] + [result]
            settings = described("collapse", settings["cpu_seconds"] + time.process_time() - started)
            file.write_text(json.dumps({"settings": settings, "results": results}) + "\n", encoding="utf-8")
            bar.set_postfix(last=name, alarm=result["alarms"][0][0] if result["alarms"] else "none")
    file.write_text(json.dumps({"settings": settings, "results": results}) + "\n", encoding="utf-8")
    plot(results, args.output / "images" / "collapse.png")
    (args.output / "results" / "collapse.md").write_text(page(results, settings), encoding="utf-8")
    Console().print(terminal_table(HEADER, table_rows(results)))


if __name__ == "__main__":
    main()
