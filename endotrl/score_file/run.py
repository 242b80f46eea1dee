# SPDX-License-Identifier: Apache-2.0
"""Scoring of a file from its first to its last row, block by block, resuming an earlier run."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..checks import check_choice
from ..data.formats import ROW_FORMAT
from ..data.sources import STREAM, Reader
from ..reporting import counted
from ..rewards.residuals import RESIDUALS
from ..runs.files import only_run_on
from ..runs.processes import processes
from .by_prompt import Slopes, fit_slopes, take_out
from .output_files import Output, Tally
from .rows import Reward, Row, output_records, read_responses, score_rows
from .sharded import ShardedScores


@dataclass(frozen=True)
class Example:
    """A row with the frozen model's token statistics, or a sentence reward model's sentence scores."""

    row: Row
    stats: Any


@dataclass(frozen=True)
class ScoreReport:
    """Result of [`score_file`]."""

    tally: Tally  # of all rows, including those of earlier runs
    resumed_rows: int
    seconds: float  # scoring time of all runs
    examples: list[Example]  # the first rows, as many as requested
    slopes: Slopes = field(default_factory=dict)  # removed by a residual, by domain

    @property
    def tokens_per_second(self) -> float:
        """Scored tokens per second; prompts are not counted."""
        return self.tally.tokens / self.seconds if self.seconds > 0 else 0.0


def score_file(
    reward: Reward,
    input_path: str | Path,  # rows of any of TRL's formats with responses, as read by `Reader`
    output_path: str | Path,  # `"-"` for standard output, without metadata, error file and resuming
    settings: Mapping[str, Any],  # that determine the numbers, as JSON values: a run resumes only with equal ones
    *,
    block_size: int = 64,  # rows read, scored and saved together
    limit: int | None = None,  # only this many rows from the start
    overwrite: bool = False,  # start over if the output exists
    tokens: bool = True,  # write each token, or sentence, and its reward
    num_examples: int = 0,  # first rows kept in the report with their token statistics
    progress: bool = False,
    on_error: Callable[[int, str], None] | None = None,  # called with line number and reason for each invalid row
    residual: str | None = None,
) -> ScoreReport:
    """
    Scores rows, resuming an earlier run that was interrupted. Only the report of the main process is not empty.

    Under `accelerate launch`, all processes call it: each scores blocks of similar total length into its own file in
    the folder `OUTPUT.shards`, from which the main process makes the output, identical to that of one process.

    A `residual`, `"residual"` or `"style_residual"`, subtracts from the rewards the effect of length, or of length and
    Markdown, among the responses to one prompt, which must be adjacent: see [`~endotrl.rewards.residuals.residuals`].
    The shards are then kept, so that longer inputs are scored without scoring these rows again.

    Raises `ValueError` if the output exists and is not of an earlier, equal run, or for impossible numbers and paths;
    `OSError` if a file cannot be read or written.
    """
    for name, value in (("block_size", block_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    if residual is not None:
        check_choice("residual", residual, tuple(RESIDUALS))
    state = processes()
    folder = Path(f"{output_path}.shards")  # exists after an interruption of several processes
    in_shards = state.num_processes > 1 or residual is not None or folder.is_dir()
    if in_shards and STREAM in (str(input_path), str(output_path)):
        raise ValueError("Several processes and residuals need files: standard input or output cannot be used.")
    settings = {**settings, "tokens": tokens} | ({} if residual is None else {"residual": residual})
    tally, slopes = Tally(), dict[str, Any]()
    with only_run_on(output_path, input_path) if state.is_main_process else nullcontext():
        reader = Reader(input_path)
        output = Output(output_path, reader, settings)
        output.check(block_size, overwrite, anew=residual is not None)
        if limit is not None and output.kept_rows > limit:  # responses, of which a row may have several
            kept = sum(1 for _ in groupby(output.kept_records(), itemgetter("line")))
            if kept > limit:
                raise ValueError(
                    f"{output_path} has {counted(kept, 'row')}, more than `limit={limit}`. Choose another output, or "
                    "overwrite this one (--overwrite)."
                )
        total = reader.count(limit)
        if total == 0:
            raise ValueError(f"{input_path} has no rows. A row is a line such as {ROW_FORMAT}.")
        if total is None or total > output.kept_rows or num_examples:
            reward.load()  # before a file is touched: a model that cannot be loaded leaves no files behind
        shards = ShardedScores(reward, input_path, folder, block_size, limit, tokens, start=output.kept_rows)
        if in_shards:
            shards.fill(settings, overwrite, progress)
            if not state.is_main_process:
                return ScoreReport(tally, 0, 0.0, [])
        if residual is not None:
            slopes |= fit_slopes(residual, shards.scored())
            output.notes["slopes"] = {g: dict(zip(RESIDUALS[residual], b, strict=True)) for g, b in slopes.items()}
        output.begin()
        shown: list[Example] = []  # the first good ones

        def take(row: Row, record: dict[str, Any], stats: Any = None) -> None:
            tally.add(row, record)
            if "error" not in record and len(shown) < num_examples:
                shown.append(Example(row, stats))

        rows = read_responses(reader, limit)
        for record, row in zip(output.kept_records(), rows, strict=False):
            take(row, record)
            output.write_errors([record])
        what = "Writing" if in_shards else "Scoring"
        with tqdm(total=total, initial=output.kept_rows, desc=what, unit=" rows", disable=not progress) as bar:
            while block := list(islice(rows, block_size)):
                began = time.perf_counter()
                results: Sequence[Any] = [None] * len(block)
                if in_shards:
                    records, seconds = shards.get(block)
                else:
                    results = score_rows(reward, block)
                    records = output_records(reward, block, results, tokens)
                    seconds = time.perf_counter() - began
                for row, record, stats in zip(block, records, results, strict=True):
                    if residual is not None:
                        take_out(residual, slopes, row, record)
                    take(row, record, stats)
                    if "error" in record and on_error is not None:
                        on_error(row.line, record["error"])
                output.write(records, tally, seconds)
                bar.update(len({row.line for row in block}))
        # What an earlier run, or another process, has scored is scored again.
        fresh = iter(score_rows(reward, [example.row for example in shown if example.stats is None]))
        examples = [example if example.stats is not None else Example(example.row, next(fresh)) for example in shown]
        if in_shards and residual is None:
            shards.remove()
    return ScoreReport(tally, output.kept_rows, output.seconds, examples, slopes)
