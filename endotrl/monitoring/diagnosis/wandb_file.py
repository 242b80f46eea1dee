# SPDX-License-Identifier: Apache-2.0
"""
Reader of offline W&B runs (`run-<id>.wandb`), finished or still being written.

The file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) after a header of seven
bytes: blocks of 32 KiB of chunks, each with a checksum (4 bytes), a length (2) and a type (1) before its data. wandb
dropped its own Python reader when its core was rewritten in Go (it is not in 0.31), so the log is read here and its
records by wandb's protocol buffers.
"""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any


HEADER = b":W&B\xe1\xbe\x00"
BLOCK, CHUNK_HEADER = 2**15, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """
    History of an offline W&B run, as logged, without an incomplete record at the end. Raises `ImportError` if wandb is
    not installed, and `ValueError` if the file is not a W&B run, or is damaged before its end.
    """
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError as error:
        raise ImportError(
            f"Reading the W&B run {path} requires wandb: `pip install 'endotrl[wandb]'`. Or give the run's "
            "`trainer_state.json`, which is in its checkpoints."
        ) from error
    rows = (Record.FromString(data).history.item for data in _records(path))
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row} for row in rows if row
    ]


def _records(path: Path) -> Iterator[bytes]:
    data = path.read_bytes()
    if not data.startswith(HEADER[:4]):
        raise ValueError(f"{path} is not a W&B run: it begins with {data[:8]!r} instead of {HEADER!r}.")
    position, parts = len(HEADER), b""
    while position + CHUNK_HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < CHUNK_HEADER:  # the rest of a block is zero padding
            position += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        start = position + CHUNK_HEADER
        position = start + length
        if position > len(data) or kind == length == 0:
            return  # incomplete, or preallocated space
        chunk = data[start:position]
        if zlib.crc32(bytes([kind]) + chunk) != checksum or kind not in (FULL, FIRST, MIDDLE, LAST):
            if position == len(data):
                return
            raise ValueError(f"{path} is damaged at byte {start - CHUNK_HEADER}: the checksum does not match.")
        parts = chunk if kind in (FULL, FIRST) else parts + chunk
        if kind in (FULL, LAST):
            yield parts
