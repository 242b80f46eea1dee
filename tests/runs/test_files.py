# SPDX-License-Identifier: Apache-2.0
"""Disks that are full or read-only, files that are half there, two runs in one place, and secrets."""

import errno
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from endotrl import EndogenousReward
from endotrl.commands.main import main
from endotrl.data.sources import Reader
from endotrl.evaluation.run_folder import RunFolder
from endotrl.runs.jsonl import append_lines
from endotrl.score_file.output_files import Output, Tally, only_run_on
from endotrl.score_file.rows import Row

from ..monitoring.test_monitor import CollapseMonitor, make_trainer
from ..support.rows import parse_row


LINES = [json.dumps({"prompt": f"{i} + {i} =", "completion": f" {2 * i} 😀"}, ensure_ascii=False) for i in range(6)]
SECRET = "hf_thisMustNotBeSeenAnywhere0123456789"


def score(model: str, folder: Path, *more: str) -> int:
    file = folder / "rows.jsonl"
    if not file.exists():
        file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return main(
        ["score", str(file), "--model", model, "--output", str(folder / "out.jsonl"), "--block-size", "2", *more]
    )


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 400))
def test_half_written_input_names_the_bad_line_only(cut):
    data = "\n".join(LINES).encode()[:cut]
    rows = [parse_row(i, line) for i, line in enumerate(data.split(b"\n"), start=1) if line.strip()]
    assert all(isinstance(row, Row) for row in rows)
    assert all(row.error is None for row in rows[:-1])


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, is_refused: Callable[[str], bool]) -> None:
    """From now on, the disk refuses to write files of such names."""
    original = Path.open

    def open_(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if is_refused(self.name) and mode != "rb":
            raise OSError(code, os.strerror(code), str(self))
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)


@pytest.mark.parametrize(
    "code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO], ids=errno.errorcode.get
)
def test_a_disk_that_refuses(code, tiny_model_path, tmp_path, monkeypatch, capsys):
    """One line for the user, and no half of a result that looks whole."""
    refuse(monkeypatch, code, lambda name: name.startswith("out.jsonl"))
    assert score(tiny_model_path, tmp_path) != 0
    message = capsys.readouterr().err
    assert os.strerror(code) in message and "Traceback" not in message
    monkeypatch.undo()
    assert score(tiny_model_path, tmp_path) == 0  # and then it goes on
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(LINES)


def test_two_runs_in_one_output(tiny_model_path, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    path = tmp_path / "out.jsonl"
    with only_run_on(path):
        first = Output(path, Reader(tmp_path / "rows.jsonl"), {})
        first.check(2, overwrite=False)
        first.begin()
        first.write([{"line": 1, "reward": -1.0}], Tally(), 0.1)
        before = (tmp_path / "out.jsonl").read_bytes()
        assert score(tiny_model_path, tmp_path, "--overwrite") != 0
        assert "Another run is writing" in capsys.readouterr().err
        assert (tmp_path / "out.jsonl").read_bytes() == before
    assert score(tiny_model_path, tmp_path, "--overwrite") == 0  # the first has ended
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which no file can be made")
def test_a_folder_without_room_for_a_lock_is_no_other_run():
    with pytest.raises(OSError, match="/proc/x cannot be written: No such file or directory"), only_run_on("/proc/x"):
        pass


def test_the_output_is_taken_before_the_checkpoint_is_read(tiny_model_path, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")

    def read(*args: Any) -> None:
        raise AssertionError("The checkpoint was read.")

    with monkeypatch.context() as patch, only_run_on(tmp_path / "out.jsonl"):
        patch.setattr("endotrl.commands.rows.model_digest", read)
        patch.setattr("endotrl.frozen.names.AutoConfig.from_pretrained", read)
        assert score(tiny_model_path, tmp_path) != 0
        assert "Another run is writing" in capsys.readouterr().err
    # What ends before it has begun leaves nothing behind.
    assert score("/nonexistent", tmp_path) != 0
    assert not (tmp_path / "out.jsonl").exists()


def everything_written(folder: Path) -> str:
    return "".join(path.read_bytes().decode("utf-8", "replace") for path in folder.rglob("*") if path.is_file())


def test_secrets_of_the_environment_are_not_written(tiny_model_path, tmp_path, monkeypatch, capsys, caplog):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    with caplog.at_level(logging.DEBUG, logger="endotrl"):
        assert score(tiny_model_path, tmp_path, "--html", str(tmp_path / "page.html")) == 0
        assert score("/nonexistent", tmp_path, "--overwrite") != 0
    output = capsys.readouterr()
    assert SECRET not in everything_written(tmp_path) + output.out + output.err + caplog.text
    assert SECRET not in repr(EndogenousReward(tiny_model_path))


@pytest.mark.slow
def test_secrets_of_a_training_run_are_not_written(tiny_policy_path, tmp_path, monkeypatch):
    """W&B's configuration is the trainer's arguments and the model's: a token for the hub is in the first."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    trainer = make_trainer(
        tiny_policy_path, tmp_path / "run", max_steps=2, hub_token=SECRET, save_strategy="steps", save_steps=2
    )
    from transformers.integrations import WandbCallback

    trainer.add_callback(WandbCallback())
    CollapseMonitor().attach(trainer)
    trainer.train()
    assert "train/collapse/alarm" in dict(wandb.run.summary)
    config = json.dumps(dict(wandb.run.config), default=str)
    wandb.finish()
    wandb.teardown()  # or the next test's run would go to this one's folder
    assert SECRET not in config
    # `training_args.bin`, which transformers pickles beside a checkpoint, is not ours.
    (tmp_path / "run" / "checkpoint-2" / "training_args.bin").unlink()
    assert SECRET not in everything_written(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors"])
def test_a_damaged_checkpoint_is_not_gone_on_from(name, tiny_policy_path, tmp_path):
    first = make_trainer(tiny_policy_path, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    CollapseMonitor().attach(first)
    first.train()
    path = tmp_path / "checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    second = make_trainer(tiny_policy_path, tmp_path, max_steps=4)
    CollapseMonitor().attach(second)
    with pytest.raises(Exception, match=r"."):
        second.train(resume_from_checkpoint=True)


def test_a_model_folder_that_was_half_copied(tiny_policy_path, tmp_path, monkeypatch):
    """An interrupted download or copy: shards that the index names are missing."""
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_path)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    AutoTokenizer.from_pretrained(tiny_policy_path).save_pretrained(tmp_path)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    with pytest.raises(OSError, match="model-"):
        EndogenousReward(str(tmp_path))(prompts=["a"], completions=["b"])


PAIRS = [{"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": " 1"} for i in range(6)]


def evaluate(model: str, folder: Path, *more: str) -> int:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    command = ["eval", "preference", "--model", model, "--data", str(file), "--output", str(folder / "run"), "--quiet"]
    return main([*command, "--scorers", "log_prob.sum", *more])


def test_two_evaluations_in_one_folder(tiny_model_path, tmp_path, capsys):
    """With `--overwrite` and other settings, the scores of both would stand in one file."""
    first = RunFolder(tmp_path / "run")
    first.hold()
    first.open({"model": "another"})
    append_lines(first.scores_path, [{"key": "k", "tokens": [1], "cut": 0, "scores": {}, "seconds": 0.1}])
    before = first.scores_path.read_bytes()
    assert evaluate(tiny_model_path, tmp_path, "--overwrite") != 0
    assert "Another run is writing" in capsys.readouterr().err
    assert first.scores_path.read_bytes() == before
    del first  # it has ended
    assert evaluate(tiny_model_path, tmp_path, "--overwrite") == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["scores.jsonl", "settings.json.tmp", "report.html.tmp"])
def test_an_evaluation_on_a_disk_that_refuses(code, name, tiny_model_path, tmp_path, monkeypatch, capsys):
    refuse(monkeypatch, code, lambda written: written == name)
    assert evaluate(tiny_model_path, tmp_path) != 0
    message = capsys.readouterr().err
    assert os.strerror(code) in message and name in message and "Traceback" not in message
    monkeypatch.undo()
    assert evaluate(tiny_model_path, tmp_path) == 0  # and then it goes on
    assert json.loads((tmp_path / "run" / "results.json").read_text())["num_items"] == len(PAIRS)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_page_on_a_full_disk(tiny_model_path, tmp_path, capsys):
    """The disk that is full for real: the rows are saved, and the message says which file is not."""
    page = tmp_path / "page.html"
    page.symlink_to("/dev/full")
    assert score(tiny_model_path, tmp_path, "--html", str(page)) != 0
    assert f"The page {page} cannot be written: No space left on device." in capsys.readouterr().err
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == len(LINES)
