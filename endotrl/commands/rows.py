# SPDX-License-Identifier: Apache-2.0
"""The commands `endotrl score` and `endotrl pairs`: from options to output files, HTML page and terminal output."""

import argparse
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from itertools import count
from pathlib import Path

from .. import __version__
from ..data.formats import ROW_FORMAT, images_of, message_text
from ..data.sources import STREAM, Reader
from ..reporting import HeatMapRow, counted, heat_maps, number, page, say, settings_table, terminal, terminal_table
from ..rewards.endogenous import EndogenousReward
from ..rewards.residuals import RESIDUALS
from ..rewards.scored import heat_map_row
from ..runs.files import only_run_on
from ..runs.processes import processes
from ..score_file.rows import Reward
from ..score_file.run import Example, ScoreReport, score_file
from ..selection.choose import Choice, Counts
from ..selection.file import choose_from_file
from .common import EXIT_FOUND, EXIT_OK, as_options, default_output
from .models import make_reward, use_form


SHOWN_SETTINGS = ("token_reward", "aggregate", "alpha", "gamma", "truncation", "criterion")  # on the page
HTML_ROWS = 50  # first rows shown on the page
SHOWN_ERRORS = 20  # invalid rows reported on the terminal; the error file has all of them
SENTENCE_DECIMALS = 4  # the contributions of long responses are small
ONE_SIDED = 0.7  # share of pairs decided alike by length from which on the summary mentions it


def run_score(args: argparse.Namespace) -> int:
    """Runs `endotrl score`; returns the exit code."""
    Reader(args.file)  # raises if there is nothing of that name
    state, residual = processes(), use_form(args)
    output = args.output or default_output(args.file, ".scores.jsonl")
    if args.html is not None:
        if not Path(args.html).parent.is_dir():
            raise ValueError(f"The folder of --html {args.html} does not exist. Create it first.")
        if Path(args.html).resolve() in (Path(args.file).resolve(), Path(output).resolve()):
            raise ValueError(f"--html {args.html} is also the input or the output file. Choose another name.")
    if state.is_main_process:
        with only_run_on(output):
            pass  # raises if another run holds it, before the model is loaded
    with redirect_stdout(sys.stderr):  # as in `main`
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
        num_examples=0 if args.html is None else HTML_ROWS,
        progress=not args.quiet and state.is_main_process,
        on_error=errors_on_terminal(args, "the output" if output == STREAM else f"{output}.errors.jsonl"),
        residual=residual,
    )
    if not state.is_main_process:
        return EXIT_OK
    if not report.tally.rows:  # rows of standard input cannot be counted beforehand
        raise ValueError(f"The input has no rows. It must have lines such as {ROW_FORMAT}.")
    if args.html is not None:
        html = _heat_map_page(args, report, reward, output)
        try:
            Path(args.html).write_text(html, encoding="utf-8")
        except OSError as error:
            saved = "" if output == STREAM else f" The scores are in {output}."
            raise OSError(f"The page {args.html} cannot be written: {error.strerror}.{saved}") from error
    if not args.quiet:
        _show_report(report, output, args.html, by_sentence)
    return EXIT_FOUND if report.tally.errors else EXIT_OK


def run_pairs(args: argparse.Namespace) -> int:
    """Runs `endotrl pairs`; returns the exit code."""
    Reader(args.file)  # raises if there is nothing of that name
    state, residual = processes(), use_form(args)
    choice = Choice(args.write, args.margin, args.per_prompt, args.fraction, args.unfinished)
    output = args.output or default_output(args.file, f".{args.write}.jsonl")
    with redirect_stdout(sys.stderr):  # as in `main`
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
    """Reports the first invalid rows on the terminal, and `where` to find all of them."""
    numbers = count(1)

    def on_error(line: int, error: str) -> None:
        shown = next(numbers)
        if shown <= SHOWN_ERRORS:
            say(f"line {line}: {as_options(error, args)}")
        elif shown == SHOWN_ERRORS + 1:
            say("There are more invalid rows" + ("." if where is None else f"; {where} lists all of them."))

    return on_error


def _show_report(report: ScoreReport, output: str, html: str | None, by_sentence: bool) -> None:
    console = terminal(stderr=output == STREAM)
    numbers = {"reward": "reward", "num_tokens": "tokens", "reward_per_token": "per token"}
    if by_sentence:
        del numbers["reward_per_token"]
    cells: list[list[object]] = []
    for row, record in report.tally.head:
        error = record.get("error") or record.get("reason")
        cells.append([row.line, *map(record.get, numbers), f"({error})" if error else message_text(row.completion)])
    console.print()
    console.print(terminal_table(["line", *numbers.values(), "completion"], cells, "First rows"))
    for line in _summary_lines(report, output, "" if by_sentence else " nats"):
        console.print(line)
    for what, path in (("Rewards", output), ("Heat map", html)):
        if path not in (None, STREAM):
            console.print(f"{what}: {path}", soft_wrap=True)


def _summary_lines(report: ScoreReport, output: str, unit: str) -> list[str]:
    tally = report.tally
    speed = f"{counted(tally.tokens, 'token')} in {report.seconds:,.1f} s ({report.tokens_per_second:,.0f} tokens/s)"
    lines = [f"{counted(tally.rows - tally.errors, 'row')} scored, {speed}."]
    if kept := report.resumed_rows:
        lines.append(f"Earlier runs processed {counted(kept, 'row')}, this run {tally.rows - kept:,}.")
    if tally.mean_reward is not None:
        words = f"Mean reward {number(tally.mean_reward)}{unit}"
        if (correlation := tally.length_correlation) is not None:
            kind = f"longer answers score {'higher' if correlation > 0 else 'lower'}"
            kind = "reward hardly depends on length" if abs(correlation) < 0.2 else kind
            words += f"; {kind} (r = {number(correlation, 2, sign=True)})"
        lines.append(f"{words}.")
    for domain, slopes in report.slopes.items():
        kinds = zip(slopes, RESIDUALS["style_residual"], strict=False)
        found = ", ".join(f"{number(slope)} × {kind}" for slope, kind in kinds)
        lines.append(f"Subtracted among the responses to a prompt{f' ({domain})' if domain else ''}: {found}.")
    if tally.skipped:
        lines.append(f"{counted(tally.skipped, 'row')} got no reward (null; see the reason in the row).")
    if tally.errors:
        where = "" if output == STREAM else f"; see {output}.errors.jsonl"
        lines.append(f"{counted(tally.errors, 'row')} could not be scored{where}.")
    return lines


def _heat_map_page(args: argparse.Namespace, report: ScoreReport, reward: Reward, output: str) -> str:
    examples, first = report.examples, f"the first {counted(len(report.examples), 'row')}"
    if isinstance(reward, EndogenousReward):
        kind, unit = "Token", " nats"
        settings = {name.replace("_", " "): getattr(args, name) for name in SHOWN_SETTINGS}
        maps = heat_maps(
            [heat_map_row(reward, e.stats, e.row.prompt, _name(e), images=images_of(e.row.extra)) for e in examples]
        )
        lead = (
            f"The endogenous reward of {args.model}, in nats, for {first}. Colours show the contributions of "
            "tokens, which sum to the reward of a row."
        )
    else:
        kind, unit, settings = "Sentence", "", {"segmenter": reward.config.segmenter}
        rows = [_sentence_row(example) for example in examples]
        maps = heat_maps(rows, "contribution of a sentence", "score", "sentence", decimals=SENTENCE_DECIMALS)
        lead = (
            f"The scores of the sentence reward model {args.model} for {first}. The contribution of a sentence is its "
            "weight times its reward (for the first sentence, plus the contribution of the prompt). They sum to the "
            "score."
        )
    return page(
        f"{kind} rewards of {Path(args.file).name}",
        [("", maps), ("Settings", settings_table(settings))],
        lead=" ".join([lead, *_summary_lines(report, output, unit)]),
        footer=f"endotrl {__version__} · {args.command_line}",
    )


def _name(example: Example) -> str:
    row = example.row
    return f"line {row.line}" + (f" · id {row.extra['id']}" if "id" in row.extra else "")


def _sentence_row(example: Example) -> HeatMapRow:
    scores = example.stats
    return HeatMapRow(
        text=scores.sentences.text,
        offsets=scores.sentences.spans,
        contributions=scores.contributions.tolist(),
        total=scores.score,
        rest={} if scores.sentences.spans else {"prompt": scores.score},
        columns={"reward": scores.sentence_rewards[1:].tolist(), "weight": scores.weights[1:].tolist()},
        prompt=message_text(example.row.prompt),
        meta=_name(example),
    )


def _show_pairs(counts: Counts, choice: Choice, output: str, residual: str | None, unit: str) -> None:
    console = terminal(stderr=output == STREAM)
    rows = counted(counts.rows, "pair" if choice.kind == "pairs" else "row")
    lines = [f"{rows} from {counted(counts.prompts, 'prompt')} with {counted(counts.responses, 'response')}."]
    if choice.kind == "pairs":
        lines.append(f"On average, the chosen response is better by {number(counts.margins / counts.rows)}{unit}.")
        pairs = counts.longer.total()
        for sign, word in ((1, "longer"), (-1, "shorter")):
            share = counts.longer[sign] / pairs if pairs else 0.0
            if share >= ONE_SIDED and pairs >= 20:
                hint = "" if residual else "; --form style_residual:bellman.discounted=0.93 corrects for it"
                lines.append(f"It is {word} than the rejected one in {share:.0%} of the pairs{hint}.")
        if labels := counts.labels.total():
            lines.append(f"{counts.labels['chosen'] / labels:.0%} of the pairs agree with the labels of the input.")
    lines.append(counts.why_not())
    console.print("\n".join(filter(None, lines)))
    if output != STREAM:
        console.print(f"Wrote {output} (scores for other choices: {output}.scores)", soft_wrap=True)
