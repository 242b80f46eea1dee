# SPDX-License-Identifier: Apache-2.0
"""Processes of `accelerate launch`: state, division of work, termination."""

import ctypes
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar


if TYPE_CHECKING:
    from accelerate import PartialState

# In a launcher's command line.
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed", "deepspeed", "trl")
Block = TypeVar("Block")


def processes() -> "PartialState":
    """
    This process among those of `accelerate launch`; the only one without it. They wait for each other without a limit:
    at the end of a long file, one can be many minutes ahead, where torch gives up after ten to thirty.
    """
    import torch
    from accelerate import PartialState

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return PartialState()
    # Without an accelerator, accelerate would take each process for the only one.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30))


def share(blocks: Iterable[tuple[int, Block]], process: int, num_processes: int) -> Iterator[Block]:
    """Blocks, given with their sizes, for one process: each goes to the process with the least work so far."""
    sizes = [0] * num_processes
    for size, block in blocks:
        owner = sizes.index(min(sizes))
        sizes[owner] += size
        if owner == process:
            yield block


def leave() -> None:
    """Destroys the process group, if there is one: a process that exits in it may abort in a thread of gloo."""
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()


def end_with_launcher() -> None:
    """
    Makes Linux send this process SIGTERM when its launcher, if any, has ended: `accelerate launch` ends on SIGTERM,
    but leaves its child processes running.
    """
    import psutil

    launcher = os.getppid()
    # Both: a launcher's settings may be exported by hand, and a shell may have its name in its command line.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform != "linux" or not launched:
        return
    is_launcher = any(name in word for word in psutil.Process(launcher).cmdline() for name in LAUNCHERS)
    if is_launcher:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != launcher or (launcher == 1 and not is_launcher):  # it ended during the imports
        os.kill(os.getpid(), signal.SIGTERM)
