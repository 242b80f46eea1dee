# SPDX-License-Identifier: Apache-2.0
"""`endotrl demo`: stages, metrics and report."""

import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from ..checks import check_choice
from ..frozen.quickstart_model import quickstart_model_path
from ..reporting import quiet_libraries, terminal_table
from ..runs.files import write_json
from ..runs.record import machine, versions
from .findings import accuracy_table, summary, write_report
from .parts import LOOK, SIZES, TASKS, look, run
from .progress import Kept, Progress


def run_demo(
    task: str = "all", output_dir: str | os.PathLike[str] = "demo-output", seed: int = 0, size: str = "default"
) -> dict[str, Any]:
    """
    Runs the demo and writes its folder: `metrics.json`, `report.html`, plots as PNG, and the trained models; after an
    interruption, the same call resumes at the first unfinished training. `task` is `"arithmetic"`, `"facts"`,
    `"images"`, or `"all"` for the first two; `size` is `"quick"` (the arithmetic without controls), `"default"`, or
    `"full"` (more steps, all questions, and controls of both models). Returns the content of `metrics.json`.

    Raises `ValueError` for another task or size, or a size without the task; `ImportError` for a missing package.
    """
    started = time.perf_counter()
    check_choice("task", task, (*TASKS, "all"))
    check_choice("size", size, tuple(SIZES))
    if task == "facts" and SIZES[size].facts is None:
        raise ValueError(f"The {size} demo has no facts. Remove `--task facts` or `--{size}`.")
    quiet_libraries()
    _check_requirements(task)
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=min(100, Console().width))

    def say(text: Any) -> None:
        with tqdm.external_write_mode():
            console.print(Text(text) if isinstance(text, str) else text)

    names = [task] if task != "all" else ["arithmetic", *(["facts"] if SIZES[size].facts else [])]
    tasks = [TASKS[name](SIZES[size], output, seed) for name in names]
    looks = {LOOK: 10.0} if task in ("all", "facts") else {}
    progress = Progress(looks | {title: seconds for one in tasks for title, seconds in one.stages.items()})
    software = versions("torch", "transformers", "trl")
    environment = {"machine": f"{machine()}, torch threads: {torch.get_num_threads()}", **software}
    kept = Kept(output / "partial", {"size": size, "seed": seed, **software})
    metrics: dict[str, Any] = {}
    parts = []
    try:
        if looks:
            look(progress, say)
        for one in tasks:
            part = run(one, output, seed, progress, kept, say)
            parts.append(part)
            metrics[part.name] = part.metrics
            metrics["seconds"] = round(time.perf_counter() - started, 1)
            metrics["environment"] = environment | {f"{p.name}_dtype": p.settings["dtype"] for p in parts}
            write_json(output / "metrics.json", metrics)
            report = write_report(parts, metrics, output)
            say(terminal_table(*accuracy_table(part)))
            say(summary(part))
    except KeyboardInterrupt as error:
        told = f"Interrupted. Results so far are in {output}. Run the same command again to resume."
        raise KeyboardInterrupt(told) from error
    finally:
        progress.close()
    shutil.rmtree(output / "partial")
    console.rule("done")
    told = f"{metrics['seconds'] / 60:.1f} minutes. Report: {report}; metrics: {output / 'metrics.json'}."
    console.print(told, markup=False, highlight=False, soft_wrap=True)
    return metrics


def _check_requirements(task: str) -> None:
    """Raises `ImportError` early for packages that would be needed only after minutes of training."""
    needed = ["matplotlib", *(["peft", "gguf"] if task in ("all", "facts") else [])]
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ImportError(f"The demo requires {', '.join(missing)}. In a clone, run `pip install '.[quickstart]'`.")
    if "peft" in needed:
        quickstart_model_path()  # converts the model on first use
