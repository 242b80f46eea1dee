# SPDX-License-Identifier: Apache-2.0
"""The same command goes on where a run was cut off, and ends where the uninterrupted one does."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer, recipes
from endotrl.recipes.resumption import COMPLETE_FILE, last_complete_checkpoint


pytestmark = pytest.mark.slow

CLASSES = {"grpo": (DenseGRPOTrainer, DenseGRPOConfig), "ppo": (PPOTrainer, PPOConfig)}
calls = 0


def fuse(call: int) -> None:
    """What a reward function of weight 0 does when it is called for the n-th time in a run."""


def watch(completions: list[Any], **kwargs: Any) -> list[float]:
    global calls
    calls += 1
    fuse(calls)
    return [0.0] * len(completions)


class Killed(BaseException):
    """What SIGKILL leaves behind: nothing is saved, nothing is closed."""


@pytest.fixture(autouse=True)
def no_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_recipes_interruption.fuse", lambda call: None)


@pytest.fixture
def launch(tiny_policy_path: str, tmp_path: Path) -> Callable[..., Any]:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ["a b", "c", "d e f", "g"] * 4))

    def start(kind: str, output: str, *arguments: str, trainer_class: Any = None) -> Any:
        global calls
        calls = 0
        settings = {
            "model_name_or_path": tiny_policy_path,
            "dataset_name": prompts,
            "output_dir": tmp_path / output,
            "max_steps": 6,
            "save_steps": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "num_generations": {"grpo": 2, "ppo": 1}[kind],
            "learning_rate": 1e-2,
            "beta": 0.1,
            "max_completion_length": 6,
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        }
        words = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
        words += ["--reward", "endogenous", "tests.test_recipes_interruption.watch", "--reward_weights", "1", "0"]
        standard, config = CLASSES[kind]
        return recipes.launch(trainer_class or standard, config, [*words, *arguments])

    return start


def assert_same_run(found: Path, expected: Path) -> None:
    for name, tensor in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(load_file(found / "model.safetensors")[name], tensor, atol=1e-6, rtol=0, msg=name)

    def history(folder: Path) -> list[tuple[Any, ...]]:
        state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
        return [(entry["step"], entry["reward"]) for entry in state["log_history"] if "reward" in entry]

    for (step, reward), (expected_step, expected_reward) in zip(history(found), history(expected), strict=True):
        assert step == expected_step and reward == pytest.approx(expected_reward)


def set_fuse(monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[], None]) -> None:
    monkeypatch.setattr("tests.test_recipes_interruption.fuse", lambda n: action() if n == call else None)


# PPO generates every four steps: here its second generation is for step 5, and a step before is resumed within a batch.
@pytest.mark.parametrize(("kind", "call"), [("grpo", 6), ("ppo", 2)])
def test_killed(
    kind: str, call: int, launch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(kind, "whole")

    def kill() -> None:
        raise Killed

    set_fuse(monkeypatch, call, kill)
    with pytest.raises(Killed):
        launch(kind, "killed")
    assert last_complete_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-4"
    # And as if it had been killed earlier, while that was written:
    (tmp_path / "killed" / "checkpoint-4" / COMPLETE_FILE).unlink()
    (tmp_path / "killed" / "checkpoint-4" / "optimizer.pt").unlink()
    assert last_complete_checkpoint(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-2"
    monkeypatch.undo()
    launch(kind, "killed")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_sigterm(launch: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launch("grpo", "whole")
    handler = signal.getsignal(signal.SIGTERM)
    set_fuse(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        launch("grpo", "terminated")
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert last_complete_checkpoint(tmp_path / "terminated") == tmp_path / "terminated" / "checkpoint-3"
    assert not (tmp_path / "terminated" / "model.safetensors").exists()  # it is not done
    monkeypatch.undo()
    launch("grpo", "terminated")
    assert_same_run(tmp_path / "terminated", tmp_path / "whole")


def test_nan(launch: Callable[..., Any], tmp_path: Path) -> None:
    class Exploding(DenseGRPOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs) * (float("nan") if self.state.global_step == 3 else 1.0)

    with pytest.raises(
        FloatingPointError, match="gradients are NaN.*at step 4.*checkpoint-2 is from before, and is kept"
    ):
        launch("grpo", "run", trainer_class=Exploding)
    checkpoint = last_complete_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_full_disk(launch: Callable[..., Any], tmp_path: Path) -> None:
    class OnSmallDisk(DenseGRPOTrainer):
        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            if self.state.global_step == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            super()._save_optimizer_and_scheduler(output_dir)

    launch("grpo", "whole")
    with pytest.raises(OSError, match="disk of `output_dir` is full.*checkpoint-2 is complete.*same command again"):
        launch("grpo", "run", trainer_class=OnSmallDisk)
    launch("grpo", "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_other_settings_are_another_run(
    launch: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    launch("grpo", "run", "--max_steps", "2")
    with pytest.raises(SystemExit) as ended:
        launch("grpo", "run", "--reward_alpha", "2")
    assert ended.value.code == 2
    assert "other settings (reward_alpha: 1.0 -> 2.0)" in " ".join(capsys.readouterr().err.split())
    # Longer is the same run, and goes on.
    trainer = launch("grpo", "run", "--max_steps", "3")
    assert calls == 1 and trainer.state.global_step == 3
    launch("grpo", "run", "--max_steps", "2", "--reward_alpha", "2", "--resume", "False")
    assert calls == 2
    shutil.rmtree(tmp_path / "run")
    record_of = launch("grpo", "run", "--max_steps", "1", "--save_strategy", "no")
    record = json.loads((tmp_path / "run" / "recipe.json").read_text())
    assert record["settings"]["training"]["learning_rate"] == record_of.args.learning_rate
    assert record["settings"]["reward"]["reward"][0] == "endogenous"
    assert record["versions"].keys() >= {"endotrl", "torch", "trl", "transformers", "accelerate", "python"}
