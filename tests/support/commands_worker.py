# SPDX-License-Identifier: Apache-2.0
"""
Commands of the command line as a script, for several processes: `commands_worker.py COMMANDS.json [KILL_AFTER]`, with
the words of each command. With KILL_AFTER, the second process is killed at that call of a reward.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from endotrl import EndogenousReward
from endotrl.commands import main as commands
from endotrl.runs.processes import leave


def kill_at(call: int) -> None:
    score, calls = EndogenousReward.score, 0

    def counting(self: EndogenousReward, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return score(self, *args, **kwargs)

    EndogenousReward.score = counting  # type: ignore[method-assign]


if __name__ == "__main__":
    if len(sys.argv) > 2 and os.environ["RANK"] == "1":
        kill_at(int(sys.argv[2]))
    commands.leave = lambda: None  # one group for all commands
    for words in json.loads(Path(sys.argv[1]).read_text()):
        code = commands.main(words)
        if code != 0:
            sys.exit(code)
    leave()
