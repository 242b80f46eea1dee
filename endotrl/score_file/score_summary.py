# SPDX-License-Identifier: Apache-2.0
"""
What came out of `endotrl score`: in a table and in words, and as the page of `--html` with every token, or sentence,
in the colour of what it contributes to the reward.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from .. import __version__
from ..data.formats import images_of, message_text
from ..data.sources import STREAM
from ..reporting import (
    HeatMapRow,
    correlation_in_words,
    counted,
    heat_maps,
    number,
    page,
    plain,
    settings_table,
    table,
    terminal_table,
)
from ..rewards.residuals import RESIDUALS
from .rows import Reward
from .run import Example, ScoreReport


SENTENCE_HEADERS = ["", "reward", "weight", "contribution", "sentence"]
SENTENCE_DECIMALS = 4  # the contributions of long responses are small


def show_report(report: ScoreReport, output: str, html: str | None, by_sentence: bool) -> None:
    """Table and summary on the terminal; on standard error if the output goes to standard output."""
    console = Console(stderr=output == STREAM, highlight=False)
    per_token = [] if by_sentence else ["reward_per_token"]
    cells: list[list[object]] = []
    for row, record in report.tally.head:
        error = record.get("error") or record.get("reason")
        numbers = [record.get(key) for key in ("reward", "num_tokens", *per_token)]
        cells.append([row.line, *numbers, f"({error})" if error else message_text(row.completion)])
    headers = ["line", "reward", "tokens", *(["per token"] if per_token else []), "completion"]
    console.print()
    console.print(terminal_table(headers, cells, "First rows"))
    for line in summary_lines(report, output, "" if by_sentence else " nats"):
        console.print(line, markup=False, soft_wrap=False)
    for what, path in (("Rewards", output), ("Heat map", html)):
        if path not in (None, STREAM):
            console.print(f"{what}: {path}", markup=False, soft_wrap=True)


def summary_lines(report: ScoreReport, output: str, unit: str) -> list[str]:
    """What came out, in words."""
    tally = report.tally
    speed = f"{counted(tally.tokens, 'token')} in {report.seconds:,.1f} s ({report.tokens_per_second:,.0f} tokens/s)"
    lines = [f"{counted(tally.rows - tally.errors, 'row')} scored, {speed}."]
    if kept := report.resumed_rows:
        was = "was" if kept == 1 else "were"
        lines.append(f"{counted(kept, 'row')} {was} done by earlier runs, {tally.rows - kept:,} by this one.")
    if tally.mean_reward is not None:
        words = f"Mean reward {number(tally.mean_reward)}{unit}"
        if tally.length_correlation is not None:
            words += f"; {correlation_in_words(tally.length_correlation)}"
        lines.append(f"{words}.")
    for domain, slopes in report.slopes.items():
        kinds = zip(slopes, RESIDUALS["style_residual"], strict=False)
        found = ", ".join(f"{number(slope)} × {kind}" for slope, kind in kinds)
        lines.append(f"Taken out among the responses to a prompt{f' ({domain})' if domain else ''}: {found}.")
    if tally.skipped:
        lines.append(f"{counted(tally.skipped, 'row')} got no reward (null, with the reason).")
    if tally.errors:
        where = "" if output == STREAM else f"; {output}.errors.jsonl says why"
        lines.append(f"{counted(tally.errors, 'row')} could not be scored{where}.")
    return lines


def heat_map_page(
    report: ScoreReport,
    reward: Reward,
    *,
    file: str,
    model: str,
    output: str,
    command: str,
    settings: Mapping[str, Any],
) -> str:
    """The report's examples; names of files and model, the `command` and the `settings` are shown as given."""
    from ..rewards.endogenous import EndogenousReward
    from ..rewards.scored import heat_map_row

    examples, first = report.examples, f"the first {counted(len(report.examples), 'row')}"
    if isinstance(reward, EndogenousReward):
        kind, unit = "Token", " nats"
        maps = heat_maps(
            [heat_map_row(reward, e.stats, e.row.prompt, _name(e), images=images_of(e.row.extra)) for e in examples]
        )
        lead = (
            f"The endogenous reward of {model}, in nats, for {first}. Colour is what a token "
            "contributes: the numbers of a row sum to its reward."
        )
    else:
        kind, unit = "Sentence", ""
        rows = [_sentence_row(example) for example in examples]
        maps = heat_maps(rows, "contribution of a sentence", "score", "sentence", decimals=SENTENCE_DECIMALS)
        lead = (
            f"The sentence reward model {model}, for {first}. A sentence's contribution is its "
            "weight times its reward; with the prompt's, which the first sentence has in its own, they sum to the "
            "score."
        )
    shown = {name.replace("_", " "): value for name, value in settings.items()}
    return page(
        f"{kind} rewards of {Path(file).name}",
        [("", maps), ("Settings", settings_table(shown))],
        lead=" ".join([lead, *summary_lines(report, output, unit)]),
        footer=f"endotrl {__version__} · {command}",
    )


def _name(example: Example) -> str:
    row = example.row
    return f"line {row.line}" + (f" · id {row.extra['id']}" if "id" in row.extra else "")


def _sentence_row(example: Example) -> HeatMapRow:
    scores = example.stats
    texts = ["(prompt)", *(scores.sentences.text[start:end].strip() for start, end in scores.sentences.spans)]
    rewards, weights = scores.sentence_rewards.tolist(), scores.weights.tolist()
    cells = [
        [i or None, reward, weight, reward * weight, plain(text)]
        for i, (text, reward, weight) in enumerate(zip(texts, rewards, weights, strict=True))
    ]
    return HeatMapRow(
        text=scores.sentences.text,
        offsets=scores.sentences.spans,
        contributions=scores.contributions.tolist(),
        total=scores.score,
        rest={} if scores.sentences.spans else {"prompt": scores.score},
        columns={"reward": rewards[1:], "weight": weights[1:]},
        prompt=message_text(example.row.prompt),
        meta=_name(example),
        details=Markup("<details><summary>Sentences</summary>{}</details>").format(
            table(SENTENCE_HEADERS, cells, decimals=SENTENCE_DECIMALS)
        ),
    )
