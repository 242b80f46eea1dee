# SPDX-License-Identifier: Apache-2.0
"""Resuming: what is saved, where the same command continues, and interruption of a run."""

import json
import math
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from packaging.version import Version
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..reporting import say
from .checkpoints import checkpoints, delete_old, discard_later, last_complete_checkpoint, mark_complete
from .files import lock_folder
from .record import check_same_settings, recorded_settings, write_record
from .wandb_run import continue_wandb_run


# Saved with a checkpoint: metrics since the last log, and TRL's token count.
SINCE_LAST_LOG_FILE = "since_last_log.json"
# Earlier versions hide the sum of losses, so that the first log after an interruption averages fewer steps.
HAS_LOSS = Version(transformers.__version__) >= Version("5.3.0")
EXIT_TERMINATED = 143  # 128 + SIGTERM, as for a process ended by it


@contextmanager
def only_run_in(output_dir: str) -> Iterator[None]:
    """Context that only one run can enter with this folder; the first process of a run holds the [`lock`] for all."""
    with ExitStack() as stack:
        if PartialState().is_main_process:
            try:
                stack.callback(lock_folder(Path(output_dir), "`output_dir`").release)
            except OSError as error:
                raise OSError(f"Cannot write to `output_dir` {output_dir!r}: {error}") from error
        yield


class Interruptions(TrainerCallback):
    """
    Marks checkpoints as complete, and deletes those beyond `save_total_limit` only then; after SIGTERM (`terminated`),
    saves a checkpoint and stops, on all processes after the same step; and stops a run whose gradients or loss are NaN
    or infinite with `FloatingPointError`, before it is saved.
    """

    def __init__(self, trainer: Any) -> None:
        self.terminated = self._asked = False
        self._trainer, self._accelerator = trainer, trainer.accelerator
        self._save_total_limit = trainer.args.save_total_limit

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Context in which SIGTERM requests a checkpoint and a stop, instead of terminating the process."""
        former = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, former)
            self._trainer.args.save_total_limit = self._save_total_limit

    def _ask(self, signum: int, frame: Any) -> None:
        if not self._asked and self._accelerator.is_local_main_process:
            # Not with `say`: the signal may have interrupted a write of it.
            os.write(2, b"Received SIGTERM: finishing this step, saving a checkpoint, then exiting.\n")
        self._asked = True

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **rest: Any) -> None:
        if args.should_save:
            discard_later(args.output_dir, state.global_step)
        since = Path(args.resume_from_checkpoint or "") / SINCE_LAST_LOG_FILE
        if args.resume_from_checkpoint is not None and since.is_file():
            gathered = json.loads(since.read_text(encoding="utf-8"))
            for key, values in gathered["metrics"].items():
                self._trainer._metrics["train"][key].extend(values)
            self._trainer._total_train_tokens = gathered["tokens"]
            if HAS_LOSS:
                self._trainer._tr_loss += gathered["loss"]
                self._trainer._globalstep_last_logged = gathered["last_log"]
        if state.global_step >= state.max_steps:
            # Killed between the last checkpoint and the end. transformers would take one more step.
            self._trainer.get_batch_samples = lambda *args, **kwargs: ([], None)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: torch.nn.Module, **rest: Any
    ) -> None:
        """Weights are still valid here. (DeepSpeed does not expose its gradients: see `on_log` and `on_save`.)"""
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            self._stop(args, state.global_step + 1, "the gradients are")

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, Any], **rest: Any) -> None:
        for key in ("loss", "grad_norm"):
            if key in logs and not math.isfinite(float(logs[key])):
                self._stop(args, state.global_step, f"`{key}` is")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **rest: Any) -> None:
        # transformers would delete checkpoints before the last one is marked. (Trackers have read the settings by
        # now.)
        args.save_total_limit = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        # A signal may reach processes at different steps.
        asked = torch.tensor(float(self._asked), device=self._accelerator.device)
        if self._accelerator.reduce(asked, reduction="sum") > 0 and state.global_step < state.max_steps:
            self.terminated = control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **rest: Any) -> None:
        loss = self._accelerator.reduce(self._trainer._tr_loss, reduction="mean").item() if HAS_LOSS else 0.0
        if not math.isfinite(loss):  # of a step after the last log
            self._stop(args, state.global_step, "the loss is")
        self._accelerator.wait_for_everyone()
        if args.should_save:
            folder = checkpoints(args.output_dir)[state.global_step]
            gathered = {"metrics": self._trainer._metrics["train"], "tokens": self._trainer._total_train_tokens}
            gathered |= {"loss": loss, "last_log": self._trainer._globalstep_last_logged}
            (folder / SINCE_LAST_LOG_FILE).write_text(json.dumps(gathered), encoding="utf-8")
            mark_complete(folder, state.global_step, args.world_size)
            delete_old(args.output_dir, state.global_step, self._save_total_limit, state.best_model_checkpoint)

    def _stop(self, args: TrainingArguments, step: int, what: str) -> None:
        checkpoint = last_complete_checkpoint(args.output_dir)
        kept = "No earlier checkpoint exists" if checkpoint is None else f"The last good checkpoint is {checkpoint}"
        raise FloatingPointError(
            f"Training was stopped: {what} NaN or infinite at step {step}. {kept}. Lower `learning_rate` or "
            "`max_grad_norm`, or use a wider dtype. (A run with other settings needs its own `output_dir`; set "
            "`resume_from_checkpoint` to start from an existing checkpoint.)"
        )


def find_checkpoint(args: TrainingArguments, record: Mapping[str, Any]) -> None:
    """
    Sets `resume_from_checkpoint` to the last complete checkpoint of `output_dir`, if there is one. An explicit
    `resume_from_checkpoint` takes precedence, unless the run in `output_dir` was already started from it.
    """
    checkpoint = None
    if PartialState().is_main_process:
        given = args.resume_from_checkpoint
        # The starting point of the run there.
        if given is None or given == recorded_settings(args.output_dir).get("resume_from_checkpoint"):
            checkpoint = last_complete_checkpoint(args.output_dir)
    (checkpoint,) = broadcast_object_list([checkpoint])
    if checkpoint is not None:
        check_same_settings(args.output_dir, record)
        args.resume_from_checkpoint = str(checkpoint)
    elif args.resume_from_checkpoint is not None and not Path(args.resume_from_checkpoint).is_dir():
        raise ValueError(f"The folder {args.resume_from_checkpoint!r} of `resume_from_checkpoint` does not exist.")


def train_and_save(trainer: Trainer, interruptions: Interruptions, record: Mapping[str, Any]) -> None:
    """Trains, from `resume_from_checkpoint` if set, and saves to `output_dir`, unless `terminated`."""
    args = trainer.args
    if trainer.accelerator.is_main_process:
        write_record(args.output_dir, record)
        if "wandb" in args.report_to:
            continue_wandb_run(args.output_dir, anew=args.resume_from_checkpoint is None)
    args.logging_nan_inf_filter = False  # it would hide NaN and infinity
    with interruptions.listening():
        trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
        if not interruptions.terminated:
            trainer.save_model(args.output_dir)
    if interruptions.terminated and trainer.accelerator.is_main_process:
        say(f"Terminated at step {trainer.state.global_step}. Run the same command again to resume from there.")


def end_run(trainer: Trainer, terminated: bool) -> None:
    """Closes the trackers and the process group, and exits the process with code 143 if SIGTERM has stopped it."""
    # Earlier versions have no such method, and do not need it.
    if Version(transformers.__version__) >= Version("5.18.0"):
        trainer.end()
    if terminated:
        sys.exit(EXIT_TERMINATED)
