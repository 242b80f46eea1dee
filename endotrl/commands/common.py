# SPDX-License-Identifier: Apache-2.0
"""Shared parts of the commands: exit codes, option types, option groups and help."""

import argparse
import json
import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, NoReturn

from ..checks import did_you_mean
from ..reporting import counted, say
from ..rewards.settings import CRITERION, INIT_KWARGS, JSON, READERS, SETTINGS
from ..runs.processes import processes
from ..runs.record import model_digest


if TYPE_CHECKING:
    from ..frozen.served import ServedModel
    from ..score_file.rows import Reward
    from ..scoring.scorer import Placement

# Hidden size below which a model takes negligible time in any dtype, so that the CPU's speed is not measured.
NARROW = 512

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
share = option_type(float, "a number above 0 and at most 1", lambda n: 0.0 < n <= 1.0)
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


def choose_dtype(args: argparse.Namespace, *recorded: str | PurePath) -> None:
    """
    Replaces `"auto"` by a dtype for a model on a CPU: that of the run that is resumed, from the `recorded` JSON files,
    or else the faster one on this CPU. `ValueError` if `--device` cannot be used.
    """
    import torch

    from ..frozen.cpu_dtype import faster_dtype
    from ..frozen.names import load_config
    from ..frozen.served import is_url

    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    state, given = processes(), args.model_init_kwargs or {}
    device = state.device if args.device is None else torch.device(args.device)
    told = args.dtype != "auto" or {"dtype", "torch_dtype", "quantization_config"} & set(given)
    if told or device.type != "cpu" or is_url(args.model):
        return
    for path in () if args.overwrite else map(Path, recorded):
        with suppress(OSError, ValueError):  # missing, or damaged, which the run reports
            settings = json.loads(path.read_bytes())
            args.dtype = settings.get("settings", settings).get("dtype", "auto")
            return
    config = load_config(args.model, args.trust_remote_code, given.get("revision"))
    if config.get_text_config().hidden_size < NARROW:
        return
    args.dtype, reason = faster_dtype()
    if state.is_main_process and not args.quiet:
        say(f"Using {args.dtype} on this CPU, as {reason}. Set --dtype to override this.")


def identity(args: argparse.Namespace, model: "Placement | ServedModel | Reward") -> dict[str, Any]:
    """Settings that identify the model of `--model`: its name, version and, unless it is on a server, dtype."""
    from ..frozen.own_copy import resolve_device, resolve_dtype
    from ..frozen.served import ServedModel

    if isinstance(model, ServedModel):
        return {"model": args.model, "model_version": model.version}
    # The current meaning of the name and of "auto", which can differ after training or on another machine.
    version = model_digest(model.config._name_or_path) or model.config._commit_hash
    dtype = str(resolve_dtype(args.dtype, resolve_device(args.device))).removeprefix("torch.")
    return {"model": args.model, "model_version": version, "dtype": dtype}


def use_form(args: argparse.Namespace) -> str | None:
    """Sets `token_reward` and `aggregate` from `--form`; returns the residual."""
    from ..evaluation.forms import GAIN, Form
    from ..rewards.residuals import split_name

    if args.form is None:
        return None
    residual, base = split_name(args.form)
    for name in ("token_reward", "aggregate", "discount"):
        if getattr(args, name) != SETTINGS[name].default:
            raise ValueError(f"--form {args.form} cannot be combined with --{name.replace('_', '-')}. Remove one.")
    form = Form.parse(base)
    if form.token == GAIN:
        raise ValueError(f"--form {args.form} needs a second forward pass, which only `endotrl eval` makes.")
    args.token_reward, args.aggregate = form.rule.token_reward, form.rule.aggregate
    if form.rule.aggregate == "discounted":
        args.discount = form.rule.discount
    return residual


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
