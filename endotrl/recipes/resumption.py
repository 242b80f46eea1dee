# SPDX-License-Identifier: Apache-2.0
"""Interrupted runs: what is saved, where the same command goes on, and what stops a run."""

import errno
import json
import math
import os
import re
import secrets
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from packaging.version import Version
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..reporting import say
from .record import check_same_settings, write_record


logger = get_logger(__name__)

# Written into a checkpoint after everything else.
COMPLETE_FILE = "complete.json"
WANDB_ID_FILE = "wandb_run_id"
FULL_DISK_BYTES = 2**20
EXIT_TERMINATED = 143  # 128 and SIGTERM, as of a process that it has ended


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """
    The last checkpoint of a recipe that was written to its end.

    Args:
        output_dir (`str`):
            Folder of the run.

    Returns:
        `Path`, *optional*: `None` if there is none. Later checkpoints that were cut off while they were written are named
        in a warning.
    """
    checkpoints = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    for step in sorted(checkpoints, reverse=True):
        if (checkpoints[step] / COMPLETE_FILE).is_file():
            return checkpoints[step]
        logger.warning(f"{checkpoints[step]} was cut off while it was written, and is skipped.")
    return None


class Interruptions(TrainerCallback):
    """
    Marks checkpoints that were written to their end; saves one and stops after SIGTERM, on all processes after the same step;
    and stops a run whose gradients or loss are NaN or infinite, before it is saved.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.

    Attributes:
        terminated (`bool`):
            Whether SIGTERM has stopped the run.

    Raises:
        `FloatingPointError`: In training, for NaN or infinite gradients or loss.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.terminated = False
        self._accelerator = accelerator
        self._asked = False
        self._former: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, SIGTERM asks for a checkpoint and the end, in place of the end."""
        self._former = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, self._former)

    def _ask(self, signum: int, frame: Any) -> None:
        self._asked = True

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **kwargs: Any,
    ) -> None:
        """Weights are still good here. (DeepSpeed keeps its gradients to itself: see `on_log`.)"""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            self._stop(args, state.global_step + 1, "The gradients are")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        for key in ("loss", "grad_norm"):
            if key in logs and not math.isfinite(float(logs[key])):
                self._stop(args, state.global_step, f"`{key}` is")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # A signal may reach processes at different steps.
        asked = torch.tensor(float(self._asked), device=self._accelerator.device)
        if self._accelerator.reduce(asked, reduction="sum") > 0:
            self.terminated = control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._accelerator.wait_for_everyone()
        if args.should_save:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            marker = {"step": state.global_step, "num_processes": args.world_size}
            (folder / COMPLETE_FILE).write_text(json.dumps(marker), encoding="utf-8")

    def _stop(self, args: TrainingArguments, step: int, what: str) -> None:
        checkpoint = last_complete_checkpoint(args.output_dir)
        kept = "There is no checkpoint" if checkpoint is None else f"{checkpoint} is from before, and is kept"
        raise FloatingPointError(
            f"{what} NaN or infinite at step {step}, so training was stopped before they could spoil the weights that are "
            f"saved. {kept}. Lower `learning_rate` or `max_grad_norm`, or use a wider dtype. (Other settings are another run: "
            "give it its own `output_dir`, and `resume_from_checkpoint` to start from that one.)"
        )


@contextmanager
def clear_when_disk_is_full(output_dir: str) -> Iterator[None]:
    """Turns the various errors of a full disk into one `OSError` that says so."""
    try:
        yield
    except Exception as error:  # safetensors, torch and Python each have their own
        full = "No space left" in str(error) or (isinstance(error, OSError) and error.errno == errno.ENOSPC)
        writing = isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error)
        if not full and not (writing and shutil.disk_usage(output_dir).free < FULL_DISK_BYTES):
            raise
        checkpoint = last_complete_checkpoint(output_dir)
        kept = "there is no complete checkpoint yet" if checkpoint is None else f"{checkpoint} is complete"
        raise OSError(
            errno.ENOSPC,
            f"The disk of `output_dir` is full; {kept}. Make room (`save_total_limit` keeps fewer checkpoints), and start the "
            "same command again: it goes on from there.",
            output_dir,
        ) from error


def find_checkpoint(args: TrainingArguments, record: Mapping[str, Any]) -> None:
    """
    Sets `resume_from_checkpoint` to the last complete checkpoint of `output_dir`, if there is one and it is not set.

    Raises:
        `ValueError`: If the run there was made with other settings.
    """
    if args.resume_from_checkpoint is not None:
        return
    checkpoint = last_complete_checkpoint(args.output_dir)
    if checkpoint is not None:
        check_same_settings(args.output_dir, record)
        args.resume_from_checkpoint = str(checkpoint)


def train_and_save(trainer: Trainer, record: Mapping[str, Any]) -> bool:
    """
    Trains, from `resume_from_checkpoint` if it is set, and saves to `output_dir`.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer.
        record (`dict[str, Any]`):
            What the run is made of: see [`make_record`].

    Returns:
        `bool`: whether SIGTERM has stopped it. There is a checkpoint then, and nothing in `output_dir` itself.

    Raises:
        `FloatingPointError`: For NaN or infinite gradients or loss.
        `OSError`: If the disk is full.
    """
    args = trainer.args
    if trainer.accelerator.is_main_process:
        write_record(args.output_dir, record)
        if "wandb" in args.report_to:
            continue_wandb_run(args.output_dir, anew=args.resume_from_checkpoint is None)
    args.logging_nan_inf_filter = False  # it would hide what is looked for
    interruptions = Interruptions(trainer.accelerator)
    # First, so that a run with NaN stops before they are logged.
    trainer.callback_handler.callbacks.insert(0, interruptions)
    with clear_when_disk_is_full(args.output_dir), interruptions.listening():
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if not interruptions.terminated:
            trainer.save_model(args.output_dir)
    if interruptions.terminated and trainer.accelerator.is_main_process:
        say(f"Terminated at step {trainer.state.global_step}, which is saved. The same command goes on from there.")
    return interruptions.terminated


def end(trainer: Trainer, terminated: bool) -> None:
    """Finishes the trackers and the process group, and ends the process with code 143 if SIGTERM has stopped it."""
    # There is no such method before, and no need of it.
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()
    if terminated:
        sys.exit(EXIT_TERMINATED)


def continue_wandb_run(output_dir: str, anew: bool) -> None:
    """
    Lets W&B go on with the run that is named in the output folder, or names one there.

    Args:
        output_dir (`str`):
            Folder of the run.
        anew (`bool`):
            Whether to begin another run.
    """
    path = Path(output_dir) / WANDB_ID_FILE
    if anew or not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4), encoding="utf-8")
    os.environ["WANDB_RUN_ID"] = path.read_text(encoding="utf-8").strip()
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", output_dir)
