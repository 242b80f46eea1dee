# SPDX-License-Identifier: Apache-2.0
"""Resumable JSON Lines logs: only complete lines count, and only runs with equal settings append to them."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

from ..reporting import counted


logger = logging.getLogger(__name__)


def append_lines(
    log: Path | IO[bytes], records: Sequence[Mapping[str, Any]], ensure_ascii: bool = True, sync: bool = True
) -> None:
    """Appends records to a log (its path, or its open file); with `sync`, returns only once they are on disk."""
    lines = (json.dumps(record, ensure_ascii=ensure_ascii, allow_nan=False) + "\n" for record in records)
    with log.open("ab") if isinstance(log, Path) else nullcontext(log) as file:
        file.write("".join(lines).encode())
        file.flush()
        if sync:
            os.fsync(file.fileno())


def json_number(value: float | None, decimals: int) -> float | None:
    """A number rounded for JSON, which has neither NaN nor infinity: these are `None`."""
    # Adding 0.0 makes a negative zero positive.
    return round(value, decimals) + 0.0 if value is not None and math.isfinite(value) else None


def parse_line(line: bytes, keys: Sequence[str]) -> dict[str, Any]:
    """Parses the record of a line. Raises `ValueError` if it is damaged, or lacks one of `keys`."""
    if not line.endswith(b"\n"):
        raise ValueError("the end is missing")
    record = json.loads(line)
    if not isinstance(record, dict) or not record.keys() >= set(keys):
        raise ValueError("keys are missing")
    return record


def read_log(path: Path, keys: Sequence[str], mend: bool = True) -> Iterator[tuple[int, dict[str, Any]]]:
    """
    Records of a log, and the offset of each. Damaged lines are skipped, with a warning, so that their records are made
    again; with `mend`, an incomplete last line is cut off.
    """
    end = damaged = 0
    with path.open("rb") as file:
        for line in file:
            is_whole = line.endswith(b"\n")
            try:
                record = parse_line(line, keys)
            except ValueError:
                damaged += is_whole
            else:
                yield end, record
            end += len(line) if is_whole else 0
    if damaged:
        logger.warning(f"Skipping {counted(damaged, 'damaged line')} of {path}. Their content is computed again.")
    if mend:
        os.truncate(path, end)


def read_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Records of a log, as in [`read_log`]; empty if there is no such file."""
    return [record for _, record in read_log(path, keys)] if path.exists() else []


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Description of the settings that differ between a log and a run that would resume it; empty if none does."""
    return "; ".join(
        f"`{key}` was {before.get(key)!r} and is {now.get(key)!r}"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    )


def goes_on(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether to resume the run whose settings are at `path`, if any. Raises `ValueError` if they differ."""
    if not path.exists():
        return False
    way_out = "Choose another --output, or start over with --overwrite."
    try:
        before = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged. {way_out}") from error
    if changed := changed_settings(before, settings):
        raise ValueError(f"{path.parent} holds a run with other settings: {changed}. {way_out}")
    return True
