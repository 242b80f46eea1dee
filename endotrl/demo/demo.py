# SPDX-License-Identifier: Apache-2.0
"""`endotrl demo`: both parts, their figures, their report."""

import json
import os
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..frozen.quickstart_model import quickstart_model_path
from ..reporting import terminal_table
from ..runs.record import machine, versions
from .demo_page import write_report
from .findings import accuracy_rows, summary
from .grpo_runs import quiet
from .parts import PARTS


def run_demo(task: str = "all", output_dir: str | os.PathLike[str] = "demo-output", seed: int = 0) -> dict[str, Any]:
    """
    Runs the demo and writes its folder: `metrics.json`, `report.html`, plots as PNG, the trained models, and offline
    W&B runs if wandb is installed.

    Args:
        task (`str`, *optional*, defaults to `"all"`):
            `"arithmetic"`, `"facts"` or `"all"`.
        output_dir (`str`, *optional*, defaults to `"demo-output"`):
            Folder to write. Files of an earlier demo in it are replaced.
        seed (`int`, *optional*, defaults to `0`):
            Seed of all randomness.

    Returns:
        `dict[str, Any]`: the content of `metrics.json`. Accuracies are on held-out questions, sampled at T = 1 (except
        `greedy_before`).

    Raises:
        `ValueError`: If there is no such task.
        `ImportError`: If a package is missing that the task needs.
    """
    if task != "all" and task not in PARTS:
        raise ValueError(f"`task` is {task!r}, but it must be {', '.join(map(repr, PARTS))} or 'all'.")
    quiet()
    _check_requirements(task)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=min(100, Console().width))
    metrics: dict[str, Any] = {}
    parts = []
    started = time.perf_counter()
    for name, run in PARTS.items():
        if task not in (name, "all"):
            continue
        console.rule(name)
        part = run(output, seed, lambda text: console.print(text, markup=False, highlight=False))
        parts.append(part)
        metrics[name] = part.metrics
        metrics["seconds"] = round(time.perf_counter() - started, 1)
        metrics["environment"] = _environment()
        metrics["environment"][f"{name}_dtype"] = part.settings["dtype"]
        (output / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
        headers = ["policy", "accuracy, held-out", "cut off", "training"]
        console.print(terminal_table(headers, accuracy_rows(part)))
        console.print(summary(part), markup=False, highlight=False)
    report = write_report(parts, metrics, output)
    console.rule("done")
    console.print(
        f"{metrics['seconds'] / 60:.1f} minutes. Report: {report}; figures: {output / 'metrics.json'}.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    return metrics


def _check_requirements(task: str) -> None:
    """Raises `ImportError` now for a package that would be missed only after minutes of training."""
    needed = ["matplotlib"] + (["peft", "gguf"] if task != "arithmetic" else [])
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"The demo needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed. `make "
            "demo` "
            "installs all it needs; by hand, in a clone: `pip install '.[quickstart]'`."
        )
    if task != "arithmetic":
        quickstart_model_path()  # converts the model on first use


def _environment() -> dict[str, Any]:
    threads = f"{torch.get_num_threads()} threads"
    return {"machine": f"{machine()}, {threads}", **versions("torch", "transformers", "trl")}
