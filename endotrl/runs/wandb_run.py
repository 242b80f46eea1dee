# SPDX-License-Identifier: Apache-2.0
"""W&B: login, resuming of runs, alerts, tables, and logging of evaluations."""

import os
import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainingArguments

from ..reporting.text import is_number
from .files import replace_text


WANDB_ID_FILE = "wandb_run_id"


def check_wandb_login(training_args: TrainingArguments) -> None:
    """Raises `ValueError` if the run reports to W&B without a login; on a terminal, W&B asks for it now."""
    if "wandb" in training_args.report_to and PartialState().is_main_process:
        # First, as W&B reads the environment only once.
        continue_wandb_run(training_args.output_dir, anew=training_args.resume_from_checkpoint is None)
        _log_in("`report_to: wandb`")


def check_wandb(project: str | None) -> None:
    """Raises `ImportError` or `ValueError` if `--wandb` lacks a package, or a login."""
    if project is not None and PartialState().is_main_process:
        if find_spec("wandb") is None:
            raise ImportError("--wandb requires wandb, which is not installed. Run `pip install 'endotrl[wandb]'`.")
        _log_in("--wandb")


def _log_in(what: str) -> None:
    import wandb

    if wandb.setup().settings.mode not in ("offline", "disabled"):
        try:
            wandb.login(verify=False)
        except wandb.Error as error:
            raise ValueError(
                f"{what} requires a W&B login: {error} To run without one, set WANDB_MODE=offline (`wandb sync` "
                "uploads the run later)."
            ) from error


def continue_wandb_run(output_dir: str, anew: bool) -> None:
    """Lets W&B resume the run recorded in the output folder, or (`anew`) records a new one there."""
    path = Path(output_dir) / WANDB_ID_FILE
    if anew or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", output_dir)


def active_run() -> Any:
    """This process's current W&B run, or `None`. Does not import W&B."""
    module = sys.modules.get("wandb")
    return None if module is None else module.run


def log_table(run: Any, name: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Logs a table to a run."""
    import wandb

    cells = [[cell if cell is None or is_number(cell) else str(cell) for cell in row] for row in rows]
    run.log({name: wandb.Table(columns=list(headers), data=cells)})


def log_evaluation(
    project: str, results: Mapping[str, Any], table: tuple[list[str], list[list[object]]], pages: Sequence[Path]
) -> None:
    """Logs an evaluation as a W&B run: settings, verdict and main metrics in the summary, table, pages."""
    import wandb

    config = {key: results[key] for key in ("benchmark", "model", "model_version", "data", "settings", "versions")}
    name, main = f"{results['benchmark']} {Path(results['model']).name}", results["main_metric"]
    figures = {f"{scorer}/{main}": metrics[main]["value"] for scorer, metrics in results["metrics"].items()}
    with wandb.init(project=project, job_type="eval", name=name, config=config) as run:
        run.summary.update({"verdict": results["verdict"], **figures})
        log_table(run, "results", *table)
        for page in pages:
            # Our own pages: model output in them is escaped.
            run.log({page.stem: wandb.Html(str(page), inject=False)})
