# SPDX-License-Identifier: Apache-2.0
"""Scoring of a file's rows by several processes."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.sources import Reader
from ..runs.files import write_json
from ..runs.jsonl import append_lines, goes_on, read_log
from ..runs.processes import processes, share
from .rows import Reward, Row, Scored, output_records, read_responses, score_rows


@dataclass
class ShardedScores:
    """
    Output lines of a file's responses, without the first `start`, in a folder that all processes fill: each scores
    blocks of similar total length into its own file, one JSON line per block. Completely written blocks are not scored
    again.
    """

    reward: Reward
    input_path: str | Path
    folder: Path
    block_size: int
    limit: int | None
    tokens: bool
    start: int = 0
    _places: dict[str, tuple[Path, int]] = field(default_factory=dict)  # of blocks: file, and offset of the line

    def fill(self, settings: Mapping[str, Any], overwrite: bool = False, progress: bool = False) -> None:
        """
        Scores missing blocks, in all processes, and returns once all are done. `ValueError` if existing scores were
        made with other settings.
        """
        state = processes()
        if state.is_main_process:
            if overwrite:
                self.remove()
            path = self.folder / "settings.json"
            if not goes_on(path, settings):
                self.folder.mkdir(exist_ok=True)
                write_json(path, settings)
        state.wait_for_everyone()
        own = self.folder / f"{state.process_index}.jsonl"
        self._find(own)
        state.wait_for_everyone()  # a faster process must not write blocks that others have yet to find missing
        total = Reader(self.input_path).count(self.limit)
        bar = tqdm(total=total, desc="Scoring", unit=" rows", disable=not (progress and state.is_main_process))

        def missing() -> Iterator[tuple[int, list[Row]]]:
            for block in self:
                if _key(block) not in self._places:
                    yield sum(len(str((row.prompt, row.completion))) for row in block), block
                bar.update(len({row.line for row in block}))  # whichever process scores it

        with bar:
            for block in share(missing(), state.process_index, state.num_processes):
                began = time.perf_counter()
                records = output_records(self.reward, block, score_rows(self.reward, block), self.tokens)
                results = {"seconds": time.perf_counter() - began, "records": records}
                append_lines(own, [{"block": _key(block), "results": results}], ensure_ascii=False)
        state.wait_for_everyone()
        self._find(own)

    def __iter__(self) -> Iterator[list[Row]]:
        rows = islice(read_responses(Reader(self.input_path), self.limit), self.start, None)
        return iter(lambda: list(islice(rows, self.block_size)), [])

    def get(self, block: Sequence[Row]) -> tuple[list[dict[str, Any]], float]:
        """Output lines of a block, and its scoring time in seconds."""
        path, place = self._places[_key(block)]
        with path.open("rb") as file:
            file.seek(place)
            results = json.loads(file.readline())["results"]
        return results["records"], results["seconds"]

    def scored(self) -> Iterator[Scored]:
        """All responses with their output lines."""
        for block in self:
            yield from zip(block, self.get(block)[0], strict=True)

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _find(self, own: Path) -> None:
        """Finds all blocks written so far by any process, and cuts off an incomplete end of this one's file."""
        self._places.clear()
        for path in sorted(self.folder.glob("*.jsonl")):
            for place, record in read_log(path, ("block", "results"), mend=path == own):
                self._places[record["block"]] = (path, place)


def _key(block: Sequence[Row]) -> str:
    """Digest that identifies a block."""
    return hashlib.sha256(json.dumps([astuple(row) for row in block]).encode()).hexdigest()[:32]
