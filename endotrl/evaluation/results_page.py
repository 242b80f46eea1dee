# SPDX-License-Identifier: Apache-2.0
"""The page of a run: tables, plots, and the tokens of what the reward got most wrong."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..data.formats import message_text
from ..rendering.offsets import decode_with_offsets
from ..reporting import HeatMapRow, figure, heat_maps, number, page, table
from .benchmarks import BENCHMARKS
from .engine import ScoredResponse
from .forms import Form
from .items import Item
from .plots import plot_calibration, plot_length, plot_levels, plot_metric
from .scorer_names import base_name, make_form, needs_model
from .stats_cache import StatsCache
from .tables import few_items, full_rows, value


NUM_EXAMPLES = 4
SHOWN_TOKENS = 160  # of each response


def report_page(
    results: Mapping[str, Any],
    items: Sequence[Item],
    stats: StatsCache,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> str:
    """The page of a run. Items whose token statistics are not in the cache are not shown."""
    benchmark = BENCHMARKS[results["benchmark"]]
    headers, rows = full_rows(results)
    note = f"{results['tie_rule']} Intervals are 95%: bootstrap over items.{few_items(results)}"
    blocks = [table(headers, rows, caption=note)]
    plots = find_spec("matplotlib") is not None
    if plots:
        blocks.append(figure(plot_metric(results), f"{results['main_metric']}; controls in grey."))
    sections: list[tuple[str, Markup | str]] = [("Results", Markup("").join(blocks))]
    if results["statements"]:
        lines = Markup("").join(Markup("<li>{}</li>").format(line) for line in results["statements"])
        sections.append((f"Differences to {next(iter(results['metrics']))}", Markup("<ul>{}</ul>").format(lines)))
    if results["benchmark"] == "rm-bench":
        sections.append(("Substance and style", _rm_bench(results, plots)))
    if results["benchmark"] == "dsp":
        sections.append(("Criterion by domain", _dsp(results)))
    if results["length"]:
        sections.append(("Length", _length(results, plots)))
        sections.append(("Calibration", _calibration(results, plots)))
    shown = _disagreements(results, items, stats, tokenizer, vocab_size)
    if shown:
        sections.append(("Most wrong", shown))
    settings = [[key, None if v is None else str(v)] for key, v in results["settings"].items()]
    settings += [
        ["data", results["data"]],
        ["items", str(results["num_items"])],
        ["cut responses", str(results["cut"])],
    ]
    sections.append(("Settings", table(["setting", "value"], settings)))
    names = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    return page(
        f"{benchmark.title}: {results['model']}",
        sections,
        lead=f"How well rewards that need no training tell better from worse. {results['num_items']} items, "
        f"{results['tokens']:,} tokens, {results['seconds']:.0f} seconds. {benchmark.paper}",
        footer=f"{names} · {results['updated']} · {results['command']}" if names else f"endotrl {__version__}",
    )


def _rm_bench(results: Mapping[str, Any], plots: bool) -> Markup:
    styles = ("concise", "detailed", "markdown")
    blocks = [
        Markup(
            "<p>Easy: the better response is in the fancier style; hard: in the plainer one. A reward that looks at "
            "substance has them equal.</p>"
        )
    ]
    if plots:
        blocks.append(figure(plot_levels(results, ("easy", "normal", "hard")), "Accuracy by level."))
    first = next(iter(results["metrics"]))
    rows = [[a, *[value(results, first, f"{a} > {b}") for b in styles]] for a in styles]
    headers = ["better \\ worse", *styles]
    blocks.append(
        table(headers, rows, caption=f"Wins of {first}, by the style of the better and of the worse response.")
    )
    return Markup("").join(blocks)


def _dsp(results: Mapping[str, Any]) -> Markup:
    from .benchmarks.dsp import DOMAINS, NONE

    blocks = []
    for scorer in list(results["metrics"])[:4]:
        rows = [
            [criterion, *[value(results, scorer, f"{criterion} > {domain}") for domain in DOMAINS]]
            for criterion in (NONE, *DOMAINS)
        ]
        caption = f"{scorer}: accuracy in a domain (column) under the criterion of another (row)."
        blocks.append(table(["criterion", *DOMAINS], rows, caption=caption))
    return Markup("").join(blocks)


def _length(results: Mapping[str, Any], plots: bool) -> Markup:
    keys = ["better_is_longer", "similar_length", "better_is_shorter", "length_controlled", "bias"]
    rows = [[name, *[split[key] for key in keys]] for name, split in results["length"].items()]
    counts = next(iter(results["length"].values()))
    caption = (
        f"Accuracy where the better response is longer ({counts['num_better_is_longer']} pairs), of similar length "
        f"({counts['num_similar_length']}, within a factor of 1.2) and shorter ({counts['num_better_is_shorter']}). "
        "Bias is the first minus the third, length-controlled their mean: length alone gets 0.5."
    )
    blocks = [table(["scorer", *[key.replace("_", " ") for key in keys]], rows, caption=caption)]
    if plots and any(split["bias"] is not None for split in results["length"].values()):
        blocks.append(figure(plot_length(results), "Far apart: length decides. Together: it does not."))
    return Markup("").join(blocks)


def _calibration(results: Mapping[str, Any], plots: bool) -> Markup:
    count = max(len(bins) for bins in results["calibration"].values())
    rows = [
        [name, *[part["accuracy"] for part in bins], *[None] * (count - len(bins))]
        for name, bins in results["calibration"].items()
    ]
    headers = ["scorer", *[f"fifth {i + 1}" for i in range(count)]]
    blocks = [table(headers, rows, caption="Accuracy of pairs by margin, from the least to the most decided.")]
    if plots:
        blocks.append(figure(plot_calibration(results), "Margins that mean something rise to the right."))
    return Markup("").join(blocks)


def _disagreements(
    results: Mapping[str, Any],
    items: Sequence[Item],
    stats: StatsCache,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
) -> Markup | None:
    """What tokens contribute in the pairs that the first scorer gets most wrong."""
    scorer = next(iter(results["metrics"]))
    if items[0].steps is not None:
        return _missed_steps(results, items, stats, tokenizer, vocab_size, scorer)
    form = _shown_form(scorer, vocab_size)
    rows = []
    for item, pair, margin in _worst_pairs(results, items, stats, scorer):
        responses = stats.load(item.key)
        scores = next(e for e in results["examples"] if e["key"] == item.key)["scores"][scorer]
        shortest = min(response.num_tokens for response in responses)
        for which in pair:
            first = which == pair[0]
            note = f"margin {number(margin)}" if first else "preferred, but worse"
            meta = f"{item.group} · {item.id} · {note}"
            row = _heat_map_row(
                responses[which], shortest, form, tokenizer, message_text(item.prompt) if first else "", meta
            )
            if form.name == scorer:
                row = replace(row, total=scores[which])  # the one that judged
            else:
                row = replace(row, meta=f"{meta} · {scorer} {number(scores[which])}")
            rows.append(row)
    if not rows:
        return None
    text = f"The pairs that {scorer} gets most wrong: first the better response, then the one that it prefers."
    return Markup("<p>{} {}</p>").format(text, _what_is_shown(form)) + _heat_maps(rows, form)


def _missed_steps(
    results: Mapping[str, Any],
    items: Sequence[Item],
    stats: StatsCache,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    scorer: str,
) -> Markup | None:
    """What tokens contribute in the solutions in which the first wrong step scores highest above the lowest step."""
    found = []
    for item, example in zip(items, results["examples"], strict=True):
        scores = example["scores"][scorer]
        wrong = item.facts["label"] if "label" in item.facts else min(item.facts["errors"], default=-1)
        if wrong >= 0 and item.key in stats and scores[wrong] > min(scores):
            found.append((scores[wrong] - min(scores), item, wrong, scores.index(min(scores))))
    worst = sorted(found, key=lambda entry: -entry[0])[:NUM_EXAMPLES]
    if not worst:
        return None
    token = _shown_form(scorer, vocab_size).token
    # Summed over a step, Bellman rewards are its log-probability and a difference of soft values.
    form = Form.parse(f"{'log_prob' if token == 'bellman' else token}.sum", vocab_size)
    rows = []
    for _, item, wrong, lowest in worst:
        (response,) = stats.load(item.key)
        meta = (
            f"{item.group} · {item.id} · first wrong step {wrong + 1}, lowest step {lowest + 1} of {item.num_scores}"
        )
        rows.append(_heat_map_row(response, response.num_tokens, form, tokenizer, message_text(item.prompt), meta))
    text = f"Solutions in which {scorer} finds another step worse than the first wrong one."
    return Markup("<p>{} {}</p>").format(text, _what_is_shown(form)) + _heat_maps(rows, form)


def _worst_pairs(
    results: Mapping[str, Any], items: Sequence[Item], stats: StatsCache, scorer: str
) -> list[tuple[Item, tuple[int, int], float]]:
    found = []
    for item, example in zip(items, results["examples"], strict=True):
        scores = example["scores"][scorer]
        if item.better and item.key in stats:
            margin, pair = min((scores[a] - scores[b], (a, b)) for a, b in item.better)
            if margin < 0 and math.isfinite(margin):
                found.append((item, pair, margin))
    return sorted(found, key=lambda entry: entry[2])[:NUM_EXAMPLES]


def _shown_form(scorer: str, vocab_size: int) -> Form:
    """
    The form whose contributions are shown for a scorer: its own, or for one that is no sum over tokens the
    log-probability.
    """
    base = base_name(scorer)
    form = None if needs_model(base) else make_form(base, vocab_size)
    return form if isinstance(form, Form) else Form.parse("log_prob.sum", vocab_size)


def _what_is_shown(form: Form) -> str:
    return f"Colour is what a token contributes to {form.name}, for the first {SHOWN_TOKENS} tokens."


def _heat_maps(rows: Sequence[HeatMapRow], form: Form) -> Markup:
    values = [value for row in rows for value in row.contributions]
    # Never negative, and much alike: what tells is the difference to the mean.
    center = math.fsum(values) / max(1, len(values)) if form.token == "self_certainty" else 0.0
    return heat_maps(rows, f"contribution to {form.name}", form.name, center=center)


def _heat_map_row(
    response: ScoredResponse,
    shortest: int,
    form: Form,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    meta: str,
) -> HeatMapRow:
    stats = response.stats
    contributions = form.contributions(response, shortest)
    tokens = contributions.tokens.tolist()
    count = min(SHOWN_TOKENS, len(tokens))
    text, offsets = decode_with_offsets(tokenizer, stats.token_ids[:count].tolist())
    rest = {
        f"{len(tokens) - count:,} not shown": math.fsum(tokens[count:]),
        "V of the prompt": contributions.prompt,
        "V of the state behind": contributions.cut_off,
    }
    columns = {
        "token reward": form.token_rewards(response),
        "log-prob": stats.log_probs,
        "soft value": stats.soft_values,
        **({} if stats.entropies is None else {"entropy": stats.entropies}),
    }
    return HeatMapRow(
        text=text,
        offsets=offsets,
        contributions=tokens[:count],
        total=contributions.total,
        rest={name: value for name, value in rest.items() if value},
        columns={name: values[:count].tolist() for name, values in columns.items()},
        eos=stats.finished and count == len(tokens),
        prompt=prompt,
        meta=meta,
    )
