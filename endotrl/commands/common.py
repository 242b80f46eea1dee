# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the commands: exit codes, option types, option groups and help."""

import argparse
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import PurePath
from typing import Any, NoReturn

from ..checks import did_you_mean
from ..reporting import counted
from ..rewards.settings import CRITERION, INIT_KWARGS, JSON, READERS, SETTINGS


# EXIT_FOUND: rows that could not be scored, or a match of `diagnose --fail-on`.
EXIT_OK, EXIT_FOUND, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 130


# Parsed arguments that are not options such as `--name`.
NO_OPTIONS = {"command", "command_line", "run", "file", "benchmark", "runs", "recipe", "name", "project"}

DATA_HELP = (
    "file (.json, .jsonl, both also .gz, .parquet), folder of such files, OWNER/NAME[/CONFIG][:SPLIT] on the Hugging "
    "Face hub, or - for standard input"
)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except empty ones, and lists in the form in which they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.nargs == 0 or action.default in (None, "", []):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Parser that suggests the nearest match for a mistyped command or choice; so do its sub-parsers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        found = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
        super().error(message + (did_you_mean(found[1], re.findall(r"[\w.-]+", found[2])) if found else ""))


def add_command(commands: Any, name: str, run: str, **words: str) -> Parser:
    """Adds a command that calls `run`, a `"module:function"` of this folder, which is imported only then."""
    parser = commands.add_parser(name, **words)
    parser.set_defaults(run=run)
    return parser


def option_type(
    reader: Callable[[str], Any], words: str, fits: Callable[[Any], bool] = lambda value: True
) -> Callable[[str], Any]:
    """Type for options whose value is parsed by `reader` and satisfies `fits`; `words` describe valid values."""

    def read(text: str) -> Any:
        with suppress(ValueError):
            value = reader(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return read


json_object = option_type(*READERS[JSON])
COUNT: dict[str, Any] = {"metavar": "N", "type": option_type(*READERS[int])}
positive_number = option_type(float, "a number above 0", lambda n: 0.0 < n < math.inf)
fraction = option_type(float, "a number above 0 and at most 1", lambda n: 0.0 < n <= 1.0)
# Logits divided by less overflow to infinity.
temperature = option_type(float, "a number of at least 0.01", lambda n: 0.01 <= n < math.inf)


def default_output(source: str, ending: str) -> str:
    """Default output path: in the current folder, as the input's may be shared, or not writable."""
    name = PurePath(source).name.removesuffix(".gz").replace(":", "-")
    return source if source == "-" else f"{PurePath(name).stem}{ending}"


def counted_items(count: int, distinct: int, noun: str = "item") -> str:
    """Number of items, and of distinct ones if fewer: `3 items (2 distinct)`."""
    return counted(count, noun) + (f" ({distinct:,} distinct)" if distinct < count else "")


def as_options(message: object, args: argparse.Namespace) -> str:
    """Message of the library with its parameter names replaced by command-line options: `--name value`."""

    def option(match: re.Match[str]) -> str:
        name, value = "tokenizer" if match[1] == "processing_class" else match[1], match[2]
        if name not in args or name in NO_OPTIONS or value in ("False", "None"):
            return match[0]
        return " ".join([f"--{name.replace('_', '-')}", *([] if value in (None, "True") else [value.strip("\"'")])])

    return re.sub(r"`(\w+)(?:=([^`\s]+))?`", option, str(message))


def add_model(parser: Parser, what: str) -> None:
    """Adds the options `--model` and `--tokenizer`."""
    names = 'path, hub id, "quickstart" (the model of the demo), or URL of a server, such as http://host:8000/v1'
    parser.add_argument("--model", required=True, help=f"{what}: {names}")
    parser.add_argument(
        "--tokenizer",
        metavar="M",
        help="path or hub id of the tokenizer (default: that of the model, or of the model that the server reports)",
    )


def add_reward_settings(parser: Any, *names: str) -> None:
    """Adds options `--<name>` for settings of [`EndogenousReward`] to a parser or a group."""
    for name in names:
        setting = SETTINGS[name]
        words: dict[str, Any] = {"help": setting.help[0].lower() + setting.help[1:].removesuffix(".")}
        if setting.type is bool:
            words["action"] = "store_true"
        elif setting.choices:
            words |= {"default": setting.default, "choices": setting.choices}
            if len(",".join(setting.choices)) > 40:  # argparse does not wrap them
                words["metavar"] = "NAME"
        else:
            metavar = {int: "N", JSON: "JSON", INIT_KWARGS: "JSON", CRITERION: "TEXT"}.get(setting.type)
            words |= {"default": setting.default, "type": option_type(*READERS[setting.type]), "metavar": metavar}
        parser.add_argument(f"--{name.replace('_', '-')}", **words)
