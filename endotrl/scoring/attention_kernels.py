# SPDX-License-Identifier: Apache-2.0
"""Selection of the fastest correct attention kernel for packed rows on a GPU."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .forward_pass import PackedRow, Span, block_attention, compiled
from .isolation import multiplies_exactly, relative_difference


logger = logging.getLogger(__name__)

# Calls, one per layer and pass, with rows of one kind after which a kernel that takes seconds to compile is tried: 40
# passes of a model of 24 layers, so that short runs do not pay for it.
CALLS_BEFORE_COMPILING = 1000
# A kernel must be faster by more than chance, so that two runs make the same choice.
GAIN = 0.9
REPEATS = 3
# Head dimensions of PyTorch's flash-attention kernels: multiples of 8 up to 256.
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 256
# Queries and keys per block of FlexAttention's mask: its own default.
BLOCK = 128
# Shapes for which FlexAttention may be compiled: lengths are powers of two, so one model has about ten at most.
MAX_COMPILED = 64


class Lengths(NamedTuple):
    """Lengths of concatenated sequences."""

    offsets: Tensor  # (N + 1,), int32: start of each of N sequences, and the end of the last one
    longest: int  # upper bound on the longest

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Lengths":
        # With a longest of 1, the kernel takes queries of a group for tokens, and log-sum-exps have another layout.
        return cls(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max([2, *lengths]))


# (query, key, value, lengths of queries, lengths of keys, causal, scaling) -> output of shape
# `(Q, num_heads, head_dim)` and log-sum-exps of the scores, of shape `(num_heads, Q)`, float32.
SequencesKernel = Callable[[Tensor, Tensor, Tensor, Lengths, Lengths, bool, float | None], tuple[Tensor, Tensor]]


class SharedPrompts(NamedTuple):
    """Positions of the continuations that share a prompt, and of their prompts, and the lengths of both."""

    positions: Tensor
    prompts: Tensor
    lengths: Lengths
    prompt_lengths: Lengths


def varlen_plan(spans: Sequence[Span], device: torch.device) -> tuple[Lengths, SharedPrompts | None]:
    """
    Lengths of sequences with causal self-attention: a prompt with its only continuation, a shared prompt, or one of
    its continuations; and the shared prompts, if there are any.
    """
    own: list[int] = []
    parts: tuple[list[range], list[range]] = ([], [])  # (continuations of a prompt, the prompt)
    for start, prompt_end, continuations in spans:
        if len(continuations) == 1:
            own.append(continuations[0][1] - start)
            continue
        own += [prompt_end - start, *(end - first for first, end in continuations)]
        if continuations and continuations[-1][1] > prompt_end:
            parts[0].append(range(prompt_end, continuations[-1][1]))
            parts[1].append(range(start, prompt_end))
    if not parts[0]:
        return Lengths.of(own, device), None
    positions, prompts = (torch.tensor([*chain(*ranges)], dtype=torch.long, device=device) for ranges in parts)
    lengths, prompt_lengths = (Lengths.of([*map(len, ranges)], device) for ranges in parts)
    return Lengths.of(own, device), SharedPrompts(positions, prompts, lengths, prompt_lengths)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Lengths, keys: Lengths, causal: bool, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """
    PyTorch's own flash-attention over sequences of several lengths: the operator behind `varlen_attn` of torch 2.10,
    or FlashAttention 3 if `torch.nn.attention.activate_flash_attention_impl` has installed it.
    """
    where = (queries.offsets, keys.offsets, queries.longest, keys.longest)
    output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        query, key, value, *where, 0.0, causal, False, scale=scaling
    )
    return output, log_sum_exp


def has_flash_attention(query: Tensor, value: Tensor) -> bool:
    """Whether [`flash_attention`] takes these tensors: half precision on a GPU of compute capability 8.0 or newer."""
    head_dim = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and head_dim == value.shape[-1] <= MAX_HEAD_DIM
        and head_dim % HEAD_DIM_MULTIPLE == 0
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    row: PackedRow,
    scaling: float | None,
    kernel: SequencesKernel = flash_attention,
) -> Tensor:
    r"""
    As [`attend`], with two calls of a kernel: a token of a continuation sees its prompt and the tokens before it in
    the continuation. With outputs $o_1$, $o_2$ and log-sum-exps $\ell_1$, $\ell_2$ of the two parts, its output is
    $(e^{\ell_1} o_1 + e^{\ell_2} o_2) / (e^{\ell_1} + e^{\ell_2})$.
    """
    own, shared = row.kept(("varlen", query.device), lambda: varlen_plan(row.spans, query.device))
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, head_dim)
    output, log_sum_exp = kernel(query, key, value, own, own, True, scaling)
    if shared is None:
        return output[None]
    positions, prompts, lengths, prompt_lengths = shared
    of_prompt, prompt_lse = kernel(
        query[positions], key[prompts], value[prompts], lengths, prompt_lengths, False, scaling
    )
    # Fraction of the weight on the prompt, of shape (Q, num_heads, 1).
    weight = torch.sigmoid(prompt_lse - log_sum_exp[:, positions]).T[..., None]
    merged = torch.lerp(output[positions].float(), of_prompt.float(), weight)
    return output.index_copy(0, positions, merged.to(output.dtype))[None]


def has_flex_attention(query: Tensor, value: Tensor) -> bool:
    """Whether [`flex_attention`] takes these: one dtype, heads of 16 or wider, a GPU of capability 8.0 or newer."""
    fits = query.is_cuda and query.dtype == value.dtype and min(query.shape[-1], value.shape[-1]) >= 16
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


def flex_attention(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """As [`attend`]. Compiled once per power of two of the row's length, to which it is padded."""
    num_tokens = query.shape[2]
    length = max(BLOCK, 2 ** math.ceil(math.log2(num_tokens)))
    mask = row.kept(("flex", query.device), lambda: block_mask(row, length, query.device))
    query, key, value = (pad(states, (0, 0, 0, length - num_tokens)) for states in (query, key, value))
    with compiled(), torch._dynamo.config.patch(recompile_limit=MAX_COMPILED):
        output = flex_kernel()(query, key, value, block_mask=mask, scale=scaling, enable_gqa=True)
    return output[:, :, :num_tokens].transpose(1, 2)


@cache
def flex_kernel() -> Callable[..., Tensor]:
    """FlexAttention, compiled."""
    # Imported late: it takes a second.
    from torch.nn.attention.flex_attention import flex_attention as kernel

    # Full graph: otherwise, one shape too many would silently materialize all scores.
    return torch.compile(kernel, dynamic=False, fullgraph=True)


def block_mask(row: PackedRow, length: int, device: torch.device) -> Any:
    """
    FlexAttention's `BlockMask` of a row that is padded to `length` tokens, a multiple of [`BLOCK`]. Computed from the
    spans, as the pairs of 32,768 tokens would take a gigabyte.
    """
    from torch.nn.attention.flex_attention import BlockMask

    # A token sees two ranges: [prompt start, prompt end), and [own start, itself]. Padding sees nothing.
    own, start, end = torch.full((length,), length), torch.zeros(length), torch.zeros(length)
    for first, prompt_end, continuations in row.spans:
        own[first:prompt_end] = first
        for begin, stop in continuations:
            own[begin:stop], start[begin:stop], end[begin:stop] = begin, first, prompt_end
    own, start, end = (bounds.to(device, torch.int32) for bounds in (own, start, end))

    def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & ((k >= own[q]) | ((k >= start[q]) & (k < end[q])))

    edges = torch.arange(0, length + 1, BLOCK, dtype=torch.int32, device=device)
    past = torch.arange(1, length + 1, dtype=torch.int32, device=device)

    def seen(first: Tensor, stop: Tensor) -> Tensor:
        """Pairs of a block of queries and one of keys in ranges of `N` queries, of shape `(N / BLOCK, blocks)`."""
        upper = torch.minimum(stop[:, None], edges[None, 1:])
        keys = (upper - torch.maximum(first[:, None], edges[None, :-1])).clamp_(min=0)
        return keys.unflatten(0, (-1, BLOCK)).sum(dim=1)

    parts = zip(*(bounds.split(32 * BLOCK) for bounds in (start, end, own, past)), strict=True)  # bounds the memory
    pairs = torch.cat([seen(first, stop) + seen(begin, after) for first, stop, begin, after in parts])
    full = pairs == BLOCK * BLOCK
    (num_partial, partial), (num_full, whole) = (
        (
            chosen.sum(dim=-1, dtype=torch.int32)[None, None],
            chosen.int().argsort(dim=-1, descending=True, stable=True).int()[None, None],
        )
        for chosen in ((pairs > 0) & ~full, full)
    )
    return BlockMask.from_kv_blocks(num_partial, partial, num_full, whole, BLOCK_SIZE=BLOCK, mask_mod=visible)


Kernel = Callable[[Tensor, Tensor, Tensor, PackedRow, float | None], Tensor]
REFERENCE = "blocks"
# In the order in which they are tried.
KERNELS: dict[str, Kernel] = {REFERENCE: block_attention, "varlen": varlen_attention, "flex": flex_attention}


@dataclass
class Choice:
    """Kernel for rows of one kind: device, dtype, heads, and numbers of tokens and of sequences in bits."""

    name: str = REFERENCE
    seconds: dict[str, float] = field(default_factory=dict)  # per kernel tried, infinity if it failed
    calls: int = 0  # number of such rows so far


choices: dict[tuple[Any, ...], Choice] = {}
_told: set[tuple[str, torch.device]] = set()  # kernels whose failure was logged


def attend(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """
    As [`~forward_pass.attend`]. The kernels are measured on the first row of each kind (see [`Choice`]); one whose
    numbers differ from those of [`block_attention`] is not used.
    """
    available = {"varlen": has_flash_attention(query, value), "flex": has_flex_attention(query, value)}
    if not any(available.values()):
        return block_attention(query, key, value, row, scaling)
    sequences = sum(1 + len(continuations) for *_, continuations in row.spans)
    heads = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])
    kind = (query.device, query.dtype, *heads, query.shape[2].bit_length(), sequences.bit_length())
    choice = choices.setdefault(kind, Choice())
    choice.calls += 1
    available["flex"] &= choice.calls > CALLS_BEFORE_COMPILING
    if any(there and name not in choice.seconds for name, there in available.items()):
        names = [name for name, there in available.items() if there and choice.seconds.get(name) != math.inf]
        _measure(choice, names, query, key, value, row, scaling)
        logger.info("Using the kernel %r for packed rows of %s; seconds: %s", choice.name, kind, choice.seconds)
    return KERNELS[choice.name](query, key, value, row, scaling)


def _measure(
    choice: Choice, names: list[str], query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None
) -> None:
    """Measures these kernels against the reference, and chooses."""
    reference = KERNELS[REFERENCE](query, key, value, row, scaling)
    allowed = 1e-3 if multiplies_exactly(query.dtype, query.device) else 0.05
    choice.name = REFERENCE
    for name in (REFERENCE, *names):
        run = partial(KERNELS[name], query, key, value, row, scaling)
        try:
            # A first call compiles, and makes the plan that the layers share.
            difference = relative_difference(run(), reference).max().item()
            if not difference <= allowed:  # catches NaN, too
                raise ValueError(f"its output has a relative error of {difference:.2g}")
            choice.seconds[name] = min(_seconds(run, query.device) for _ in range(REPEATS))
        except Exception as error:  # compilers and drivers raise many types, and there are other kernels
            choice.seconds[name] = math.inf
            reason = (str(error).strip().splitlines() or ["no reason given"])[0][:200]
            logger.log(
                logging.DEBUG if (name, query.device) in _told else logging.WARNING,
                "The attention kernel %r is not used for packed rows on %s: %s: %s. Results are the same.",
                name,
                query.device,
                type(error).__name__,
                reason,
            )
            _told.add((name, query.device))
        if choice.seconds[name] < GAIN * choice.seconds[choice.name]:
            choice.name = name


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    def now() -> float:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter()

    started = now()
    run()
    return now() - started
