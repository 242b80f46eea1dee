# SPDX-License-Identifier: Apache-2.0
"""
Reader of offline W&B runs (`run-<id>.wandb`), finished or still being written.

The file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) after a header of seven
bytes: blocks of 32 KiB of chunks, each a checksum (4 bytes), a length (2) and a type (1) before its data. wandb's own
reader in Python went when its core was written in Go (it is not in 0.31), so the log is read here and its records by
wandb's protocol buffers.
"""

import json
import math
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


HEADER = b":W&B\xe1\xbe\x00"
BLOCK, CHUNK_HEADER = 2**15, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_wandb_file(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """
    History and configuration of an offline W&B run.

    Args:
        path (`Path`):
            The `.wandb` file. A record at its end that is half written is left for later.

    Returns:
        `tuple[list[dict], dict]`: what was logged, in order, under the names that it was logged by; and the run's
        config, which transformers fills with all training arguments.

    Raises:
        `ImportError`: If wandb is not installed.
        `ValueError`: If it is no such file, or is damaged before its end.
    """
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError as error:
        raise ImportError(
            f"{path} is a W&B run, which takes wandb to read: pip install 'endotrl[wandb]'. Or give the run's "
            "`trainer_state.json`, which is in its checkpoints."
        ) from error
    history: list[dict[str, Any]] = []
    config: dict[str, Any] = {}
    for data in _records(path):
        record = Record.FromString(data)
        for items in (record.run.config.update, record.config.update):
            config.update({item.key: json.loads(item.value_json) for item in items if item.key})
        if record.HasField("history"):
            entry = {item.key or "/".join(item.nested_key): _number(item.value_json) for item in record.history.item}
            history.append(entry)
    return history, config


def _number(text: str) -> Any:
    value = json.loads(text)
    return {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}.get(value, value) if value else value


def _records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    if not data.startswith(HEADER[:4]):
        raise ValueError(f"{path} is no W&B run: it begins with {data[:8]!r}, not with {HEADER!r}.")
    position, parts = len(HEADER), b""
    while position + CHUNK_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER:  # the rest of a block is filled with zeros
            position += left
            continue
        checksum, length, kind = (
            int.from_bytes(data[position : position + 4], "little"),
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        start = position + CHUNK_HEADER
        position = start + length
        if kind == 0 and length == 0:
            return  # room that was made for what is to be written
        if position > len(data):
            return
        chunk = data[start:position]
        if zlib.crc32(bytes([kind]) + chunk) != checksum or kind not in (FULL, FIRST, MIDDLE, LAST):
            if position >= len(data):
                return
            raise ValueError(f"{path} is damaged at byte {start - CHUNK_HEADER}: a checksum is wrong.")
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts
