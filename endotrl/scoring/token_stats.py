# SPDX-License-Identifier: Apache-2.0
"""Statistics per token: logit and soft value, from which everything else is computed."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..reporting import HeatMapRow, heat_maps, notebook_cell


@dataclass(frozen=True)
class TokenStats:
    r"""
    Statistics of the frozen model for one completion of `H` scored tokens.

    Attributes:
        token_ids, positions (`torch.Tensor` of shape `(H,)`):
            The scored tokens, including EOS if it was generated, and their positions in the completion: `0..H-1`, with
            gaps where tools wrote.
        chosen_logits (`torch.Tensor` of shape `(H,)`), soft_values (`torch.Tensor` of shape `(H + 1,)`):
            $f(s_h, a_h)$ and $V(s_h)$, float32. The last value is 0 if the completion is finished (terminal state),
            otherwise the model's value of the state after the last token.
        entropies, mean_logits (`torch.Tensor` of shape `(H,)`, *optional*):
            Entropy of $\hat\pi(\cdot|s_h)$ in nats, and mean of $f(s_h, \cdot)$ over the vocabulary, float32.
        finished (`bool`), alpha (`float`):
            Whether the completion ends with an end-of-sequence token, and the temperature of the soft values.
        num_completion_tokens (`int`), vocab_size (`int`, *optional*):
            Length of the completion, including tokens that are not scored, and size of the vocabulary.
        text (`str`, *optional*), offsets (`list[tuple[int, int]]`, *optional*):
            The completion, decoded with its special tokens, and the character span of every scored token in it: empty
            for a token that ends inside a character.
        generalist_log_probs (`torch.Tensor` of shape `(H,)`, *optional*):
            Log-probabilities of the tokens under the second model of [`InformationGain`], in nats.
        has_logits (`bool`, *optional*, defaults to `True`):
            `False` if computed from log-probabilities: `chosen_logits` are these, and `soft_values` 0.
    """

    token_ids: Tensor
    positions: Tensor
    chosen_logits: Tensor
    soft_values: Tensor
    entropies: Tensor | None
    finished: bool
    alpha: float
    num_completion_tokens: int
    text: str | None = None
    offsets: list[tuple[int, int]] | None = None
    mean_logits: Tensor | None = None
    vocab_size: int | None = None
    generalist_log_probs: Tensor | None = None
    has_logits: bool = True

    @property
    def log_probs(self) -> Tensor:
        r"""$\log \hat\pi(a_h|s_h) = (f(s_h, a_h) - V(s_h)) / \alpha$, of shape `(H,)`, in nats."""
        return (self.chosen_logits - self.soft_values[:-1]) / self.alpha

    @property
    def tokens(self) -> list[str]:
        """Text of every scored token; empty where a token ends inside a character, or without `text`."""
        offsets = [(0, 0)] * len(self.token_ids) if self.offsets is None else self.offsets
        return [(self.text or "")[start:end] for start, end in offsets]

    def to_dict(self) -> dict[str, list[Any]]:
        """Columns with one entry per scored token, for `pandas.DataFrame(stats.to_dict())`; `log_prob` in nats."""
        columns = {
            "token_id": self.token_ids,
            "log_prob": self.log_probs,
            "chosen_logit": self.chosen_logits,
            "soft_value": self.soft_values[:-1],
            "entropy": self.entropies,
            "mean_logit": self.mean_logits,
            "generalist_log_prob": self.generalist_log_probs,
        }
        return {"token": self.tokens, **{key: value.tolist() for key, value in columns.items() if value is not None}}

    def _repr_html_(self) -> str | None:
        """Heat map of the log-probabilities, in a notebook; `None` without `text`."""
        if self.text is None:
            return None
        columns = self.to_dict()
        row = HeatMapRow(
            text=self.text,
            offsets=self.offsets or [],
            contributions=columns["log_prob"],
            total=math.fsum(columns["log_prob"]),
            columns={name.replace("_", " "): columns[name] for name in ("soft_value", "entropy") if name in columns},
            eos=self.finished,
        )
        return notebook_cell(heat_maps([row], "log-probability, nats", "log-probability"))

    def on_all_tokens(self, values: Tensor) -> Tensor:
        """Values of shape `(H,)` at their positions among all `num_completion_tokens`: 0 where a tool wrote."""
        scattered = torch.zeros(self.num_completion_tokens)
        scattered[self.positions] = values
        return scattered
