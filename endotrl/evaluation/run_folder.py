# SPDX-License-Identifier: Apache-2.0
"""Folder of an evaluation run: settings, incremental scores, token statistics, results."""

import shutil
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import BaseFileLock
from torch import Tensor
from tqdm.auto import tqdm

from ..runs.files import lock_folder, replacing, write_json
from ..runs.jsonl import append_lines, goes_on, read_lines
from ..runs.processes import processes, share
from ..scoring.token_stats import TokenStats
from .engine import ScoredResponse
from .items import Item
from .questions import Question


BLOCK = 16  # items processed and saved together
Keyed = TypeVar("Keyed", Item, Question)  # identified by `key`


class RunFolder:
    """
    Files of a run in one folder. A run is resumed only with equal settings; finished work is only appended to. Each
    process of `accelerate launch` appends to files of its own, such as `scores.1.jsonl`, and reads those of all.
    """

    def __init__(self, folder: str | Path, process: int = 0) -> None:
        self.folder = Path(folder)
        self.settings_path = self.folder / "settings.json"
        number = f".{process}" if process else ""
        self.scores_path = self.folder / f"scores{number}.jsonl"  # one line per scored item
        self.answers_path = self.folder / f"answers{number}.jsonl"
        self.report_path = self.folder / "report.html"
        self.stats_path = self.folder / "token_stats"
        self._lock: BaseFileLock | None = None

    def open(self, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """
        Creates the folder, or checks that its content was made with the same settings; and locks it against other runs
        until this object is deleted.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output {self.folder} must be a folder, but it is a file. Choose another path.")
        self._lock = lock_folder(self.folder, "--output")
        if not overwrite:
            if goes_on(self.settings_path, settings):
                return
            if self.scores_path.exists() or self.answers_path.exists():
                raise ValueError(
                    f"{self.folder} contains scores, but no settings.json to say how they were made. Choose another "
                    "--output, or start over with --overwrite."
                )
        for pattern in ("scores*.jsonl", "answers*.jsonl", "results.json"):
            for path in self.folder.glob(pattern):
                path.unlink()
        shutil.rmtree(self.stats_path, ignore_errors=True)
        write_json(self.settings_path, settings)

    def read_scores(self) -> dict[str, dict[str, Any]]:
        """Scores so far, by item key; lines of the same item are merged."""
        records: dict[str, dict[str, Any]] = {}
        for line in self.read_lines("scores", ("key", "tokens", "cut", "scores", "seconds")):
            known = records.setdefault(line["key"], {**line, "scores": {}, "seconds": 0.0})
            known["scores"].update(line["scores"])
            known["seconds"] += line["seconds"]
        return records

    def read_answers(self) -> dict[tuple[str, str], dict[str, Any]]:
        """Answers so far, with their grades, by question key and seed."""
        keys = ("key", "seed", "texts", "token_ids", "finished", "right", "tokens", "seconds")
        return {(line["key"], line["seed"]): line for line in self.read_lines("answers", keys)}

    def save_stats(self, scored: Mapping[str, Sequence[ScoredResponse]]) -> None:
        """
        Saves responses of items, by key, each item atomically as a file of plain tensors, so that other forms of the
        reward can be evaluated without the model.
        """
        self.stats_path.mkdir(parents=True, exist_ok=True)
        for key, responses in scored.items():
            with replacing(self.stats_path / f"{key}.pt") as file:
                torch.save(list(map(_plain, responses)), file)

    def load_stats(self, key: str, alone: bool = False) -> list[ScoredResponse] | None:
        """Responses of an item; `None` if they are missing, or missing without their prompts while `alone` is set."""
        path = self.stats_path / f"{key}.pt"
        if not path.exists():
            return None
        found = [{**row, "stats": TokenStats(**row["stats"])} for row in torch.load(path, weights_only=True)]
        responses = [ScoredResponse(**row) for row in found]
        return None if alone and any(response.log_probs_alone is None for response in responses) else responses

    def read_lines(self, name: str, keys: Sequence[str]) -> list[dict[str, Any]]:
        """Lines written by all processes, read in sync, so that no two processes then write the same work."""
        processes().wait_for_everyone()
        paths = sorted(self.folder.glob(f"{name}*.jsonl"))
        lines = [line for path in paths for line in read_lines(path, keys)]
        processes().wait_for_everyone()
        return lines


def _plain(value: Any) -> Any:
    """A response as a dictionary. Tensors are copied: a view would be saved with the whole batch."""
    if isinstance(value, ScoredResponse | TokenStats):
        return {name: _plain(entry) for name, entry in vars(value).items()}
    return value.clone() if isinstance(value, Tensor) else value


def open_folder(path: str | Path, settings: Mapping[str, Any], overwrite: bool = False) -> RunFolder:
    """Folder of a run, which all processes of `accelerate launch` use once the main one has opened it."""
    state = processes()
    folder = RunFolder(path, state.process_index)
    if state.is_main_process:
        folder.open(settings, overwrite)
    state.wait_for_everyone()
    return folder


def in_blocks(
    items: Sequence[Keyed],
    known: Container[str],  # keys of items that have a record of an earlier run
    path: Path | None,  # file of this process; without one, all items are processed here, and nothing is saved
    make: Callable[[list[Keyed]], list[dict[str, Any]]],
    title: str,
    progress: bool,
    block_size: int = BLOCK,
    size_of: Callable[[Keyed], int] = lambda item: 1,
) -> list[dict[str, Any]]:
    """
    Makes one record per other distinct item, with the `seconds` it took, appended to a file block by block. The
    processes of `accelerate launch` share the blocks by size, and each returns its own records.
    """
    state = processes()
    process, num_processes = (0, 1) if path is None else (state.process_index, state.num_processes)
    todo = list({item.key: item for item in items if item.key not in known}.values())
    blocks = (todo[start : start + block_size] for start in range(0, len(todo), block_size))
    sized = ((sum(map(size_of, block)), block) for block in blocks)
    records, total, done = [], len(items), len(items) - len(todo)
    silent = not (progress and todo) or process > 0
    with tqdm(total=total, initial=done, desc=title, unit=" items", disable=silent) as bar:
        for block in share(sized, process, num_processes):
            began = time.perf_counter()
            made = make(block)
            seconds = round((time.perf_counter() - began) / len(block), 4)
            made = [{**record, "seconds": seconds} for record in made]
            if path is not None:
                append_lines(path, made)
            records += made
            bar.update(min(num_processes * len(block), total - bar.n))
    return records
