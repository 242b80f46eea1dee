# SPDX-License-Identifier: Apache-2.0
"""Protocol of dense rewards: rewards per token for trainers with token credit, besides TRL's one per completion."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..rendering.messages import Completions, Prompts, TokenIds
from ..rendering.renderer import Rendered


class DenseScores(NamedTuple):
    r"""
    Rewards of a batch, per completion and per token.

    Attributes:
        outcomes (`list[float | None]`):
            One number per completion, logged by TRL; `None` for one without a reward, whose tensors are ignored.
        token_rewards (`list[torch.Tensor]` of shape `(H_i,)`):
            One number per token id, 0 where a tool wrote. They sum to the outcome, up to a constant of the prompt.
        state_values (`list[torch.Tensor]` of shape `(H_i,)`, *optional*):
            Before each token, an estimate of the rewards from it on, from the prompt and the tokens before it only: a
            baseline, which does not change the expected gradient.
    """

    outcomes: list[float | None]
    token_rewards: list[Tensor]
    state_values: list[Tensor] | None = None


@runtime_checkable
class DenseReward(Protocol):
    """
    A reward function with rewards per token. [`DenseGRPOTrainer`] and [`PPOTrainer`] call this method instead of the
    reward itself.

    Example: a reward of -0.01 per token, the same in TRL's trainers and in those of endotrl.
    ```python
    >>> import torch
    >>> from endotrl.rewards import DenseReward, DenseScores

    >>> class Brevity:
    ...     def __call__(self, completion_ids, **kwargs):
    ...         return [-0.01 * len(ids) for ids in completion_ids]
    ...
    ...     def outcome_and_token_rewards(self, prompts, completions, completion_ids=None, **kwargs):
    ...         return DenseScores(self(completion_ids), [torch.full((len(ids),), -0.01) for ids in completion_ids])

    >>> isinstance(Brevity(), DenseReward)
    True
    ```
    """

    def outcome_and_token_rewards(
        self, prompts: Prompts, completions: Completions, completion_ids: TokenIds | None = None, **kwargs: Any
    ) -> DenseScores:
        """[`DenseScores`] of a batch, or a tuple of its first two entries, from TRL's arguments for rewards."""
        ...


def check_same_tokens(rows: Sequence[Rendered], completion_ids: TokenIds | None) -> None:
    """Raises `ValueError` if completions were re-encoded to other tokens than the policy's."""
    for i, (row, given) in enumerate(zip(rows, completion_ids or [], strict=completion_ids is not None)):
        if row.completion_ids != list(given):
            raise ValueError(
                f"The completion of row {i} was re-encoded for the frozen model into {len(row.completion_ids)} tokens "
                f"instead of {len(given)}, so its token rewards do not belong to the policy's tokens. Use a frozen "
                "model with the policy's tokenizer and chat template, or credit the outcome."
            )
