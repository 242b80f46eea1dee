# SPDX-License-Identifier: Apache-2.0
"""Resumable JSON Lines logs: only complete lines count, and only runs with equal settings append to them."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any


def append_lines(
    log: Path | IO[bytes], records: Sequence[Mapping[str, Any]], ensure_ascii: bool = True, sync: bool = True
) -> None:
    """Appends records to a log (its path, or its open file); with `sync`, returns only once they are on disk."""
    if isinstance(log, Path):
        with log.open("ab") as file:
            return append_lines(file, records, ensure_ascii, sync)
    lines = (json.dumps(record, ensure_ascii=ensure_ascii, allow_nan=False) + "\n" for record in records)
    log.write("".join(lines).encode())
    log.flush()
    if sync:
        os.fsync(log.fileno())


def parse_line(line: bytes, keys: Sequence[str]) -> dict[str, Any]:
    """Parses the record of a line. Raises `ValueError` if it is damaged, or lacks one of `keys`."""
    if not line.endswith(b"\n"):
        raise ValueError("the end is missing")
    record = json.loads(line)
    if not isinstance(record, dict) or not record.keys() >= set(keys):
        raise ValueError("keys are missing")
    return record


def read_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Records of a log; empty if it does not exist. An incomplete last line is cut off."""
    if not path.exists():
        return []
    lines = path.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(sum(map(len, lines[:-1])))
        del lines[-1]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(parse_line(line, keys))
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: damaged ({error}). Take the line out, and the same command makes it again; "
                "or start anew with --overwrite."
            ) from error
    return records


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Description of the settings that differ between a log and a run that would resume it; empty if none does."""
    return "; ".join(
        f"`{key}` was {before.get(key)!r} and is {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    )
