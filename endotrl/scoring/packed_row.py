# SPDX-License-Identifier: Apache-2.0
"""Layout of several prompts and their completions in one row without padding."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor


T = TypeVar("T")
# Part of a row that may be filler, so that rows have few different lengths: kernels of half precision on a CPU are
# compiled for each shape and kept, about 1 MB for every new length.
MAX_FILLER = 1 / 32

# Span of a prompt in a row, and the spans of its continuations, each right behind the one before.
Span = tuple[int, int, list[tuple[int, int]]]


@dataclass(frozen=True)
class Group:
    """Token ids of a prompt, at least one, and of its continuations, of which one may be empty."""

    prompt: Sequence[int]
    continuations: list[Sequence[int]]

    @property
    def num_tokens(self) -> int:
        """Tokens that the model runs over."""
        return len(self.prompt) + sum(map(len, self.continuations))


@dataclass
class PackedRow:
    """
    Groups one after another in one row of `T` tokens: a prompt, its continuations, the next prompt, ... Every
    continuation has the positions that follow its prompt, and attends to its prompt and itself only. A few tokens that
    nobody sees fill the row up to one of few lengths.

    Attributes:
        input_ids (`torch.Tensor` of shape `(1, T)`), position_ids (`torch.Tensor` of shape `(1, T)`):
            What the model is given.
        spans (`list[tuple[int, int, list[tuple[int, int]]]]`):
            For every group, and the filler: start and end of the prompt, and start and end of every continuation, in
            the row.
        longest (`int`):
            Length of the longest prompt with a continuation.
    """

    input_ids: Tensor
    position_ids: Tensor
    spans: list[Span]
    longest: int
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[Group]) -> "PackedRow":
        tokens: list[int] = []
        positions: list[Tensor] = []
        spans = []
        longest = 0
        filler = _filler(sum(group.num_tokens for group in groups))
        for group in groups:
            start, prompt_end = len(tokens), len(tokens) + len(group.prompt)
            tokens.extend(group.prompt)
            positions.append(torch.arange(len(group.prompt)))
            ends = []
            for continuation in group.continuations:
                ends.append((len(tokens), len(tokens) + len(continuation)))
                tokens.extend(continuation)
                total = len(group.prompt) + len(continuation)
                positions.append(torch.arange(len(group.prompt), total))
                longest = max(longest, total)
            spans.append((start, prompt_end, ends))
        if filler:
            spans.append((len(tokens), len(tokens) + filler, []))
            tokens.extend([0] * filler)
            # Not counted on, so that no position is beyond those of the rows.
            positions.append(torch.zeros(filler, dtype=torch.long))
        return cls(torch.tensor([tokens]), torch.cat(positions)[None], spans, longest)

    def states(self, group: int, continuation: int) -> list[int]:
        """
        Positions in the row of the states of a continuation of `L` tokens: `L + 1` of them, the first of which is the
        last token of the prompt. The state at `h` predicts token `h`.
        """
        _, prompt_end, ends = self.spans[group]
        return [prompt_end - 1, *range(*ends[continuation])]

    def kept(self, key: Hashable, make: Callable[[], T]) -> T:
        """What a kernel makes of the spans once, for all layers."""
        if key not in self._kept:
            self._kept[key] = make()
        kept: T = self._kept[key]
        return kept


def _filler(num_tokens: int) -> int:
    """
    Tokens that bring a row to a multiple of the largest power of two of which less than [`MAX_FILLER`] is wasted.
    """
    multiple = 2 ** max(0, math.floor(math.log2(max(1, num_tokens * MAX_FILLER))))
    return -num_tokens % multiple
