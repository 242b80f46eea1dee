# SPDX-License-Identifier: Apache-2.0
"""Trainer callbacks of a recipe: tracking, heat maps, collapse monitor."""

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..monitoring import CollapseMonitor
from ..reporting import heat_maps, page
from ..rewards import EndogenousReward
from ..rewards.scored import heat_map_row
from ..runs.callback_order import add_in_order
from ..runs.resumption import Interruptions
from ..runs.wandb_run import active_run
from ..trainers.dense_reward_trainer import DenseRewardTrainer


# Metrics for which W&B keeps the maximum, besides the last value.
MAXIMA = ["train/rewards/*", "eval/rewards/*", "eval/accuracy", "train/collapse/held_out/*", "train/collapse/alarm"]
MAXIMA += ["train/collapse/evidence", "train/kl", "train/perf/memory_gib"]


def add_callbacks(
    trainer: Any, record: Mapping[str, Any], heat_map_steps: int = 0, monitor: CollapseMonitor | None = None
) -> Interruptions:
    """Adds a recipe's callbacks, with the `record` of [`make_record`], to a trainer; returns the first of them."""
    interruptions = Interruptions(trainer)
    add_in_order(trainer, interruptions, Tracking(record))
    if heat_map_steps:
        add_in_order(trainer, HeatMaps(trainer, heat_map_steps))
    if monitor is not None:
        monitor.attach(trainer)
    return interruptions


class Tracking(TrainerCallback):
    """
    Adds to the logs: `perf/tokens_per_second` (of trained prompts and completions, over all processes),
    `perf/seconds_per_step` and `perf/memory_gib` ([`peak_memory`]). With W&B, the run's config gets the `record`.
    """

    def __init__(self, record: Mapping[str, Any]) -> None:
        self._record, self._is_recorded = record, False
        self._since: tuple[float, float, int] | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **rest: Any) -> None:
        logged = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        self._since = (time.perf_counter(), logged[-1] if logged else 0, state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, Any], **rest: Any) -> None:
        if "loss" not in logs:  # logs of an evaluation, or of the whole run
            return
        if self._since is not None and state.global_step > self._since[2] and "num_tokens" in logs:
            now = (time.perf_counter(), logs["num_tokens"], state.global_step)
            seconds, tokens, steps = (new - old for new, old in zip(now, self._since, strict=True))
            logs["perf/tokens_per_second"], logs["perf/seconds_per_step"] = tokens / seconds, seconds / steps
            self._since = now
        logs["perf/memory_gib"] = peak_memory(args.device) / 2**30
        run = active_run() if "wandb" in args.report_to and state.is_world_process_zero else None
        if run is not None and not self._is_recorded:
            run.config.update({"recipe": dict(self._record)}, allow_val_change=True)
            for name in MAXIMA:  # the x-axis is that of transformers
                run.define_metric(name, step_metric="train/global_step", summary="last,max")
            self._is_recorded = True


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on an accelerator allocated by torch, on a CPU the resident set size of the process."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class HeatMaps(TrainerCallback):
    """
    Every few steps, scores four of the last completions again, and writes them as heat maps to
    `output_dir/completions/token_rewards_<step>.html` and, with W&B, to the table `token_rewards`.
    """

    def __init__(self, trainer: DenseRewardTrainer, every: int) -> None:
        self._trainer, self._every, self._last = trainer, every, 0
        self._reward = next((r for r in trainer.reward_funcs if isinstance(r, EndogenousReward)), None)

    def on_log(self, args: TrainingArguments, state: TrainerState, *_: Any, logs: dict[str, Any], **rest: Any) -> None:
        reward, due = self._reward, "reward" in logs and state.global_step >= self._last + self._every
        if not due or reward is None or isinstance(reward.criterion, dict):
            return
        self._last = state.global_step
        prompts, completions, completion_ids = self._trainer.last_completions
        every = max(1, len(prompts) // 4)  # of different prompts: completions of one prompt are adjacent
        shown = slice(None, 4 * every, every)
        # On all processes, as frozen weights may be sharded over them.
        stats = reward.score(prompts[shown], completions[shown], completion_ids[shown])
        if not state.is_world_process_zero:
            return
        slope = reward.length_slope  # of the last batch, as the completions are
        pairs = zip(prompts[shown], stats, strict=True)
        rows = [heat_map_row(reward, row, prompt, length_slope=slope) for prompt, row in pairs]
        path = Path(args.output_dir) / "completions" / f"token_rewards_{state.global_step}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"Token rewards of completions, step {state.global_step}"
        path.write_text(page(title, [("", heat_maps(rows))]), encoding="utf-8")
        if "wandb" in args.report_to and (run := active_run()) is not None:
            import wandb

            table = wandb.Table(columns=["step", "prompt", "completion", "reward", "token_rewards"])
            for row in rows:
                html = wandb.Html(page(title, [("", heat_maps([row]))]), inject=False)
                table.add_data(state.global_step, row.prompt, row.text, row.total, html)
            run.log({"token_rewards": table}, commit=False)
