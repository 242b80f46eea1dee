# SPDX-License-Identifier: Apache-2.0
"""Training datasets from local files or the Hugging Face hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from .sources import is_json, read_rows


TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """
    Splits of a dataset: of a file (split `train`), of a folder, or of the hub. JSON and JSON Lines are read by
    [`Reader`], row by row; other files by `datasets`, with their own types. Raises `ValueError` if it cannot be read
    as rows, for JSON with the line, and `OSError` if there is nothing of that name.
    """
    path, suffix = Path(name), table_suffix(name)
    if suffix is not None and not path.is_file():
        raise FileNotFoundError(f"`dataset_name` is {name!r}, but there is no such file.")
    try:
        if suffix is None:
            return load_dataset(name, name=config, streaming=streaming)
        if not is_json(path):
            return load_dataset(TABLES[suffix], data_files=name, streaming=streaming)
        if streaming:
            rows = IterableDataset.from_generator(_rows, gen_kwargs={"name": name})
            return IterableDatasetDict(train=rows)
        # The arguments are the cache key: a file that has changed is read again.
        stat = path.stat()
        stamp = (str(path.resolve()), stat.st_mtime_ns, stat.st_size)
        return DatasetDict(train=Dataset.from_generator(_whole_rows, gen_kwargs={"name": name, "stamp": stamp}))
    except DatasetsError as error:  # not all of them are `ValueError` or `OSError`
        what = "it cannot be read" if suffix is None else f"that file cannot be read as {suffix.removeprefix('.')}"
        raise ValueError(f"`dataset_name` is {name!r}, but {what}: {error.__cause__ or error}") from error


def table_suffix(name: str) -> str | None:
    """Table format by file name, as its suffix, such as `".jsonl"`; `None` for a folder, or a dataset of the hub."""
    path = Path(name)
    suffix = next((suffix for suffix in path.suffixes[::-1] if suffix not in COMPRESSED), "")
    return suffix if suffix in TABLES and not path.is_dir() else None


def _rows(name: str) -> Iterator[dict[str, Any]]:
    yield from (row.data for row in read_rows(name))


def _whole_rows(name: str, stamp: tuple[str, int, int]) -> Iterator[dict[str, Any]]:
    """Rows with all keys of the file, like those of a table."""
    keys = dict.fromkeys(key for row in _rows(name) for key in row)
    yield from ({key: row.get(key) for key in keys} for row in _rows(name))
