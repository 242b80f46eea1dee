# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark from local files or the Hugging Face hub, and messages that name the line that is wrong."""

import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")
DEFAULT_SPLIT = "test"
_GAP = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")  # between elements of an array
_HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*?)(:(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class HubDataset:
    """
    Where the hub has a benchmark.

    Attributes:
        name (`str`):
            Id of the dataset.
        splits (`tuple[str, ...]`):
            Splits to read.
        config (`str`, *optional*):
            Name of its configuration.
    """

    name: str
    splits: tuple[str, ...]
    config: str | None = None


class FormatError(ValueError):
    """A row is not what its benchmark wants; the message names file, line and rule."""


@dataclass(frozen=True)
class Row:
    """
    One row as it was found, with access that checks.

    Attributes:
        data (`dict[str, Any]`):
            The row.
        source (`str`):
            File, or dataset and split.
        place (`str`):
            `"line 3"`, or `"row 3"` where rows are not lines. Both count from 1.
        stem (`str`):
            Name of the file without its endings, or of the split.
    """

    data: dict[str, Any]
    source: str
    place: str
    stem: str

    def __post_init__(self) -> None:
        seen = next((key for key in ("image", "images") if self.data.get(key)), None)
        if seen is not None:
            raise self.error(
                f"the row has {json.dumps(seen)}, and evaluations read only text: the responses would be judged as "
                "answers to another question. Leave such rows out, or score them with `endotrl score`."
            )

    def error(self, rule: str) -> FormatError:
        """The error that this row breaks `rule`."""
        return FormatError(f"{self.source}, {self.place}: {rule}")

    def get(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self.data:
            raise self.error(f"the key {json.dumps(key)} is missing. There are {sorted(self.data)}.")
        return self.data[key]

    def text(self, key: str) -> str:
        """A text that is not empty."""
        value = self.get(key)
        if not isinstance(value, str) or not value.strip():
            raise self.error(f"{json.dumps(key)} must be a text that is not empty, but is {_brief(value)}.")
        return value

    def response(self, key: str) -> str:
        """A response; some benchmarks have empty ones."""
        value = self.get(key)
        if not isinstance(value, str):
            raise self.error(f"{json.dumps(key)} must be a text, but is {_brief(value)}.")
        return value

    def responses(self, key: str, exactly: int | None = None) -> list[str]:
        """A list of responses."""
        value = self.get(key)
        wanted = f"a list of {exactly} texts" if exactly else "a list of at least one text"
        if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            if exactly is None or len(value) == exactly:
                return value
        raise self.error(f"{json.dumps(key)} must be {wanted}, but is {_brief(value)}.")

    def steps(self, key: str) -> list[str]:
        """A list of steps; a few of PRMBench's are empty, but never all of a solution."""
        value = self.responses(key)
        if not any(step.strip() for step in value):
            raise self.error(f"{json.dumps(key)} has only empty steps: there is nothing to score.")
        return value

    def one_of(self, key: str, choices: Sequence[Any]) -> Any:
        """A value out of a few."""
        value = self.get(key)
        if isinstance(value, bool) or value not in choices:
            raise self.error(f"{json.dumps(key)} must be one of {list(choices)}, but is {_brief(value)}.")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(f"{json.dumps(key)} must be a whole number from {low} to {high}, but is {_brief(value)}.")
        return value

    def name(self, *keys: str) -> str:
        """The first of these keys that the row has, as text; or its place."""
        for key in keys:
            if self.data.get(key) is not None:
                return str(self.data[key])
        return f"{self.stem} {self.place}"


def read_rows(data: str | None, hub: HubDataset | None, benchmark: str) -> Iterator[Row]:
    """
    Rows of a benchmark.

    Args:
        data (`str`, *optional*):
            File (JSON array, JSON Lines, both also as `.gz`, or Parquet), folder with such files, or, where neither is
            there, a dataset on the hub, `OWNER/NAME` or `OWNER/NAME:SPLIT` (default: `test`). Of a folder without such
            files, those in the folders below are read.
        hub ([`HubDataset`], *optional*):
            Where to load from if `data` is not given.
        benchmark (`str`):
            Its name, for messages.

    Raises:
        `FormatError`: If a file cannot be read as rows.
        `ValueError`: If there is neither file nor hub dataset.
    """
    if data is None:
        if hub is None:
            raise ValueError(f"{benchmark} is not on the hub: give its file or folder with --data.")
        yield from _hub_rows(hub)
        return
    path = Path(data)
    if path.is_dir():
        paths = sorted(filter(_is_data, path.iterdir())) or sorted(filter(_is_data, path.rglob("*")))
        if not paths:
            raise ValueError(f"--data {data}: the folder has no file that ends with {', '.join(SUFFIXES)}.")
    elif path.is_file():
        paths = [path]
    elif (found := _HUB_ID.fullmatch(data)) and not data.endswith(SUFFIXES):
        yield from _hub_rows(HubDataset(found["name"], (found["split"] or DEFAULT_SPLIT,)))
        return
    else:
        raise ValueError(f"--data {data}: there is no such file or folder.")
    for file in paths:
        yield from read_file(file)


def read_file(path: Path) -> Iterator[Row]:
    """Rows of one file."""
    stem = path.name
    for suffix in (".gz", ".jsonl", ".json", ".parquet"):
        stem = stem.removesuffix(suffix)
    if path.name.endswith(".parquet"):
        from datasets import Dataset

        try:
            rows = Dataset.from_parquet(str(path))
        except Exception as error:  # the library raises many kinds
            raise FormatError(f"{path}: cannot be read as Parquet: {error}.") from error
        if len(rows) == 0:
            raise FormatError(f"{path}: there is no row in the file.")
        for number, data in enumerate(rows, start=1):
            yield Row(data, str(path), f"row {number}", stem)
        return
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as UTF-8 text: {error}.") from error
    objects = _array_objects(path, text) if text.lstrip().startswith("[") else _line_objects(path, text)
    empty = True
    for place, data in objects:
        empty = False
        if not isinstance(data, dict):
            raise FormatError(f"{path}, {place}: a row must be a JSON object, but is {_brief(data)}.")
        try:
            json.dumps(data, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            raise FormatError(
                f"{path}, {place}: has half of a surrogate pair, which is no character: {error}."
            ) from error
        yield Row(data, str(path), place, stem)
    if empty:
        raise FormatError(f"{path}: there is no row in the file.")


def _is_data(file: Path) -> bool:
    return file.name.endswith(SUFFIXES) and not file.name.startswith(".")


def _line_objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise FormatError(f"{path}, line {number}: not valid JSON: {error}.") from error


def _array_objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Elements of a JSON array, with their number and the line that each begins on."""
    decoder = json.JSONDecoder()
    position, line = text.index("[") + 1, 1
    counted, number = 0, 0
    while True:
        gap = _GAP.match(text, position)
        assert gap is not None  # it matches nothing, too
        position = gap.end()
        line += text.count("\n", counted, position)
        counted = position
        comma, end = "," in gap[0], text.startswith("]", position)
        if end and not comma:
            if text[position + 1 :].strip():
                raise FormatError(f"{path}, line {line}: not valid JSON: text behind the end of the array.")
            return
        if comma != (number > 0) or end:
            raise FormatError(f"{path}, line {line}: not valid JSON: a comma is missing, or one too many.")
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError as error:
            raise FormatError(f"{path}, line {line}: not valid JSON: {error}.") from error
        number += 1
        yield f"row {number} (line {line})", value


def _hub_rows(hub: HubDataset) -> Iterator[Row]:
    from datasets import load_dataset

    for split in hub.splits:
        try:
            rows = load_dataset(hub.name, hub.config, split=split)
        except Exception as error:  # the library raises many kinds; all end the command with one message
            raise ValueError(
                f"The dataset {hub.name} (split {split}) is no file or folder here, and cannot be loaded from the "
                "Hugging "
                f"Face hub: {error}. Without network, give a local file or folder with --data."
            ) from error
        for number, data in enumerate(rows, start=1):
            yield Row(data, f"{hub.name} ({split})", f"row {number}", split)


def _brief(value: object) -> str:
    text = json.dumps(value, ensure_ascii=True, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
