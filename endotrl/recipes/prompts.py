# SPDX-License-Identifier: Apache-2.0
"""Data of a recipe, checked before any model is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, load_dataset
from datasets.exceptions import DatasetGenerationError
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, GRPOConfig, RewardConfig, ScriptArguments, get_dataset

from .arguments import RecipeArguments


FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(
    script_args: RecipeArguments, training_args: GRPOConfig, dataset_args: DatasetMixtureConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Loads the prompts to train on, and those to evaluate on if `eval_strategy` asks for it.

    Args:
        script_args ([`RecipeArguments`]), training_args ([`~trl.GRPOConfig`]), dataset_args ([`~trl.DatasetMixtureConfig`]):
            What the parser of [`make_parser`] returns. A mixture (`datasets`) goes before `dataset_name`.

    Returns:
        Two datasets with a column `prompt`, the second of them `None` without evaluation.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If no dataset is named, or its file cannot be read; if a split or the column of the prompts is missing; or
            if there are fewer prompts than one generation batch has.
    """
    train, evaluation = _splits(script_args, training_args, dataset_args, _quickstart_prompts)
    train = _with_prompts(train, script_args.dataset_train_split, script_args)
    if evaluation is not None:
        evaluation = _with_prompts(evaluation, script_args.dataset_test_split, script_args)
    num_prompts = training_args.generation_batch_size // training_args.num_generations
    if isinstance(train, Dataset) and len(train) < num_prompts:
        raise ValueError(
            f"The dataset has {len(train)} prompts, but one generation batch has {num_prompts}: "
            f"`generation_batch_size` {training_args.generation_batch_size} (by default `per_device_train_batch_size` "
            "times processes times `gradient_accumulation_steps`) divided by `num_generations` "
            f"{training_args.num_generations}. Make the batch smaller, or use more prompts."
        )
    return train, evaluation


def load_preferences(
    script_args: ScriptArguments, training_args: RewardConfig, dataset_args: DatasetMixtureConfig
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    """
    Loads the pairs to train on, and those to evaluate on if `eval_strategy` asks for it.

    Args:
        script_args ([`~trl.ScriptArguments`]), training_args ([`~trl.RewardConfig`]), dataset_args ([`~trl.DatasetMixtureConfig`]):
            Settings. `dataset_name` is a dataset of the hub or a file, or `"quickstart"`: right against wrong answers to
            the questions that ship with endotrl. A mixture (`datasets`) goes before `dataset_name`.

    Returns:
        Two datasets with columns `chosen` and `rejected`, the second of them `None` without evaluation.

    Raises:
        `FileNotFoundError`: If there is no such file.
        `ValueError`: If no dataset is named, its file cannot be read, or a split or column is missing.
    """
    train, evaluation = _splits(script_args, training_args, dataset_args, _quickstart_preferences)
    for dataset in (train, evaluation):
        columns = set() if dataset is None else set(column_names(dataset))
        if (
            dataset is not None
            and not columns >= {"chosen", "rejected"}
            and not columns >= {"chosen_ids", "rejected_ids"}
        ):
            raise ValueError(
                f"The dataset has the columns {', '.join(map(repr, column_names(dataset)))}, but preferences need "
                "'chosen' and 'rejected' (and 'prompt', unless it is the beginning of both). Rename its columns."
            )
    return train, evaluation


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """Names of the columns; a streamed dataset may tell only by its first row."""
    return dataset.column_names or list(next(iter(dataset)))


def _splits(
    script_args: ScriptArguments,
    training_args: TrainingArguments,
    dataset_args: DatasetMixtureConfig,
    quickstart: Callable[[], DatasetDict],
) -> tuple[Dataset | IterableDataset, Dataset | IterableDataset | None]:
    splits = _load(script_args, dataset_args, quickstart)
    train = _split(splits, script_args.dataset_train_split, "dataset_train_split")
    if training_args.eval_strategy == "no":
        return train, None
    return train, _split(splits, script_args.dataset_test_split, "dataset_test_split")


def _load(
    script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, quickstart: Callable[[], DatasetDict]
) -> Any:
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    name = script_args.dataset_name
    if name is None:
        raise ValueError(
            "There is no dataset. Set `dataset_name` (a dataset of the hub, a file such as `prompts.jsonl`, or "
            "`quickstart`) or `datasets`."
        )
    if name == "quickstart":
        return quickstart()
    file_format = FILE_FORMATS.get(Path(name).suffix)
    if file_format is None:
        return load_dataset(name, name=script_args.dataset_config, streaming=script_args.dataset_streaming)
    if not Path(name).is_file():
        raise FileNotFoundError(f"`dataset_name` is {name!r}, but there is no such file.")
    if not Path(name).stat().st_size:
        raise ValueError(f"`dataset_name` is {name!r}, but that file is empty.")
    try:
        return load_dataset(file_format, data_files=name, streaming=script_args.dataset_streaming)
    except DatasetGenerationError as error:
        raise ValueError(
            f"`dataset_name` is {name!r}, but that file cannot be read as {Path(name).suffix.removeprefix('.')}: {error.__cause__}"
        ) from error


def _quickstart_prompts() -> DatasetDict:
    from ..quickstart import facts

    train, held_out = facts.load_questions()
    return DatasetDict(train=facts.make_dataset(train), test=facts.make_dataset(held_out))


def _quickstart_preferences() -> DatasetDict:
    from ..quickstart import facts

    train, held_out = facts.load_questions()
    return DatasetDict(train=facts.make_preferences(train), test=facts.make_preferences(held_out))


def _split(splits: DatasetDict | IterableDatasetDict, name: str, argument: str) -> Dataset | IterableDataset:
    if name not in splits:
        raise ValueError(
            f"The dataset has no split {name!r}, only {', '.join(map(repr, splits))}. Set `{argument}` to one of them"
            + (", or `eval_strategy: no`." if argument == "dataset_test_split" else ".")
        )
    return splits[name]


def _with_prompts(
    dataset: Dataset | IterableDataset, split: str, script_args: RecipeArguments
) -> Dataset | IterableDataset:
    columns, column = column_names(dataset), script_args.dataset_prompt_column
    if column not in columns:
        raise ValueError(
            f"The split {split!r} of the dataset has no column {column!r} with prompts, only "
            f"{', '.join(map(repr, columns))}. Set `dataset_prompt_column` to one of them."
        )
    if column != "prompt":
        dataset = (dataset.remove_columns("prompt") if "prompt" in columns else dataset).rename_column(
            column, "prompt"
        )
    suffix, chat = script_args.dataset_prompt_suffix or "", script_args.dataset_prompt_chat
    if not suffix and not chat:
        return dataset
    if isinstance(dataset, Dataset):
        # A column cannot change its type in a `map` that writes into it.
        prompts = [_worded(prompt, suffix, chat) for prompt in dataset["prompt"]]
        return dataset.remove_columns("prompt").add_column("prompt", prompts)
    return dataset.map(lambda row: {"prompt": _worded(row["prompt"], suffix, chat)})


def _worded(prompt: str | list[dict[str, Any]], suffix: str, chat: bool) -> str | list[dict[str, Any]]:
    if isinstance(prompt, str):
        text = prompt + suffix
        return [{"role": "user", "content": text}] if chat else text
    return [*prompt[:-1], {**prompt[-1], "content": prompt[-1]["content"] + suffix}]
