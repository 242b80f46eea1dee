# SPDX-License-Identifier: Apache-2.0
"""Completions of a run in the colours of what their tokens contribute to the reward."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..rendering.messages import Prompt
from ..reporting import HeatMapRow, heat_maps, page
from ..rewards import EndogenousReward
from ..rewards.contributions import heat_map_row
from ..score_file.rows import message_text
from ..scoring.token_stats import TokenStats
from ..trainers.base import DenseRewardTrainer


HEAT_MAP_TITLE = "Token rewards of completions"


class HeatMaps(TrainerCallback):
    """
    Every few steps, scores some of the last completions again, and writes them as heat maps to
    `output_dir/completions/token_rewards_<step>.html` and, with W&B, to the table `token_rewards`.

    Args:
        trainer ([`DenseGRPOTrainer`] or [`PPOTrainer`]):
            The trainer.
        every (`int`):
            Steps from one heat map to the next.
        num_completions (`int`, *optional*, defaults to `4`):
            Completions of a heat map.
    """

    def __init__(self, trainer: DenseRewardTrainer, every: int, num_completions: int = 4) -> None:
        self._trainer = trainer
        self._every, self._num_completions = every, num_completions
        self._reward = next((r for r in trainer.reward_funcs if isinstance(r, EndogenousReward)), None)
        self._last = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        due = "reward" in logs and state.global_step >= self._last + self._every
        if due and self._reward is not None and not isinstance(self._reward.criterion, dict):
            self._last = state.global_step
            self._log_page(self._reward, args, state)

    def _log_page(self, reward: EndogenousReward, args: TrainingArguments, state: TrainerState) -> None:
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
                    [state.global_step, row.prompt, row.text, row.total]
                    + [wandb.Html(page(title, [("", heat_maps([row]))]), inject=False)]
                    for row in _rows(reward, prompts, stats)
                ]
                columns: list[str | int] = ["step", "prompt", "completion", "reward", "token_rewards"]
                wandb.log({"token_rewards": wandb.Table(columns=columns, data=rows)}, commit=False)


def heat_map_page(title: str, reward: EndogenousReward, prompts: list[Prompt], stats: list[TokenStats]) -> str:
    """
    A page of completions with every token in the colour of what it contributes to the reward. Text of prompts and completions is escaped.

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
    return page(title, [("", heat_maps(_rows(reward, prompts, stats)))])


def _rows(reward: EndogenousReward, prompts: list[Prompt], stats: list[TokenStats]) -> list[HeatMapRow]:
    # The completions are of the last batch, and so is the slope.
    return [
        heat_map_row(reward, row, message_text(prompt), length_slope=reward.length_slope)
        for prompt, row in zip(prompts, stats, strict=True)
    ]
