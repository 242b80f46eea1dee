# SPDX-License-Identifier: Apache-2.0
"""Options of `endotrl pairs`. Imports nothing heavy, so that `endotrl --help` answers at once."""

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


def add_pairs(commands: Any) -> None:
    """Adds `pairs` to the sub-parsers of the command line."""
    parser = commands.add_parser(
        "pairs",
        help="make preference pairs, or an SFT dataset, of candidate responses",
        description="Scores the candidate responses to each prompt and writes a dataset of TRL: preference pairs for "
        "DPO, the best of n, or the best fraction for SFT. Rows of the input have a prompt and a list of completions, "
        "or one completion each, those of a prompt next to each other; or they are preferences, which are labelled "
        "anew. The same command goes on where an earlier run was cut off; `accelerate launch -m endotrl pairs` uses "
        "several devices.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help=f"candidates: {DATA_HELP}")
    add(
        "--model",
        required=True,
        help='frozen model, or sentence reward model: path, hub id, "quickstart", or http://host:8000/v1',
    )
    add_tokenizer(add)

    choice = parser.add_argument_group("choice")
    add = choice.add_argument
    add(
        "--write",
        choices=("pairs", "best", "top", "ranked"),
        default="pairs",
        help="pairs: rows of prompt, chosen and rejected, the best with the worst response; best, top: rows of prompt "
        "and completion, the best response to each prompt, or the best --fraction; ranked: all, the best first",
    )
    add("--margin", metavar="X", type=float, default=0.0, help="the rewards of a pair differ by more than X")
    add("--per-prompt", metavar="N", type=positive, default=1, help="most pairs of a prompt")
    add("--fraction", metavar="X", type=float, default=0.25, help="share of the responses that --write top keeps")
    add("--unfinished", action="store_true", help="use responses that were cut off (completion_ids tell), too")

    files = parser.add_argument_group("files")
    add = files.add_argument
    add(
        "--output",
        metavar="F",
        help="JSON Lines file to write, next to the folder F.scores, from which another choice is made without the "
        "model; - for standard output (default: the name of FILE with the ending .pairs.jsonl, or as --write says, in "
        "the current folder)",
    )
    add("--overwrite", action="store_true", help="start anew if the output exists")
    add("--limit", metavar="N", type=positive, help="only the first N rows")
    add("--block-size", metavar="N", type=positive, default=64, help="responses that are scored and saved together")
    add("--quiet", action="store_true", help="show neither progress nor summary; errors only")

    add_reward_of_rows(parser)
    parser.set_defaults(run=_pairs)


def _pairs(args: argparse.Namespace) -> int:
    from .pairs import run

    return EXIT_BAD_ROWS if run(args).bad else EXIT_OK
