# SPDX-License-Identifier: Apache-2.0
"""Recorder of token rewards during TRL's calls of reward functions, which return one number per completion."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rewards.protocol import DenseReward, DenseScores


class RewardRecorder:
    """
    Replaces a synchronous reward function during one batch: gives TRL one number per completion, and keeps the
    token rewards of the last call in `scores` (CPU, float32; `None` if the function is not dense). A plain callable is
    dense if it returns a list of numbers (or a 1-d tensor or array) per completion; TRL then gets their sum.
    """

    def __init__(self, reward: Any, name: str, keep_token_rewards: bool = True) -> None:
        self.reward, self.name, self.keep_token_rewards = reward, name, keep_token_rewards
        self.scores: DenseScores | None = None

    def __call__(self, completion_ids: Sequence[Sequence[int]], **kwargs: Any) -> Sequence[float | None]:
        if self.keep_token_rewards and isinstance(self.reward, DenseReward):
            scores = DenseScores(*self.reward.outcome_and_token_rewards(completion_ids=completion_ids, **kwargs))
        else:
            output = list(self.reward(completion_ids=completion_ids, **kwargs))
            if not any(_is_list_of_numbers(row) for row in output):
                return output
            scores = self._sum(output)
        checked: dict[str, Any] = {
            field: self._checked(field, tensors, scores.outcomes, completion_ids)
            for field, tensors in scores._asdict().items()
            if field != "outcomes" and tensors is not None
        }
        self.scores = scores._replace(**checked) if self.keep_token_rewards else None
        return scores.outcomes

    def _sum(self, output: Sequence[Any]) -> DenseScores:
        for row, value in enumerate(output):
            if value is not None and not _is_list_of_numbers(value):
                raise TypeError(
                    f"The reward function '{self.name}' returned one number per token for some completions, but "
                    f"{value!r} for row {row}. It must return a list of numbers or `None` for each."
                )
        tokens = [torch.as_tensor([] if value is None else value, dtype=torch.float32) for value in output]
        totals = [None if v is None else t.double().sum().item() for v, t in zip(output, tokens, strict=True)]
        return DenseScores(totals, tokens)

    def _checked(
        self, field: str, tensors: Sequence[Tensor], outcomes: Sequence[float | None], completion_ids: Sequence[Any]
    ) -> list[Tensor]:
        """Raises `ValueError` unless a scored completion has one finite number per token."""
        if not len(outcomes) == len(tensors) == len(completion_ids):
            raise ValueError(
                f"The reward function '{self.name}' returned {len(outcomes)} outcomes and {len(tensors)} tensors of "
                f"{field} for {len(completion_ids)} completions. It must return one for each."
            )
        checked = []
        for row, (outcome, given, ids) in enumerate(zip(outcomes, tensors, completion_ids, strict=True)):
            tensor = torch.zeros(len(ids)) if outcome is None else given.detach().to("cpu", torch.float32)
            if tensor.shape != (len(ids),):
                raise ValueError(
                    f"The reward function '{self.name}' returned {field} of shape {tuple(tensor.shape)} for row "
                    f"{row}, but this completion has {len(ids)} tokens. Return one number for each token of "
                    f"`completion_ids[{row}]`, including EOS and what tools wrote."
                )
            for position in (~tensor.isfinite()).nonzero()[:1, 0].tolist():
                raise ValueError(
                    f"The reward function '{self.name}' returned {field} of {tensor[position].item()} for token "
                    f"{position} of row {row}. They must be finite. The reward of a whole completion may be `None`."
                )
            checked.append(tensor)
        return checked


def _is_list_of_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) or (isinstance(value, Tensor | np.ndarray) and value.ndim > 0)


@dataclass(frozen=True)
class ScoredBatch:
    """Rewards of a batch of `N` completions, `B` on this process, of up to `T` tokens, by `F` reward functions."""

    rewards_per_func: Tensor  # (N, F), NaN where a function gave `None`
    reward_weights: Tensor  # (F,)
    local: slice  # the rows of `rewards_per_func` that are this process's
    # Per dense reward function (or its state values), by its index in `F`; the same keys on every process. 0 at
    # padding, and for completions for which it gave `None`.
    token_rewards: dict[int, Tensor]  # (B, T)
    state_values: dict[int, Tensor]  # (B, T)
    # `True` where the policy wrote the token. Completions removed from the loss by `mask_truncated_completions` are
    # still in it: they count in the baselines of the others, as in TRL.
    mask: Tensor  # (B, T), bool
    completion_ids: list[list[int]]  # of this process, without padding

    @property
    def scorable(self) -> Tensor:
        """Shape `(N,)`, bool: `False` for completions for which every reward function gave `None`."""
        return ~self.rewards_per_func.isnan().all(dim=1)

    def weighted(self, tensors: dict[int, Tensor]) -> Tensor:
        """Weighted sum, of shape `(B, T)`, of `token_rewards` or `state_values`."""
        zero = torch.zeros_like(self.mask, dtype=torch.float32)
        return sum((self.reward_weights[index] * tensor for index, tensor in tensors.items()), zero)

    @property
    def weighted_outcomes(self) -> Tensor:
        """Weighted sum of the rewards that are *not* dense, shape `(B,)`; `None` counts as 0, as in TRL."""
        scalar = [i for i in range(self.rewards_per_func.shape[1]) if i not in self.token_rewards]
        return (self.rewards_per_func[self.local][:, scalar].nan_to_num(0.0) * self.reward_weights[scalar]).sum(dim=1)


def pad_rows(rows: Sequence[Tensor], num_positions: int, device: torch.device) -> Tensor:
    """Stacks tensors of shape `(H_i,)` to one of shape `(B, num_positions)`, filled with 0 on the right."""
    padded = torch.zeros(len(rows), num_positions)
    for row, tensor in zip(padded, rows, strict=True):
        row[: len(tensor)] = tensor
    return padded.to(device)
