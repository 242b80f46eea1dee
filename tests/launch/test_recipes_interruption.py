# SPDX-License-Identifier: Apache-2.0
"""The same command goes on where a run was cut off, and ends where the uninterrupted one does."""

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, PPOConfig, PPOTrainer
from endotrl import launch as recipes
from endotrl.runs import resumption
from endotrl.runs.checkpoints import COMPLETE_FILE, checkpoints, delete_old, last_complete_checkpoint, mark_complete
from endotrl.runs.files import replace_text

from ..support.accelerate_server import python
from ..support.helpers import ON_CPU, as_arguments
from ..support.recipes import Killed, kill


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


@pytest.fixture(autouse=True)
def no_fuse(monkeypatch):
    monkeypatch.setattr("tests.launch.test_recipes_interruption.fuse", lambda call: None)


@pytest.fixture
def launch(tiny_policy_path, tmp_path):
    return lambda *arguments, **kwargs: start(tmp_path, tiny_policy_path, *arguments, **kwargs)


@pytest.fixture(scope="module")
def whole(tiny_policy_path, tmp_path_factory):
    """GRPO, undisturbed: what most tests compare with."""
    folder = tmp_path_factory.mktemp("whole")
    start(folder, tiny_policy_path, "grpo", "whole")
    return folder / "whole"


def start(folder: Path, model: str, kind: str, output: str, *arguments: str, trainer_class: Any = None) -> Any:
    """Launches a recipe in this process."""
    global calls
    calls = 0
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in ["a b", "c", "d e f", "g"] * 4))
    settings = {"model_name_or_path": model, "dataset_name": prompts, "output_dir": folder / output, **ON_CPU}
    settings |= {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4, "beta": 0.1}
    settings |= {"num_generations": {"grpo": 2, "ppo": 1}[kind], "learning_rate": 1e-2, "max_completion_length": 6}
    words = as_arguments(settings)
    words += ["--reward", "endogenous", "tests.launch.test_recipes_interruption.watch", "--reward_weights", "1", "0"]
    standard, config = CLASSES[kind]
    return recipes.launch(trainer_class or standard, config, [*words, *arguments])


def assert_same_run(found: Path, expected: Path) -> None:
    for name, tensor in load_file(expected / "model.safetensors").items():
        torch.testing.assert_close(load_file(found / "model.safetensors")[name], tensor, atol=1e-6, rtol=0, msg=name)

    def history(folder: Path) -> list[tuple[Any, ...]]:
        state = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())
        return [(entry["step"], entry["reward"]) for entry in state["log_history"] if "reward" in entry]

    for (step, reward), (expected_step, expected_reward) in zip(history(found), history(expected), strict=True):
        assert step == expected_step and reward == pytest.approx(expected_reward)


def set_fuse(monkeypatch: pytest.MonkeyPatch, call: int, action: Callable[[], None]) -> None:
    monkeypatch.setattr("tests.launch.test_recipes_interruption.fuse", lambda n: action() if n == call else None)


# PPO generates every four steps: here its second generation is for step 5, and a step before is resumed within a
# batch.
@pytest.mark.parametrize(("kind", "call"), [("grpo", 6), ("ppo", 2)])
def test_killed(kind, call, launch, whole, tmp_path, monkeypatch):
    if kind == "ppo":
        launch(kind, "whole")
        whole = tmp_path / "whole"

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
    assert_same_run(tmp_path / "killed", whole)


def test_killed_between_the_last_checkpoint_and_the_end(launch, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    trainer = launch("grpo", "run", "--dataset_name", str(whole.parent / "prompts.jsonl"))
    assert calls == 0 and trainer.state.global_step == 6
    assert_same_run(tmp_path / "run", whole)


def test_with_a_limit_there_is_always_a_complete_checkpoint(launch, whole, tmp_path, monkeypatch):
    def killed_before_marking(checkpoint: Path, step: int, *args: Any) -> None:
        if step == 4:
            raise Killed
        mark_complete(checkpoint, step, *args)

    monkeypatch.setattr(resumption, "mark_complete", killed_before_marking)
    with pytest.raises(Killed):
        launch("grpo", "run", "--save_total_limit", "1")
    assert (tmp_path / "run" / "checkpoint-4").is_dir()
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"
    monkeypatch.undo()
    launch("grpo", "run", "--save_total_limit", "1")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert_same_run(tmp_path / "run", whole)


def test_rewards_with_a_state(launch, tmp_path, monkeypatch):
    arguments = ["--reward", "random", "endogenous", "tests.launch.test_recipes_interruption.watch"]
    arguments += ["--reward_weights", "1", "1", "0", "--reward_correction", "length"]
    launch("grpo", "whole", *arguments)

    set_fuse(monkeypatch, 4, kill)
    with pytest.raises(Killed):
        launch("grpo", "run", *arguments)
    monkeypatch.undo()
    launch("grpo", "run", *arguments)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_sigterm(launch, whole, tmp_path, monkeypatch):
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
    assert_same_run(tmp_path / "terminated", whole)


def test_start_from_elsewhere_and_go_on_from_here(launch, tmp_path):
    launch("grpo", "first", "--max_steps", "2")
    arguments = ["--resume_from_checkpoint", str(tmp_path / "first" / "checkpoint-2")]
    assert launch("grpo", "second", *arguments, "--max_steps", "4").state.global_step == 4 and calls == 2
    assert launch("grpo", "second", *arguments).state.global_step == 6 and calls == 2  # from step 4
    # But a checkpoint of its own is the one that was asked for.
    back = ["--resume_from_checkpoint", str(tmp_path / "second" / "checkpoint-4")]
    assert launch("grpo", "second", *back).state.global_step == 6 and calls == 2


def test_starting_anew_gives_up_what_was_there(launch, tmp_path, monkeypatch):
    launch("grpo", "run")

    set_fuse(monkeypatch, 4, kill)
    with pytest.raises(Killed):
        launch("grpo", "run", "--resume", "False", "--learning_rate", "1e-3")
    # Not the checkpoint-6 of the run before.
    assert last_complete_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


class TestOneRunInAFolder:
    def test_the_second_is_refused_before_a_model_is_loaded(self, launch, tmp_path, capsys):
        launch("grpo", "run", "--max_steps", "2")
        before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
        with resumption.only_run_in(str(tmp_path / "run")):
            with pytest.raises(SystemExit) as ended:
                launch("grpo", "run", "--model_name_or_path", "no-such-model")
            assert ended.value.code == 2
            assert "Another run is writing to" in " ".join(capsys.readouterr().err.split())
            assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
        assert launch("grpo", "run", "--max_steps", "4").state.global_step == 4  # the other one has ended

    def test_the_lock_ends_with_its_process_and_workers_do_not_hold_it(self, tmp_path):
        reading, writing = os.pipe()
        run = os.fork()
        if not run:  # which is killed in here, whatever happens
            try:
                with resumption.only_run_in(str(tmp_path)):
                    worker = os.fork()
                    if worker:
                        os.write(writing, str(worker).encode())
                    time.sleep(600)
            finally:
                os._exit(1)
        worker = int(os.read(reading, 20))
        try:
            with pytest.raises(ValueError, match="Another run is writing"), resumption.only_run_in(str(tmp_path)):
                pass
            os.kill(run, signal.SIGKILL)
            os.waitpid(run, 0)
            with resumption.only_run_in(str(tmp_path)):
                os.kill(worker, 0)  # it is still there
        finally:
            with suppress(ProcessLookupError):
                os.kill(run, signal.SIGKILL)
            os.kill(worker, signal.SIGKILL)

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        def refuse(*args: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", refuse)
        with resumption.only_run_in(str(tmp_path)):
            pass


def test_what_a_complete_checkpoint_consists_of(tmp_path, caplog):
    for step in (2, 10):
        folder = tmp_path / f"checkpoint-{step}" / f"global_step{step}"
        folder.mkdir(parents=True)
        for rank in (0, 1):
            (folder / f"rank_{rank}.pt").write_bytes(b"weights")
        assert last_complete_checkpoint(tmp_path) == (None if step == 2 else tmp_path / "checkpoint-2")
        mark_complete(tmp_path / f"checkpoint-{step}", step, 2)
        assert last_complete_checkpoint(tmp_path) == tmp_path / f"checkpoint-{step}"
    (tmp_path / "checkpoint-10" / "README.md").write_text("more is no harm")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    (folder / "rank_1.pt").write_bytes(b"weig")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "global_step10/rank_1.pt has 4 bytes instead of 7" in caplog.text
    (folder / "rank_1.pt").unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "global_step10/rank_1.pt is missing" in caplog.text


def test_old_checkpoints(tmp_path):
    for step in (1, 2, 9, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()

    def left() -> set[int]:
        return set(checkpoints(tmp_path))

    delete_old(tmp_path, 10, None, None)
    delete_old(tmp_path, 10, 0, None)
    assert left() == {1, 2, 9, 10, 12}
    delete_old(tmp_path, 10, 3, str(tmp_path / "checkpoint-1"))  # the best one, one more, and the last one
    assert left() == {1, 9, 10, 12}  # a later one is of a run before, and will be written over
    delete_old(tmp_path, 10, 1, str(tmp_path / "checkpoint-1"))
    assert left() == {1, 10, 12}


def test_a_checkpoint_is_on_the_disk_before_it_counts(launch, tmp_path, monkeypatch):
    fsync, synced, seen = os.fsync, set(), []

    def watched_fsync(descriptor: int) -> None:
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def watched_mark(marker: Path, text: str) -> None:
        seen.append({path.stat().st_ino for path in marker.parent.rglob("*") if path.is_file()})
        assert seen[-1] <= synced
        replace_text(marker, text)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr("endotrl.runs.checkpoints.replace_text", watched_mark)
    launch("grpo", "run", "--max_steps", "2")
    assert len(seen) == 1 and len(seen[0]) > 5


# Also as with DeepSpeed, whose gradients are its own, and between two logs.
@pytest.mark.parametrize(
    ("method", "step", "words", "said"),
    [("compute_loss", 3, [], "gradients are NaN"), ("training_step", 2, ["--logging_steps", "5"], "loss is NaN")],
)
def test_nan(method, step, words, said, launch, tmp_path):
    class Exploding(DenseGRPOTrainer):
        pass

    def explode(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = getattr(DenseGRPOTrainer, method)(self, *args, **kwargs)
        return found * (float("nan") if self.state.global_step == step else 1.0)

    setattr(Exploding, method, explode)
    with pytest.raises(FloatingPointError, match=f"{said}.*at step 4.*last good checkpoint is .*checkpoint-2"):
        launch("grpo", "run", *words, trainer_class=Exploding)
    checkpoint = last_complete_checkpoint(tmp_path / "run")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"
    assert all(tensor.isfinite().all() for tensor in load_file(checkpoint / "model.safetensors").values())


def test_other_settings_are_another_run(launch, tmp_path, capsys):
    launch("grpo", "run", "--max_steps", "2")
    with pytest.raises(SystemExit) as ended:
        launch("grpo", "run", "--reward_alpha", "2")
    assert ended.value.code == 2
    assert "other settings (`reward_alpha` was 1.0 and is 2.0)" in " ".join(capsys.readouterr().err.split())
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


def test_killed_at_random_ten_times(tmp_path):
    """By real SIGKILLs. `benchmarks/interruptions.py` says how, and does more of it, and to the other recipes too."""
    options = ["--recipes", "grpo", "--steps", "32", "--kills", "10", "--output", str(tmp_path / "results")]
    finished = python("-m", "benchmarks.interruptions", *options)
    assert finished.returncode == 0, finished.stderr[-4000:]
    (run,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert run["kills"] == 10
    assert run["hit"]["a training step"] >= 2 and run["hit"]["saving a checkpoint"] >= 2
    assert run["tensors"] > 20 and run["metrics"] > 200
    assert run["different_tensors"] == [] and run["different_metrics"] == []
