# SPDX-License-Identifier: Apache-2.0
"""The attention kernel of a packed row: of those that a device has, the one that is fastest there and right."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from .flex import flex_attention, has_flex_attention
from .forward_pass import multiplies_exactly, relative_difference
from .packing import PackedRow, block_attention
from .varlen import has_flash_attention, varlen_attention


logger = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, PackedRow, float | None], Tensor]
REFERENCE = "blocks"
# In the order in which they are tried.
KERNELS: dict[str, Kernel] = {REFERENCE: block_attention, "varlen": varlen_attention, "flex": flex_attention}
# Calls, one per layer and pass, with rows of one kind after which a kernel that takes seconds to compile is tried: 40
# passes of a model of 24 layers, so that short runs do not pay for it.
CALLS_BEFORE_COMPILING = 1000
# A kernel must be faster by more than chance, so that two runs choose alike.
GAIN = 0.9
REPEATS = 3


class Kind(NamedTuple):
    """
    Rows that are alike: heads are numbers of queries and of keys, and their dimensions; tokens and sequences count by
    their length in bits.
    """

    device: torch.device
    dtype: torch.dtype
    heads: tuple[int, int, int, int]
    token_bits: int
    sequence_bits: int


@dataclass
class Choice:
    """
    The kernel for rows of one kind.

    Attributes:
        name (`str`):
            Key of [`KERNELS`].
        seconds (`dict[str, float]`):
            What each kernel that was tried took, infinity if it failed.
        calls (`int`):
            How often such a row has come.
    """

    name: str = REFERENCE
    seconds: dict[str, float] = field(default_factory=dict)
    calls: int = 0


choices: dict[Kind, Choice] = {}
_told: set[tuple[str, torch.device]] = set()  # kernels of which was logged that they fail


def attend(query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None) -> Tensor:
    """
    Attention over a packed row, in which a continuation sees its prompt and itself. The kernels are measured on the
    first row of each kind (device, dtype, heads, power of two of tokens and of sequences), and one whose numbers are
    not those of [`block_attention`] is not used.

    Args:
        query (`torch.Tensor` of shape `(1, num_heads, T, head_dim)`):
            Queries, rotated.
        key, value (`torch.Tensor` of shape `(1, num_key_value_heads, T, head_dim)`):
            Keys and values.
        row ([`PackedRow`]):
            What attends to what.
        scaling (`float`, *optional*):
            Factor of the scores.

    Returns:
        `torch.Tensor` of shape `(1, T, num_heads, head_dim)`.
    """
    available = {"varlen": has_flash_attention(query, value), "flex": has_flex_attention(query)}
    if not any(available.values()):
        return block_attention(query, key, value, row, scaling)
    sequences = sum(1 + len(continuations) for *_, continuations in row.spans)
    heads = (query.shape[1], key.shape[1], query.shape[-1], value.shape[-1])
    kind = Kind(query.device, query.dtype, heads, query.shape[2].bit_length(), sequences.bit_length())
    choice = choices.setdefault(kind, Choice())
    choice.calls += 1
    available["flex"] &= choice.calls > CALLS_BEFORE_COMPILING
    if any(there and name not in choice.seconds for name, there in available.items()):
        names = [name for name, there in available.items() if there and choice.seconds.get(name) != math.inf]
        _measure(choice, names, query, key, value, row, scaling)
        logger.info("Packed rows of %s run by the kernel %r; seconds: %s", kind, choice.name, choice.seconds)
    return KERNELS[choice.name](query, key, value, row, scaling)


def _measure(
    choice: Choice, names: list[str], query: Tensor, key: Tensor, value: Tensor, row: PackedRow, scaling: float | None
) -> None:
    """Measures these kernels beside the reference, and chooses."""
    reference = KERNELS[REFERENCE](query, key, value, row, scaling)
    allowed = 1e-3 if multiplies_exactly(query.dtype, query.device) else 0.05
    choice.name = REFERENCE
    for name in (REFERENCE, *names):
        run = partial(KERNELS[name], query, key, value, row, scaling)
        try:
            # A first call compiles, and makes the plan that the layers share.
            difference = relative_difference(run(), reference).max().item()
            if not difference <= allowed:  # NaN is not
                raise ValueError(f"its numbers are off by a part of {difference:.2g}")
            choice.seconds[name] = min(_seconds(run, query.device) for _ in range(REPEATS))
        except Exception as error:  # compilers and drivers have many kinds, and there are other kernels
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
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    started = time.perf_counter()
    run()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - started
