# SPDX-License-Identifier: Apache-2.0
"""A recipe's data: loading, and checks of columns, rows and prompt lengths before weights are loaded."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
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
from tqdm.auto import tqdm
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, GRPOConfig, ModelConfig, RewardConfig, ScriptArguments, get_dataset

from ..data.formats import check_text
from ..data.sources import is_json, read_rows
from ..frozen.names import context_length, load_config, load_tokenizer
from ..rendering.messages import Template, add_criterion, criteria_of_rows
from ..reporting import say
from ..rewards import EndogenousReward
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


def fit_lengths(
    dataset: Data,
    script_args: RecipeArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    reward_funcs: Sequence[Callable[..., Any]],
) -> Data:
    """
    Raises `ValueError` for prompts that, with the longest completion, do not fit into the context of the policy, or of
    an endogenous reward's frozen model; with `dataset_overlong="drop"`, returns the dataset without them. A stream is
    only checked if such rows are to be dropped.
    """
    drop = script_args.dataset_overlong == "drop"
    for name, context, length in _readers(training_args, model_args, reward_funcs):
        room = context - training_args.max_completion_length
        if isinstance(dataset, IterableDataset):
            if drop:
                dataset = dataset.filter(lambda row, length=length, room=room: length(row) <= room)
            continue
        lengths: list[int] = []
        try:
            for row in tqdm(dataset, desc=f"Prompt lengths for {name}", unit=" prompts", delay=2, leave=False):
                lengths.append(length(row))
        except ValueError as error:
            raise ValueError(f"Row {len(lengths)} of the dataset is invalid: {error}") from error
        overlong = [i for i, tokens in enumerate(lengths) if tokens > room]
        if not overlong:
            continue
        what = (
            f"{len(overlong)} of {len(lengths)} prompts are too long for the context of {name}, {context} tokens, "
            f"with `max_completion_length` {training_args.max_completion_length}. The first is row {overlong[0]}, "
            f"with {lengths[overlong[0]]} tokens."
        )
        if not drop:
            raise ValueError(f"{what} Lower `max_completion_length`, or set `dataset_overlong: drop` to drop them.")
        if len(overlong) == len(lengths):
            raise ValueError(f"{what} No prompt is left. Lower `max_completion_length`.")
        if training_args.process_index == 0:
            say(f"{what} They are dropped.")
        dataset = dataset.select([i for i, tokens in enumerate(lengths) if tokens <= room])
    return dataset


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


def _readers(
    training_args: GRPOConfig, model_args: ModelConfig, reward_funcs: Sequence[Callable[..., Any]]
) -> Iterator[tuple[str, float, Callable[[dict[str, Any]], int]]]:
    """Readers of prompts and completions: name, token limit, and a function for the prompt length of a row."""

    def template(name: str) -> Template:
        return Template(load_tokenizer(name, training_args.trust_remote_code), training_args.chat_template_kwargs)

    policy = str(model_args.model_name_or_path)
    config = load_config(policy, training_args.trust_remote_code, model_args.model_revision, "The model")
    contexts = [context_length(config), training_args.vllm_max_model_length if training_args.use_vllm else None]
    shortest = min((limit for limit in contexts if limit is not None), default=float("inf"))
    yield "the policy", shortest, partial(_prompt_length, template(policy), None, True)
    for reward in reward_funcs:
        if isinstance(reward, EndogenousReward) and reward.overlong_prompt == "error":
            frozen, context = reward.config._name_or_path, context_length(reward.config)
            # Otherwise the policy's check covers it.
            if context is not None and (frozen != policy or reward.criterion is not None):
                length = partial(_prompt_length, template(frozen), reward.criterion, False)
                yield f"the frozen model {frozen}", context, length


def _prompt_length(template: Template, all_criteria: Any, is_policy: bool, row: dict[str, Any]) -> int:
    (criterion,) = criteria_of_rows(all_criteria, [row.get("domain")], 1)  # type: ignore[list-item]
    prompt = add_criterion(row["prompt"], criterion)
    if isinstance(prompt, str):
        return len(template.encode(prompt, special=True))
    text = template.apply(prompt, add_generation_prompt=True, has_criterion=criterion is not None)
    # TRL passes it to the policy's template unchanged (but a processor gets parts for text).
    in_parts = any(isinstance(message.get("content"), list) for message in prompt)
    if is_policy and in_parts and not template.reads_as_given(prompt):
        raise ValueError(
            "The content of a message is a list of parts, which the policy's chat template cannot read. Make it a "
            "string."
        )
    return len(template.encode(text, special=False))
