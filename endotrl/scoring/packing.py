# SPDX-License-Identifier: Apache-2.0
"""Many completions in one row without padding, where those of one prompt share its pass through the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from .kernels import attend, relative_difference
from .modules import backbone, execution_device
from .packed_row import Group, PackedRow
from .rope import rope_as_made


ATTENTION = "endotrl_shared_prefix"


class NotPackable(Exception):
    """A layer's attention is of a kind that [`shared_prefix_attention`] does not compute."""


_row: ContextVar[PackedRow | None] = ContextVar("packed_row", default=None)


def longest_packable(config: PretrainedConfig) -> float:
    """
    Length in tokens up to which a model attends to everything before a token: its sliding window or chunk, infinity if
    it has none, and 0 if it has layers that are no attention (state-space, convolution) or parts that are no text.
    """
    if config.sub_configs:
        return 0
    # `to_dict`, as each family has its own keys and a missing one means "no window".
    settings = config.to_dict()
    limit = float("inf")
    layer_types = set(settings.get("layer_types") or ["full_attention", "sliding_attention"])
    if not layer_types <= {"full_attention", "sliding_attention", "chunked_attention"}:
        return 0
    for kind, key in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        if kind in layer_types and settings.get(key) and settings.get("use_sliding_window", True):
            limit = min(limit, settings[key])
    return limit


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Attention over the [`PackedRow`] of the surrounding [`packed_attention`]: exact, causal, and kept apart. Queries
    have shape `(1, num_heads, T, head_dim)`, keys and values `(1, num_key_value_heads, T, head_dim)`, the result `(1,
    T, num_heads, head_dim)`. Raises [`NotPackable`] if the layer asks for a kind of attention that this is not
    (soft-capped or biased scores, sinks, a window shorter than the sequences).
    """
    row = _row.get()
    if row is None:
        raise RuntimeError(
            "A model instance was run while an endogenous reward scored with it in another thread. Run it before or "
            "after, or give the reward its own copy: `EndogenousReward(model=<path>)`."
        )
    special = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if special or attention_mask is not None or (window is not None and window < row.longest):
        raise NotPackable(", ".join(special) or "a mask of its own, or a window shorter than the sequences")
    return attend(query, key, value, row, scaling), None


# Not registered as a mask function as well: transformers then makes no mask for it.
AttentionInterface.register(ATTENTION, shared_prefix_attention)


@contextmanager
def packed_attention(model: PreTrainedModel, row: PackedRow) -> Iterator[None]:
    """
    Inside, the model's attention is [`shared_prefix_attention`] over `row`; afterwards it is the model's own again.
    """
    own = model.config._attn_implementation
    token = _row.set(row)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        _row.reset(token)


def packed_hidden_states(model: PreTrainedModel, row: PackedRow) -> Tensor:
    """Hidden states of shape `(T, D)` that the LM head reads."""
    device = execution_device(model, model.get_input_embeddings())
    with packed_attention(model, row), rope_as_made(model):
        return backbone(model)(
            input_ids=row.input_ids.to(device), position_ids=row.position_ids.to(device), use_cache=False
        ).last_hidden_state[0]


def last_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """
    Hidden states of shape `(B, T, D)` that the LM head reads. Padding on the right needs no mask, as nothing before it
    sees it.
    """
    device = execution_device(model, model.get_input_embeddings())
    input_ids = input_ids.to(device)
    positions = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    # Without a mask, some families (GPT-2) warn of padding.
    mask = torch.ones_like(input_ids) if mask is None else mask.to(device)
    with rope_as_made(model):
        return backbone(model)(
            input_ids=input_ids, attention_mask=mask, use_cache=False, **positions
        ).last_hidden_state


def rounding(model: PreTrainedModel) -> float:
    """Difference of two passes of different shapes that is rounding, relative to the states."""
    device = execution_device(model, model.get_input_embeddings())
    return 1e-3 if model.dtype == torch.float32 and not torch.is_autocast_enabled(device.type) else 0.1


def why_not_packable(model: PreTrainedModel) -> str | None:
    """
    Tries a packed row on a few tokens. `None` if the model gives what it gives for each sequence alone; else the
    reason.
    """
    if not model.is_backend_compatible():
        return "its attention is its own"
    if longest_packable(model.config) == 0:
        return "it has layers or parts that are no attention over text"
    vocab_size = model.config.get_text_config().vocab_size
    tokens = (torch.arange(24) * 7919 % vocab_size).tolist()
    groups = [Group(tokens[:5], [tokens[5:12], tokens[12:14]]), Group(tokens[14:18], [tokens[18:24], tokens[:3]])]
    row = PackedRow.of(groups)
    try:
        packed = packed_hidden_states(model, row)
    except NotPackable as error:
        return f"its attention has {error}"
    for g, group in enumerate(groups):
        for k, continuation in enumerate(group.continuations):
            alone = torch.tensor([[*group.prompt, *continuation]])
            expected = last_hidden_states(model, alone)[0, len(group.prompt) - 1 :]
            # Rounding apart, they are equal. What leaks from a neighbour, or a wrong position, is as large as the
            # state.
            if relative_difference(packed[row.states(g, k)], expected).max() > rounding(model):
                return "its layers mix neighbouring sequences"
    return None
