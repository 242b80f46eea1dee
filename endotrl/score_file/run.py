# SPDX-License-Identifier: Apache-2.0
"""From the first row to the last: block by block, behind what an earlier run has done."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from .blocks import output_record, score_rows
from .output_files import Output, only_run_on
from .rows import ROW_FORMAT, Reader, Row
from .tally import Tally


if TYPE_CHECKING:
    from ..rewards.endogenous import EndogenousReward
    from ..rewards.sentence import SentenceReward
    from ..scoring.token_stats import TokenStats
    from ..sentence.sentence_scorer import SentenceScores


@dataclass(frozen=True)
class Example:
    """A row with what the frozen model said about its tokens, or a sentence reward model about its sentences."""

    row: Row
    stats: Any


@dataclass(frozen=True)
class ScoreReport:
    """
    What came out of [`score_file`].

    Attributes:
        tally ([`Tally`]):
            Statistics of all rows, those of earlier runs included.
        resumed_rows (`int`):
            Rows that earlier runs had done.
        seconds (`float`):
            Scoring time of all runs, in seconds.
        examples (`list[Example]`):
            The first rows, as many as asked.
    """

    tally: Tally
    resumed_rows: int
    seconds: float
    examples: list[Example]

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second; prompts are not counted."""
        return self.tally.tokens / self.seconds if self.seconds > 0 else 0.0


def score_file(
    reward: "EndogenousReward | SentenceReward",
    input_path: str | Path,
    output_path: str | Path,
    settings: Mapping[str, Any],
    *,
    block_size: int = 64,
    limit: int | None = None,
    overwrite: bool = False,
    tokens: bool = True,
    keep: int = 10,
    num_examples: int = 0,
    progress: bool = False,
    on_error: Callable[[int, str], None] | None = None,
    held: bool = False,
) -> ScoreReport:
    """
    Scores the rows of a JSON Lines file, and goes on where an earlier run was cut off.

    Args:
        reward ([`EndogenousReward`] or [`SentenceReward`]):
            The reward.
        input_path (`str` or `Path`):
            File of rows `{"prompt": ..., "completion": ...}`, text or messages; `"-"` for standard input.
        output_path (`str` or `Path`):
            File to write; `"-"` for standard output, without metadata, error file and resuming.
        settings (`Mapping[str, Any]`):
            What the numbers depend on (model, alpha, ...), as JSON values. A run resumes only under equal settings.
        block_size (`int`, *optional*, defaults to `64`):
            Rows that are read, scored and saved together.
        limit (`int`, *optional*):
            Score only so many rows from the start.
        overwrite (`bool`, *optional*, defaults to `False`):
            Start anew if the output exists.
        tokens (`bool`, *optional*, defaults to `True`):
            Whether to write each token, or sentence, and its reward.
        keep (`int`, *optional*, defaults to `10`):
            How many first, highest and lowest rows the report keeps.
        num_examples (`int`, *optional*, defaults to `0`):
            How many first rows the report keeps with their token statistics.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        on_error (`Callable[[int, str], None]`, *optional*):
            Called with line number and reason of each bad row.
        held (`bool`, *optional*, defaults to `False`):
            Whether the caller keeps other runs from the output already: see [`only_run_on`].

    Returns:
        [`ScoreReport`].

    Raises:
        `ValueError`: If the output exists and is not an earlier, equal run; or for numbers and paths that cannot be.
        `OSError`: If a file cannot be read or written.
    """
    for name, value in (("block_size", block_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}, but it must be at least 1.")
    report = on_error or (lambda line, error: None)
    tally = Tally(keep)
    examples: list[Example] = []
    with ExitStack() as stack:
        if not held:
            stack.enter_context(only_run_on(output_path))
        reader = stack.enter_context(Reader(input_path))
        output = stack.enter_context(Output(output_path, reader, {**settings, "tokens": tokens}))
        output.check(block_size, overwrite)
        total = reader.count_rows(limit)
        if total == 0:
            raise ValueError(f"{input_path} has no rows. A row is a line such as {ROW_FORMAT}.")
        if total is None or total > output.kept_rows or num_examples:
            reward.load()  # before a file is touched: a model that cannot be loaded leaves nothing behind
        output.open()
        bar = stack.enter_context(
            tqdm(total=total, initial=output.kept_rows, desc="Scoring", unit=" rows", disable=not progress)
        )

        unseen: list[Row] = []  # rows of earlier runs, of which the token statistics are gone
        for record in output.kept_records():
            row = next(reader)
            if row.line != record["line"]:
                raise ValueError(
                    f"{output.path} holds line {record['line']} where the input has line {row.line}: it is not the "
                    "output of this input. Choose another output, or overwrite this one."
                )
            tally.add(row, record)
            if "error" in record:
                output.write_error(record)
            elif len(unseen) < num_examples:
                unseen.append(row)
        examples.extend(_examples(unseen, score_rows(reward, unseen)))

        while limit is None or tally.rows < limit:
            started = time.perf_counter()
            rows = list(islice(reader, block_size if limit is None else min(block_size, limit - tally.rows)))
            if not rows:
                break
            results = score_rows(reward, rows)
            records = [output_record(reward, row, result, tokens) for row, result in zip(rows, results, strict=True)]
            examples.extend(_examples(rows, results)[: max(0, num_examples - len(examples))])
            for row, record in zip(rows, records, strict=True):
                tally.add(row, record)
                if "error" in record:
                    report(row.line, record["error"])
            output.write(records, tally, time.perf_counter() - started)
            bar.update(len(rows))
        return ScoreReport(tally, output.kept_rows, output.seconds, examples)


def _examples(rows: Sequence[Row], results: Sequence["TokenStats | SentenceScores | str"]) -> list[Example]:
    return [Example(row, stats) for row, stats in zip(rows, results, strict=True) if not isinstance(stats, str)]
