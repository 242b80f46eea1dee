# SPDX-License-Identifier: Apache-2.0
"""What trackers show of a recipe besides the trainer's own metrics: speed, memory, what it was made of."""

import resource
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import RewardTrainer


GIB = 2**30


class Tracking(TrainerCallback):
    """
    Adds to what is logged: `perf/tokens_per_second` (tokens of prompts and completions of all processes that were trained on,
    per second of wall clock), `perf/seconds_per_step` and `perf/memory_gib` (peak of this process: on an accelerator what
    torch allocated, on a CPU its resident memory). With W&B, the run's config gets what it was made of.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer, one of TRL's.
        record (`dict[str, Any]`):
            What the run is made of: see [`make_record`].
    """

    def __init__(self, trainer: Trainer, record: Mapping[str, Any]) -> None:
        self._trainer = trainer
        self._record = record
        self._recorded_config = False
        self._since: tuple[float, float, int] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = (time.perf_counter(), self._tokens(state), state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "loss" not in logs:  # of an evaluation, or of the whole run
            return
        if self._since is not None and state.global_step > self._since[2]:
            started, tokens, step = self._since
            seconds = time.perf_counter() - started
            logs["perf/tokens_per_second"] = (self._tokens(state) - tokens) / seconds
            logs["perf/seconds_per_step"] = seconds / (state.global_step - step)
            self._since = (time.perf_counter(), self._tokens(state), state.global_step)
        logs["perf/memory_gib"] = peak_memory(args.device) / GIB
        if "wandb" in args.report_to and state.is_world_process_zero and not self._recorded_config:
            import wandb

            if wandb.run is not None:
                wandb.config.update({"recipe": dict(self._record)}, allow_val_change=True)
                self._recorded_config = True

    def _tokens(self, state: TrainerState) -> float:
        # TRL's reward trainer counts for itself.
        trainer: Any = self._trainer
        return trainer._total_train_tokens if isinstance(trainer, RewardTrainer) else state.num_input_tokens_seen


def peak_memory(device: torch.device) -> int:
    """Bytes: on an accelerator the most that torch had allocated, on a CPU the most that the process had resident."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
