# SPDX-License-Identifier: Apache-2.0
"""Output files of a scoring run: rows, error file, and metadata for resuming."""

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from ..data.sources import STREAM, Reader
from ..reporting import counted
from ..runs.files import write_json
from ..runs.jsonl import append_lines, changed_settings, parse_line
from ..runs.record import now, versions
from .rows import TOKEN_KEYS, Row


HEAD = 10  # first rows kept by a tally


class Tally:
    """Running statistics of a file's rows, in constant memory."""

    def __init__(self) -> None:
        self.rows = self.errors = self.skipped = self.tokens = 0
        self.head: list[tuple[Row, dict[str, Any]]] = []  # the first rows, each with its output line
        # Count, means of length and reward, central second moments (xx, yy, xy): Welford's recurrence.
        self._moments = (0, 0.0, 0.0, 0.0, 0.0, 0.0)

    def add(self, row: Row, record: dict[str, Any]) -> None:
        """Adds a row and its output line."""
        self.rows += 1
        if len(self.head) < HEAD:
            self.head.append((row, {key: value for key, value in record.items() if key not in TOKEN_KEYS}))
        if "error" in record:
            self.errors += 1
            return
        self.tokens += record["num_tokens"]
        if record["reward"] is None:
            self.skipped += 1
            return
        count, mean_x, mean_y, xx, yy, xy = self._moments
        dx, dy, count = record["num_tokens"] - mean_x, record["reward"] - mean_y, count + 1
        mean_x, mean_y = mean_x + dx / count, mean_y + dy / count
        to_mean_y = record["reward"] - mean_y
        xx, yy, xy = xx + dx * (record["num_tokens"] - mean_x), yy + dy * to_mean_y, xy + dx * to_mean_y
        self._moments = (count, mean_x, mean_y, xx, yy, xy)

    @property
    def mean_reward(self) -> float | None:
        """Mean reward in nats; `None` if no row has one."""
        return self._moments[2] if self._moments[0] else None

    @property
    def length_correlation(self) -> float | None:
        """Pearson correlation of reward and length in tokens; `None` if undefined."""
        count, _, _, xx, yy, xy = self._moments
        # The second moment of equal values is a rounding error, not a variance.
        if count < 3 or min(xx, yy) <= 1e-12 * count:
            return None
        return max(-1.0, min(1.0, xy / math.sqrt(xx * yy)))


class Output:
    """The output, its error file and metadata. The caller locks it against other runs by [`only_run_on`]."""

    def __init__(self, path: str | Path, reader: Reader, settings: Mapping[str, Any]) -> None:
        self.path, self.stream = Path(path), str(path) == STREAM
        self.errors_path, self.meta_path = Path(f"{path}.errors.jsonl"), Path(f"{path}.meta.json")
        self.kept_rows, self.seconds = 0, 0.0
        self.notes: dict[str, Any] = {}  # part of the metadata, ignored when a later run compares settings
        self._reader, self._settings = reader, dict(settings)
        self._started = now()
        self._kept_bytes = 0

    def check(self, block_size: int, overwrite: bool, anew: bool = False) -> None:
        """Determines what to keep of an earlier run (nothing if `anew`). `ValueError` if it cannot be resumed."""
        if self.stream:
            return
        if overwrite or not self.path.exists() or self.path.stat().st_size == 0:
            return
        way_out = "Choose another output, or overwrite this one (--overwrite)."
        if not self.meta_path.exists():
            raise ValueError(f"{self.path} exists without {self.meta_path.name}, so it cannot be resumed. {way_out}")
        try:
            meta = json.loads(self.meta_path.read_bytes())
            settings, rows, lines, digest = (meta[k] for k in ("settings", "rows", "input_lines", "input_sha256"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.meta_path} is damaged, so {self.path} cannot be resumed. {way_out}") from error
        changed = changed_settings(settings, self._settings)
        if changed:
            raise ValueError(f"{self.path} was made with other settings: {changed}. {way_out}")
        if self._reader.path == STREAM:
            raise ValueError(f"{self.path} exists, but a run on standard input cannot be resumed. {way_out}")
        if self._reader.prefix_digest(lines) != digest:
            first = f"the first {lines} lines of {self._reader.path}"
            raise ValueError(f"{self.path} was made from another input: {first} have changed. {way_out}")
        if anew:
            return
        self._started, self.seconds = meta["started"], meta["seconds"]
        self.kept_rows, self._kept_bytes = self._whole_rows(rows, block_size)

    def begin(self) -> None:
        """Creates the output, or cuts off everything after the rows that are kept."""
        if self.stream:
            return
        with self._writing():
            with self.path.open("ab") as file:
                file.truncate(self._kept_bytes)
            self.errors_path.unlink(missing_ok=True)
            if not self.kept_rows:
                self._write_meta(Tally())

    def kept_records(self) -> Iterator[dict[str, Any]]:
        """Kept output lines of earlier runs."""
        if self.kept_rows:
            with self.path.open("rb") as file:
                yield from map(json.loads, islice(file, self.kept_rows))

    def write(self, records: Sequence[Mapping[str, Any]], tally: Tally, seconds: float) -> None:
        """Writes a block, and then the checkpoint that counts it."""
        self.seconds += seconds
        log = sys.stdout.buffer if self.stream else self.path
        with self._writing(tally.rows - len(records)):
            append_lines(log, records, ensure_ascii=False, sync=not self.stream)
            if not self.stream:
                self.write_errors(records)
                self._write_meta(tally)

    def write_errors(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes the invalid rows among these to the error file, which exists only if there are any."""
        bad = [{key: r[key] for key in ("line", "id", "error") if key in r} for r in records if "error" in r]
        if bad:
            append_lines(self.errors_path, bad, ensure_ascii=False, sync=False)

    def _whole_rows(self, rows: int, block_size: int) -> tuple[int, int]:
        """Rows, and their bytes, up to the checkpoint; or up to the last complete block, if lines were lost since."""
        ends = [0]
        with self.path.open("rb") as file:
            with suppress(ValueError):
                for line in islice(file, rows):
                    parse_line(line, ("line",))
                    ends.append(ends[-1] + len(line))
        kept = rows if len(ends) > rows else (len(ends) - 1) // block_size * block_size
        return kept, ends[kept]

    def _write_meta(self, tally: Tally) -> None:
        meta = {
            "settings": self._settings,
            "input": self._reader.path,
            **{name: getattr(tally, name) for name in ("rows", "errors", "tokens")},
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(tally.tokens / self.seconds, 1) if self.seconds else None,
            "input_lines": self._reader.lines,
            "input_sha256": self._reader.digest.hexdigest(),
            **self.notes,
            "started": self._started,
            "updated": now(),
            "versions": versions("torch", "transformers", "trl"),
        }
        write_json(self.meta_path, meta)

    @contextmanager
    def _writing(self, saved_rows: int = 0) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the reader of a pipe has closed it
            raise
        except OSError as error:
            saved = f"Saved so far: {counted(saved_rows, 'row')}. Run the same command again to resume."
            raise OSError(f"{self.path} cannot be written: {error.strerror or error}. {saved}") from error
