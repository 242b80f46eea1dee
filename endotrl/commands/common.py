# SPDX-License-Identifier: Apache-2.0
"""What the commands of the command line have in common: exit codes, and types and help of their options."""

import argparse
from collections.abc import Callable
from typing import Any

from ..rewards.settings import CRITERION, JSON, READERS, SETTINGS


EXIT_OK, EXIT_BAD_ROWS, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_FOUND = EXIT_BAD_ROWS  # of `diagnose --fail-on`


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but only those that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def option_type(kind: Any) -> Callable[[str], Any]:
    """Type of options whose value is of a type of [`READERS`]."""
    reader, words = READERS[kind]

    def read(text: str) -> Any:
        try:
            return reader(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is not {words}") from error

    return read


positive, json_object = option_type(int), option_type(JSON)


def positive_number(text: str) -> float:
    """Type of options that are finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_reward_settings(parser: Any, *names: str) -> None:
    """Adds options `--<name>` of settings of [`EndogenousReward`] to a parser or a group."""
    for name in names:
        setting = SETTINGS[name]
        words: dict[str, Any] = {"help": setting.help[0].lower() + setting.help[1:].removesuffix(".")}
        if setting.type is bool:
            words["action"] = "store_true"
        elif setting.choices:
            words |= {"default": setting.default, "choices": setting.choices}
        else:
            metavar = {int: "N", JSON: "JSON", CRITERION: "TEXT"}.get(setting.type)
            words |= {"default": setting.default, "type": option_type(setting.type), "metavar": metavar}
        parser.add_argument(f"--{name.replace('_', '-')}", **words)
