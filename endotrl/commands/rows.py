# SPDX-License-Identifier: Apache-2.0
"""The commands `endotrl score` and `endotrl pairs`: from their options to the files, the page and the terminal."""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data.formats import ROW_FORMAT
from ..data.sources import STREAM, Reader
from ..reporting import counted, number, say
from ..rewards.settings import SETTINGS
from ..runs.processes import processes
from ..score_file.output_files import model_digest, only_run_on
from ..score_file.run import score_file
from ..score_file.score_summary import heat_map_page, show_report
from ..selection.choose import Choice, Counts
from ..selection.file import choose_from_file
from .common import EXIT_FOUND, EXIT_OK, as_options, choose_dtype, default_output, resolved_dtype, use_form


# Settings that a sentence reward model has, too.
COMMON = {"max_tokens_per_batch", "dtype", "device", "trust_remote_code", "overlong_prompt", "chat_template_kwargs"}
ENDOGENOUS = [name for name, setting in SETTINGS.items() if "score" not in setting.absent and name not in COMMON]
LATER = ("images", "model_init_kwargs", "correction")  # than the first files of scores, which do not have them
SHOWN_SETTINGS = ("token_reward", "aggregate", "alpha", "gamma", "truncation", "criterion")  # on the page
SHOWN_ERRORS = 20  # bad rows named on the terminal; the error file has them all
ONE_SIDED = 0.7  # share of pairs that are decided alike by length, from which on the summary says so


def run_score(args: argparse.Namespace) -> int:
    """Runs `endotrl score`; returns the exit code."""
    Reader(args.file)  # raises if there is nothing of that name
    state, residual = processes(), use_form(args)
    output = args.output or default_output(args.file, ".scores.jsonl")
    if args.html is not None:
        if not Path(args.html).parent.is_dir():
            raise ValueError(f"The folder of the page, {Path(args.html).parent}, does not exist. Make it first.")
        if Path(args.html).resolve() in (Path(args.file).resolve(), Path(output).resolve()):
            raise ValueError(f"--html {args.html} is also the input or the output. Choose another name.")
    # Before the checkpoint is read, which takes a while.
    with only_run_on(output) if state.is_main_process else nullcontext():
        # Libraries print while they are imported (wandb: that it is offline), and standard output may be the rows.
        with redirect_stdout(sys.stderr):
            reward, settings, by_sentence = make_reward(args, f"{output}.meta.json", f"{output}.shards/settings.json")
        report = score_file(
            reward,
            args.file,
            output,
            settings,
            block_size=args.block_size,
            limit=args.limit,
            overwrite=args.overwrite,
            tokens=not args.no_tokens,
            num_examples=0 if args.html is None else args.html_rows,
            progress=not args.quiet and state.is_main_process,
            on_error=errors_on_terminal(args, "the output" if output == STREAM else f"{output}.errors.jsonl"),
            held=True,
            residual=residual,
        )
    if state.is_main_process and not report.tally.rows:  # of standard input, whose rows cannot be counted before
        raise ValueError(f"The input has no rows. A row is a line such as {ROW_FORMAT}.")
    if state.is_main_process and args.html is not None:
        shown = {name: getattr(args, name) for name in SHOWN_SETTINGS}
        html = heat_map_page(
            report,
            reward,
            file=args.file,
            model=args.model,
            output=output,
            command=args.command_line,
            settings={"segmenter": reward.config.segmenter} if by_sentence else shown,
        )
        try:
            Path(args.html).write_text(html, encoding="utf-8")
        except OSError as error:
            saved = "" if output == STREAM else f" The rows are scored, and in {output}."
            raise OSError(f"The page {args.html} cannot be written: {error.strerror}.{saved}") from error
    if state.is_main_process and not args.quiet:
        show_report(report, output, args.html, by_sentence)
    return EXIT_FOUND if report.tally.errors else EXIT_OK


def run_pairs(args: argparse.Namespace) -> int:
    """Runs `endotrl pairs`; returns the exit code."""
    Reader(args.file)  # raises if there is nothing of that name
    state, residual = processes(), use_form(args)
    choice = Choice(args.write, args.margin, args.per_prompt, args.fraction, args.unfinished)
    output = args.output or default_output(args.file, f".{args.write}.jsonl")
    with redirect_stdout(sys.stderr):  # libraries print while they are imported, and standard output may be the rows
        reward, settings, by_sentence = make_reward(args, f"{output}.scores/settings.json")
    counts = choose_from_file(
        reward,
        args.file,
        output,
        settings,
        choice,
        residual=residual,
        block_size=args.block_size,
        limit=args.limit,
        overwrite=args.overwrite,
        progress=not args.quiet,
        on_error=errors_on_terminal(args),
    )
    if state.is_main_process and not args.quiet:
        _show_pairs(counts, choice, output, residual, "" if by_sentence else " nats")
    return EXIT_FOUND if counts.bad else EXIT_OK


def errors_on_terminal(args: argparse.Namespace, where: str | None = None) -> Callable[[int, str], None]:
    """Says on the terminal which rows are bad: the first ones, and `where` all of them are named."""
    numbers = count(1)

    def on_error(line: int, error: str) -> None:
        shown = next(numbers)
        if shown <= SHOWN_ERRORS:
            say(f"line {line}: {as_options(error, args)}")
        elif shown == SHOWN_ERRORS + 1:
            say("More rows are bad." if where is None else f"More rows are bad: {where} names them all.")

    return on_error


def make_reward(args: argparse.Namespace, *recorded: str) -> tuple[Any, dict[str, Any], bool]:
    """The reward, the settings that its numbers depend on, and whether it is a sentence reward model's."""
    from ..frozen.names import load_config, load_tokenizer
    from ..frozen.served import ServedModel, is_url
    from ..rewards.endogenous import EndogenousReward
    from ..rewards.sentence import SentenceReward
    from ..sentence.configuration import SentenceRewardConfig

    choose_dtype(args, *recorded)
    by_sentence = not is_url(args.model) and isinstance(
        load_config(args.model, args.trust_remote_code), SentenceRewardConfig
    )
    # Numbers depend on these, but not on batches and device: a run may go on with others.
    settings = {name: getattr(args, name) for name in ("chat_template_kwargs", "overlong_prompt", "dtype")}
    values = {name: getattr(args, name) for name in ENDOGENOUS}
    changed = {name for name, value in values.items() if value != SETTINGS[name].default}
    if by_sentence and (given := [*(["form"] if args.form else []), *sorted(changed)]):
        name = given[0].replace("_", "-")
        raise ValueError(f"--{name} is a setting of the endogenous reward, not of sentence models. Leave it out.")
    if args.correction == "length":
        raise ValueError("--correction length compares completions of a batch in training; rows are scored alone.")
    if not by_sentence:
        settings = {name: v for name, v in values.items() if name in changed or name not in LATER} | settings
    reward: Any = (SentenceReward if by_sentence else EndogenousReward)(
        args.model,
        None if args.tokenizer is None else load_tokenizer(args.tokenizer, args.trust_remote_code),
        **settings,
        max_tokens_per_batch=args.max_tokens_per_batch,
        device=args.device,
        trust_remote_code=args.trust_remote_code,
    )
    model = reward.model if isinstance(reward, EndogenousReward) and reward.is_served else None
    if isinstance(model, ServedModel):
        version = model.version
    else:
        # What "auto" and the name stand for today: on another machine, or after training, it can be something else.
        version = model_digest(reward.config._name_or_path) or reward.config._commit_hash
        settings["dtype"] = resolved_dtype(args)
    return reward, {"model": args.model, "model_version": version, **settings}, by_sentence


def _show_pairs(counts: Counts, choice: Choice, output: str, residual: str | None, unit: str) -> None:
    console = Console(stderr=output == STREAM, highlight=False)
    rows = counted(counts.rows, "pair" if choice.kind == "pairs" else "row")
    lines = [f"{rows} from {counted(counts.prompts, 'prompt')} with {counted(counts.responses, 'response')}."]
    if choice.kind == "pairs":
        lines.append(f"The chosen response is better by {number(counts.margins / counts.rows)}{unit} on average.")
        pairs = counts.longer.total()
        for sign, word in ((1, "longer"), (-1, "shorter")):
            share = counts.longer[sign] / pairs if pairs else 0.0
            if share >= ONE_SIDED and pairs >= 20:
                hint = "" if residual else "; --form style_residual:bellman.discounted=0.93 takes that out"
                lines.append(f"It is {word} than the rejected one in {share:.0%} of the pairs{hint}.")
        if labels := counts.labels.total():
            lines.append(f"{counts.labels['chosen'] / labels:.0%} of the pairs agree with the labels of the input.")
    lines.append(counts.why_not())
    console.print("\n".join(filter(None, lines)), markup=False)
    if output != STREAM:
        console.print(f"Written: {output} (scores for other choices: {output}.scores)", markup=False, soft_wrap=True)
