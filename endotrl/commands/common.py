# SPDX-License-Identifier: Apache-2.0
"""What the commands of the command line have in common: exit codes, and types and help of their options."""

import argparse
from typing import Any

from ..rewards import settings
from ..rewards.settings import SETTINGS


EXIT_OK, EXIT_BAD_ROWS, EXIT_FAILED, EXIT_INTERRUPTED = 0, 1, 2, 130


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but only those that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def positive(text: str) -> int:
    """Type of options that are whole numbers of at least 1."""
    try:
        return settings.positive(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1") from error


def positive_number(text: str) -> float:
    """Type of options that are finite numbers above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def json_object(text: str) -> dict[str, Any]:
    """Type of options that are JSON objects."""
    try:
        return settings.json_object(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object") from error


def add_reward_settings(parser: Any, *names: str) -> None:
    """Adds options `--<name>` of settings of [`EndogenousReward`] to a parser or a group."""
    metavars = {int: "N", dict[str, Any] | None: "JSON", dict[str, str] | str | None: "TEXT"}
    for name in names:
        setting = SETTINGS[name]
        option = "--" + name.replace("_", "-")
        text = setting.help[0].lower() + setting.help[1:].removesuffix(".")

        def read(text: str, setting: settings.RewardSetting = setting) -> Any:
            try:
                return setting.read(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(f"{text!r}, but it {error}") from error

        if setting.type is bool:
            parser.add_argument(option, action="store_true", help=text)
        elif setting.choices:
            parser.add_argument(option, choices=setting.choices, default=setting.default, help=text)
        else:
            parser.add_argument(
                option, type=read, default=setting.default, metavar=metavars.get(setting.type), help=text
            )
