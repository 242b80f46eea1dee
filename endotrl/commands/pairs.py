# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl pairs`: from its options to the file and the terminal."""

import argparse
import sys
from contextlib import redirect_stdout

from rich.console import Console

from ..data.sources import STREAM, Reader
from ..reporting import number
from ..runs.processes import processes
from ..selection.choose import Choice, Counts
from ..selection.file import choose_from_file
from .common import EXIT_FOUND, EXIT_OK, default_output, use_form
from .score import errors_on_terminal, make_reward


ONE_SIDED = 0.7  # share of pairs that are decided alike by length, from which on the summary says so


def run(args: argparse.Namespace) -> int:
    """Runs `endotrl pairs`; returns the exit code."""
    Reader(args.file)  # raises if there is nothing of that name
    state, residual = processes(), use_form(args)
    choice = Choice(args.write, args.margin, args.per_prompt, args.fraction, args.unfinished)
    output = args.output or default_output(args.file, f".{args.write}.jsonl")
    with redirect_stdout(sys.stderr):  # libraries print while they are imported, and standard output may be the rows
        reward, settings, by_sentence = make_reward(args, f"{output}.scores/settings.json")
    try:
        counts = choose_from_file(
            reward,
            args.file,
            output,
            settings,
            choice,
            residual=residual,
            block_size=args.block_size,
            limit=args.limit,
            overwrite=args.overwrite,
            progress=not args.quiet,
            on_error=errors_on_terminal(),
        )
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("Interrupted. The same command goes on behind what was scored.") from interrupt
    if state.is_main_process and not args.quiet:
        _show(counts, choice, output, residual, "" if by_sentence else " nats")
    return EXIT_FOUND if counts.bad else EXIT_OK


def _show(counts: Counts, choice: Choice, output: str, residual: str | None, unit: str) -> None:
    console = Console(stderr=output == STREAM, highlight=False)
    noun = "pairs" if choice.kind == "pairs" else "rows"
    lines = [f"{counts.rows:,} {noun} from {counts.prompts:,} prompts with {counts.responses:,} responses."]
    if choice.kind == "pairs":
        lines.append(f"The chosen response is better by {number(counts.margins / counts.rows)}{unit} on average.")
        pairs = counts.longer.total()
        for sign, word in ((1, "longer"), (-1, "shorter")):
            share = counts.longer[sign] / pairs if pairs else 0.0
            if share >= ONE_SIDED and pairs >= 20:
                hint = "" if residual else "; --form style_residual:bellman.discounted=0.93 takes that out"
                lines.append(f"It is {word} than the rejected one in {share:.0%} of the pairs{hint}.")
        if labels := counts.labels.total():
            lines.append(f"{counts.labels['chosen'] / labels:.0%} of the pairs agree with the labels of the input.")
    lines.append(counts.why_not())
    for line in filter(None, lines):
        console.print(line, markup=False)
    if output != STREAM:
        console.print(f"Written: {output} (scores for other choices: {output}.scores)", markup=False, soft_wrap=True)
