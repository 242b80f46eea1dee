# SPDX-License-Identifier: Apache-2.0
"""Many completions in one row without padding, where those of one prompt share its pass through the model."""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from .forward_pass import backbone, execution_device, last_hidden_states, relative_difference, rope_as_made, rounding


T = TypeVar("T")
# Part of a row that may be filler, so that rows have few different lengths: kernels of half precision on a CPU are
# compiled for each shape and kept, about 1 MB for every new length.
MAX_FILLER = 1 / 32

# Span of a prompt in a row, and the spans of its continuations, each right behind the one before.
Span = tuple[int, int, list[tuple[int, int]]]
ATTENTION = "endotrl_shared_prefix"
# CPU kernels of `scaled_dot_product_attention` take about half the time if the number of keys is a multiple of it.
KEY_MULTIPLE = 32
# Queries for which one mask is made: bounds a mask to 1024 times the length of the sequence.
QUERY_BLOCK = 1024
# Masks are the same in every layer and are kept for all of them, up to this many elements (64 MB in bfloat16).
KEPT_MASK_ELEMENTS = 2**25


class NotPackable(Exception):
    """A layer's attention is of a kind that [`shared_prefix_attention`] does not compute."""


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt, at least one, and of its continuations, of which one may be empty."""

    prompt: Sequence[int]
    continuations: list[Sequence[int]]


@dataclass
class PackedRow:
    """
    Groups one after another in one row of `T` tokens: a prompt, its continuations, the next prompt, ... Every
    continuation has the positions that follow its prompt, and attends to its prompt and itself only. A few tokens that
    nobody sees fill the row up to one of few lengths.
    """

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T)
    spans: list[Span]  # of every group, and of the filler
    longest: int  # length of the longest prompt with a continuation
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "PackedRow":
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for group in groups:
            start, length = len(tokens), len(group.prompt)
            tokens += group.prompt
            positions += range(length)
            ends = []
            for continuation in group.continuations:
                ends.append((len(tokens), len(tokens) + len(continuation)))
                tokens += continuation
                positions += range(length, length + len(continuation))
            spans.append((start, start + length, ends))
        longest = max(positions) + 1
        # To a multiple of the largest power of two of which less than `MAX_FILLER` is wasted.
        filler = -len(tokens) % 2 ** max(0, math.floor(math.log2(max(1, len(tokens) * MAX_FILLER))))
        if filler:
            spans.append((len(tokens), len(tokens) + filler, []))
            tokens += [0] * filler
            positions += [0] * filler  # not counted on, so that no position is beyond those of the rows
        return cls(torch.tensor([tokens]), torch.tensor([positions]), spans, longest)

    def states(self, group: int, continuation: int) -> list[int]:
        """
        Positions in the row of the `L + 1` states of a continuation of `L` tokens, of which the first is the last
        token of the prompt. The state at `h` predicts token `h`.
        """
        _, prompt_end, ends = self.spans[group]
        return [prompt_end - 1, *range(*ends[continuation])]

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a kernel makes of the spans once, for all layers."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept


def plan_packs(
    prompt_lengths: Sequence[int], continuation_lengths: Sequence[Sequence[int]], max_tokens: int
) -> list[list[tuple[int, list[int]]]]:
    """
    Micro-batches of at most `max_tokens` tokens, by lengths alone, in which every prompt counts once: lists of (index
    of the prompt, indices of its continuations). Continuations that do not fit together are spread over several, each
    with the prompt; one that does not fit at all has one of its own. The largest come first, as in [`plan_batches`].
    """
    pieces: list[tuple[int, int, list[int]]] = []  # (tokens, prompt, continuations)
    for prompt, lengths in enumerate(continuation_lengths):
        size = prompt_lengths[prompt]
        members: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            if members and size + lengths[index] > max_tokens:
                pieces.append((size, prompt, members))
                size, members = prompt_lengths[prompt], []
            size += lengths[index]
            members.append(index)
        pieces.append((size, prompt, members))
    packs: list[list[tuple[int, list[int]]]] = []
    used = 0
    for size, prompt, members in sorted(pieces, key=lambda piece: (-piece[0], piece[1], piece[2])):
        if not packs or used + size > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append((prompt, members))
        used += size
    return packs


_row: ContextVar[PackedRow | None] = ContextVar("packed_row", default=None)


def longest_packable(config: PretrainedConfig) -> float:
    """
    Tokens up to which a model attends to all before a token: its window or chunk, infinity if it has none, and 0 if it
    has layers that are no attention (state-space, convolution) or parts that are no text.
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
    Attention over the [`PackedRow`] of the surrounding [`packed_attention`]. Queries have shape `(1, num_heads, T,
    head_dim)`, keys and values `(1, num_key_value_heads, T, head_dim)`, the result `(1, T, num_heads, head_dim)`.
    Raises [`NotPackable`] for another kind: soft-capped or biased scores, sinks, a window shorter than the sequences.
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
    """Inside, the model's attention is [`shared_prefix_attention`] over `row`."""
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


def why_not_packable(model: PreTrainedModel) -> str | None:
    """Why a model does not give, in a packed row of a few tokens, what it gives for each sequence alone, if so."""
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


def attend(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """As [`~kernels.attend`], whose other kernels are all for CUDA."""
    if not query.is_cuda:
        return block_attention(query, key, value, row, scaling)
    from .kernels import attend as fastest

    return fastest(query, key, value, row, scaling)


def block_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """As [`~kernels.attend`]."""
    # On CUDA, attention with a mask has no kernel for grouped queries.
    grouped = query.device.type == "cpu"
    if not grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # Laid out as it is returned, so that nothing is copied at the end.
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)

    def attend(queries: slice, *seen: slice) -> None:
        """One causal call of the kernel, of the last of the keys."""
        num_queries, num_keys = queries.stop - queries.start, sum(part.stop - part.start for part in seen)
        padding = -num_keys % KEY_MULTIPLE  # behind all queries, so that none sees it
        mask = None if len(seen) == 1 else _causal_mask(row, num_queries, num_keys, padding, query)
        output[:, :, queries] = scaled_dot_product_attention(
            query[:, :, queries],
            _join(key, seen, padding),
            _join(value, seen, padding),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=grouped,
        )

    for start, prompt_end, continuations in row.spans:
        if len(continuations) == 1:
            attend(slice(start, continuations[0][1]), slice(start, continuations[0][1]))
            continue
        prompt = slice(start, prompt_end)
        attend(prompt, prompt)
        for first, end in continuations:
            for block_start in range(first, end, QUERY_BLOCK):
                block_end = min(block_start + QUERY_BLOCK, end)
                attend(slice(block_start, block_end), prompt, slice(first, block_end))
    return output.transpose(1, 2)


def _causal_mask(row: PackedRow, num_queries: int, num_keys: int, padding: int, like: Tensor) -> Tensor:
    """Additive mask of shape `(num_queries, num_keys + padding)`: the last query sees `num_keys` keys."""
    masks: dict[object, Tensor] = row.kept("masks", dict)
    key = (num_queries, num_keys, like.device)  # layers may be spread over devices
    if key in masks:
        return masks[key]
    mask = like.new_full((num_queries, num_keys + padding), -torch.inf).triu_(num_keys - num_queries + 1)
    if sum(kept.numel() for kept in masks.values()) + mask.numel() <= KEPT_MASK_ELEMENTS:
        masks[key] = mask
    return mask


def _join(states: Tensor, parts: Sequence[slice], padding: int) -> Tensor:
    """Parts of the keys or values one after another, and zeros."""
    zeros = states.new_zeros(*states.shape[:2], padding, states.shape[-1])
    return torch.cat([*(states[:, :, part] for part in parts), zeros], dim=2)
