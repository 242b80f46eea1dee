# SPDX-License-Identifier: Apache-2.0
"""A recipe ends with the process that launched it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
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
end_with_launcher(every=0.05)
print("running", flush=True)
time.sleep(float(os.environ["SECONDS"]))
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("name", "launched", "expected"),
    [("accelerate", True, "asked to end"), ("accelerate", False, "done"), ("bash", True, "done")],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_child_without_its_launcher(number: int, name: str, launched: bool, expected: str) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE", "TORCHELASTIC"))}
    env |= {
        "MODULE": str(ROOT / "endotrl" / "launch" / "launcher.py"),
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


@pytest.mark.slow
def test_sigterm_to_accelerate_launch(tiny_policy_path: str, tmp_path: Path) -> None:
    """One line at once, a checkpoint after the step, and no process left."""
    (tmp_path / "waiting.py").write_text(
        "import time\n\n\ndef reward(completions, **kwargs):\n    time.sleep(1)\n    return [0.0] * len(completions)\n"
    )
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in ["a b", "c", "d e f", "g"]))
    settings = {
        "model_name_or_path": tiny_policy_path,
        "dataset_name": tmp_path / "prompts.jsonl",
        "output_dir": tmp_path / "run",
        "reward": "waiting.reward",
        "max_steps": 100,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    words = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch"]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "recipes" / "grpo.py")]
    with (tmp_path / "said.txt").open("w+") as said:
        launcher = subprocess.Popen(
            [*launch, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "OMP_NUM_THREADS": "1"},
            stdout=said,
            stderr=subprocess.STDOUT,
        )
        wait_until(lambda: "'loss'" in (tmp_path / "said.txt").read_text(), 400)
        (child,) = psutil.Process(launcher.pid).children()
        launcher.terminate()
        launcher.wait(timeout=10)
        wait_until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE, 30)
    text = (tmp_path / "said.txt").read_text()
    assert text.count("SIGTERM: this step is finished, a checkpoint is saved") == 1
    assert "which is saved. The same command goes on from there." in text
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "complete.json").is_file()
    assert not (tmp_path / "run" / "model.safetensors").exists()


def wait_until(happened: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():  # type: ignore[operator]
        assert time.monotonic() < end, "It has not happened."
        time.sleep(0.2)
