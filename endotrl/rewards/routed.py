# SPDX-License-Identifier: Apache-2.0
"""Routing of rows to rewards by a dataset column: one frozen model per domain."""

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from .frozen_model_reward import FrozenModelReward


class RoutedReward:
    """
    Gives each completion the reward selected by its row of the dataset, such as that of a frozen model for its domain:
    `RoutedReward({"math": math_reward, "code": code_reward}, column="domain")`. The rewards are reward functions with
    distinct names, including asynchronous ones, and run concurrently: needs TRL 1.14 or newer, and GRPO or RLOO.
    """

    def __init__(self, rewards: Mapping[str, Any], column: str = "domain", name: str = "routed_reward") -> None:
        names = [getattr(reward, "__name__", repr(reward)) for reward in rewards.values()]
        if not rewards or len(set(names)) < len(names):
            raise ValueError(f"`rewards` must contain rewards with distinct names, got {names}.")
        self.rewards, self.column = dict(rewards), column
        self.__name__ = name

    def bind(self, trainer: Any) -> Self:
        """Binds the rewards that use frozen models: see [`EndogenousReward.bind`]."""
        for reward in self.rewards.values():
            if isinstance(reward, FrozenModelReward):
                reward.bind(trainer)
        return self

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """One reward per completion. `ValueError` if the column is missing, or a value of it has no reward."""
        routes: Sequence[Any] = kwargs.get(self.column) or []
        unknown = sorted(map(repr, set(routes or [None]) - set(self.rewards)))
        if unknown:
            raise ValueError(
                f"The column {self.column!r} of the dataset must name the reward of each row, one of "
                f"{sorted(self.rewards)}, but it {'also contains ' + ', '.join(unknown) if routes else 'is missing'}."
            )
        # Extra columns must be whole, so that `log_extra` is not passed on.
        batch = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **kwargs}
        columns = [key for key, value in batch.items() if isinstance(value, list) and len(value) == len(prompts)]
        scored: dict[int, float | None] = {}

        async def score(route: str) -> None:
            rows = [i for i, other in enumerate(routes) if other == route]
            theirs = {**batch, **{key: [batch[key][i] for i in rows] for key in columns}}
            reward = self.rewards[route]
            if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
                values = await reward(**theirs)
            else:
                values = await asyncio.to_thread(lambda: reward(**theirs))
            scored.update(zip(rows, values, strict=True))

        await asyncio.gather(*(score(route) for route in dict.fromkeys(routes)))
        return [scored[i] for i in range(len(prompts))]
