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

from endotrl import EndogenousReward
from endotrl.commands.main import main
from endotrl.data.sources import Reader
from endotrl.evaluation.run_folder import RunFolder
from endotrl.runs.files import lock_folder, only_run_on
from endotrl.runs.jsonl import append_lines
from endotrl.score_file.output_files import Output, Tally


LINES = [json.dumps({"prompt": f"{i} + {i} =", "completion": f" {2 * i} 😀"}, ensure_ascii=False) for i in range(6)]
SECRET = "hf_thisMustNotBeSeenAnywhere0123456789"


def score(model: str, folder: Path, *more: str) -> int:
    file = folder / "rows.jsonl"
    if not file.exists():
        file.write_text("\n".join(LINES) + "\n", encoding="utf-8")
    return main(
        ["score", str(file), "--model", model, "--output", str(folder / "out.jsonl"), "--block-size", "2", *more]
    )


def refuse(monkeypatch: pytest.MonkeyPatch, code: int, is_refused: Callable[[str], bool]) -> None:
    """From now on, the disk refuses to write files of such names."""
    original = Path.open

    def open_(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if is_refused(self.name) and mode != "rb":
            raise OSError(code, os.strerror(code), str(self))
        return original(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)


def test_two_runs_in_one_output(tiny_model_path, tmp_path, monkeypatch, capsys):
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES) + "\n", encoding="utf-8")
    path = tmp_path / "out.jsonl"

    def read(*args: Any) -> None:
        raise AssertionError("The checkpoint was read.")

    with monkeypatch.context() as patch, only_run_on(path):
        patch.setattr("endotrl.commands.models.model_digest", read)
        patch.setattr("endotrl.frozen.names.AutoConfig.from_pretrained", read)
        first = Output(path, Reader(tmp_path / "rows.jsonl"), {})
        first.check(2, overwrite=False)
        first.begin()
        first.write([{"line": 1, "reward": -1.0}], Tally(), 0.1)
        before = path.read_bytes()
        assert score(tiny_model_path, tmp_path, "--overwrite") != 0
        assert "Another run is writing" in capsys.readouterr().err
        assert path.read_bytes() == before
    assert score(tiny_model_path, tmp_path, "--overwrite") == 0  # the first has ended
    assert not list(tmp_path.glob("*.lock"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder in which no file can be made")
def test_a_folder_without_room_for_a_lock_is_no_other_run():
    with pytest.raises(OSError, match="/proc/x cannot be written: No such file or directory"), only_run_on("/proc/x"):
        pass


def test_a_lock_that_nothing_needs_any_more_is_no_other_run(tmp_path):
    held = lock_folder(tmp_path, "--output")
    with pytest.raises(ValueError, match="Another run is writing to .* or choose another --output"):
        lock_folder(tmp_path, "--output")
    cycle = [held]
    cycle.append(cycle)
    del cycle, held
    assert lock_folder(tmp_path, "--output").is_locked


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


PAIRS = [{"prompt": f"{i} + {i} =", "chosen": f" {2 * i}", "rejected": " 1"} for i in range(6)]


def evaluate(model: str, folder: Path, *more: str) -> int:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    command = ["eval", "preference", "--model", model, "--data", str(file), "--output", str(folder / "run"), "--quiet"]
    return main([*command, "--scorers", "log_prob.sum", *more])


def test_two_evaluations_in_one_folder(tiny_model_path, tmp_path, capsys):
    """With `--overwrite` and other settings, the scores of both would stand in one file."""
    first = RunFolder(tmp_path / "run")
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
