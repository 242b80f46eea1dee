# SPDX-License-Identifier: Apache-2.0
"""`endotrl eval` from a YAML file."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def evaluation_command(config: dict[str, Any]) -> list[str]:
    """
    The command line of `endotrl` that a YAML file describes: `benchmark` says which evaluation, every other key is an
    option of `endotrl eval <benchmark>`, with `_` for `-`. `true` stands for the option alone, `false` for its negation
    (`chat`) or nothing, and a list for several values.

    Args:
        config (`dict[str, Any]`):
            What the file holds.

    Returns:
        `list[str]`: arguments, for [`~endotrl.cli.main`].

    Raises:
        `ValueError`: If the file does not say which evaluation.

    Example:
    ```python
    >>> from endotrl.recipes import evaluation_command

    >>> evaluation_command({"benchmark": "rm-bench", "model": "quickstart", "scorers": ["bellman.sum", "length"]})
    ['eval', 'rm-bench', '--model', 'quickstart', '--scorers', 'bellman.sum', 'length']
    ```
    """
    options = dict(config)
    if "benchmark" not in options:
        raise ValueError("The file has no `benchmark`: which evaluation, such as `rm-bench` or `generation`.")
    words = ["eval", str(options.pop("benchmark"))]
    for key, value in options.items():
        option = "--" + key.replace("_", "-")
        if value is True:
            words.append(option)
        elif value is False and key == "chat":
            words.append("--no-chat")
        elif isinstance(value, list):
            words += [option, *map(str, value)]
        elif value is not False and value is not None:
            words += [option, str(value)]
    return words


def evaluate(argv: Sequence[str] | None = None) -> int:
    """
    Runs `endotrl eval` with the options of a YAML file (`--config`), of which the command line wins.

    Args:
        argv (`Sequence[str]`, *optional*):
            Arguments. Defaults to those of the process.

    Returns:
        `int`: exit code.

    Raises:
        `SystemExit`: For an option that `endotrl eval` does not know.
    """
    from ..cli import main
    from ..reporting import say

    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] != ["--config"] or len(argv) < 2:
        say("evaluate.py: error: the first argument must be --config FILE.yaml.")
        return 2
    try:
        config = yaml.safe_load(Path(argv[1]).read_text(encoding="utf-8"))
        command = evaluation_command(config)
    except (OSError, ValueError, yaml.YAMLError) as error:
        say(f"evaluate.py: error: {error}")
        return 2
    return main([*command, *argv[2:]])  # of an option that is given twice, the last counts
