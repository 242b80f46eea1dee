# SPDX-License-Identifier: Apache-2.0
"""Datasets from a file of candidate responses: the implementation of `endotrl pairs`."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, nullcontext
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from ..data.sources import STREAM
from ..runs.files import only_run_on, replacing
from ..runs.processes import processes
from ..score_file.by_prompt import by_prompt, fit_slopes, take_out
from ..score_file.rows import Reward, Scored
from ..score_file.sharded import ShardedScores
from .choose import Choice, Counts


def choose_from_file(
    reward: Reward,
    input_path: str | Path,
    output_path: str | Path,
    settings: Mapping[str, Any],
    choice: Choice,
    *,
    residual: str | None = None,
    block_size: int = 64,
    limit: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    on_error: Callable[[int, str], None] | None = None,
) -> Counts:
    """
    Scores the responses of a file, those of a prompt adjacent, and writes the rows selected by a [`Choice`] for each
    prompt. The scores are kept in the folder `OUTPUT.scores`: after an interruption the same call resumes, and another
    choice needs no model. Under `accelerate launch`, all processes call it, and the main one returns counts. Settings
    as in [`~endotrl.score_file.score_file`].
    """
    state, counts = processes(), Counts()
    streams = STREAM in (str(input_path), str(output_path))
    if streams and state.num_processes > 1:
        raise ValueError("Only one process can use standard input and output. Pass files for both.")
    with ExitStack() as stack:
        if state.is_main_process:
            stack.enter_context(only_run_on(output_path, input_path))
        folder = Path(f"{output_path}.scores")
        if streams:
            temporary = Path(stack.enter_context(TemporaryDirectory()))
            folder = temporary / "scores" if str(output_path) == STREAM else folder
            if str(input_path) == STREAM:
                input_path = temporary / "input"  # it is read twice
                with input_path.open("wb") as copy:
                    shutil.copyfileobj(sys.stdin.buffer, copy)
        output = Path(output_path)
        if output.exists() and not folder.exists() and not overwrite:
            raise ValueError(
                f"{output} exists, but there is no {folder.name} to say how it was made. Choose another output, or "
                "pass --overwrite."
            )
        scores = ShardedScores(reward, input_path, folder, block_size, limit, tokens=False)
        scores.fill(settings, overwrite, progress)
        if not state.is_main_process:
            return counts
        slopes = {} if residual is None else fit_slopes(residual, scores.scored())

        def scored() -> Iterator[Scored]:
            for row, record in scores.scored():
                if record["reward"] is None:
                    counts.bad += 1
                    if on_error is not None:
                        on_error(row.line, record.get("error") or record["reason"])
                elif residual is not None:
                    take_out(residual, slopes, row, record)
                yield row, record

        rows = (row for group in by_prompt(scored()) for row in choice.rows(group, counts))
        if (first := next(rows, None)) is None:
            raise ValueError(f"No rows to write. {counts.why_not()}".strip())
        written = nullcontext[IO[bytes]](sys.stdout.buffer) if str(output) == STREAM else replacing(output)
        with written as file:
            for row in chain([first], rows):
                file.write((json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode())
                counts.rows += 1
            file.flush()
    return counts
