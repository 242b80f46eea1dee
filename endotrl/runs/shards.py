# SPDX-License-Identifier: Apache-2.0
"""Results of blocks of work that several processes, or an earlier run, have done: a folder with a file per process."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from .files import write_json
from .jsonl import append_lines, changed_settings, parse_line


Block = TypeVar("Block")


class Shards:
    """
    A folder in which each process writes the results of its blocks to a file of its own, one line each, and finds
    those of all. What was not written to its end is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._places: dict[str, tuple[Path, int]] = {}

    def open(self, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """Makes the folder, or raises `ValueError` if what is in it was made under other settings."""
        path = self.folder / "settings.json"
        if overwrite:
            self.remove()
        if path.exists() and (changed := changed_settings(json.loads(path.read_bytes()), settings)):
            raise ValueError(
                f"{self.folder} holds results of a run with other settings: {changed}. Choose another output, or "
                "overwrite this one (--overwrite)."
            )
        self.folder.mkdir(exist_ok=True)
        write_json(path, settings)

    def read(self, process: int) -> None:
        """Finds what all processes have written so far, and mends the end of the file of one."""
        self._places.clear()
        for path in sorted(self.folder.glob("*.jsonl")):
            place = 0
            with path.open("rb") as file:
                for line in file:
                    # A line that an interruption has damaged is not there: its block is done again.
                    with suppress(ValueError):
                        self._places[parse_line(line, ("block", "results"))["block"]] = (path, place)
                    place += len(line) if line.endswith(b"\n") else 0
            if path == self._path(process):
                os.truncate(path, place)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def get(self, key: str) -> Any:
        """The results of a block."""
        path, place = self._places[key]
        with path.open("rb") as file:
            file.seek(place)
            return json.loads(file.readline())["results"]

    def write(self, process: int, key: str, results: Any) -> None:
        """Adds the results of a block to the file of a process."""
        append_lines(self._path(process), [{"block": key, "results": results}], ensure_ascii=False)

    def share(
        self, blocks: Iterable[tuple[str, int, Block]], process: int, num_processes: int
    ) -> Iterator[tuple[str, Block]]:
        """As [`share`], of the blocks that nobody has done. All processes must have called [`read`] at one time."""
        todo = ((size, (key, block)) for key, size, block in blocks if key not in self._places)
        return share(todo, process, num_processes)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, process: int) -> Path:
        return self.folder / f"{process}.jsonl"


def share(blocks: Iterable[tuple[int, Block]], process: int, num_processes: int) -> Iterator[Block]:
    """The blocks, given with their sizes, that a process is to do: each goes to the one that has the least so far."""
    sizes = [0] * num_processes
    for size, block in blocks:
        owner = sizes.index(min(sizes))
        sizes[owner] += size
        if owner == process:
            yield block


def block_key(content: Any) -> str:
    """Digest by which a block is known again, of JSON values."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
