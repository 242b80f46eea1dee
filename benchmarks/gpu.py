# SPDX-License-Identifier: Apache-2.0
"""
Everything that is asked of one GPU, in one run: exactness, scoring speed, a GRPO step, learning. Weights are random, in
the shapes of Qwen2.5; nothing is downloaded.

    python -m benchmarks.gpu --minutes 6             # or `make gpu`
    python -m benchmarks.gpu --part scoring
    python -m benchmarks.gpu --cpu --output /tmp/x   # tiny sizes: shows that everything runs

What is measured is in [`benchmarks.gpu_cells`], which runs in a process of its own: one that dies, hangs or has lost its
device is begun anew, without the cell in which that happened. A run that was stopped goes on where it was; `--fresh`
begins anew. For a machine without a network, `make gpu-wheels` where there is one fills `wheels/`, from which `make gpu`
installs.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


PARTS = ("exactness", "scoring", "step", "learning")
# Exit status of a process whose device does not answer any more: after an illegal access, nothing runs on it there.
LOST_DEVICE = 75
# Seconds in which the last cell may take longer than expected.
GRACE = 15.0
# Nothing is of the hub, and without a network each try would wait; of several GPUs, a trainer would split a batch over
# all; one kernel is compiled at a time, for which a pool of processes takes longer to start than to compile.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}


def main() -> None:
    """Measures what is not there yet, as far as the time goes, and writes figures and page."""
    args = make_parser().parse_args()
    end = time.time() + 60 * args.minutes
    # Stopped from outside, it stops the process that measures.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    os.environ.update(ENVIRONMENT)
    if not args.cpu:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    file = args.output / "results" / "gpu.json"
    if args.fresh:
        file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu_cells", *sys.argv[1:], "--until", str(end - GRACE)]
    sys.exit(supervise(command, file, end, longest=max(90.0, 20 * args.minutes)))


def supervise(command: Sequence[str], file: Path, end: float, longest: float, tries: int = 8) -> int:
    """
    Runs a command until it ends by itself, and returns its exit status. It is stopped at `end`, in seconds since 1970,
    or if a cell takes `longest` seconds: it writes `file` before each. What died or was stopped is begun anew, with
    `--restarted`, after the end only to write the page.
    """
    status = 1
    for restarted in ([], *[["--restarted"]] * (tries - 1)):
        started = time.time()
        last = max(end, started + 60) if restarted else end
        with subprocess.Popen([*command, *restarted]) as worker:
            try:
                while worker.poll() is None:
                    begun = max(started, file.stat().st_mtime if file.exists() else 0)
                    if time.time() > min(last, begun + longest):
                        sys.stderr.write("A cell takes too long: its process is stopped.\n")
                        worker.kill()
                    time.sleep(0.2)
            except BaseException:
                worker.kill()
                raise
        status = worker.returncode
        if 0 <= status < LOST_DEVICE:
            break
        sys.stderr.write(f"The process ended with {status}.\n")
    return status


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "--minutes",
        type=float,
        default=6.0,
        help="of the whole run: what would not end by then does not begin (default: 6)",
    )
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part; may be repeated")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU, whose figures mean nothing")
    parser.add_argument("--fresh", action="store_true", help="measure again what is there already")
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), help="folder of results/gpu.json and results/gpu.md"
    )
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), help="file whose table between two comments is rewritten"
    )
    # Of one process to the next.
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--restarted", action="store_true", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
