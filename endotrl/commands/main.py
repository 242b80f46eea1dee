# SPDX-License-Identifier: Apache-2.0
"""
The command `endotrl`.

Exit codes: 0 for success, 1 if some rows could not be scored or `diagnose --fail-on` matched, 2 if the command could
not be run or completed, 130 after Ctrl-C. Nothing heavy is imported before a command runs, so that `endotrl --help` is
instant.
"""

import argparse
import os
import shlex
import sys
import textwrap
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

from .. import __version__
from ..reporting import ignore_upstream_warnings, quiet_libraries, say, terminal, working
from ..rewards.settings import SETTINGS
from ..runs.processes import leave
from .common import (
    COUNT,
    DATA_HELP,
    EXIT_FAILED,
    EXIT_FOUND,
    EXIT_INTERRUPTED,
    EXIT_OK,
    Parser,
    add_command,
    add_model,
    add_reward_settings,
    as_options,
    positive_number,
)
from .evaluate_options import add_eval, add_forecast


__all__ = ["main", "make_parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if name != "instruction" and (value == "" or (isinstance(value, list) and "" in value)):
            parser.error(f"{name.upper()} must not be empty. Is a shell variable unset?")
    ignore_upstream_warnings()
    args.command_line = shlex.join(["endotrl", *(sys.argv[1:] if argv is None else argv)])
    quiet = getattr(args, "quiet", False)
    if quiet:
        quiet_libraries()
    module, function = args.run.split(":")
    try:
        # Importing torch takes seconds; and libraries print on import (wandb: that it is offline), while standard
        # output may be used for the rows.
        with redirect_stdout(sys.stderr), working("Loading", module != "main" and not quiet):
            run = getattr(import_module(f".{module}", __package__), function)
        return run(args) or EXIT_OK
    except KeyboardInterrupt as interrupt:
        say(str(interrupt) or "Interrupted. Run the same command again to resume.")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of the output (`| head`) has exited. Python would raise once more on closing stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (ValueError, OSError, ImportError) as error:
        told: object = error
        if isinstance(error, OSError) and error.filename is not None:
            told = f"{error.filename} cannot be used: {error.strerror}. Choose another path."
        say(f"endotrl {args.command}: error: {as_options(told, args)}")
        return EXIT_FAILED
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError" or "max_tokens_per_batch" not in args:  # torch's
            raise
        told = f"The device does not have enough memory for batches of {args.max_tokens_per_batch} tokens"
        say(f"endotrl {args.command}: error: {told}. Resume with a smaller --max-tokens-per-batch.")
        return EXIT_FAILED
    finally:
        leave()


def make_parser() -> argparse.ArgumentParser:
    """Returns the command-line parser."""
    parser = Parser(prog="endotrl", description="The reward model inside the language model, for TRL.")
    parser.add_argument("--version", action="version", version=f"endotrl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_score(commands)
    _add_pairs(commands)
    add_eval(commands)
    add_forecast(commands)
    _add_diagnose(commands)
    _add_plan(commands)
    _add_recipes(commands)
    _add_workspace(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = add_command(
        commands,
        "demo",
        "main:run_demo",
        help="train two small models on their own reward, with a report, in minutes on a CPU",
        description="Runs GRPO on the endogenous reward, without labels, and writes a report. By default, it trains "
        "a small transformer that has learned addition from faulty demonstrations, and a pretrained model that "
        "answers factual questions; with --task images, a vision-language model that reads numbers. After Ctrl-C, "
        "run the same command again to resume.",
    )
    add = parser.add_argument
    tasks = ("arithmetic", "facts", "images", "all")
    add("--task", choices=tasks, default="all", help="part to run; all: arithmetic and facts")
    add("--output", metavar="DIR", default="demo-output", help="folder for the report, metrics and models")
    add("--seed", type=int, default=0, help="random seed")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--quick", dest="size", action="store_const", const="quick", help="skip the facts and all controls")
    add("--full", dest="size", action="store_const", const="full", help="more steps, more questions, all controls")
    parser.set_defaults(size="default")


def run_demo(args: argparse.Namespace) -> None:
    """Runs `endotrl demo`."""
    with working("Loading"):
        from ..demo import run_demo

    run_demo(task=args.task, output_dir=args.output, seed=args.seed, size=args.size)


def _add_score(commands: Any) -> None:
    parser = add_command(
        commands,
        "score",
        "rows:run_score",
        help="score every row of a file of prompts and completions",
        description="Scores every row with the endogenous reward of a language model, in nats, or with a sentence "
        'reward model. A row is {"prompt": ..., "completion": ...}, text or messages, and optionally '
        '"completion_ids", the tokens as they were generated; TRL\'s other dataset formats are read, too. Other keys '
        "are copied to the output. Run the same command again to resume an interrupted run; `accelerate launch -m "
        "endotrl score` uses several devices.",
        epilog="Exit codes: 0 if all rows were scored; 1 if some rows could not be scored (they are listed); 2 if the "
        "command failed; 130 if it was interrupted. Rows that were scored are always saved.",
    )
    add = _add_rows(
        parser,
        "rows to score",
        "JSON Lines file to write, one line per row in the same order, with F.meta.json (settings, versions, speed) "
        "and, if rows are invalid, F.errors.jsonl; - for standard output (default: FILE.scores.jsonl in the current "
        "folder)",
    )
    add("--html", metavar="F", help="page to write, with heat maps of the first 50 rows by token (or sentence)")
    add("--no-tokens", action="store_true", help="omit tokens (or sentences) and their rewards from the output")


def _add_pairs(commands: Any) -> None:
    parser = add_command(
        commands,
        "pairs",
        "rows:run_pairs",
        help="turn candidate responses into preference pairs or an SFT dataset",
        description="Scores the candidate responses to each prompt and writes a dataset for TRL: preference pairs for "
        "DPO, or the best response or best fraction for SFT. An input row has a prompt and a list of completions, or "
        "a prompt and one completion, with the rows of a prompt adjacent; or it is a preference, which is relabelled. "
        "Run the same command again to resume an interrupted run; `accelerate launch -m endotrl pairs` uses several "
        "devices.",
    )
    add = parser.add_argument_group("choice").add_argument
    add(
        "--write",
        choices=("pairs", "best", "top", "ranked"),
        default="pairs",
        help="pairs: rows of prompt, chosen and rejected (the best and the worst response); best, top: rows of prompt "
        "and completion (the best response to each prompt, or the best --fraction of all responses); ranked: all "
        "responses, the best first",
    )
    add("--margin", metavar="X", type=float, default=0.0, help="minimum difference (exclusive) between paired rewards")
    add("--per-prompt", **COUNT, default=1, help="maximum number of pairs per prompt")
    add("--fraction", metavar="X", type=float, default=0.25, help="fraction of responses that --write top keeps")
    add("--unfinished", action="store_true", help="also use truncated responses, as told by their completion_ids")
    _add_rows(
        parser,
        "candidates",
        "JSON Lines file to write; the folder F.scores next to it allows another choice without running the model; - "
        "for standard output (default: FILE.pairs.jsonl, or as --write says, in the current folder)",
    )


def _add_rows(parser: Parser, what: str, output: str) -> Any:
    """Adds the options shared by `score` and `pairs`; returns the function that adds further options about files."""
    parser.add_argument("file", metavar="FILE", help=f"{what}: {DATA_HELP}")
    add_model(parser, "frozen model, or sentence reward model")
    add = parser.add_argument_group("files").add_argument
    add("--output", metavar="F", help=output)
    add("--overwrite", action="store_true", help="start over if the output exists")
    add("--limit", **COUNT, help="score only the first N rows")
    add("--block-size", **COUNT, default=64, help="number of responses scored and saved together")
    add("--quiet", action="store_true", help="print errors only, without progress and summary")
    settings = parser.add_argument_group("reward", "Parameters of `endotrl.EndogenousReward`.")
    settings.add_argument(
        "--form",
        metavar="NAME",
        help="form of the reward as named in `endotrl eval`, instead of --token-reward and --aggregate: "
        "TOKEN.AGGREGATE, such as log_prob.discounted=0.95; residual:FORM or style_residual:FORM, which remove the "
        "effect of length, or of length and Markdown, among the (adjacent) responses to a prompt",
    )
    add_reward_settings(settings, *(name for name, setting in SETTINGS.items() if "score" not in setting.absent))
    return add


def _add_diagnose(commands: Any) -> None:
    parser = add_command(
        commands,
        "diagnose",
        "main:run_diagnose",
        help="find out what is wrong with a finished or running training run",
        description="Diagnoses a run of a TRL trainer from its logs: whether it learns, whether it collapses, and "
        "which common problems it has, with evidence and fixes. A run is a `trainer_state.json`, an output folder or "
        "checkpoint, an offline W&B run, TensorBoard events, `completions/*.parquet`, or JSON Lines.",
    )
    add = parser.add_argument
    add("runs", metavar="RUN", nargs="+", help="file or folder of a run; several runs are compared")
    add(
        "--held-out",
        metavar="NAME",
        nargs="+",
        help="reward functions that are not trained on (default: those that the logged reward does not depend on)",
    )
    add("--output", metavar="DIR", help="folder for report.html and findings.json")
    add(
        "--fail-on",
        choices=("warning", "failure"),
        help="exit with code 1 for findings of at least this severity; a run too short to judge counts as a warning",
    )


def run_diagnose(args: argparse.Namespace) -> int:
    """Runs `endotrl diagnose`."""
    from ..monitoring.diagnosis import diagnose
    from ..monitoring.diagnosis.report import print_diagnoses, report_page
    from ..runs.files import replace_text, write_json

    diagnoses, console = [diagnose(run, args.held_out) for run in args.runs], terminal()
    print_diagnoses(diagnoses, console)
    if args.output:
        folder = Path(args.output)
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "report.html", report_page(diagnoses))
        write_json(folder / "findings.json", {"runs": [diagnosis.to_dict() for diagnosis in diagnoses]})
        console.print(f"Report: {folder / 'report.html'}")
    grave = {"failure": ("failure",), "warning": ("failure", "warning", "unclear"), None: ()}[args.fail_on]
    return EXIT_FOUND if any(diagnosis.status in grave for diagnosis in diagnoses) else EXIT_OK


def _add_plan(commands: Any) -> None:
    parser = add_command(
        commands,
        "plan",
        "plan:run",
        help="check whether a recipe fits on given GPUs",
        description="Estimates the memory per GPU for each way to distribute a recipe over GPUs, what to change if it "
        "does not fit, and roughly how long training takes. Reads only configs: no weights are loaded, and no GPU is "
        "needed.",
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="YAML file of a recipe, or endotrl://NAME of one shipped with endotrl")
    add("--gpus", **COUNT, default=8, help="total number of GPUs")
    number: dict[str, Any] = {"metavar": "N", "type": positive_number}
    add("--gpu-memory", **number | {"metavar": "GIB"}, default=80.0, help="memory per GPU, in GiB")
    add("--rows", **COUNT, help="number of rows in the dataset, to estimate the time of a recipe with epochs")
    add("--gpu-tflops", **number, default=312.0, help="peak dense bfloat16 throughput, in TFLOPS (A100: 312)")
    add("--gpu-bandwidth", **number, default=2000.0, help="memory bandwidth, in GB/s (A100 80 GB: 2000)")
    scripts = ("grpo", "ppo", "sentence_reward")
    add("--kind", choices=scripts, help="script of the recipe (default: inferred from the file name)")
    add("--model", help="path or hub id of a model to use instead of the recipe's (only its config is read)")
    add("--prompt-tokens", **COUNT, default=512, help="length of the longest prompt, if the recipe does not set it")
    changes = "settings of the recipe to override, such as use_peft=true"
    add("--set", metavar="KEY=VALUE", nargs="+", default=[], help=changes)


def _add_recipes(commands: Any) -> None:
    parser = add_command(
        commands,
        "recipes",
        "main:run_recipes",
        help="list, find or copy the recipes and accelerate configs shipped with endotrl",
        description="Lists the recipes and accelerate configs. With NAME, prints the path of one, or copies it.",
    )
    parser.add_argument("name", metavar="NAME", nargs="?", help="recipe, model or accelerate config")
    parser.add_argument("--copy", metavar="DIR", type=Path, help="folder to copy it to")


def run_recipes(args: argparse.Namespace) -> None:
    """Runs `endotrl recipes`."""
    from ..shipped import SCHEME, accelerate_configs, copy_shipped, recipes, shipped_path

    if args.name is not None:
        sys.stdout.write(f"{shipped_path(args.name) if args.copy is None else copy_shipped(args.name, args.copy)}\n")
        return
    if args.copy is not None:
        raise ValueError("--copy requires a NAME, such as in `endotrl recipes smollm2-135m --copy .`")
    lines = []
    for name, about in recipes().items():
        lines += [name, *textwrap.wrap(about, 80, initial_indent="    ", subsequent_indent="    ")]
    lines += ["", *textwrap.wrap(f"accelerate configs: {', '.join(accelerate_configs())}", 80), ""]
    lines += ["Launch one:  accelerate launch --config_file $(endotrl recipes cpu.yaml) \\"]
    lines += [f"    -m endotrl.launch.grpo --config {SCHEME}smollm2-135m/grpo.yaml"]
    lines += ["Change one:  endotrl recipes smollm2-135m --copy .\n"]
    sys.stdout.write("\n".join(lines))


def _add_workspace(commands: Any) -> None:
    parser = add_command(
        commands,
        "workspace",
        "main:run_workspace",
        help="organise the curves of a W&B project into sections",
        description="Saves a view of a W&B project with five sections of curves (learning, collapse, what the reward "
        "looks at, optimization, speed), and prints its URL. Requires `wandb login`.",
    )
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="W&B entity and project")


def run_workspace(args: argparse.Namespace) -> None:
    """Runs `endotrl workspace`."""
    from ..runs.wandb_workspace import make_workspace

    entity, _, project = args.project.partition("/")
    if not entity or not project or "/" in project:
        raise ValueError(f"The project must be ENTITY/PROJECT, got {args.project!r}.")
    workspace = make_workspace(entity, project)
    from wandb.errors import Error

    try:
        sys.stdout.write(f"{workspace.save().url}\n")
    except Error as error:
        raise ValueError(f"W&B cannot save a workspace for {args.project}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
