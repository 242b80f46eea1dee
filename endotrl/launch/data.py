# SPDX-License-Identifier: Apache-2.0
"""Recipe data, validated before any model is loaded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_dataset_builder,
)
from datasets.exceptions import DatasetsError
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, GRPOConfig, RewardConfig, ScriptArguments, get_dataset

from ..data.formats import check_text
from ..data.sources import is_json, read_rows
from ..tasks import facts
from .arguments import RecipeArguments


Data: TypeAlias = Dataset | IterableDataset
Split: TypeAlias = tuple[Data, Data | None]  # for training and for evaluation
Quickstart: TypeAlias = Callable[[list[facts.Question]], Dataset]

TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def load_prompts(script_args: RecipeArguments, training_args: GRPOConfig, dataset_args: DatasetMixtureConfig) -> Split:
    """Loads the prompts for training and for evaluation (`None` without `eval_strategy`), in a column `prompt`."""
    splits = _splits(script_args, training_args, dataset_args, facts.make_dataset)
    train, evaluation = (part if part is None else _with_prompts(part, script_args) for part in splits)
    return train, evaluation


def check_number(train: Data, training_args: GRPOConfig) -> None:
    """Raises `ValueError` if there are fewer prompts than a generation batch needs, so that no step would be made."""
    num_prompts = training_args.generation_batch_size // training_args.num_generations
    if isinstance(train, Dataset) and len(train) < num_prompts:
        raise ValueError(
            f"The dataset has {len(train)} prompts, fewer than the {num_prompts} of one generation batch "
            f"(`generation_batch_size` {training_args.generation_batch_size} divided by `num_generations` "
            f"{training_args.num_generations}). Use a smaller batch or more prompts."
        )


def load_preferences(
    script_args: ScriptArguments, training_args: RewardConfig, dataset_args: DatasetMixtureConfig
) -> Split:
    """
    Loads the pairs for training and for evaluation (`None` without `eval_strategy`), in columns `chosen` and
    `rejected`. `"quickstart"` has right and wrong answers to the questions that ship with endotrl.
    """
    train, evaluation = _splits(script_args, training_args, dataset_args, facts.make_preferences)
    for dataset in (train, evaluation):
        if dataset is None:
            continue
        columns = set(column_names(dataset))
        if not columns >= {"chosen", "rejected"} and not columns >= {"chosen_ids", "rejected_ids"}:
            raise ValueError(
                "A preference dataset must have the columns 'chosen' and 'rejected' (and 'prompt', unless both begin "
                f"with it), got {', '.join(map(repr, column_names(dataset)))}. Rename its columns."
            )
        for column in columns & {"prompt", "chosen", "rejected"}:
            _check_rows(dataset, column, column)
    return train, evaluation


def count_rows(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> int:
    """Number of rows in the training split; for a hub dataset from its metadata, `ValueError` if not given there."""
    name, split = script_args.dataset_name, script_args.dataset_train_split
    try:
        on_hub = name not in (None, "quickstart") and not Path(name).exists() and table_suffix(name) is None
        if dataset_args.datasets or not on_hub:
            return len(_split(_load(script_args, dataset_args, facts.make_dataset), split, "dataset_train_split"))
        info = load_dataset_builder(name, script_args.dataset_config).info
        return info.splits[split].num_examples
    except (DatasetsError, OSError, KeyError, TypeError) as error:
        raise ValueError(f"Cannot count the rows of {name}: {' '.join(str(error).split())[:200]}") from error


def load_splits(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
    """
    Splits of a dataset: of a file (split `train`), of a folder, or of the hub. JSON and JSON Lines are read by
    [`Reader`], row by row; other files by `datasets`, with their own types. Raises `ValueError` if it cannot be read
    as rows, for JSON with the line, and `OSError` if there is nothing of that name.
    """
    path, suffix = Path(name), table_suffix(name)
    if suffix is not None and not path.is_file():
        raise FileNotFoundError(f"The file {name!r} of `dataset_name` does not exist.")
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
        what = "" if suffix is None else f" as {suffix.removeprefix('.')}"
        raise ValueError(f"Cannot read `dataset_name` {name!r}{what}: {error.__cause__ or error}") from error


def table_suffix(name: str) -> str | None:
    """Table format by file name, as its suffix, such as `".jsonl"`; `None` for a folder, or a dataset of the hub."""
    path = Path(name)
    suffix = next((suffix for suffix in path.suffixes[::-1] if suffix not in COMPRESSED), "")
    return suffix if suffix in TABLES and not path.is_dir() else None


def column_names(dataset: Data) -> list[str]:
    """Column names of a dataset; those of a streamed one may have to be read from its first row."""
    return dataset.column_names or list(next(iter(dataset), {}))


def _splits(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    dataset_args: DatasetMixtureConfig,
    quickstart: Quickstart,
) -> Split:
    splits = _load(script_args, dataset_args, quickstart)
    train = _split(splits, script_args.dataset_train_split, "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train, None
    return train, _split(splits, script_args.dataset_test_split, "dataset_test_split")


def _load(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, quickstart: Quickstart) -> Any:
    if dataset_args.datasets:
        try:
            return get_dataset(dataset_args)
        except DatasetsError as error:  # not all of them are `ValueError` or `OSError`
            raise ValueError(f"Cannot read `datasets`: {error.__cause__ or error}") from error
    if script_args.dataset_name == "quickstart":
        train, test = map(quickstart, facts.load_questions())
        return DatasetDict(train=train, test=test)
    if not script_args.dataset_name:
        raise ValueError(
            "No dataset given. Set `dataset_name` (a dataset on the hub, a file such as `prompts.jsonl`, or "
            "`quickstart`) or `datasets`."
        )
    return load_splits(script_args.dataset_name, script_args.dataset_config, script_args.dataset_streaming)


def _split(splits: DatasetDict | IterableDatasetDict, name: str, argument: str) -> Data:
    if name not in splits:
        raise ValueError(
            f"The dataset has no split {name!r}, only {', '.join(map(repr, splits))}. Set `{argument}` to one of them"
            + (", or `eval_strategy: no`." if argument == "dataset_test_split" else ".")
        )
    return splits[name]


def _with_prompts(dataset: Data, script_args: RecipeArguments) -> Data:
    columns, column = column_names(dataset), script_args.dataset_prompt_column
    if column not in columns:
        raise ValueError(
            f"The dataset has no column {column!r}, only {', '.join(map(repr, columns))}. Set `dataset_prompt_column` "
            "to the column with the prompts."
        )
    _check_rows(dataset, "prompt", column)
    if column != "prompt" and "prompt" in columns:
        dataset = dataset.remove_columns("prompt")
    suffix, chat = script_args.dataset_prompt_suffix or "", script_args.dataset_prompt_chat
    # A `map` that writes into a column cannot change its type.
    name = "prompt, as given" if suffix or chat else "prompt"
    dataset = dataset if name == column else dataset.rename_column(column, name)
    if not suffix and not chat:
        return dataset
    return dataset.map(lambda row: {"prompt": _worded(row[name], suffix, chat)}, remove_columns=name)


def _check_rows(dataset: Data, key: str, column: str) -> None:
    """Raises `ValueError` if a row is neither text nor messages; in a stream, only the first row is checked."""
    row = -1
    for row, value in enumerate(dataset[column] if isinstance(dataset, Dataset) else [next(iter(dataset))[column]]):
        if reason := check_text(key, value):
            raise ValueError(f"Row {row} of the dataset is invalid: {reason} Fix or remove it.")
    if row < 0:
        raise ValueError("The dataset is empty.")


def _worded(prompt: str | list[dict[str, Any]], suffix: str, chat: bool) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt + suffix}] if chat else prompt + suffix
    content = prompt[-1]["content"] or ""
    if isinstance(content, str):
        content += suffix
    elif content and content[-1]["type"] == "text":
        content = [*content[:-1], {**content[-1], "text": content[-1]["text"] + suffix}]
    else:
        content = [*content, {"type": "text", "text": suffix}]
    return [*prompt[:-1], {**prompt[-1], "content": content}]


def _rows(name: str) -> Iterator[dict[str, Any]]:
    yield from (row.data for row in read_rows(name))


def _whole_rows(name: str, stamp: tuple[str, int, int]) -> Iterator[dict[str, Any]]:
    """Rows with all keys of the file, like those of a table."""
    keys = dict.fromkeys(key for row in _rows(name) for key in row)
    yield from ({key: row.get(key) for key in keys} for row in _rows(name))
