# SPDX-License-Identifier: Apache-2.0
"""What W&B shows of a run, read back from what an offline run has written."""

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from endotrl import DenseGRPOConfig, DenseGRPOTrainer, recipes
from endotrl.recipes.resumption import WANDB_ID_FILE


pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]

PANELS = {
    # learning
    *("reward", "rewards/endogenous_reward/mean", "rewards/accuracy/mean", "loss", "grad_norm", "learning_rate"),
    # the reward's parts
    *("endogenous_reward/reward_per_token", "endogenous_reward/log_prob_per_token", "endogenous_reward/soft_value"),
    # collapse
    *("completions/mean_length", "entropy", "kl", "endogenous_reward/entropy", "endogenous_reward/truncated_fraction"),
    *("endogenous_reward/length_correlation", "completions/clipped_ratio"),
    *("collapse/repetition", "collapse/held_out/accuracy", "collapse/distinct_completions", "collapse/alarm"),
    # speed and memory
    *("perf/tokens_per_second", "perf/seconds_per_step", "perf/memory_gib", "num_tokens"),
}


@pytest.fixture
def arguments(tiny_policy_path: str, tmp_path: Path) -> list[str]:
    prompts = tmp_path / "prompts.jsonl"
    # Prompts that look like a page's own text.
    rows = [{"prompt": f"{word} <script>alert(1)</script>", "answer": "h"} for word in "abcd" * 4]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": tiny_policy_path,
        "dataset_name": prompts,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "beta": 0.1,
        "max_completion_length": 8,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "heat_map_steps": 2,
        "accuracy": "match",
        "dataset_test_split": "train",
        "eval_strategy": "steps",
        "eval_steps": 2,
        "per_device_eval_batch_size": 8,
        "num_generations_eval": 2,
    }
    return [str(part) for key, value in settings.items() for part in (f"--{key}", value)]


def records(path: Path) -> Iterator[bytes]:
    """
    Records of a `.wandb` file: after 7 bytes of its own, LevelDB's log format, blocks of 32 KiB with pieces of records, each
    behind its checksum (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last).
    """
    data, place, record = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 2**15 - place % 2**15 < 7:  # a piece does not begin so near to the end of a block
            place += 2**15 - place % 2**15
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


def read_offline_run(path: Path) -> tuple[set[str], dict[str, Any], str]:
    """Keys of what was logged, the config, and the run's id."""
    from wandb.proto import wandb_internal_pb2

    keys: set[str] = set()
    config: dict[str, Any] = {}
    run_id = ""
    for data in records(path):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        keys |= {item.key or item.nested_key[0] for item in record.history.item}
        updates = [*record.run.config.update, *record.config.update]
        config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in updates}
        run_id = record.run.run_id or run_id
    return keys, config, run_id


def test_wandb(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR"):
        # Set in the process by the recipe; put back after the test.
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))  # where artifacts wait for being uploaded
    wandb = pytest.importorskip("wandb")
    recipes.launch(DenseGRPOTrainer, DenseGRPOConfig, [*arguments, "--report_to", "wandb"])
    wandb.teardown()  # as at the end of a process: all is written
    first_id = (tmp_path / "run" / WANDB_ID_FILE).read_text()
    (file,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    keys, config, run_id = read_offline_run(file)
    assert {f"train/{panel}" for panel in PANELS} <= keys
    assert "eval/rewards/accuracy/mean" in keys  # held-out accuracy
    assert "token_rewards" in keys
    assert run_id == first_id
    assert config["learning_rate"] == 1e-6 and config["beta"] == 0.1
    record = config["recipe"]
    assert record["settings"]["reward"]["reward_alpha"] == 1.0
    assert record["versions"]["trl"] and (record["git"] is None or len(record["git"]["revision"]) == 40)
    # Text of users and models is escaped. A table's pages are an artifact.
    pages = "".join(
        path.read_text() for path in (tmp_path / "data").rglob("*") if path.is_file() and b"<html" in path.read_bytes()
    )
    assert pages.count('class="heat"') == 4 and "&lt;script&gt;" in pages and "<script" not in pages
    page = (tmp_path / "run" / "completions" / "token_rewards_2.html").read_text()
    assert "<script" not in page and page.count('class="heat"') == 4

    # The same command, to a later step, goes on with the same run.
    monkeypatch.delenv("WANDB_RUN_ID")
    command = [
        sys.executable,
        str(ROOT / "recipes" / "grpo.py"),
        *arguments,
        "--report_to",
        "wandb",
        "--max_steps",
        "3",
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {read_offline_run(path)[2] for path in files} == {first_id}


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard", "trackio"])
def test_without_the_package(
    tracker: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("endotrl.recipes.training.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        recipes.launch(DenseGRPOTrainer, DenseGRPOConfig, [*arguments, "--report_to", tracker])
    assert ended.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"`report_to: {tracker}` needs {tracker}, which is not installed: pip install" in said
    assert "or set `report_to: none`" in said
