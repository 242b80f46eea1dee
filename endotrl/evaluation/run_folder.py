# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: settings, scores as they come, token statistics, results."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

from .. import __version__
from ..runs.files import lock
from .stats_cache import StatsCache


LOCK_FILE = ".run.lock"


class RunFolder:
    """
    The files of a run in one folder.

    ```text
    settings.json     what scores depend on; a run goes on only under equal settings
    scores.jsonl      one line for each item that was scored, only ever appended to
    answers.jsonl     the same for sampled answers
    token_stats/      token statistics, from which other forms are made without the model
    results.json      metrics, intervals, scores of each item
    results.md        the table, to paste
    report.html       the same with plots and token rewards
    ```

    Args:
        folder (`str` or `Path`):
            The folder; made if it is not there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings_path = self.folder / "settings.json"
        self.scores_path = self.folder / "scores.jsonl"
        self.answers_path = self.folder / "answers.jsonl"
        self.results_path = self.folder / "results.json"
        self.table_path = self.folder / "results.md"
        self.report_path = self.folder / "report.html"
        self.stats = StatsCache(self.folder / "token_stats")
        self._lock: IO[str] | None = None

    def hold(self) -> None:
        """
        Makes the folder, and keeps other runs out of it until this object is gone.

        Raises:
            `ValueError`: If another run is in there.
        """
        self._check_is_folder()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / LOCK_FILE).open("a")
        message = f"Another run is writing to {self.folder} right now. Wait for it, or choose another --output."
        lock(self._lock, message)

    def open(self, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        """
        Makes the folder, or checks that what is in it was made under the same settings.

        Raises:
            `ValueError`: If it was not.
        """
        self._check_is_folder()
        if self.settings_path.exists() and not overwrite:
            old = self.read_settings()
            changed = [
                f"`{key}` was {old.get(key)!r} and is {settings.get(key)!r}"
                for key in dict.fromkeys([*old, *settings])
                if old.get(key) != settings.get(key)
            ]
            if changed:
                raise ValueError(
                    f"{self.folder} holds a run with other settings: {'; '.join(changed)}. Choose another --output, or "
                    "start anew with --overwrite."
                )
            return
        if (self.scores_path.exists() or self.answers_path.exists()) and not overwrite:
            raise ValueError(
                f"{self.folder} holds scores, but no {self.settings_path.name} that tells what made them. Choose another "
                "--output, or start anew with --overwrite."
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [self.scores_path, self.answers_path, self.results_path, *self.stats.folder.glob("*.npz")]:
            path.unlink(missing_ok=True)
        self.stats = StatsCache(self.stats.folder)
        write_json(self.settings_path, settings)

    def _check_is_folder(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"--output {self.folder} is a file, but a run needs a folder. Choose another one.")

    def read_settings(self) -> dict[str, Any]:
        """
        The settings of the run.

        Raises:
            `ValueError`: If there is no run in the folder, or the file is damaged.
        """
        try:
            return json.loads(self.settings_path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise ValueError(f"{self.folder} holds no run of endotrl eval: {error.filename} is missing.") from error
        except ValueError as error:
            raise ValueError(f"{self.settings_path} is damaged. Start anew with --overwrite.") from error

    def read_scores(self) -> dict[str, dict[str, Any]]:
        """What is scored so far, by key of the item; the lines of one item are put together."""
        records: dict[str, dict[str, Any]] = {}
        for line in read_lines(self.scores_path, ("key", "tokens", "cut", "scores", "seconds")):
            merge_line(records, line)
        return records


def merge_line(records: dict[str, dict[str, Any]], line: Mapping[str, Any]) -> None:
    """Adds a line of `scores.jsonl` to what is known of its item."""
    known = records.setdefault(
        line["key"], {"tokens": line["tokens"], "scores": {}, "seconds": 0.0, "cut": line["cut"]}
    )
    known["scores"].update(line["scores"])
    known["seconds"] += line["seconds"]


def append_lines(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Appends lines to a JSON Lines file, and returns when they are on the disk."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """
    Lines of a file that [`append_lines`] wrote; none if it is not there. A last line that was only half written is cut off.

    Raises:
        `ValueError`: If another line is damaged, or lacks one of `keys`.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
    records = []
    for number, line in enumerate(data[:whole].splitlines(), start=1):
        try:
            record = json.loads(line)
            if not all(key in record for key in keys):
                raise ValueError("keys are missing")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: damaged ({error}). Take the line out, and the same command makes it again; or start "
                "anew with --overwrite."
            ) from error
        records.append(record)
    return records


def write_json(path: Path, value: Any) -> None:
    """Writes a file of JSON whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def versions() -> dict[str, str]:
    """Versions of what computed the numbers."""
    libraries = {name: version(name) for name in ("torch", "transformers", "trl", "numpy")}
    return {"endotrl": __version__, "python": platform.python_version(), **libraries}


def now() -> str:
    """The time, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
