# SPDX-License-Identifier: Apache-2.0
"""Attention of a packed row on a GPU: two calls of a flash-attention kernel, merged by their log-sum-exps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .packing import PackedRow, Span


# Head dimensions of PyTorch's flash-attention kernels: multiples of 8 up to 256.
HEAD_DIM_MULTIPLE, MAX_HEAD_DIM = 8, 256


@dataclass(frozen=True)
class Lengths:
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
        return cls(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device), max(2, *lengths))


# (query, key, value, lengths of queries, lengths of keys, causal, scaling) -> output of shape
# `(Q, num_heads, head_dim)` and log-sum-exps of the scores, of shape `(num_heads, Q)`, float32.
Kernel = Callable[[Tensor, Tensor, Tensor, Lengths, Lengths, bool, float | None], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class VarlenPlan:
    """
    What attends to what in a row: every sequence to itself, causally, and continuations that share a prompt to it.

    Attributes:
        own ([`Lengths`]):
            A prompt with its only continuation, a prompt that several continuations share, or one of these.
        shared (`torch.Tensor` of shape `(Q,)`, *optional*), prompts (`torch.Tensor` of shape `(K,)`, *optional*):
            Positions of the continuations that share a prompt, and of their prompts.
        shared_lengths ([`Lengths`], *optional*), prompt_lengths ([`Lengths`], *optional*):
            Of all continuations of one prompt together, and of the prompt.
    """

    own: Lengths
    shared: Tensor | None = None
    prompts: Tensor | None = None
    shared_lengths: Lengths | None = None
    prompt_lengths: Lengths | None = None

    @classmethod
    def of(cls, spans: Sequence[Span], device: torch.device) -> "VarlenPlan":
        own: list[int] = []
        groups: list[tuple[range, range]] = []
        for start, prompt_end, continuations in spans:
            if len(continuations) == 1:
                own.append(continuations[0][1] - start)
                continue
            own += [prompt_end - start, *(end - first for first, end in continuations)]
            if continuations and continuations[-1][1] > prompt_end:
                groups.append((range(prompt_end, continuations[-1][1]), range(start, prompt_end)))
        lengths = Lengths.of(own, device)
        if not groups:
            return cls(lengths)
        shared, prompts = ([group[kind] for group in groups] for kind in range(2))
        return cls(
            lengths,
            torch.tensor([i for part in shared for i in part], device=device),
            torch.tensor([i for part in prompts for i in part], device=device),
            Lengths.of(list(map(len, shared)), device),
            Lengths.of(list(map(len, prompts)), device),
        )


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Lengths, keys: Lengths, causal: bool, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """PyTorch's own flash-attention kernel over sequences of several lengths, as a [`Kernel`]."""
    output, log_sum_exp, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        queries.offsets,
        keys.offsets,
        queries.longest,
        keys.longest,
        0.0,  # no dropout
        causal,
        False,
        scale=scaling,
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
    kernel: Kernel = flash_attention,
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
    assert plan.prompts is not None and plan.shared_lengths is not None and plan.prompt_lengths is not None
    of_prompt, prompt_lse = kernel(
        query[plan.shared],
        key[plan.prompts],
        value[plan.prompts],
        plan.shared_lengths,
        plan.prompt_lengths,
        False,
        scaling,
    )
    # Part of the weight that is the prompt's, of shape (Q, num_heads, 1).
    weight = torch.sigmoid(prompt_lse - log_sum_exp[:, plan.shared]).T[..., None]
    merged = torch.lerp(output[plan.shared].float(), of_prompt.float(), weight)
    return output.index_copy(0, plan.shared, merged.to(output.dtype))[None]
