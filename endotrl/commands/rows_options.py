# SPDX-License-Identifier: Apache-2.0
"""Options of `endotrl score` and `endotrl pairs`. Imports nothing heavy, so that `endotrl --help` answers at once."""

from typing import Any

from ..rewards.settings import SETTINGS
from .common import COUNT, DATA_HELP, Parser, add_command, add_model, add_reward_settings


def add_score(commands: Any) -> None:
    """Adds `score` to the parser of the command line."""
    parser = add_command(
        commands,
        "score",
        "rows:run_score",
        help="score every row of a file of prompts and completions",
        description="Rewards every row with the endogenous reward of a language model, or with a sentence reward "
        'model. A row is {"prompt": ..., "completion": ...}, text or lists of messages, and optionally '
        '"completion_ids", the tokens as they were generated; or of another format of TRL: "chosen" and "rejected", '
        '"messages", or "completions", a list. Other keys are copied to the output. Endogenous rewards are in nats. '
        "The same command goes on where an earlier run was cut off; `accelerate launch -m endotrl score` uses several "
        "devices.",
        epilog="Exit codes: 0 all rows are scored; 1 some rows could not be, and are named; 2 the command could not "
        "run or not go on; 130 interrupted, with what was scored saved.",
    )
    _add_source(parser, "rows to score")
    add = parser.add_argument_group("files").add_argument
    add(
        "--output",
        metavar="F",
        help="JSON Lines file to write, one line per row in the same order, with F.meta.json (settings, versions, "
        "speed) and, if rows are bad, F.errors.jsonl; - for standard output (default: the name of FILE with the "
        "ending .scores.jsonl, in the current folder)",
    )
    add("--html", metavar="F", help="page of token (or sentence) rewards of the first 50 rows as heat maps to write")
    add("--no-tokens", action="store_true", help="leave tokens (or sentences) and their rewards out of the output")
    _add_resuming(add, "rows")
    add("--quiet", action="store_true", help="show neither progress nor table; errors only")
    _add_reward(parser)


def add_pairs(commands: Any) -> None:
    """Adds `pairs` to the parser of the command line."""
    parser = add_command(
        commands,
        "pairs",
        "rows:run_pairs",
        help="turn candidate responses into preference pairs or an SFT dataset",
        description="Scores the candidate responses to each prompt and writes a dataset of TRL: preference pairs for "
        "DPO, the best of n, or the best fraction for SFT. Rows of the input have a prompt and a list of completions, "
        "or one completion each, those of a prompt next to each other; or they are preferences, which are labelled "
        "anew. The same command goes on where an earlier run was cut off; `accelerate launch -m endotrl pairs` uses "
        "several devices.",
    )
    _add_source(parser, "candidates")
    add = parser.add_argument_group("choice").add_argument
    add(
        "--write",
        choices=("pairs", "best", "top", "ranked"),
        default="pairs",
        help="pairs: rows of prompt, chosen and rejected, the best with the worst response; best, top: rows of prompt "
        "and completion, the best response to each prompt, or the best --fraction; ranked: all, the best first",
    )
    add("--margin", metavar="X", type=float, default=0.0, help="the rewards of a pair differ by more than X")
    add("--per-prompt", **COUNT, default=1, help="maximum number of pairs per prompt")
    add("--fraction", metavar="X", type=float, default=0.25, help="fraction of the responses that --write top keeps")
    add("--unfinished", action="store_true", help="also use responses that were cut off, as completion_ids show")
    add = parser.add_argument_group("files").add_argument
    add(
        "--output",
        metavar="F",
        help="JSON Lines file to write, next to the folder F.scores, from which another choice is made without the "
        "model; - for standard output (default: the name of FILE with the ending .pairs.jsonl, or as --write says, in "
        "the current folder)",
    )
    _add_resuming(add, "responses")
    add("--quiet", action="store_true", help="show neither progress nor summary; errors only")
    _add_reward(parser)


def _add_source(parser: Parser, what: str) -> None:
    parser.add_argument("file", metavar="FILE", help=f"{what}: {DATA_HELP}")
    add_model(parser, "frozen model, or sentence reward model")


def _add_resuming(add: Any, what: str) -> None:
    add("--overwrite", action="store_true", help="start anew if the output exists")
    add("--limit", **COUNT, help="only the first N rows")
    add("--block-size", **COUNT, default=64, help=f"{what} that are scored and saved together")


def _add_reward(parser: Parser) -> None:
    settings = parser.add_argument_group("reward", "As the parameters of `endotrl.EndogenousReward`.")
    settings.add_argument(
        "--form",
        metavar="NAME",
        help="form of the reward by its name in `endotrl eval`, in place of --token-reward and --aggregate: "
        "TOKEN.AGGREGATE, such as log_prob.discounted=0.95; and residual:FORM or style_residual:FORM, which take out "
        "what length, or length and Markdown, explain among the responses to a prompt, which must be neighbours",
    )
    add_reward_settings(settings, *(name for name, setting in SETTINGS.items() if "score" not in setting.absent))
