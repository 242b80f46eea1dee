# SPDX-License-Identifier: Apache-2.0
"""Strict parser of a recipe's command line and YAML file."""

import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NoReturn, get_type_hints

import yaml
from trl import TrlParser

from ..checks import did_you_mean
from ..reporting import ignore_upstream_warnings
from ..shipped import local_path
from .ranges import check_together, check_value


ALL_SETTINGS = "`--help` of the recipe's script lists all settings."


class RecipeParser(TrlParser):
    """
    TRL's parser of a command line and a YAML file (`--config`), of which the command line wins; unknown settings,
    abbreviations, and values of another type or out of range are errors, each a `ValueError` of one line. `settle` is
    called with all settings, each of which is checked, to change them, and the names of those that are given.
    """

    def __init__(self, dataclasses: Sequence[type]) -> None:
        super().__init__(dataclasses, allow_abbrev=False)
        self.settle: Callable[[Namespace, Collection[str]], None] | None = None
        self._in_file: set[str] = set()
        self._hints = {name: hint for one in dataclasses for name, hint in get_type_hints(one).items()}

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """One instance of each class of settings."""
        ignore_upstream_warnings()
        words = list(sys.argv[1:] if args is None else args)
        if words[-1:] == ["--config"]:
            raise ValueError("`--config` is the last word, but the recipe's YAML file must come after it.")
        if "--config" in words:
            file = words.index("--config") + 1
            words[file] = local_path(words[file])
        try:
            *parsed, unknown = super().parse_args_and_config(words, return_remaining_strings=True)
        except yaml.YAMLError as error:
            raise ValueError(f"The file that `--config` names is no YAML: {' '.join(str(error).split())}.") from error
        except (ValueError, OSError, ImportError):
            raise
        except Exception as error:  # where a class of settings computes with a value before it checks it
            raise ValueError(f"Settings do not go together: {type(error).__name__}: {error}.") from error
        if unknown:
            raise ValueError(self._unknown(unknown))
        return tuple(parsed)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Takes the settings of the file."""
        self._in_file = set(settings)
        return super().set_defaults_with_config(**settings)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Checks values before anything computes with them."""
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        options = {word.partition("=")[0] for word in (args[0] if args else kwargs["args"]) or ()}
        on_line = {a.dest for a in self._actions if options.intersection(a.option_strings)}
        settings = vars(namespace)
        for action in self._actions:
            name = action.dest
            if name in self._hints and name in self._in_file | on_line:
                settings[name] = check_value(name, settings[name], self._hints[name], action.choices)
        if self.settle is not None:
            self.settle(namespace, self._in_file | on_line)
        check_together(settings)
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """In place of printing the usage and ending the process."""
        raise ValueError(f"{message}. {ALL_SETTINGS}")

    def _unknown(self, words: Sequence[str]) -> str:
        moved: dict[str, str] = {}
        if any(dataclass.__name__ == "PPOConfig" for dataclass in self.dataclass_types):
            from ..trainers.ppo_migration import CONFIG as moved  # needs a newer TRL than other recipes
        known = [action.dest for action in self._actions]
        names = [word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")]
        unknown = [
            name + (f" (of TRL's own PPO: now {moved[name]})" if name in moved else did_you_mean(name, known))
            for name in names
        ]
        return f"There is no setting {', '.join(unknown or words)}. {ALL_SETTINGS}"
