# SPDX-License-Identifier: Apache-2.0
"""Settings of TRL that would undo what the trainers of this package add to it."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset, IterableDataset
from trl import GRPOConfig

from ..rewards.endogenous import EndogenousReward
from ..rewards.protocol import DenseReward


def check_token_credit(args: GRPOConfig, alternative: str = "") -> None:
    """Raises `ValueError` for settings of TRL's loss under which tokens cannot have advantages of their own."""
    if args.importance_sampling_level == "sequence":
        raise ValueError(
            "`importance_sampling_level='sequence'` puts one importance ratio before all tokens of a completion, so "
            "that each of them gets the same gradient, and their own advantages are lost. Use "
            f"`importance_sampling_level='token'`{alternative}."
        )
    if args.off_policy_mask_threshold is not None:
        raise ValueError(
            f"`off_policy_mask_threshold` is {args.off_policy_mask_threshold}, but it drops whole completions with a "
            "negative advantage. Where tokens have advantages of their own, it would drop the tokens with a negative "
            "one and keep the others, which only raises their probability. Use "
            f"`off_policy_mask_threshold=None`{alternative}."
        )


def check_token_rewards(reward_funcs: Sequence[Any]) -> bool:
    """
    Whether any of the reward functions is a [`DenseReward`]. Plain functions show it only when they are called.

    Raises:
        `ValueError`: If one of them cannot be credited to tokens.
    """
    for reward in reward_funcs:
        if isinstance(reward, EndogenousReward):
            reward.check_token_credit()
    return any(isinstance(reward, DenseReward) for reward in reward_funcs)


def check_prompts(name: str, dataset: Any) -> None:
    """Raises `ValueError` for a dataset of token ids in the place of prompts, as those of TRL's own PPO."""
    if isinstance(dataset, dict):
        for part in dataset.values():
            check_prompts(name, part)
    elif isinstance(dataset, Dataset | IterableDataset):
        columns = dataset.column_names or []  # unknown of some streams
        if "input_ids" in columns and "prompt" not in columns:
            raise ValueError(
                f"`{name}` has a column `input_ids` and none called `prompt`: it is tokenized. This trainer renders "
                "and tokenizes prompts itself; pass them as text or as messages, in a column `prompt`."
            )
