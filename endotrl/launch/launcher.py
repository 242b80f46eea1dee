# SPDX-License-Identifier: Apache-2.0
"""End of a process with the launcher that started it."""

import os
import signal
import sys
import threading
import time

import psutil


# In the command line of a launcher.
LAUNCHERS = ("accelerate", "torchrun", "torch.distributed", "deepspeed", "trl")


def end_with_launcher(every: float = 1.0) -> None:
    """
    Sends this process SIGTERM when the one that launched it, if any, has ended: `accelerate launch` ends on SIGTERM,
    and leaves what it has started to itself.
    """
    launcher = os.getppid()
    # Both: settings of a launcher may be exported by hand, and a shell may have its name in its command line.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if sys.platform == "win32" or not launched:
        return
    # It may have ended while this process was importing.
    if not any(name in word for word in psutil.Process(launcher).cmdline() for name in LAUNCHERS):
        if launcher == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(every)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
