# SPDX-License-Identifier: Apache-2.0
"""A scored completion as a row of a heat map: what each token contributes to its reward."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup
from torch import Tensor

from ..data.formats import message_text
from ..rendering.messages import Prompt
from ..reporting import HeatMapRow
from ..scoring.token_stats import TokenStats
from .corrections import length_shares
from .prompt_images import pictures_of


if TYPE_CHECKING:
    from .endogenous import EndogenousReward


def heat_map_row(
    reward: "EndogenousReward",
    stats: TokenStats,
    prompt: Prompt = "",
    meta: str = "",
    length_slope: float = 0.0,
    images: Sequence[Any] | None = None,
) -> HeatMapRow:
    """
    A completion in the colours of its contributions to the reward ([`RewardRule.contributions`]), with the
    token rewards and what they are made of as further numbers, above the images that its prompt and its columns have.
    `length_slope` is the slope on log length that [`LengthControl`] takes out.
    """
    contributions, total = reward.rule.contributions(stats), reward.rule.outcome(stats)
    token_rewards = reward.rule.token_rewards(stats)
    rest = {}
    if contributions is None or total is None:
        tokens = torch.full_like(token_rewards, torch.nan)
    else:
        num_tokens = len(stats.token_ids)
        tokens = contributions.tokens + length_shares(num_tokens, length_slope).double()
        total -= length_slope * math.log(num_tokens)
        if contributions.prompt:
            rest["V of the prompt"] = contributions.prompt
        if contributions.cut_off:
            rest["V of the state where it was cut off"] = contributions.cut_off
    return HeatMapRow(
        text=stats.text or "",
        offsets=stats.offsets or [],
        contributions=tokens.tolist(),
        total=total,
        rest=rest,
        columns={name: values.tolist() for name, values in columns_of(stats, token_rewards).items()},
        eos=stats.finished,
        prompt=message_text(prompt),
        meta=meta,
        details=pictures_of(prompt, images) if reward.images == "read" else Markup(""),
    )


def columns_of(stats: TokenStats, token_rewards: Tensor) -> dict[str, Tensor]:
    """What a heat map tells of each token, by name."""
    if not stats.has_logits:  # so that Bellman rewards of tokens are none, either
        return {"log-prob": stats.log_probs}
    return {
        "token reward": token_rewards,
        "log-prob": stats.log_probs,
        "soft value": stats.soft_values[:-1],
        **({} if stats.entropies is None else {"entropy": stats.entropies}),
    }
