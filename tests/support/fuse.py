# SPDX-License-Identifier: Apache-2.0
"""A reward function, to be given the weight 0, that interrupts the run that calls it."""

import os
import signal
import time
from typing import Any


calls = 0


def watch(completions: list[Any], **kwargs: Any) -> list[float]:
    """
    At the call that `ENDOTRL_TEST_FUSE` says, `term:<call>` sends SIGTERM to the launcher, as a scheduler does, and
    `kill:<call>` kills the second process.
    """
    global calls
    calls += 1
    action, _, call = os.environ.get("ENDOTRL_TEST_FUSE", "").partition(":")
    if action and calls == int(call):
        if action == "term" and os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(2)  # until it has come back
        elif action == "kill" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
    return [0.0] * len(completions)
