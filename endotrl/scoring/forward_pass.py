# SPDX-License-Identifier: Apache-2.0
"""
Forward passes of a causal language model: of padded rows, and of many completions packed in one row, where those of
one prompt share its computation; one thread at a time.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import chain
from threading import Lock, RLock
from typing import Any, NamedTuple, TypeGuard, TypeVar
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel


T = TypeVar("T")
# Maximum fraction of filler in a row, so that rows have few different lengths: half-precision kernels on a CPU are
# compiled for each shape and kept, about 1 MB per new length.
MAX_FILLER = 1 / 32
ATTENTION = "endotrl_shared_prefix"
# CPU kernels of `scaled_dot_product_attention` take about half the time if the number of keys is a multiple of this.
KEY_MULTIPLE = 32
# Queries per mask: bounds a mask to 1024 times the length of the sequence.
QUERY_BLOCK = 1024
# Elements of masks that are kept for all layers (64 MB in bfloat16).
KEPT_MASK_ELEMENTS = 2**25
# Types of transformers' `ROPE_INIT_FUNCTIONS` that do not depend on the length of the pass.
ANY_LENGTH = {"default", "linear", "yarn", "llama3", "proportional"}

# Outside the models, so that these can be pickled and copied, and two rewards that hold one model wait for each
# other.
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_guard = Lock()
_stance = RLock()


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model whose hidden states are the LM head's input."""
    if model.base_model is not model:
        return model.base_model
    # `base_model_prefix` names a part that the class does not have (Llama 4's text model).
    embeddings = model.get_input_embeddings()
    return next(part for part in model.children() if any(module is embeddings for module in part.modules()))


def execution_device(model: PreTrainedModel, module: nn.Module) -> torch.device:
    """Device on which a module of a model computes: not that of its weights if accelerate offloads them."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    if tensor is None:
        return torch.device("cpu")  # dynamic quantisation, whose modules have neither
    if not tensor.is_meta:
        return tensor.device
    # The module's own hook, or one that loads several modules at once.
    hooked = next(part for part in chain([module], model.modules()) if has_offloaded_params(part))
    return torch.device(hooked._hf_hook.execution_device)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module only multiplies by its `weight`; quantised and parametrised ones must be called."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


@contextmanager
def exclusive(owner: Any) -> Iterator[None]:
    """Context in which other threads wait for the same object (a model instance, or its loader)."""
    with _guard:
        lock = _locks.setdefault(owner, RLock())
    with lock:
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Context in which `torch.compile`d code runs eagerly: each row length would compile it again."""
    with _stance, torch.compiler.set_stance("force_eager"):  # global to all threads, which therefore take turns
        yield


@contextmanager
def compiled() -> Iterator[None]:
    """Context in which `torch.compile`d code is compiled, also within [`uncompiled`]."""
    with _stance, torch.compiler.set_stance("default"):
        yield


@dataclass(frozen=True)
class RopeLengths:
    """Dependence of a model's rotary frequencies on the largest position of a pass; lengths are in tokens."""

    is_rotary: bool  # the config names rotary frequencies
    switches: tuple[int, ...]  # lengths beyond which other frequencies apply (`longrope`)
    grows_beyond: int | None  # length beyond which every length has its own (`dynamic`)
    unknown: tuple[str, ...]  # types of unknown behaviour

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "RopeLengths":
        # `to_dict`, as models without rotary positions have no such key, and earlier code has another one.
        settings = config.get_text_config().to_dict()
        parameters = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
        # One set of parameters, or one per type of layer.
        entries = [entry for entry in parameters.values() if isinstance(entry, dict)]
        if parameters and not entries:
            entries = [parameters]
        switches, unknown, grows_beyond = set(), set(), None
        key = "original_max_position_embeddings"
        for entry in entries:
            rope_type = entry.get("rope_type") or entry.get("type") or "default"
            original = entry.get(key) or settings.get(key)
            if "dynamic" in rope_type and settings.get("max_position_embeddings"):
                grows_beyond = settings["max_position_embeddings"]
            elif rope_type == "longrope" and original:
                switches.add(original)
            elif rope_type not in ANY_LENGTH:
                unknown.add(rope_type)
        is_rotary = bool(entries or settings.get("rope_theta"))
        return cls(is_rotary, tuple(sorted(switches)), grows_beyond, tuple(sorted(unknown)))

    @property
    def limits(self) -> list[int]:
        """Lengths beyond which frequencies change, in order."""
        return sorted([*self.switches, *([] if self.grows_beyond is None else [self.grows_beyond])])

    def length_class(self, length: int) -> tuple[int, ...]:
        """Class of lengths with the same frequencies."""
        beyond = length if self.grows_beyond is not None and length > self.grows_beyond else 0
        return (*(int(length > switch) for switch in self.switches), beyond)


@contextmanager
def rope_as_made(model: PreTrainedModel) -> Iterator[None]:
    """
    Context in which `dynamic` rotary frequencies are the model's initial ones: transformers keeps those of the longest
    pass so far until a short one comes. On exit, they are restored.
    """
    # Each family has a class of its own.
    made = [module for module in model.modules() if {"original_max_seq_len", "rope_type"} <= vars(module).keys()]
    grown = [module for module in made if "dynamic" in str(vars(module)["rope_type"])]
    found = [(module, dict(vars(module)), dict(module._buffers)) for module in grown]
    for module, state, buffers in found:
        # Tensors or buffers, by version; per type of layer, or one for all.
        for name, value in [*state.items(), *buffers.items()]:
            if name.endswith("max_seq_len_cached"):
                vars(module)[name] = state["original_max_seq_len"]
            elif name.endswith("original_inv_freq"):
                current = name.replace("original_", "")
                module._buffers[current] = value.to(buffers[current].device)
    try:
        yield
    finally:
        for module, state, buffers in found:
            vars(module).clear()
            vars(module).update(state)
            module._buffers.clear()
            module._buffers.update(buffers)


def last_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """The LM head's input, of shape `(B, T, D)`. Right padding needs no mask: no token sees it."""
    device = execution_device(model, model.get_input_embeddings())
    input_ids = input_ids.to(device)
    positions = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    # Without a mask, some families (GPT-2) warn of padding.
    mask = torch.ones_like(input_ids) if mask is None else mask.to(device)
    with rope_as_made(model):
        return backbone(model)(
            input_ids=input_ids, attention_mask=mask, use_cache=False, **positions
        ).last_hidden_state


class NotPackable(Exception):
    """A layer has soft-capped or biased scores, sinks, or a window shorter than the sequences."""


class Group(NamedTuple):
    """Token ids of a prompt, at least one, and of its continuations, of which one may be empty."""

    prompt: Sequence[int]
    continuations: list[Sequence[int]]


class Span(NamedTuple):
    """Span of a prompt in a row, and the spans of its continuations, each directly after the one before."""

    start: int
    end: int
    continuations: list[tuple[int, int]]


@dataclass
class PackedRow:
    """
    Groups packed in one row of `T` tokens. Every continuation (a, b) has the positions that follow its prompt (P), and
    attends only to its prompt and itself. Filler (.) limits the number of different lengths:

        input_ids       P P P a a b b b Q Q c . .
        position_ids    0 1 2 3 4 3 4 5 0 1 2 0 0
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
            span = Span(len(tokens), len(tokens) + len(group.prompt), [])
            tokens += group.prompt
            positions += range(len(group.prompt))
            for continuation in group.continuations:
                span.continuations.append((len(tokens), len(tokens) + len(continuation)))
                tokens += continuation
                positions += range(len(group.prompt), len(group.prompt) + len(continuation))
            spans.append(span)
        longest = max(positions) + 1
        # To a multiple of the largest power of two that wastes less than `MAX_FILLER`.
        filler = -len(tokens) % 2 ** max(0, math.floor(math.log2(max(1, len(tokens) * MAX_FILLER))))
        if filler:
            spans.append(Span(len(tokens), len(tokens) + filler, []))
            tokens += [0] * filler
            positions += [0] * filler  # not increasing, so that no position is beyond those of the rows
        return cls(torch.tensor([tokens]), torch.tensor([positions]), spans, longest)

    def states(self, group: int, continuation: int) -> list[int]:
        """Positions in the row of the states that predict the `L` tokens of a continuation, and of the one after."""
        span = self.spans[group]
        return [span.end - 1, *range(*span.continuations[continuation])]

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """A kernel's derived data for the spans, computed once for all layers."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept


_row: ContextVar[PackedRow | None] = ContextVar("packed_row", default=None)


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[`attend`] over the row of the enclosing [`packed_attention`], with transformers' signature."""
    row = _row.get()
    if row is None:
        raise RuntimeError(
            "This model was called while an endogenous reward was scoring with it in another thread. Call it before "
            "or after, or give the reward its own copy: `EndogenousReward(model=<path>)`."
        )
    special = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    window = kwargs.get("sliding_window")
    if special or attention_mask is not None or (window is not None and window < row.longest):
        raise NotPackable(", ".join(special) or "a custom mask, or a window shorter than the sequences")
    return attend(query, key, value, row, scaling), None


# Deliberately not registered as a mask function: transformers then makes no mask for it.
AttentionInterface.register(ATTENTION, shared_prefix_attention)


@contextmanager
def packed_attention(model: PreTrainedModel, row: PackedRow) -> Iterator[None]:
    """Context in which the model's attention is [`shared_prefix_attention`] over `row`."""
    own = model.config._attn_implementation
    token = _row.set(row)
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
        _row.reset(token)


def packed_hidden_states(model: PreTrainedModel, row: PackedRow) -> Tensor:
    """The LM head's input for a packed row, of shape `(T, D)`."""
    device = execution_device(model, model.get_input_embeddings())
    with packed_attention(model, row), rope_as_made(model):
        return backbone(model)(
            input_ids=row.input_ids.to(device), position_ids=row.position_ids.to(device), use_cache=False
        ).last_hidden_state[0]


def attend(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """
    Attention over a packed row, in which a continuation sees its prompt and itself, of shape `(1, T, num_heads,
    head_dim)`, from rotated queries of shape `(1, num_heads, T, head_dim)`, and keys and values of `(1,
    num_key_value_heads, T, head_dim)`. `scaling` is the factor of the scores.
    """
    if not query.is_cuda:
        return block_attention(query, key, value, row, scaling)
    from .attention_kernels import attend as fastest

    return fastest(query, key, value, row, scaling)


def block_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """As [`attend`], with one call of PyTorch's kernel per prompt and per block of a continuation."""
    # On CUDA, attention with a mask has no kernel for grouped queries.
    grouped = query.device.type == "cpu"
    if not grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    # In the layout of the result, so that nothing is copied at the end.
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1]).transpose(1, 2)

    def attend(queries: slice, *seen: slice) -> None:
        """One causal call of the kernel, for queries aligned with the last keys."""
        num_queries, num_keys = queries.stop - queries.start, sum(part.stop - part.start for part in seen)
        padding = -num_keys % KEY_MULTIPLE  # after all queries, so that none sees it
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
    """Concatenates parts of the keys or values, and zeros."""
    zeros = states.new_zeros(*states.shape[:2], padding, states.shape[-1])
    return torch.cat([*(states[:, :, part] for part in parts), zeros], dim=2)
