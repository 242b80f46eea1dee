# SPDX-License-Identifier: Apache-2.0
"""What trackers show of a recipe besides the trainer's own metrics: speed, memory, token rewards, what it was made of."""

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from markupsafe import Markup
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..reporting import ColorScale, legend, page, token_heat_map
from ..rewards import EndogenousReward
from ..score_file.rows import message_text
from ..scoring.messages import Prompt
from ..scoring.token_stats import TokenStats
from ..trainers.dense_reward_trainer import DenseRewardTrainer


HEAT_MAP_TITLE = "Token rewards of completions"
GIB = 2**30


class Tracking(TrainerCallback):
    """
    Adds to what is logged: `perf/tokens_per_second` (tokens of prompts and completions of all processes that were trained on,
    per second of wall clock), `perf/seconds_per_step` and `perf/memory_gib` (peak of this process: on an accelerator what
    torch allocated, on a CPU its resident memory). Every `heat_map_steps` steps it scores a few of the last completions
    again, and writes them with their token rewards as heat maps to `output_dir/completions/token_rewards_<step>.html` and,
    with W&B, to the table `token_rewards`. With W&B, the run's config gets what it was made of.

    Args:
        trainer ([`DenseGRPOTrainer`] or [`PPOTrainer`]):
            The trainer.
        record (`dict[str, Any]`, *optional*):
            What the run is made of: see [`make_record`].
        heat_map_steps (`int`, *optional*, defaults to `0`):
            Steps from one heat map to the next; 0 for none.
        num_completions (`int`, *optional*, defaults to `4`):
            Completions of a heat map.
    """

    def __init__(
        self,
        trainer: DenseRewardTrainer,
        record: Mapping[str, Any] | None = None,
        heat_map_steps: int = 0,
        num_completions: int = 4,
    ) -> None:
        self._trainer = trainer
        self._record = record
        self._heat_map_steps, self._num_completions = heat_map_steps, num_completions
        self._reward = next((r for r in trainer.reward_funcs if isinstance(r, EndogenousReward)), None)
        self._recorded_config = False
        self._since: tuple[float, float, int] | None = None
        self._last_heat_map = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._since = (time.perf_counter(), state.num_input_tokens_seen, state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if "reward" not in logs:
            return
        if self._since is not None and state.global_step > self._since[2]:
            started, tokens, step = self._since
            seconds = time.perf_counter() - started
            logs["perf/tokens_per_second"] = (state.num_input_tokens_seen - tokens) / seconds
            logs["perf/seconds_per_step"] = seconds / (state.global_step - step)
            self._since = (time.perf_counter(), state.num_input_tokens_seen, state.global_step)
        logs["perf/memory_gib"] = peak_memory(args.device) / GIB
        if "wandb" in args.report_to and state.is_world_process_zero and not self._recorded_config:
            import wandb

            if wandb.run is not None:
                wandb.config.update({"recipe": dict(self._record or {})}, allow_val_change=True)
                self._recorded_config = True
        due = self._heat_map_steps and state.global_step >= max(0, self._last_heat_map) + self._heat_map_steps
        if self._reward is not None and not isinstance(self._reward.criterion, dict) and due:
            self._last_heat_map = state.global_step
            self._log_heat_maps(self._reward, args, state)

    def _log_heat_maps(self, reward: EndogenousReward, args: TrainingArguments, state: TrainerState) -> None:
        prompts, completions, completion_ids = self._trainer.last_completions
        # Of different prompts: completions of one stand together.
        spread = slice(None, None, max(1, len(prompts) // self._num_completions))
        prompts, completions, completion_ids = (
            prompts[spread][: self._num_completions],
            completions[spread][: self._num_completions],
            completion_ids[spread][: self._num_completions],
        )
        # On all processes, as frozen weights may be split over them.
        stats = reward.score(prompts, completions, completion_ids)
        if not state.is_world_process_zero:
            return
        title = f"{HEAT_MAP_TITLE}, step {state.global_step}"
        path = Path(args.output_dir) / "completions" / f"token_rewards_{state.global_step}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(heat_map_page(title, reward, prompts, stats), encoding="utf-8")
        if "wandb" in args.report_to:
            import wandb

            if wandb.run is not None:
                rows = [
                    [state.global_step, message_text(prompt), row.text, reward.aggregate_from(row)]
                    + [wandb.Html(heat_map_page(title, reward, [prompt], [row]), inject=False)]
                    for prompt, row in zip(prompts, stats, strict=True)
                ]
                columns: list[str | int] = ["step", "prompt", "completion", "reward", "token_rewards"]
                wandb.log({"token_rewards": wandb.Table(columns=columns, data=rows)}, commit=False)


def heat_map_page(title: str, reward: EndogenousReward, prompts: list[Prompt], stats: list[TokenStats]) -> str:
    """
    A page of completions with every token in the colour of its reward. Text of prompts and completions is escaped.

    Args:
        title (`str`):
            Title of the page.
        reward ([`EndogenousReward`]):
            The reward.
        prompts (`list[str]` or `list[list[dict]]`):
            Prompts.
        stats (`list[TokenStats]`):
            What [`EndogenousReward.score`] says about the completions.

    Returns:
        `str`: HTML.
    """
    rewards = [reward.token_rewards_from(row)[row.positions] for row in stats]
    # The end of a finished answer gets the whole of f(s_H, a_H), as V of the end is 0: it would set the scale alone.
    inner = [row[:-1] if one.finished else row for row, one in zip(rewards, stats, strict=True)]
    scale = ColorScale.of(row.tolist() for row in inner)
    maps = [
        token_heat_map(
            row.text or "",
            row.offsets or [],
            row_rewards.tolist(),
            scale,
            log_probs=row.log_probs.tolist(),
            soft_values=row.soft_values.tolist(),
            entropies=None if row.entropies is None else row.entropies.tolist(),
            eos=row.finished,
            prompt=message_text(prompt),
            meta=f"reward {reward.aggregate_from(row)}",
        )
        for prompt, row, row_rewards in zip(prompts, stats, rewards, strict=True)
    ]
    return page(title, [("", Markup("").join([legend(scale), *maps]))])


def peak_memory(device: torch.device) -> int:
    """Bytes: on an accelerator the most that torch had allocated, on a CPU the most that the process had resident."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
