# SPDX-License-Identifier: Apache-2.0
"""
Runs of two processes under `accelerate launch` that are terminated, killed and robbed of a file, and end where the
undisturbed run does. On CPUs, over gloo.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from endotrl.runs.checkpoints import last_complete_checkpoint

from ..support.accelerate_server import accelerate
from ..support.helpers import ON_CPU, as_arguments


pytestmark = pytest.mark.slow

# What the second process alone has written.
OWN_FILE = {
    "multi_gpu": "rng_state_1.pth",
    "zero3": "global_step4/*rank_1_*optim_states.pt",
    "fsdp2": "rng_state_1.pth",
}


# "fsdp2" passes too: three more launches, which the suite does without.
@pytest.mark.parametrize("launcher", ["multi_gpu", "zero3"])
def test_terminated_then_killed_then_incomplete(launcher, tiny_policy_path, tmp_path, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": p}) for p in ["a b", "c", "d e f", "g"]))

    def arguments(output: str) -> str:
        settings = {"model_name_or_path": tiny_policy_path, "dataset_name": tmp_path / "prompts.jsonl", **ON_CPU}
        settings |= {"output_dir": tmp_path / output, "max_steps": 6, "save_steps": 2, "logging_steps": 2, "beta": 0.1}
        settings |= {"per_device_train_batch_size": 2, "num_generations": 2, "max_completion_length": 6}
        # Two steps for a generation batch, four for an epoch
        settings |= {"num_iterations": 2, "learning_rate": 1e-2}
        words = ["sampled", *as_arguments(settings)]
        words += ["--reward", "endogenous", "tests.support.fuse.watch", "--reward_weights", "1", "0"]
        file = tmp_path / f"{output}.json"
        file.write_text(json.dumps(words))
        return str(file)

    def start(*outputs: str, fuse: str | None = None) -> subprocess.CompletedProcess[str]:
        monkeypatch.setenv("ENDOTRL_TEST_FUSE", fuse or "")
        return accelerate(launcher, 2, "tests/support/recipe_run.py", *map(arguments, outputs))

    run = tmp_path / "run"

    # SIGTERM to the launcher in step 3: a checkpoint in the middle of a generation batch.
    terminated = start("run", fuse="term:2")
    assert terminated.returncode != 0
    said = terminated.stdout + terminated.stderr
    assert "Terminated at step 3" in said, terminated.stderr[-6000:]
    assert said.count("SIGTERM: finishing this step, saving a checkpoint") == 1  # of the main process
    assert last_complete_checkpoint(run) == run / "checkpoint-3"
    assert not (run / "model.safetensors").exists()

    # SIGKILL of one process in step 5.
    killed = start("run", fuse="kill:1")
    assert killed.returncode != 0 and not (run / "model.safetensors").exists()
    assert last_complete_checkpoint(run) == run / "checkpoint-4", killed.stderr[-6000:]

    # A file of one process is missing.
    (own,) = (run / "checkpoint-4").glob(OWN_FILE[launcher])
    own.unlink()
    resumed = start("run", "whole")
    assert resumed.returncode == 0, resumed.stdout[-2000:] + resumed.stderr[-6000:]
    assert f"checkpoint-4: {own.relative_to(run / 'checkpoint-4')} is missing" in resumed.stderr

    found, expected = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "whole"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = history(run), history(tmp_path / "whole")
    assert [entry["step"] for entry in ours] == [2, 4, 6]
    for entry, expected_entry in zip(ours, theirs, strict=True):
        assert entry == pytest.approx(expected_entry, abs=1e-5)


def history(folder: Path) -> list[dict[str, Any]]:
    """What was logged of steps, times excepted."""
    result = json.loads((folder / "result.json").read_text())
    assert result["num_processes"] == 2
    return [
        {key: value for key, value in entry.items() if not key.startswith(("perf/", "step_time"))}
        for entry in result["history"]
        if "reward" in entry
    ]
