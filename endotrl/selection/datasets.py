# SPDX-License-Identifier: Apache-2.0
"""Ranking, best of n, preference pairs, and filtered or scored datasets from rewards: library calls."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..checks import check_choice, check_rewards
from ..rendering.messages import TEMPLATE_COLUMNS, Completion, Prompt
from ..reporting import counted
from ..rewards.corrections import LengthControl
from ..rewards.endogenous import EndogenousReward
from ..rewards.residuals import RESIDUALS
from ..rewards.sentence import SentenceReward
from ..score_file.by_prompt import by_prompt, fit_slopes, take_out
from ..score_file.rows import Row, Scored, output_records, rows_of, score_rows
from .choose import Choice, Counts


if TYPE_CHECKING:
    AnyReward = EndogenousReward | SentenceReward | Callable[..., Sequence[float | None]]

BATCH = 64  # responses scored together


def rank(
    reward: "AnyReward",
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[Completion]],
    *,
    completion_ids: Sequence[Sequence[Sequence[int]]] | None = None,
    residual: str | None = None,
) -> list[list[int]]:
    r"""
    Ranks the candidate responses to each prompt by a reward.

    Args:
        reward ([`EndogenousReward`], [`SentenceReward`] or `Callable`):
            The reward, or any reward function of TRL. To rank text by other authors, a discounted sum is better than
            the default: `aggregate="discounted=0.93"`.
        prompts (`list[str]` or `list[list[dict]]`), candidates (`list[list[str]]` or `list[list[list[dict]]]`):
            P prompts, as text or as messages, and the responses to each.
        completion_ids (`list[list[list[int]]]`, *optional*):
            Tokens of the responses, as a policy generated them, including the end-of-sequence token. Without them,
            text counts as complete.
        residual (`str`, *optional*):
            `"residual"` or `"style_residual"`: subtract from the rewards the effect of length, or of length and
            Markdown, among the candidates of a prompt, pooled over all prompts
            ([`~endotrl.rewards.residuals.residuals`]). With few prompts, nothing is subtracted.

    Returns:
        `list[list[int]]`: for each prompt, the indices of its candidates, from the best to the worst; ties keep their
        order, and candidates without a reward come last. `ValueError` if one cannot be scored.

    Example:
    ```python
    >>> from endotrl import EndogenousReward, rank

    >>> reward = EndogenousReward("quickstart")
    >>> rank(reward, ["The capital of France is"], [[" Rome.", " Paris."]])
    [[1, 0]]
    ```
    """
    if isinstance(prompts, str) or any(isinstance(responses, str) for responses in candidates):
        raise TypeError("`prompts` must be a list, and `candidates` a list of responses for each of them, got text.")
    for name, given in {"candidates": candidates, "completion_ids": completion_ids}.items():
        if given is not None and len(given) != len(prompts):
            count = counted(len(prompts), "prompt")
            raise ValueError(f"`{name}` must have one entry per prompt, got {len(given)} for {count}.")
    data: list[dict[str, Any]] = [
        {"prompt": prompt, "completions": list(responses)}
        for prompt, responses in zip(prompts, candidates, strict=True)
    ]
    for entry, ids in zip(data, completion_ids or [], strict=False):
        entry["completion_ids"] = [list(row) for row in ids]
    ranking: list[list[tuple[bool, float, Any]]] = [[] for _ in data]
    for row, record in scored_rows(reward, data, residual):
        value = record["reward"]
        ranking[row.line - 1].append((value is None, -(value or 0.0), row.response))
    return [[place for _, _, place in sorted(entries)] for entries in ranking]


def best_of_n(
    reward: "AnyReward",
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[Completion]],
    *,
    completion_ids: Sequence[Sequence[Sequence[int]]] | None = None,
    residual: str | None = None,
) -> list[Completion]:
    """The best of the candidate responses to each prompt by a reward, one per prompt. Arguments as in [`rank`]."""
    ranking = rank(reward, prompts, candidates, completion_ids=completion_ids, residual=residual)
    return [responses[order[0]] for responses, order in zip(candidates, ranking, strict=True)]


def preference_pairs(
    reward: "AnyReward",
    dataset: Iterable[Mapping[str, Any]],
    *,
    residual: str | None = None,
    margin: float = 0.0,
    num_pairs: int = 1,
    unfinished: bool = False,
) -> Dataset:
    """
    Makes a TRL preference dataset, for `DPOTrainer` or `RewardTrainer`, from candidate responses and a reward.

    Args:
        reward, residual, margin, num_pairs, unfinished:
            As in [`rank`] and [`~endotrl.selection.choose.Choice`].
        dataset ([`~datasets.Dataset`] or another iterable):
            Rows `{"prompt", "completions"}`, optionally with `completion_ids`; or `{"prompt", "completion"}`, those of
            a prompt adjacent; or preferences, which are relabelled. Text or messages.

    Returns:
        [`~datasets.Dataset`] with `prompt`, `chosen`, `rejected`, the other columns that are equal for all responses
        to a prompt, `score_chosen` and `score_rejected`. `ValueError` if there is no pair.

    Example:
    ```python
    >>> from endotrl import EndogenousReward, preference_pairs

    >>> reward = EndogenousReward("quickstart")
    >>> rows = [{"prompt": "The capital of France is", "completions": [" Rome.", " Paris.", " Lyon."]}]
    >>> preference_pairs(reward, rows)[0]["chosen"]
    ' Paris.'
    ```
    """
    return _chosen(reward, dataset, residual, Choice("pairs", margin, num_pairs, unfinished=unfinished))


def top_fraction(
    reward: "AnyReward",
    dataset: Iterable[Mapping[str, Any]],
    fraction: float = 0.25,
    *,
    residual: str | None = None,
    unfinished: bool = False,
) -> Dataset:
    """
    Makes a TRL prompt-completion dataset, for `SFTTrainer`: the best `fraction` of the responses to each prompt, in
    $(0, 1]$ and rounded up, with `prompt`, `completion`, the other columns, and `score`. Other arguments are as in
    [`preference_pairs`].
    """
    return _chosen(reward, dataset, residual, Choice("top", fraction=fraction, unfinished=unfinished))


def score_dataset(reward: "AnyReward", dataset: Dataset, *, residual: str | None = None) -> Dataset:
    """
    Adds rewards as columns to a dataset of any of TRL's formats with responses: `reward`, `num_tokens` and
    `finished` for prompt-completion rows; `score_chosen` and `score_rejected` for preferences; `scores` for rows with
    `completions`. Arguments as in [`rank`]. `ValueError` if such columns exist, or a row cannot be scored.

    Example:
    ```python
    >>> from datasets import Dataset
    >>> from endotrl import EndogenousReward, score_dataset

    >>> dataset = Dataset.from_list([{"prompt": "The capital of France is", "completions": [" Paris.", " Rome."]}])
    >>> scored = score_dataset(EndogenousReward("quickstart"), dataset)
    >>> paris, rome = scored["scores"][0]
    >>> paris > rome
    True
    ```
    """
    new = {"reward", "num_tokens", "finished", "score_chosen", "score_rejected", "scores"}
    if taken := new & set(dataset.column_names):
        raise ValueError(f"The dataset already has columns {sorted(taken)}. Remove or rename them.")
    columns: dict[str, list[Any]] = defaultdict(list)
    for row, record in scored_rows(reward, dataset, residual):
        if isinstance(row.response, str):
            columns[f"score_{row.response}"].append(record["reward"])
        elif row.response is None:
            for key in [key for key in ("reward", "num_tokens", "finished") if key in record]:
                columns[key].append(record[key])
        else:
            if row.response == 0:
                columns["scores"].append([])
            columns["scores"][-1].append(record["reward"])
    for name, values in columns.items():
        dataset = dataset.add_column(name, values)
    return dataset


def scored_rows(
    reward: "AnyReward", data: Iterable[Mapping[str, Any]], residual: str | None = None
) -> Iterator[Scored]:
    """
    Yields the responses of rows with their output lines; with a residual, once all are scored. `ValueError` if a row
    cannot be scored, or the reward depends on its batch.
    """
    if isinstance(reward, EndogenousReward) and isinstance(reward.correction, LengthControl):
        raise ValueError(
            'The reward\'s `correction="length"` compares the completions of a batch. Use `residual="residual"` to '
            "compare the completions of each prompt."
        )
    if residual is None:
        return _scored(reward, data)
    check_choice("residual", residual, tuple(RESIDUALS))
    pairs = list(_scored(reward, data))
    slopes = fit_slopes(residual, pairs)
    for row, record in pairs:
        take_out(residual, slopes, row, record)
    return iter(pairs)


def _scored(reward: "AnyReward", data: Iterable[Mapping[str, Any]]) -> Iterator[Scored]:
    rows = (row for number, entry in enumerate(data, start=1) for row in rows_of(number, entry))
    while block := list(islice(rows, BATCH)):
        if any(row.error for row in block):
            records: list[dict[str, Any]] = [{"error": row.error} for row in block]
        elif isinstance(reward, EndogenousReward | SentenceReward):
            records = output_records(reward, block, score_rows(reward, block), tokens=False)
        else:
            records = _rewarded(reward, block)
        for row, record in zip(block, records, strict=True):
            if record.get("error"):
                raise ValueError(f"Row {row.line - 1} cannot be scored: {record['error']}")
        yield from zip(block, records, strict=True)


def _rewarded(reward: Callable[..., Sequence[float | None]], block: Sequence[Row]) -> list[dict[str, Any]]:
    """Output lines from a reward function of TRL, which gets the columns common to all rows, and the rendered ones."""
    names = [set(row.extra) for row in block]
    shared = set.intersection(*names) | {"image", "images", *TEMPLATE_COLUMNS} & set().union(*names)
    columns: dict[str, list[Any]] = {name: [row.extra.get(name) for row in block] for name in sorted(shared)}
    if all(row.completion_ids is not None for row in block):
        columns["completion_ids"] = [row.completion_ids for row in block]
    rewards = reward(prompts=[row.prompt for row in block], completions=[row.completion for row in block], **columns)
    return [{"reward": value} for value in check_rewards(rewards, len(block))]


def _chosen(
    reward: "AnyReward", dataset: Iterable[Mapping[str, Any]], residual: str | None, choice: Choice
) -> Dataset:
    counts = Counts()
    rows = [row for group in by_prompt(scored_rows(reward, dataset, residual)) for row in choice.rows(group, counts)]
    if not rows:
        raise ValueError(f"None of {counted(counts.prompts, 'prompt')} gives a row. {counts.why_not()}".strip())
    return Dataset.from_list(rows)
