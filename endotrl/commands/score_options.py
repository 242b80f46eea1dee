# SPDX-License-Identifier: Apache-2.0
"""Options of `endotrl score`. Imports nothing heavy, so that `endotrl --help` answers at once."""

import argparse
from typing import Any

from .common import (
    DATA_HELP,
    EXIT_BAD_ROWS,
    EXIT_OK,
    HelpFormatter,
    add_reward_of_rows,
    add_tokenizer,
    positive,
)


def add_score(commands: Any) -> None:
    """Adds `score` to the parser of the command line."""
    parser = commands.add_parser(
        "score",
        help="reward every row of a file of prompts and completions",
        description="Rewards every row with the endogenous reward of a language model, or with a sentence reward "
        'model. A row is {"prompt": ..., "completion": ...}, text or lists of messages, and optionally '
        '"completion_ids", the tokens as they were generated; or of another format of TRL: "chosen" and "rejected", '
        '"messages", or "completions", a list. Other keys are carried over. Endogenous rewards are in nats. The same '
        "command goes on where an earlier run was cut off; `accelerate launch -m endotrl score` uses several devices.",
        epilog="Exit codes: 0 all rows are scored; 1 some rows could not be, and are named; 2 the command could not "
        "run or not go on; 130 interrupted, with what was scored saved.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help=f"rows to score: {DATA_HELP}")
    add(
        "--model",
        required=True,
        help='frozen model: path, hub id, "quickstart" for the model of the demo, or http://host:8000/v1; '
        "with a sentence reward model, the reward and weight of each sentence are shown",
    )

    add_tokenizer(add)

    files = parser.add_argument_group("files")
    add = files.add_argument
    add(
        "--output",
        metavar="F",
        help="JSON Lines file to write, one line a row in the same order, with F.meta.json (settings, versions, "
        "speed) and, if rows are bad, F.errors.jsonl; - for standard output (default: the name of FILE with the "
        "ending .scores.jsonl, in the current folder)",
    )
    add("--html", metavar="F", help="page of token (or sentence) rewards as heat maps to write")
    add("--html-rows", metavar="N", type=positive, default=50, help="number of first rows on that page")
    add("--no-tokens", action="store_true", help="leave tokens (or sentences) and their rewards out of the output")
    add("--overwrite", action="store_true", help="start anew if the output exists")
    add("--limit", metavar="N", type=positive, help="score only the first N rows")
    add("--block-size", metavar="N", type=positive, default=64, help="rows that are scored and saved together")

    terminal = parser.add_argument_group("terminal")
    add = terminal.add_argument
    add("--top", metavar="N", type=positive, help="show the N rows with the highest rewards, not the first rows")
    add("--bottom", metavar="N", type=positive, help="show the N rows with the lowest rewards, not the first rows")
    add("--quiet", action="store_true", help="show neither progress nor table; errors only")

    add_reward_of_rows(parser)
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> int:
    from .score import run

    return EXIT_BAD_ROWS if run(args).tally.errors else EXIT_OK
