# SPDX-License-Identifier: Apache-2.0
"""
`python`, `accelerate launch`, `torchrun` and `trl`, unchanged but for one thing: the processes are forked from one that
has imported the libraries, which takes longer than the runs of a test.
"""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import RLock
from types import SimpleNamespace
from typing import Any

from tqdm.auto import tqdm


ROOT = Path(__file__).parents[2]


def accelerate(launcher: str, num_processes: int, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs a script with a file of `accelerate_configs/`."""
    options = ["--config_file", f"accelerate_configs/{launcher}.yaml", "--num_processes", str(num_processes)]
    options += ["--mixed_precision", "no", "--main_process_port", "0"]
    return _launch("accelerate.commands.launch", *options, *command, **env)


def torchrun(num_processes: int, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return _launch("torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes), *command, **env)


def python(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return _launch("", *command, **env)


def trl(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return _launch("trl.cli.main", *command, **env)


def _launch(*words: str, timeout: int = 500, **env: str) -> subprocess.CompletedProcess[str]:
    server = _server()
    assert server.stdin and server.stdout
    with TemporaryDirectory() as folder:
        environment = {**os.environ, **ENVIRONMENT, **env}
        server.stdin.write(json.dumps([words, environment, folder, timeout]) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, code, out, err)


# A process with threads must not fork; and there is no accelerator.
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


@cache
def _server() -> subprocess.Popen[str]:
    """One for this process, ended with it: its input ends."""
    return subprocess.Popen(
        [sys.executable, __file__],
        cwd=ROOT,
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import may print is no answer
    _import()
    for line in sys.stdin:
        words, environment, folder, timeout = json.loads(line)
        pid = _fork(lambda: _run_launcher(words, environment, folder))  # noqa: B023 (called here)
        print(_wait(pid, timeout), file=answers, flush=True)


def _import() -> None:
    # With TRL 1.12 the last ones are not to be had, and what needs them is not tested.
    modules = ["torch.distributed.run", "accelerate.commands.launch", "trl.trainer.grpo_trainer"]
    for name in [*modules, "deepspeed", "endotrl.monitoring", "endotrl.launch"]:
        with suppress(ImportError):
            import_module(name)
    # Progress bars of forked processes share a lock, which one that is killed would keep; and have a thread.
    tqdm.set_lock(RLock())
    tqdm.monitor_interval = 0


def _fork(function: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        function()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int, timeout: float) -> int:
    """Exit code of a launcher, which is killed with all that it has started when the time is over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run_launcher(words: Sequence[str], environment: dict[str, str], folder: str) -> None:
    os.setsid()
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.clear()
    os.environ.update(environment)

    from accelerate.commands import launch
    from torch.distributed import run
    from trl.cli import main

    config_from_args = run.config_from_args

    def forking(args: Any) -> tuple[Any, Callable[..., None], list[str]]:
        config, _, command = config_from_args(args)
        config.start_method = "fork"
        return config, _python, command

    run.config_from_args = forking
    launch.subprocess = SimpleNamespace(Popen=_Forked, CalledProcessError=subprocess.CalledProcessError)
    module, *sys.argv[1:] = words
    if not module:
        return _python(*words[1:])
    {"accelerate.commands.launch": launch.main, "torch.distributed.run": run.main, "trl.cli.main": main}[module]()


class _Forked:
    """A process of Python, with the part of `subprocess.Popen` that accelerate uses."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        def run() -> None:
            os.environ.update(env)
            _python(*command[1:])

        self.pid = _fork(run)
        self.returncode: int | None = None

    def wait(self) -> None:
        self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _python(*words: str) -> None:
    """Runs what `python <words>` would."""
    words = words[1:] if words[0] == "-u" else words
    if words[0] == "-m":
        sys.argv = [*words[1:]]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [*words]
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
