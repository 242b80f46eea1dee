# SPDX-License-Identifier: Apache-2.0
"""W&B: login, and the run that is resumed."""

import os
import secrets
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from .files import replace_text


WANDB_ID_FILE = "wandb_run_id"


def check_wandb_login(training_args: TrainingArguments) -> None:
    """
    Raises `ValueError` if the run is to go to W&B, and nobody is logged in there. (W&B would say so when the model is
    loaded.) At a terminal, W&B asks for the key now.
    """
    if "wandb" not in training_args.report_to:
        return
    reason = None
    if PartialState().is_main_process:
        # Before: W&B reads the environment once.
        continue_wandb_run(training_args.output_dir, anew=training_args.resume_from_checkpoint is None)
        import wandb

        if wandb.setup().settings.mode not in ("offline", "disabled"):
            try:
                wandb.login(verify=False)
            except wandb.Error as error:
                reason = str(error)
    (reason,) = broadcast_object_list([reason])
    if reason is not None:
        raise ValueError(
            f"`report_to: wandb` needs an account, and W&B says: {reason} Without one, set WANDB_MODE=offline, which "
            "keeps the run on this machine (`wandb sync` uploads it later), or `report_to: none`."
        )


def continue_wandb_run(output_dir: str, anew: bool) -> None:
    """Lets W&B go on with the run that is named in the output folder, or (`anew`) names one there."""
    path = Path(output_dir) / WANDB_ID_FILE
    if anew or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", output_dir)
