# SPDX-License-Identifier: Apache-2.0
"""
Floating-point operations of a scoring pass, counted from the shapes: two for every multiplication with an addition.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from endotrl.rendering.renderer import Rendered


@dataclass(frozen=True)
class ModelShape:
    """
    What determines the work of a dense transformer.

    Attributes:
        linear (`int`):
            Elements of all weight matrices of the backbone, which every token is multiplied with.
        attention (`int`):
            Elements of the queries of a token, over all layers and heads.
        head (`int`):
            Elements of the LM head.
    """

    linear: int
    attention: int
    head: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ModelShape":
        config, head = model.config, model.get_output_embeddings().weight
        linear = sum(m.weight.numel() for m in model.base_model.modules() if isinstance(m, nn.Linear))
        # Some configs have no `head_dim`, others have it as `None`.
        head_dim = config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
        return cls(linear, config.num_hidden_layers * config.num_attention_heads * head_dim, head.numel())


@dataclass(frozen=True)
class Work:
    """
    Size of a pass.

    Attributes:
        tokens (`int`):
            Tokens that the backbone runs over.
        pairs (`int`):
            Pairs of a token and a token that it attends to, itself included.
        positions (`int`):
            Positions at which the LM head is applied.
    """

    tokens: int
    pairs: int
    positions: int

    def flops(self, shape: ModelShape) -> int:
        """Operations of the matrix products: linear layers, scores and values of the attention, and LM head."""
        return 2 * self.tokens * shape.linear + 4 * self.pairs * shape.attention + 2 * self.positions * shape.head


def useful_work(rows: Sequence[Rendered]) -> Work:
    """
    What must be computed for finished completions: every prompt once, every completion but its last token (after which
    nothing is asked), what lies before a token, and the head where a token is scored.
    """
    tokens = pairs = positions = 0
    for prompt in {tuple(row.prompt_ids) for row in rows}:
        tokens += len(prompt)
        pairs += len(prompt) * (len(prompt) + 1) // 2
    for row in rows:
        run = len(row.completion_ids) - 1
        tokens += run
        pairs += run * len(row.prompt_ids) + run * (run + 1) // 2
        positions += len(row.completion_ids)
    return Work(tokens, pairs, positions)


def padded_work(batches: Sequence[Sequence[Rendered]]) -> Work:
    """What a user's padded batches compute: every position against every position, and the head everywhere."""
    tokens = pairs = 0
    for rows in batches:
        width = max(len(row.prompt_ids) + len(row.completion_ids) for row in rows)
        tokens += len(rows) * width
        pairs += len(rows) * width * width
    return Work(tokens, pairs, tokens)
