# SPDX-License-Identifier: Apache-2.0
"""
Streaming of rows from local files, the Hugging Face hub or standard input, with errors that name the line at fault.
Memory does not grow with the file, except for a JSON array, which is read as a whole.
"""

import base64
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date, time
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, cast

from PIL.Image import Image


STREAM = "-"  # standard input
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
_BLANK = b"\xef\xbb\xbf \t\r\n"
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*?)(/(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
# A row before validation: its bytes, its place, and its data; `None` for a line, which is not parsed yet.
_Entry = tuple[bytes, str, Any]


@dataclass(frozen=True)
class HubDataset:
    """A dataset on the hub."""

    name: str
    splits: tuple[str, ...]
    config: str | None = None


class FormatError(ValueError):
    """Invalid row; the message names file, line and rule."""


@dataclass(frozen=True)
class Row:
    """One row as read, with accessors that validate."""

    data: dict[str, Any]  # empty if there is a `problem`
    source: str  # file, or dataset and split
    place: str  # "line 3", or "row 3" where rows are not lines; both count from 1
    stem: str  # name of the file without its suffixes, or of the split
    number: int = 0  # line or row; counted across files if there are several
    problem: str | None = None  # why this is not a row, as a sentence

    def error(self, rule: str) -> FormatError:
        """Error for a row that breaks `rule`."""
        return FormatError(f"{self.source}, {self.place}: {rule[0].lower()}{rule[1:]}")

    def get(self, key: str) -> Any:
        """Value of a required key."""
        if key not in self.data:
            raise self.error(f"the key {json.dumps(key)} is missing. The row has only {sorted(self.data)}.")
        return self.data[key]

    def text(self, key: str) -> str:
        """Text that is not empty."""
        value = self.get(key)
        return self._checked(key, isinstance(value, str) and value.strip(), "text that is not empty")

    def response(self, key: str) -> str:
        """A response; some benchmarks have empty ones."""
        return self._checked(key, isinstance(self.get(key), str), "text")

    def responses(self, key: str, exactly: int | None = None) -> list[str]:
        """List of responses."""
        value = self.get(key)
        texts = isinstance(value, list) and value and all(isinstance(text, str) for text in value)
        rule = f"a list of {exactly} texts" if exactly else "a list of at least one text"
        return self._checked(key, texts and exactly in (None, len(value)), rule)

    def steps(self, key: str) -> list[str]:
        """List of steps; a few of PRMBench's are empty, but never all of a solution."""
        has_text = any(step.strip() for step in self.responses(key))
        return self._checked(key, has_text, "a list of steps, at least one of which is not empty")

    def one_of(self, key: str, choices: Sequence[Any]) -> Any:
        """Value out of `choices`."""
        value = self.get(key)
        return self._checked(key, not isinstance(value, bool) and value in choices, f"one of {list(choices)}")

    def integer(self, key: str, low: int, high: int) -> int:
        """Integer from `low` to `high`."""
        value = self.get(key)
        fits = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return self._checked(key, fits, f"a whole number from {low} to {high}")

    def _checked(self, key: str, fits: object, rule: str) -> Any:
        if not fits:
            raise self.error(f"{json.dumps(key)} must be {rule}, got {_brief(self.data[key])}.")
        return self.data[key]

    def name(self, *keys: str) -> str:
        """The first of these keys that the row has, as text; otherwise its place."""
        known = (str(self.data[key]) for key in keys if self.data.get(key) is not None)
        return next(known, f"{self.stem} {self.place}")


class Reader:
    """
    Rows from any source, including invalid ones, with a running digest that identifies an earlier input: of a file
    (JSON array, JSON Lines, both also as `.gz`, or Parquet), a folder with such files or, if it has none, its
    subfolders, `"-"` for standard input, or, if no such path exists, a dataset on the hub:
    `OWNER/NAME[/CONFIG][:SPLIT]`.

    Raises `FileNotFoundError` if there is nothing of that name, and while reading [`FormatError`] if a file cannot be
    read as rows.
    """

    def __init__(self, data: "str | Path | HubDataset", split: str = "train") -> None:
        self.path = data.name if isinstance(data, HubDataset) else str(data)
        self.lines, self.digest = 0, hashlib.sha256()  # lines so far, with empty ones, or else rows
        self._parts = _parts(data, split)

    def __iter__(self) -> Iterator[Row]:
        for part in self._parts:
            source, stem = _names(part)
            for raw, place, data in _entries(part):
                self.lines += 1
                self.digest.update(raw + b"\n")
                problem = None
                if data is None and not raw.strip():
                    continue
                if data is None:
                    data, problem = parse_json(raw, first=place == "line 1")
                problem = problem or why_no_row(data)
                yield Row({} if problem else data, source, place, stem, self.lines, problem)

    def count(self, limit: int | None = None) -> int | None:
        """Number of rows, at most `limit`, for a progress bar; `None` for a stream."""
        if self.path == STREAM:
            return limit
        return sum(1 for _ in islice(filter(bytes.strip, self._all()), limit))

    def prefix_digest(self, lines: int) -> str:
        """Digest of the first `lines` lines."""
        digest = hashlib.sha256()
        for raw in islice(self._all(), lines):
            digest.update(raw + b"\n")
        return digest.hexdigest()

    def _all(self) -> Iterator[bytes]:
        return (raw for part in self._parts for raw, _, _ in _entries(part))


def text_only(rows: Iterable[Row]) -> Iterator[Row]:
    """Yields the rows. Raises `FormatError` at one with images, which the caller's reader would ignore."""
    for row in rows:
        for key in ("image", "images"):
            if row.data.get(key):
                raise row.error(f'the row has "{key}", but only text is supported here. Remove rows with images.')
        yield row


def read_rows(data: str | None, hub: HubDataset | None = None, name: str = "") -> Iterator[Row]:
    """
    Rows of `data`, as [`Reader`] reads them, or else of `hub`: at least one, and all of them valid. `name` is the
    benchmark's, for messages.
    """
    source = data or hub
    if source is None:
        raise ValueError(f"{name} is not on the Hugging Face hub. Pass its file or folder as --data.")
    row = None
    for row in Reader(source, "test"):
        if row.problem is not None:
            raise row.error(row.problem)
        yield row
    if row is None:
        raise FormatError(f"{source}: the file has no rows.")


def parse_json(raw: bytes, first: bool = False) -> tuple[Any, str | None]:
    """Value of a JSON Lines line, or why it has none. The `first` line of a file may start with a byte order mark."""
    try:
        return json.loads(raw.decode("utf-8-sig" if first else "utf-8")), None
    except RecursionError:
        return None, "The JSON is nested too deeply."
    except UnicodeDecodeError as error:
        return None, f"Not UTF-8 text: {error}. Save the file as UTF-8."
    except ValueError as error:
        return None, f"Not valid JSON: {error}."


def why_no_row(data: Any) -> str | None:
    """Reason why a value is not a row, or `None`."""
    if not isinstance(data, dict):
        return f"A row must be a JSON object, got {_brief(data)}."
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "The text has half of a surrogate pair (\\ud800 to \\udfff) and is therefore not valid Unicode."
    return None


def _parts(data: str | Path | HubDataset, split: str) -> list[Path | HubDataset]:
    """Files, or splits on the hub, that a name refers to."""
    if isinstance(data, HubDataset):
        return [replace(data, splits=(split,)) for split in data.splits]
    data, path = str(data), Path(data)
    if path.is_file() and path.suffix in (".csv", ".tsv", ".xlsx"):
        raise ValueError(
            f"{data}: the file must end with {', '.join(SUFFIXES)}. Convert it, for example with "
            '`pandas.read_csv(FILE).to_json("rows.jsonl", orient="records", lines=True)`.'
        )
    if data == STREAM or path.is_file():
        return [path]
    if path.is_dir():
        files = sorted(filter(_is_data, path.iterdir())) or sorted(filter(_is_data, path.rglob("*")))
        if not files:
            raise ValueError(f"{data}: the folder has no files that end with {', '.join(SUFFIXES)}.")
        return [*files]
    if (found := _HUB_ID.fullmatch(data)) and not data.endswith(SUFFIXES):
        return [HubDataset(found["name"], (found["split"] or split,), found["config"])]
    raise FileNotFoundError(f"{data}: there is no such file or folder, and this is not a valid name of a hub dataset.")


def _names(part: Path | HubDataset) -> tuple[str, str]:
    """Name of a source in messages, and of its rows."""
    if isinstance(part, HubDataset):
        return f"{part.name} ({part.splits[0]})", part.splits[0]
    stem = part.name
    for suffix in (".gz", ".jsonl", ".json", ".parquet"):
        stem = stem.removesuffix(suffix)
    return ("standard input" if str(part) == STREAM else str(part)), stem


def is_json(file: Path) -> bool:
    """Whether a file is JSON or JSON Lines, by its name."""
    return file.name.endswith(SUFFIXES) and file.suffix != ".parquet"


def _is_data(file: Path) -> bool:
    return file.name.endswith(SUFFIXES) and not file.name.startswith(".")


def _entries(part: Path | HubDataset) -> Iterator[_Entry]:
    if isinstance(part, HubDataset):
        yield from _hub_entries(part)
    elif part.name.endswith(".parquet"):
        yield from _parquet_entries(part)
    else:
        source, _ = _names(part)
        try:
            if str(part) == STREAM:
                yield from _text_entries(sys.stdin.buffer, source)
                return
            with gzip.open(part) if part.name.endswith(".gz") else part.open("rb") as file:
                yield from _text_entries(cast(IO[bytes], file), source)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FormatError(f"{source}: cannot be read as gzip: {error}. Check the file's suffix.") from error


def _text_entries(file: IO[bytes], source: str) -> Iterator[_Entry]:
    head = b""
    while not head.strip(_BLANK) and (line := file.readline()):
        head += line
    if head.strip(_BLANK).startswith(b"["):
        value, problem = parse_json(head + file.read(), first=True)
        if problem is not None:
            raise FormatError(f"{source}: {problem[0].lower()}{problem[1:]}")
        for number, element in enumerate(value, start=1):
            yield json.dumps(element).encode(), f"row {number}", element
        return
    for number, line in enumerate(chain(io.BytesIO(head), file), start=1):
        # Without its line ending, as the last line may get one later.
        yield line.rstrip(b"\r\n"), f"line {number}", None


def _parquet_entries(path: Path) -> Iterator[_Entry]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(256) for row in batch.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield _table_entry(number, row)
    except (pyarrow.ArrowException, OSError) as error:
        raise FormatError(f"{path}: cannot be read as Parquet: {str(error).strip().rstrip('.')}.") from error


def _hub_entries(hub: HubDataset) -> Iterator[_Entry]:
    from datasets import load_dataset

    (split,) = hub.splits
    try:
        rows = load_dataset(hub.name, hub.config, split=split)
    except Exception as error:  # the library raises many types; each ends the command with one message
        raise ValueError(
            f"{hub.name} (split {split}) is not a local file or folder, and cannot be loaded from the Hugging Face "
            f"hub: {error}. Without a network, pass a local file or folder as --data."
        ) from error
    for number, row in enumerate(rows, start=1):
        yield _table_entry(number, row)


def _table_entry(number: int, row: dict[str, Any]) -> _Entry:
    """Row of a table: dates as text, bytes and images as base64, without the nulls that pad messages."""
    raw = json.dumps({key: _without_nulls(value) for key, value in row.items()}, default=_as_json)
    return raw.encode(), f"row {number}", json.loads(raw)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _as_json(value: object) -> str:
    if isinstance(value, Image):
        file = io.BytesIO()
        value.save(file, format="png")
        value = file.getvalue()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return value.isoformat() if isinstance(value, date | time) else str(value)


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
