# SPDX-License-Identifier: Apache-2.0
"""The processes of `accelerate launch` that a command or a recipe runs in."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    from accelerate import PartialState

# In the command line of a launcher.
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed", "deepspeed", "trl")
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


def end_with_launcher() -> None:
    """
    Has Linux send this process SIGTERM when the one that launched it, if any, has ended: `accelerate launch` ends on
    SIGTERM, and leaves what it has started to itself.
    """
    import psutil

    launcher = os.getppid()
    # Both: settings of a launcher may be exported by hand, and a shell may have its name in its command line.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not launched:
        return
    is_launcher = any(name in word for word in psutil.Process(launcher).cmdline() for name in LAUNCHERS)
    if is_launcher:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher or (launcher == 1 and not is_launcher):  # it ended while this process was importing
        os.kill(os.getpid(), signal.SIGTERM)
