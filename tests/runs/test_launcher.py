# SPDX-License-Identifier: Apache-2.0
"""A recipe ends with the process that launched it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[2]
# Stands for `accelerate launch`, whose name it has in its command line: starts a process, and waits for it.
LAUNCHER = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[2]]).wait()"
CHILD = """
import os, runpy, signal, sys, time
end_with_launcher = runpy.run_path(os.environ["MODULE"])["end_with_launcher"]
def end(*_):
    print("asked to end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
end_with_launcher()
print("running", flush=True)
time.sleep(float(os.environ["SECONDS"]))
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "launched", "expected"),
    [("accelerate", True, "asked to end"), ("accelerate", False, "done"), ("bash", True, "done")],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_child_without_its_launcher(number, name, launched, expected):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "TORCHELASTIC"))}
    env |= {
        "MODULE": str(ROOT / "endotrl" / "runs" / "processes.py"),
        "SECONDS": "30" if expected != "done" else "1",
    }
    if launched:
        env["ACCELERATE_MIXED_PRECISION"] = "no"
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, name, CHILD], env=env, stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "running\n"
    launcher.send_signal(number)
    launcher.wait(timeout=10)
    assert launcher.stdout.readline() == f"{expected}\n"
