# SPDX-License-Identifier: Apache-2.0
"""
The command `endotrl`.

Exit codes: 0 if all went well, 1 if some rows could not be scored, 2 if the command could not be run or could not go on,
130 after Ctrl-C. Nothing heavy is imported before a command runs, so that `endotrl --help` answers at once.
"""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from . import __version__
from .evaluation.options import add_eval
from .reporting import say


__all__ = ["command_line", "main", "make_parser"]

EXIT_OK, EXIT_BAD_ROWS, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """
    Runs the command line.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments. Defaults to those of the process.

    Returns:
        `int`: exit code.
    """
    args = make_parser().parse_args(argv)
    if args.command == "eval":
        args.command_line = shlex.join(["endotrl", *(sys.argv[1:] if argv is None else argv)])
    try:
        return args.run(args)
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "Interrupted.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output (`| head`) has left. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, OSError, ImportError) as error:
        say(f"endotrl {args.command}: error: {error}")
        return EXIT_FAILED


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but only those that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="endotrl", description="The reward model inside the language model, for TRL.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"endotrl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_score(commands)
    add_eval(commands, _HelpFormatter, _positive)
    _add_plan(commands)
    return parser


def command_line(args: argparse.Namespace) -> str:
    """
    The `endotrl score` command of parsed options, as a line for the shell: every option that is not at its default.

    Example:
    ```python
    >>> from endotrl.cli import command_line, make_parser

    >>> command_line(make_parser().parse_args(["score", "a b.jsonl", "--model=m", "--alpha=0.5", "--gamma=1"]))
    "endotrl score 'a b.jsonl' --model m --alpha 0.5"
    ```
    """
    defaults = vars(make_parser().parse_args(["score", "FILE", "--model", "M"]))
    words = ["endotrl", "score", args.file, "--model", args.model]
    for name, value in vars(args).items():
        if name in ("file", "model") or value == defaults[name]:
            continue
        option = "--" + name.replace("_", "-")
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else str(value)
        if value is True:
            words.append(option)
        elif text.startswith("-") and text != "-":
            words.append(f"{option}={text}")  # or it would be taken for an option
        else:
            words += [option, text]
    return shlex.join(words)


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="train on the endogenous reward, from nothing to a report, in about ten minutes on a CPU",
        description="Runs GRPO on the endogenous reward, without labels, and writes a report. Two tasks: a small "
        "transformer that learns addition from faulty demonstrations, and a pretrained model that answers factual "
        "questions.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--task", choices=("arithmetic", "facts", "all"), default="all", help="what to run")
    parser.add_argument("--output", metavar="DIR", default="demo-output", help="folder for report, metrics and model")
    parser.add_argument("--seed", type=int, default=0, help="seed of all randomness")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    from .quickstart import run_demo

    run_demo(task=args.task, output_dir=args.output, seed=args.seed)
    return EXIT_OK


def _add_score(commands: Any) -> None:
    parser = commands.add_parser(
        "score",
        help="reward every row of a JSON Lines file of prompts and completions",
        description="Rewards every row of a JSON Lines file with the endogenous reward of a language model, or with a "
        "sentence reward model. A row is "
        '{"prompt": ..., "completion": ...}, both text or both lists of messages, and optionally '
        '"completion_ids", the tokens as they were generated; other keys are carried over. Endogenous rewards are in nats. '
        "The same command goes on where an earlier run was cut off.",
        epilog="Exit codes: 0 all rows are scored; 1 some rows could not be, and are named; 2 the command could not run "
        "or not go on; 130 interrupted, with what was scored saved.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("file", metavar="FILE", help="JSON Lines file to score; - for standard input")
    add(
        "--model",
        required=True,
        help='frozen model: path, hub id, or "quickstart" for the model of the demo; with a sentence reward model, the '
        "reward and weight of each sentence are shown",
    )

    files = parser.add_argument_group("files")
    add = files.add_argument
    add(
        "--output",
        metavar="F",
        help="JSON Lines file to write, one line a row in the same order, with F.meta.json (settings, versions, speed) "
        "and, if rows are bad, F.errors.jsonl; - for standard output (default: FILE with the ending .scores.jsonl)",
    )
    add("--html", metavar="F", help="page of token (or sentence) rewards as heat maps to write")
    add("--html-rows", metavar="N", type=_positive, default=50, help="number of first rows on that page")
    add("--no-tokens", action="store_true", help="leave tokens (or sentences) and their rewards out of the output")
    add("--overwrite", action="store_true", help="start anew if the output exists")
    add("--limit", metavar="N", type=_positive, help="score only the first N rows")
    add("--block-size", metavar="N", type=_positive, default=64, help="rows that are scored and saved together")

    terminal = parser.add_argument_group("terminal")
    add = terminal.add_argument
    add("--top", metavar="N", type=_positive, help="show the N rows with the highest rewards, not the first rows")
    add("--bottom", metavar="N", type=_positive, help="show the N rows with the lowest rewards, not the first rows")
    add("--quiet", action="store_true", help="show neither progress nor table; errors only")

    settings = parser.add_argument_group("reward", "As the parameters of `endotrl.EndogenousReward`.")
    add = settings.add_argument
    add("--alpha", type=float, default=1.0, help="temperature of the soft value; language models have 1")
    add("--gamma", type=float, default=1.0, help="discount inside the operator, in (0, 1]")
    add(
        "--token-reward",
        choices=("bellman", "log_prob", "centered"),
        default="bellman",
        help="form of the token rewards: f(s, a) - gamma V(s'); alpha log pi; alpha (log pi + entropy)",
    )
    add(
        "--aggregate",
        choices=("sum", "mean", "discounted"),
        default="sum",
        help="how token rewards become one number: their sum without V(s_1), a constant of the prompt; the same by "
        "token; or the sum of discount^(h-1) r_h",
    )
    add("--discount", type=float, default=0.95, help="discount of --aggregate discounted, in (0, 1]")
    add(
        "--truncation",
        choices=("terminal", "bootstrap", "skip"),
        default="terminal",
        help='completions without an end-of-sequence token (only rows with "completion_ids" can be: text counts as '
        "complete): the state after the last token is the end; subtract the model's own value of it; no reward",
    )
    add(
        "--criterion",
        metavar="TEXT",
        type=_criterion,
        help='system message under which the model judges; or JSON {"domain": "message", ...}, one for each value of '
        'the key "domain" of the rows',
    )
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        type=_json_object,
        help='further arguments of the chat template, such as {"enable_thinking": false}',
    )
    add(
        "--overlong-prompt",
        choices=("error", "truncate_left"),
        default="error",
        help="rows longer than the model's context: report the row as bad, or drop the beginning of its prompt",
    )
    add(
        "--max-tokens-per-batch",
        metavar="N",
        type=_positive,
        default=8192,
        help="padded tokens of one forward pass; bounds memory, does not change rewards",
    )
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the model: auto is bfloat16 on accelerators and float32 on CPU",
    )
    add("--device", help="device of the model, such as cpu or cuda:1 (default: the best there is)")
    add("--trust-remote-code", action="store_true", help="let code from the model's repository run")
    parser.set_defaults(run=_score)


def _score(args: argparse.Namespace) -> int:
    from .score_file.command import run

    return EXIT_BAD_ROWS if run(args, command_line(args)).tally.errors else EXIT_OK


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="say whether a recipe fits on given GPUs, and how long it takes",
        description="Memory of each GPU under each way to split a recipe over GPUs, what to change if it does not fit, and a "
        "rough time. From configs alone: no weights are loaded, and no GPU is needed.",
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="YAML file of a recipe")
    add("--gpus", metavar="N", type=_positive, required=True, help="GPUs of all machines together")
    add("--gpu-memory", metavar="GIB", type=float, required=True, help="memory of each, in GiB")
    add(
        "--kind", choices=("grpo", "ppo", "sentence_reward"), help="script of the recipe (default: by the file's name)"
    )
    add("--model", help="model in place of the recipe's: path or hub id, of which only the config is read")
    add(
        "--prompt-tokens",
        metavar="N",
        type=_positive,
        default=512,
        help="longest prompt, if the recipe does not say it",
    )
    add("--gpu-tflops", metavar="X", type=float, default=312.0, help="peak of dense bfloat16, in TFLOPS (A100: 312)")
    add(
        "--gpu-bandwidth", metavar="X", type=float, default=2000.0, help="memory bandwidth, in GB/s (A100 80 GB: 2000)"
    )
    add(
        "--set",
        metavar="KEY=VALUE",
        nargs="+",
        default=[],
        help="settings of the recipe to override, such as use_peft=true",
    )
    parser.set_defaults(run=_plan)


def _plan(args: argparse.Namespace) -> int:
    from .planning.command import run_plan

    run_plan(args)
    return EXIT_OK


def _criterion(text: str) -> str | dict[str, str]:
    """A criterion, or one for each domain."""
    if not text.lstrip().startswith("{"):
        return text
    criteria = _json_object(text)
    if not all(isinstance(message, str) for message in criteria.values()):
        raise argparse.ArgumentTypeError("every domain needs one message, as text")
    return criteria


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
