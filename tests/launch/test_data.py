# SPDX-License-Identifier: Apache-2.0
"""Datasets to train on: what the file holds, with its types, whatever the format."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from endotrl.launch.data import load_splits


ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "answer": "2020-01-01", "n": 1},
    {"prompt": "b", "answer": None, "n": 2},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    lines = "\n".join(map(json.dumps, rows))
    text = json.dumps(rows, indent=1) if ".json" in path.suffixes else lines
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", ["f.json", "f.jsonl", "f.json.gz", "f.jsonl.gz", "f.parquet"])
def test_same_rows_of_every_format(name: str, streaming: bool, tmp_path: Path) -> None:
    path = write(tmp_path / name, ROWS)
    splits = load_splits(str(path), streaming=streaming)
    assert list(splits) == ["train"] and list(splits["train"]) == ROWS  # dates stay text


def test_keys_that_only_some_rows_have(tmp_path: Path) -> None:
    train = load_splits(str(write(tmp_path / "f.jsonl", [{"prompt": "a"}, {"prompt": "b", "answer": "c"}])))["train"]
    assert list(train) == [{"prompt": "a", "answer": None}, {"prompt": "b", "answer": "c"}]


def test_values_of_several_types(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": [{"role": "user", "content": "c"}]}]
    assert list(load_splits(str(write(tmp_path / "f.jsonl", rows)))["train"]) == rows


def test_a_file_that_changes_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "f.jsonl", [{"prompt": "a"}])
    assert load_splits(str(path))["train"]["prompt"] == ["a"]
    times = path.stat().st_mtime_ns
    write(path, [{"prompt": "b"}])
    os.utime(path, ns=(times + 1, times + 1))
    assert load_splits(str(path))["train"]["prompt"] == ["b"]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text('{"prompt": "a"}\n[1]')
    with pytest.raises(ValueError, match="Cannot read `dataset_name` .* as jsonl: .*line 2: a row must be a JSON obj"):
        load_splits(str(path))
