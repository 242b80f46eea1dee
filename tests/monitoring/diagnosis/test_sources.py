# SPDX-License-Identifier: Apache-2.0
"""The same run is read from all that trainers and trackers write, finished or not."""

import gzip
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from endotrl import diagnose
from endotrl.monitoring.diagnosis import read_run
from endotrl.monitoring.diagnosis.completions import completion_entries

from .runs import healthy, write_state


ROWS = healthy(30)
needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")


def write_wandb(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """An offline run by wandb itself, in a process of its own, with the names that transformers gives."""
    code = (
        "import json, sys, wandb\n"
        "run = wandb.init(dir=sys.argv[1], mode='offline', settings="
        "wandb.Settings(console='off', x_disable_stats=True))\n"
        "for row in json.load(sys.stdin): run.log({**row, 'parts': [1.0, 2.0]})\n"
        "run.finish()"
    )
    logged = [
        {**{f"train/{k}": v for k, v in row.items() if k != "step"}, "train/global_step": row["step"]} for row in rows
    ]
    subprocess.run(
        [sys.executable, "-c", code, str(folder)], input=json.dumps(logged), text=True, check=True, timeout=120
    )
    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def same(run: Any, rows: list[dict[str, Any]]) -> bool:
    keys = rows[0].keys()
    return len(run.entries) == len(rows) and all(
        math.isclose(entry[key], row[key], rel_tol=1e-6)
        for entry, row in zip(run.entries, rows, strict=True)
        for key in keys
    )


def write_lines(path: Path, rows: list[dict[str, Any]], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_trainer_state_wherever_it_is(tmp_path: Path) -> None:
    for step in (10, 30):
        write_state(tmp_path / f"checkpoint-{step}" / "trainer_state.json", ROWS[:step], max_steps=60)
    for path in (tmp_path, tmp_path / "checkpoint-30", tmp_path / "checkpoint-30" / "trainer_state.json"):
        run = read_run(path)
        assert same(run, ROWS) and run.max_steps == 60


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(ROWS))
    assert same(read_run(path), ROWS)
    write_lines(tmp_path / "a.jsonl", [{"prompt": "1 + 1 =", "label": 2}])  # other JSON in a folder may be anything
    # The last line is being written.
    lines = write_lines(tmp_path / "b.jsonl", ROWS, '{"step": 31, "rew')
    assert same(read_run(lines), ROWS) and same(read_run(tmp_path), ROWS)
    lines.write_text('{"step": 1,\n' + json.dumps(ROWS[0]) + "\n")
    with pytest.raises(ValueError, match="line 1: not valid JSON"):
        read_run(lines)


def test_steps_that_were_done_again_count_once(tmp_path: Path) -> None:
    abandoned = [{**row, "reward": -100.0} for row in ROWS[12:20]] + [{"step": 20, "eval_reward": -100.0}]
    assert same(read_run(write_lines(tmp_path / "log.jsonl", [*ROWS[:12], *abandoned, *ROWS[12:]])), ROWS)


def test_a_state_that_is_being_written(tmp_path: Path) -> None:
    write_state(tmp_path / "checkpoint-10" / "trainer_state.json", ROWS[:10])
    newer = write_state(tmp_path / "checkpoint-20" / "trainer_state.json", ROWS[:20])
    newer.write_text(newer.read_text()[:2000])
    run = read_run(tmp_path)
    assert same(run, ROWS[:10]) and "checkpoint-20" in run.notes[0]
    with pytest.raises(ValueError, match="is damaged or still being written"):
        read_run(newer)


def test_evaluations_and_summaries(tmp_path: Path) -> None:
    rows = [
        {"train/global_step": 5, "train/reward": "0.5", "train/kl": None, "_runtime": 3},
        {"train/global_step": 5, "eval/reward": 0.7},
        {"train/global_step": 6, "train/train_runtime": 9.0, "train/train_loss": 0.1},
        {"train/global_step": 6, "profiling/generate": 0.1},
    ]
    path = tmp_path / "log.json"
    path.write_text(json.dumps(rows))
    first, second = read_run(path).entries
    assert math.isnan(first.pop("kl")) and first == {"step": 5, "reward": 0.5}
    assert second == {"step": 5, "eval_reward": 0.7}


@needs_wandb
def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_wandb(tmp_path, ROWS)
    for place in (path, path.parent, tmp_path):
        assert same(read_run(place), ROWS)
    # A run that is being written ends anywhere.
    whole, cut = path.read_bytes(), tmp_path / "run-cut.wandb"
    counts = []
    for size in range(len(whole) // 3, len(whole), 997):
        cut.write_bytes(whole[:size])
        counts.append(len(read_run(cut).entries))
    assert counts == sorted(counts) and 0 < counts[0] < 30
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    cut.write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged at byte"):
        read_run(cut)
    monkeypatch.setitem(sys.modules, "wandb.proto.wandb_internal_pb2", None)
    with pytest.raises(ImportError, match=r"pip install 'endotrl\[wandb\]'"):
        read_run(path)


@needs_wandb
def test_a_tracker_that_has_the_end_only(tmp_path: Path) -> None:
    write_wandb(tmp_path, ROWS[15:])  # a run that was resumed, under another id
    write_state(tmp_path / "checkpoint-20" / "trainer_state.json", ROWS[:20])
    assert same(read_run(tmp_path), ROWS)


@needs_wandb
def test_a_wandb_run_that_was_resumed(tmp_path: Path) -> None:
    for i, rows in enumerate((ROWS[:20], ROWS[15:18])):  # from a checkpoint, and not as far yet
        path = write_wandb(tmp_path / str(i), rows)
        os.utime(path.rename(path.with_name("run-a.wandb")), (i, i))
    assert same(read_run(tmp_path), ROWS[:18])


@pytest.mark.skipif(find_spec("tensorboard") is not None, reason="tensorboard is installed")
def test_events_without_tensorboard(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "host" / "events.out.tfevents.1.host"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    with pytest.raises(ImportError, match="pip install tensorboard"):
        read_run(tmp_path)
    write_state(tmp_path / "trainer_state.json", ROWS)
    run = read_run(tmp_path)  # another log does
    assert same(run, ROWS) and "pip install tensorboard" in run.notes[0]


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_events(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(tmp_path / "runs" / "host"))
    for row in ROWS:
        for key, value in row.items():
            if key != "step":
                writer.add_scalar(f"train/{key}", value, row["step"])
    writer.add_scalar("eval/reward", 0.5, 30)
    writer.close()
    run = read_run(tmp_path)
    assert [entry["step"] for entry in run.steps] == [row["step"] for row in ROWS]
    assert run.entries[-1] == {"step": 30, "eval_reward": 0.5}
    assert run.steps[3]["reward"] == pytest.approx(ROWS[3]["reward"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("nowhere", None, "does not exist. Give a `trainer_state.json`"),
        ("", None, "contains no log entry: nothing has been logged yet"),
        ("a.txt", b"a", "is not a log of a known format. Give"),
        ("a.json", b'{"global_step": 0, "log_history": []}', "contains no log entry"),
        ("a.json", b'{"hidden_size": 64}', "contains no log entry"),
        ("trainer_state.json", b'{"log_history": null}', "contains no log entry"),
        ("trainer_state.json", b'{"log_history": ["loss", 1]}', "contains no log entry"),
        ("a.json.gz", gzip.compress(b"{}" * 99)[:20], "cannot be read as gzip"),
        pytest.param("a.wandb", b"x", "is not a W&B run", marks=needs_wandb),
    ],
)
def test_what_is_no_run(name: str, content: bytes | None, says: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        read_run(tmp_path / name)


def write_completions(folder: Path, step: int, longer: bool) -> None:
    """Two groups of four; the advantage follows `good`, not `seen`."""
    texts = ["a b", "a b c", "a a a a a a a a", "b"] * 2
    good = [len(t.split()) if longer else (1.0, 0.0, 1.0, 0.0)[i % 4] for i, t in enumerate(texts)]
    mean = sum(good[:4]) / 4
    folder.mkdir(parents=True, exist_ok=True)
    table = {"step": [step] * 8, "note": ["x"] * 8, "seen": [0.0, 1.0, 0.0, 0.0] * 2}
    table["prompt"] = [[{"role": "user", "content": question}] for question in "ppppqqqq"]
    table["completion"] = [[{"role": "assistant", "content": text}] for text in texts]
    table |= {"good": [float(g) for g in good], "advantage": [g - mean for g in good]}
    pq.write_table(pa.table(table), folder / f"completions_{step:05d}.parquet")


def test_completions(tmp_path: Path) -> None:
    write_completions(tmp_path, 7, longer=True)
    (entry,) = completion_entries(sorted(tmp_path.glob("*.parquet")))
    assert entry["step"] == 7 and entry["words"] == 14 / 4
    assert entry["reward"] == entry["rewards/good/mean"] == 3.5 and entry["rewards/seen/mean"] == 0.25
    assert entry["collapse/length_correlation"] == pytest.approx(1.0)
    assert entry["collapse/distinct_completions"] == 4
    # Of texts with two 4-grams or more: one of five is new in "a a a a a a a a".
    assert entry["collapse/repetition"] == pytest.approx(0.8)
    assert entry["frac_reward_zero_std"] == 0.0


def test_completions_without_rewards_or_advantages(tmp_path: Path) -> None:
    table = {"step": [1] * 4, "prompt": ["a"] * 4, "completion": ["b", "b c", "d", "e"]}
    files = [tmp_path / f"{name}.parquet" for name in ("neither", "advantage", "reward")]
    for file, more in zip(files, ({}, {"advantage": [0.0] * 4}, {"good": [0.0, 1.0, 1.0, 2.0]}), strict=True):
        pq.write_table(pa.table(table | more), file)
    neither, advantage, reward = completion_entries(files)
    assert "reward" not in neither and "reward" not in advantage
    assert advantage["frac_reward_zero_std"] == 1.0 and reward["reward"] == 1.0


def test_completions_alone_show_that_the_reward_is_length(tmp_path: Path) -> None:
    for step in range(1, 13):
        write_completions(tmp_path / "long" / "completions", step, longer=True)
        write_completions(tmp_path / "right" / "completions", step, longer=False)
    assert "reward_is_length" in [f.name for f in diagnose(tmp_path / "long").findings]
    assert "reward_is_length" in [f.name for f in diagnose(tmp_path / "long" / "completions").findings]
    assert "reward_is_length" not in [f.name for f in diagnose(tmp_path / "right").findings]


def test_what_is_no_table_of_completions(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the columns completion, prompt, step are missing"):
        diagnose(tmp_path)
    (tmp_path / "a.parquet").write_text("no table")
    with pytest.raises(ValueError, match="a.parquet is not a Parquet file, or is being written, and is the only log"):
        diagnose(tmp_path)
