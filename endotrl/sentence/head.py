# SPDX-License-Identifier: Apache-2.0
"""What the sentence-level reward model reads off the language model's states."""

import torch
from torch import Tensor, nn

from .configuration import SentenceRewardConfig


class SentenceHead(nn.Module):
    """Value, query and key of a state, in float32 whatever its dtype is: rewards are small differences of values."""

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
