# SPDX-License-Identifier: Apache-2.0
"""Attention of a packed row on a GPU: two calls of a flash-attention kernel, merged by their log-sum-exps."""

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import PackedRow, Span


# Head dimensions of PyTorch's flash-attention kernels: multiples of 8 up to 256.
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 256


class Lengths(NamedTuple):
    """
    Sequences one after another.

    Attributes:
        offsets (`torch.Tensor` of shape `(N + 1,)`):
            Where each of `N` sequences begins, and the end of the last one, int32.
        longest (`int`):
            At least the length of the longest.
    """

    offsets: Tensor
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Lengths":
        # At a longest of 1, the kernel takes queries of a group for tokens, and lays out log-sum-exps in another way.
        return cls(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max([2, *lengths]))


# (query, key, value, lengths of queries, lengths of keys, causal, scaling) -> output of shape
# `(Q, num_heads, head_dim)` and log-sum-exps of the scores, of shape `(num_heads, Q)`, float32.
Kernel = Callable[[Tensor, Tensor, Tensor, Lengths, Lengths, bool, float | None], tuple[Tensor, Tensor]]


class VarlenPlan(NamedTuple):
    """
    What attends to what in a row.

    Attributes:
        own ([`Lengths`]):
            What attends to itself, causally: a prompt with its only continuation, a prompt that several continuations
            share, or one of these.
        shared (`tuple[torch.Tensor, torch.Tensor, Lengths, Lengths]`, *optional*):
            Positions of the continuations that share a prompt, and of their prompts; and their lengths, those of the
            continuations of one prompt together.
    """

    own: Lengths
    shared: tuple[Tensor, Tensor, Lengths, Lengths] | None

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> "VarlenPlan":
        own: list[int] = []
        parts: tuple[list[range], list[range]] = ([], [])
        for start, prompt_end, continuations in spans:
            if len(continuations) == 1:
                own.append(continuations[0][1] - start)
                continue
            own += [prompt_end - start, *(end - first for first, end in continuations)]
            if continuations and continuations[-1][1] > prompt_end:
                parts[0].append(range(prompt_end, continuations[-1][1]))
                parts[1].append(range(start, prompt_end))
        positions, prompts = (torch.tensor([*chain(*ranges)], dtype=torch.long, device=device) for ranges in parts)
        lengths, prompt_lengths = (Lengths.of([*map(len, ranges)], device) for ranges in parts)
        return cls(Lengths.of(own, device), (positions, prompts, lengths, prompt_lengths) if parts[0] else None)


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Lengths, keys: Lengths, causal: bool, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """
    PyTorch's own flash-attention over sequences of several lengths, as a [`Kernel`]: what `varlen_attn` of torch 2.10
    calls, and FlashAttention 3 where `torch.nn.attention.activate_flash_attention_impl` has put it in its place.
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
    query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None, kernel: Kernel = flash_attention
) -> Tensor:
    r"""
    As [`~kernels.attend`]. A token of a continuation sees its prompt and what stands before it in the continuation.
    With outputs $o_1$, $o_2$ and log-sum-exps $\ell_1$, $\ell_2$ of the two parts, its output is
    $(e^{\ell_1} o_1 + e^{\ell_2} o_2) / (e^{\ell_1} + e^{\ell_2})$.
    """
    plan = row.kept(("varlen", query.device), lambda: VarlenPlan.of(row.spans, query.device))
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (T, heads, head_dim)
    output, log_sum_exp = kernel(query, key, value, plan.own, plan.own, True, scaling)
    if plan.shared is None:
        return output[None]
    positions, prompts, lengths, prompt_lengths = plan.shared
    of_prompt, prompt_lse = kernel(
        query[positions], key[prompts], value[prompts], lengths, prompt_lengths, False, scaling
    )
    # Part of the weight that is the prompt's, of shape (Q, num_heads, 1).
    weight = torch.sigmoid(prompt_lse - log_sum_exp[:, positions]).T[..., None]
    merged = torch.lerp(output[positions].float(), of_prompt.float(), weight)
    return output.index_copy(0, positions, merged.to(output.dtype))[None]
