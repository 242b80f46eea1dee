# SPDX-License-Identifier: Apache-2.0
"""W&B: login, the run that is resumed, alerts, and what is written at the end of a run."""

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
    """Raises `ValueError` if the run is to go to W&B and nobody is logged in; at a terminal, W&B asks now."""
    if "wandb" in training_args.report_to and PartialState().is_main_process:
        # Before: W&B reads the environment once.
        continue_wandb_run(training_args.output_dir, anew=training_args.resume_from_checkpoint is None)
        _log_in("`report_to: wandb`")


def check_wandb(project: str | None) -> None:
    """Raises `ImportError` or `ValueError` if `--wandb` needs a package, or nobody is logged in there."""
    if project is not None and PartialState().is_main_process:
        if find_spec("wandb") is None:
            raise ImportError("--wandb needs wandb, which is not installed: pip install 'endotrl[wandb]'.")
        _log_in("--wandb")


def _log_in(what: str) -> None:
    import wandb

    if wandb.setup().settings.mode not in ("offline", "disabled"):
        try:
            wandb.login(verify=False)
        except wandb.Error as error:
            raise ValueError(
                f"{what} needs an account, and W&B says: {error} Without one, set WANDB_MODE=offline (`wandb sync` "
                "uploads the run later)."
            ) from error


def continue_wandb_run(output_dir: str, anew: bool) -> None:
    """Lets W&B go on with the run that is named in the output folder, or (`anew`) names one there."""
    path = Path(output_dir) / WANDB_ID_FILE
    if anew or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", output_dir)


def active_run() -> Any:
    """The run that this process has at W&B, or `None`. W&B is not imported for it."""
    module = sys.modules.get("wandb")
    return None if module is None else module.run


def log_table(run: Any, name: str, headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table of a run."""
    import wandb

    cells = [[cell if cell is None or is_number(cell) else str(cell) for cell in row] for row in rows]
    run.log({name: wandb.Table(columns=list(headers), data=cells)})


def log_evaluation(
    project: str, results: Mapping[str, Any], table: tuple[list[str], list[list[object]]], pages: Sequence[Path]
) -> None:
    """An evaluation as a run of W&B: settings, verdict and main metrics in the summary, table, pages."""
    import wandb

    config = {key: results[key] for key in ("benchmark", "model", "model_version", "data", "settings", "versions")}
    name, main = f"{results['benchmark']} {Path(results['model']).name}", results["main_metric"]
    figures = {f"{scorer}/{main}": metrics[main]["value"] for scorer, metrics in results["metrics"].items()}
    with wandb.init(project=project, job_type="eval", name=name, config=config) as run:
        run.summary.update({"verdict": results["verdict"], **figures})
        log_table(run, "results", *table)
        for page in pages:
            # Of ours: what models wrote is escaped in it.
            run.log({page.stem: wandb.Html(str(page), inject=False)})
