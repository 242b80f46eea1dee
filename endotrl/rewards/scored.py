# SPDX-License-Identifier: Apache-2.0
"""Scored completions: notebook display, table, and heat map rows."""

import math
from collections.abc import Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch
from markupsafe import Markup
from torch import Tensor

from ..data.formats import message_text
from ..rendering.images import load_picture, place_images
from ..rendering.messages import Prompt
from ..reporting import HeatMapRow, figure, heat_maps, notebook_cell, number, plain, table
from ..scoring.token_stats import TokenStats
from .corrections import length_shares


if TYPE_CHECKING:
    from .endogenous import EndogenousReward


SHOWN = 50  # heat maps in a notebook: more would make its file large
MAX_PIXELS = 320  # longer side of a picture on the page


class ScoredCompletions(list[TokenStats]):
    """
    Result of [`EndogenousReward.score`]: a list of [`TokenStats`], with the reward that scored them, their prompts and
    images. A notebook shows it as a table, with the best answer to each prompt first, and as heat maps of token
    contributions.

    Example:
    ```python
    >>> import pandas
    >>> from endotrl import EndogenousReward

    >>> scored = EndogenousReward("quickstart").score(["The capital of France is"] * 2, [" Paris.", " Rome."])
    >>> best_first = pandas.DataFrame(scored.to_dict()).sort_values("reward", ascending=False)
    >>> tokens = pandas.DataFrame(scored[0].to_dict())
    ```
    """

    def __init__(
        self,
        stats: Sequence[TokenStats],
        reward: "EndogenousReward",
        prompts: Sequence[Prompt],
        images: Sequence[Sequence[Any] | None] | None = None,
    ) -> None:
        super().__init__(stats)
        self.reward = reward
        self.prompts = [message_text(prompt) for prompt in prompts]
        self._asked = list(zip(prompts, images or [None] * len(prompts), strict=True))

    @property
    def completions(self) -> list[str]:
        """Text of each completion, without the end-of-sequence token."""
        texts = [(stats.text or "", stats.offsets or [(0, 0)], stats.finished) for stats in self]
        return [text[: offsets[-1][0]] if finished else text for text, offsets, finished in texts]

    @property
    def rewards(self) -> list[float | None]:
        """Reward of each completion, without [`LengthControl`], which needs groups; `None` if it has none."""
        return [self.reward.rule.outcome(stats) for stats in self]

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns with one entry per completion, for `pandas.DataFrame(scored.to_dict())`."""
        return {
            "prompt": self.prompts,
            "completion": self.completions,
            "reward": self.rewards,
            "num_tokens": [len(stats.token_ids) for stats in self],
            "log_prob_per_token": [stats.log_probs.mean().item() for stats in self],
            "finished": [stats.finished for stats in self],
        }

    def __repr__(self) -> str:
        rows = zip(self.rewards, self.completions, strict=True)
        return "\n".join(f"{number(reward):>10}  {plain(completion, newline='↵')}" for reward, completion in rows)

    def _repr_html_(self) -> str:
        """Table of completions, the best one to each prompt first, with its lead over the others, then heat maps."""
        rewards, completions, places = self.rewards, self.completions, list(dict.fromkeys(self.prompts))
        order = [math.inf if reward is None else -reward for reward in rewards]
        shown = sorted(range(len(self)), key=lambda i: (places.index(self.prompts[i]), order[i]))[:SHOWN]
        best: dict[str, float | None] = {}  # reward by prompt, of its first row
        lines, rows = [], []
        for i in shown:
            prompt, images = ("", None) if self.prompts[i] in best else self._asked[i]
            reward, first = rewards[i], best.setdefault(self.prompts[i], rewards[i])
            behind = None if reward is None or first is None else reward - first
            lines.append([message_text(prompt), completions[i], reward, behind, len(self[i].token_ids)])
            rows.append(heat_map_row(self.reward, self[i], prompt, images=images))
        caption = f"{SHOWN} of {len(self)} completions; all are in `.to_dict()`." if len(self) > SHOWN else ""
        headers = ["prompt", "completion", "reward, nats", "to the best", "tokens"]
        return notebook_cell(table(headers, lines, caption) + heat_maps(rows))


def heat_map_row(
    reward: "EndogenousReward",
    stats: TokenStats,
    prompt: Prompt = "",
    meta: str = "",
    length_slope: float = 0.0,
    images: Sequence[Any] | None = None,
) -> HeatMapRow:
    """
    Heat map row of a completion: its contributions to the reward ([`RewardRule.contributions`]), with token rewards
    and their terms, and the images of its prompt. `length_slope` is the slope that [`LengthControl`] removes.
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
        names = "V of the prompt", "V of the state where it was cut off"
        rest = {name: value for name, value in zip(names, contributions[1:], strict=True) if value}
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
    """Columns of a heat map per token, by name."""
    if not stats.has_logits:  # then Bellman rewards of tokens are undefined, too
        return {"log-prob": stats.log_probs}
    return {
        "token reward": token_rewards,
        "log-prob": stats.log_probs,
        "soft value": stats.soft_values[:-1],
        **({} if stats.entropies is None else {"entropy": stats.entropies}),
    }


def pictures_of(prompt: Any, images: Sequence[Any] | None = None) -> Markup:
    """Images of a prompt, including those of its columns: see [`~endotrl.rendering.images.place_images`]."""
    shown = enumerate(thumbnails(prompt, images), start=1)
    return Markup("").join(figure(png, alt=f"Image {i} of the prompt") for i, png in shown)


def thumbnails(prompt: Any, images: Sequence[Any] | None = None) -> list[bytes]:
    """Images of a prompt as small PNG files."""
    shown = []
    for picture in place_images(0, prompt, images)[1]:
        image = load_picture(0, picture).convert("RGB")
        image.thumbnail((MAX_PIXELS, MAX_PIXELS))
        buffer = BytesIO()
        image.save(buffer, format="png")
        shown.append(buffer.getvalue())
    return shown
