# SPDX-License-Identifier: Apache-2.0
"""Head of the sentence-level reward model: values, rewards, attention weights and score from hidden states."""

import math

import torch
from torch import Tensor, nn

from .configuration import SentenceRewardConfig


class SentenceHead(nn.Module):
    """Value, query and key of a state, in float32 whatever its dtype: rewards are small differences of values."""

    def __init__(self, config: SentenceRewardConfig) -> None:
        super().__init__()
        self.value = nn.Linear(config.hidden_size, 1)
        if config.aggregator == "attention":
            self.query = nn.Linear(config.hidden_size, config.attention_dim, bias=False)
            self.key = nn.Linear(config.hidden_size, config.attention_dim, bias=False)
        self.has_attention = config.aggregator == "attention"

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Values of shape `(batch_size, N)`, and queries and keys of shape `(batch_size, N, d)`; float32."""
        states = states.float()
        with torch.autocast(states.device.type, enabled=False):
            values = _linear(self.value, states).squeeze(-1)
            if not self.has_attention:
                return values, None, None
            return values, _linear(self.query, states), _linear(self.key, states)


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    bias = None if layer.bias is None else layer.bias.float()
    return nn.functional.linear(inputs, layer.weight.float(), bias)


def sentence_rewards(values: Tensor, mask: Tensor, differences: bool = True) -> Tensor:
    """
    Reward of each sentence: $r_1 = v_1$, $r_i = v_i - v_{i-1}$ (https://huggingface.co/papers/2503.04793). The first
    state is the one before the response, so that $r_1$ is the value of the prompt. Without `differences`, the values
    themselves, $r_i = v_i$, and $r_1 = 0$.

    All have shape `(batch_size, N)`; `mask` is `True` where there is a state, and rewards are 0 elsewhere. Differences
    of a row sum to its last value $v_N$.
    """
    if not differences:
        return torch.where(mask, values, 0.0) * (torch.arange(values.shape[-1], device=values.device) > 0)
    before = torch.nn.functional.pad(values, (1, 0))[..., :-1]
    return torch.where(mask, values - before, 0.0)


def rotate(vectors: Tensor, theta: float = 10_000.0) -> Tensor:
    r"""
    Rotary position embedding (https://huggingface.co/papers/2104.09864) by sentence index, for vectors of shape
    `(batch_size, N, d)`, with even `d`: the pair of entries $(x_j, x_{j + d/2})$ of vector $i$ is rotated by the angle
    $i \, \theta^{-2j/d}$.
    """
    num_sentences, half = vectors.shape[-2], vectors.shape[-1] // 2
    steps = torch.arange(half, device=vectors.device, dtype=torch.float32)
    positions = torch.arange(num_sentences, device=vectors.device, dtype=torch.float32)
    angles = positions[:, None] * theta ** (-steps / half)  # (N, d/2)
    cos, sin = angles.cos(), angles.sin()
    first, second = vectors[..., :half], vectors[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor, theta: float = 10_000.0) -> Tensor:
    r"""
    Weights $a$ of the sentences, of shape `(batch_size, N)`, by attention from the last one to all, 0 where `mask` is
    `False`: see [`SentenceRewardModel`]. Queries $W_q h_i$ and keys $W_k h_i$ have shape `(batch_size, N, d)`; `theta`
    is the base of the rotary angles, see [`rotate`].
    """
    queries, keys = rotate(queries, theta), rotate(keys, theta)
    last = mask.sum(dim=-1) - 1  # (B,)
    query = queries[torch.arange(len(queries), device=queries.device), last]  # (B, d)
    scores = torch.einsum("bd,bnd->bn", query, keys) / math.sqrt(keys.shape[-1])
    return scores.masked_fill(~mask, -torch.inf).softmax(dim=-1)
