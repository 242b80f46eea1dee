# SPDX-License-Identifier: Apache-2.0
r"""
Kills training runs with SIGKILL at random moments, starts the same command again each time, and compares what is there
at the end with an undisturbed run: every tensor of the model, every metric that was logged.

    python -m benchmarks.interruptions

The model is tiny and random. The recipes are those of `recipes/`, each launch a process of its own; they are forked
from one that has imported the libraries, so that a launch takes a second. Half of the kills aim at a checkpoint that
is being saved.
"""

import os


# One thread, from the start: a process with threads must not fork.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import argparse
import json
import platform
import random
import runpy
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from mmap import mmap
from pathlib import Path
from threading import RLock
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from tqdm.auto import tqdm
from transformers.trainer_callback import CallbackHandler

import endotrl.launch  # noqa: F401 (before the forks)
from endotrl import DenseGRPOTrainer, PPOTrainer, SentenceRewardTrainer
from endotrl.reporting import terminal_table
from endotrl.runs.record import versions
from tests.support.tiny_policy import save_tiny_policy


ROOT = Path(__file__).parents[1]
# Every step is saved, every second one logged, and all checkpoints but the last are deleted.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "save_steps": 1,
    "save_total_limit": 1,
    "logging_steps": 2,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
}
# A generation batch serves 4 steps, and an epoch has 12.
RL = {"steps_per_generation": 2, "num_iterations": 2, "beta": 0.1, "max_completion_length": 6}
RECIPES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "grpo": (DenseGRPOTrainer, {**RL, "num_generations": 2}),
    "ppo": (PPOTrainer, {**RL, "num_generations": 1}),
    "sentence_reward": (SentenceRewardTrainer, {"attention_dim": 8}),
}
ROWS = {"grpo": 12, "ppo": 24, "sentence_reward": 48}  # of an epoch
# What differs between any two runs.
TIMES = ("perf/", "step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second")

PHASES = ("loading", "a training step", "saving a checkpoint", "in between")
LOADING, STEP, CHECKPOINT, BETWEEN = range(len(PHASES))


class Notes:
    """What a launched process is doing, in memory that it shares with this one."""

    def __init__(self) -> None:
        # Phase; number of phases of each kind that were entered, and the seconds that they took.
        self._memory = np.frombuffer(mmap(-1, 8 * (1 + 2 * len(PHASES))))
        self._counts, self._seconds = self._memory[1:].reshape(2, -1)

    def clear(self) -> None:
        self._memory[:] = 0

    @property
    def phase(self) -> int:
        return int(self._memory[0])

    def count(self, phase: int) -> int:
        return int(self._counts[phase])

    def mean_seconds(self, phase: int) -> float:
        return float(self._seconds[phase] / max(self._counts[phase], 1))

    def noting(self, function: Callable[..., Any], phase: int) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            before = self._memory[0]
            self._memory[0] = phase
            self._counts[phase] += 1
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[phase] += time.perf_counter() - started
                self._memory[0] = BETWEEN if before == LOADING else before

        return noted


def start(kind: str, arguments: list[str], log: Path) -> int:
    """Forks a process that runs a recipe's script, and returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        script = str(ROOT / "recipes" / f"{kind}.py")
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def has_ended(pid: int, log: Path, block: bool = False) -> bool:
    """Whether a launched process has ended, by itself or by SIGKILL; `RuntimeError` if it failed."""
    found, status = os.waitpid(pid, 0 if block else os.WNOHANG)
    if found and status and not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
        raise RuntimeError(f"A launch failed:\n{log.read_text()[-4000:]}")
    return bool(found)


def kill_at_random(pid: int, notes: Notes, rng: random.Random, pace: dict[int, float], log: Path) -> int | None:
    """Kills a process at some moment, and returns the phase that this hit; `None` if the process ended before."""
    aim = rng.choices((LOADING, STEP, CHECKPOINT), weights=(2, 3, 5))[0]
    # The first or the second of its kind in this launch, so that there is some progress between kills, and not too
    # much.
    number = rng.choice((1, 2))
    while aim != LOADING and notes.count(aim) < number:
        if has_ended(pid, log):
            return None
        time.sleep(5e-4)
    deadline = time.perf_counter() + rng.uniform(0, pace[aim])
    while time.perf_counter() < deadline:
        if has_ended(pid, log):
            return None
        time.sleep(5e-4)
    os.kill(pid, signal.SIGSTOP)  # the phase that is read is the one that is killed
    phase = notes.phase
    os.kill(pid, signal.SIGKILL)
    has_ended(pid, log, block=True)
    return phase


def compare(found: Path, expected: Path, max_steps: int) -> dict[str, Any]:
    """Tensors and metrics of two finished runs."""
    files = sorted(path.name for path in expected.glob("*.safetensors"))
    tensors = [(load_file(found / name), load_file(expected / name)) for name in files]
    different = [
        key for ours, theirs in tensors for key in theirs if key not in ours or not torch.equal(ours[key], theirs[key])
    ]
    histories = []
    for folder in (found, expected):
        state = json.loads((folder / f"checkpoint-{max_steps}" / "trainer_state.json").read_text())
        histories.append(
            [
                {key: value for key, value in entry.items() if not key.startswith(TIMES)}
                for entry in state["log_history"]
            ]
        )
    ours, theirs = histories
    wrong = [
        f"step {b['step']}: {key}"
        for a, b in zip(ours, theirs, strict=False)
        for key in b.keys() | a.keys()
        if a.get(key) != b.get(key)
    ]
    return {
        "tensors": sum(len(theirs) for _, theirs in tensors),
        "different_tensors": different,
        "metrics": sum(len(entry) for entry in theirs),
        "different_metrics": wrong + ["number of entries"] * (len(ours) != len(theirs)),
    }


def make_rows(kind: str) -> list[dict[str, str]]:
    """Prompts, or preferences, of random words."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices("abcdefghijkl", k=rng.randint(1, 4)))

    columns = ["prompt", "chosen", "rejected"] if kind == "sentence_reward" else ["prompt"]
    return [{column: text() for column in columns} for _ in range(ROWS[kind])]


def disturb(kind: str, folder: Path, kills: int, max_steps: int, seed: int, notes: Notes) -> dict[str, Any]:
    """Runs a recipe undisturbed, and again with kills."""
    data = folder / f"{kind}.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in make_rows(kind)))
    settings = {**SETTINGS, **RECIPES[kind][1], "max_steps": max_steps, "dataset_name": data}
    settings["model_name_or_path"] = folder / "model"
    arguments = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    log = folder / f"{kind}.log"

    notes.clear()
    has_ended(start(kind, [*arguments, "--output_dir", str(folder / f"{kind}-whole")], log), log, block=True)
    pace = {phase: notes.mean_seconds(phase) for phase in (STEP, CHECKPOINT)}
    pace[LOADING] = 0.5

    rng = random.Random(f"{seed} {kind}")
    hit: Counter[int] = Counter()
    launches, done = 0, False
    progress = tqdm(total=kills, desc=f"Kills of recipes/{kind}.py", unit="kill")
    while not done:
        notes.clear()
        launches += 1
        pid = start(kind, [*arguments, "--output_dir", str(folder / f"{kind}-killed")], log)
        if sum(hit.values()) < kills:
            phase = kill_at_random(pid, notes, rng, pace, log)
            done = phase is None
            if phase is not None:
                hit[phase] += 1
                progress.update()
        else:
            done = has_ended(pid, log, block=True)
    progress.close()
    return {
        "recipe": f"recipes/{kind}.py",
        "steps": max_steps,
        "kills": sum(hit.values()),
        "hit": {PHASES[phase]: hit[phase] for phase in sorted(hit)},
        "launches": launches,
        "cut_off_checkpoints": log.read_text().count("cut off while it was written"),
        **compare(folder / f"{kind}-killed", folder / f"{kind}-whole", max_steps),
    }


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    rows = [
        f"| `{run['recipe']}` | {run['steps']} | {run['kills']} | "
        + ", ".join(f"{phase}: {number}" for phase, number in run["hit"].items())
        + f" | {run['cut_off_checkpoints']} | {len(run['different_tensors'])} of {run['tensors']} | "
        f"{len(run['different_metrics'])} of {run['metrics']} |"
        for run in results["runs"]
    ]
    return f"""# Training runs that are killed again and again

Command: `{results["command"]}`. Machine: {results["machine"]}; {results["versions"]}. {results["seconds"]:.0f} s.

SIGKILL at random moments, and the same command again, until the run has ended. What is there then, next to an undisturbed run:
tensors of the final model that are not the same to the bit, and logged metrics (all but times) that are not the same number.

| script | steps | kills | what they hit | launches that skipped a checkpoint as cut off | different tensors | different metrics |
|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Half of the kills aim at a checkpoint that is being saved, the others at a step, or at a process that is loading its model. The model is
tiny and random, and a checkpoint a few files of some kilobytes. Every step is saved, with `save_total_limit: 1`: if there were a moment
without a complete checkpoint, a kill would lose the run. In GRPO and PPO a generation batch serves four steps, an epoch has twelve, and
every second step is logged: most checkpoints are within a generation batch, half of them between two logs.
"""


def main() -> None:
    """Runs all, and writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--kills", type=int, default=20, help="Kills of each run.")
    parser.add_argument("--steps", type=int, default=48, help="Steps of a run: two for a kill.")
    parser.add_argument("--seed", type=int, default=0, help="Of the moments.")
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "docs/results/interruptions",
        help="Path of the page and the JSON file, without .md.",
    )
    args = parser.parse_args()
    # Progress bars of processes that are forked share a lock, which one that is killed would keep; and have a thread.
    tqdm.set_lock(RLock())
    tqdm.monitor_interval = 0
    notes = Notes()
    for trainer_class, _ in RECIPES.values():
        trainer_class._save_checkpoint = notes.noting(trainer_class._save_checkpoint, CHECKPOINT)
        trainer_class.training_step = notes.noting(trainer_class.training_step, STEP)
    CallbackHandler.on_save = notes.noting(CallbackHandler.on_save, CHECKPOINT)
    started, runs = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_policy(Path(folder) / "model")
        for kind in args.recipes:
            runs.append(disturb(kind, Path(folder), args.kills, args.steps, args.seed, notes))
    results = {
        "command": shlex.join(["python", "-m", "benchmarks.interruptions", *sys.argv[1:]]),
        "machine": f"{platform.system()} {platform.machine()}, one thread",
        "versions": ", ".join(map(" ".join, versions("torch", "transformers", "trl").items())),
        "seconds": time.perf_counter() - started,
        "runs": runs,
    }
    args.output.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    args.output.with_suffix(".md").write_text(page(results), encoding="utf-8")
    columns = ["recipe", "kills", "different tensors", "different metrics"]
    rows = [
        (run["recipe"], run["kills"], len(run["different_tensors"]), len(run["different_metrics"])) for run in runs
    ]
    Console().print(terminal_table(columns, rows, title="Killed again and again, next to an undisturbed run"))


if __name__ == "__main__":
    main()
