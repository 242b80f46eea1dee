# SPDX-License-Identifier: Apache-2.0
"""The processes of `accelerate launch` that a command of the command line runs in."""

import os
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    from accelerate import PartialState

Block = TypeVar("Block")


def processes() -> "PartialState":
    """
    This process among those of `accelerate launch`; the only one without it. They wait for each other for as long as
    it takes: at the end of a long file, one can be many minutes ahead, where torch gives up after ten to thirty.
    """
    import torch
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState()
    # Without an accelerator, accelerate takes each process for the only one unless it is told.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


def share(blocks: Iterable[tuple[int, Block]], process: int, num_processes: int) -> Iterator[Block]:
    """The blocks, given with their sizes, that a process is to do: each goes to the one that has the least so far."""
    sizes = [0] * num_processes
    for size, block in blocks:
        owner = sizes.index(min(sizes))
        sizes[owner] += size
        if owner == process:
            yield block


def leave() -> None:
    """Ends the process group, if there is one: a process that exits in it may abort in a thread of gloo."""
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()
