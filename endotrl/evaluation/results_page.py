# SPDX-License-Identifier: Apache-2.0
"""HTML report of a run: tables, plots, and token heat maps of the reward's worst errors."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from ..data.formats import message_text
from ..rendering.offsets import decode_with_offsets
from ..reporting import HeatMapRow, counted, figure, heat_maps, number, page, paragraph, plain, settings_table, table
from ..reporting.curves import BLUE, GREY
from ..reporting.plots import as_png, label_rows, pyplot
from ..rewards.residuals import split_name
from ..rewards.scored import columns_of, pictures_of
from .benchmarks.dsp import DOMAINS, NONE
from .benchmarks.rm_bench import STYLES
from .engine import ScoredResponse
from .examples_page import Example
from .forms import Form
from .items import Item
from .results import CEILING, RIVALS
from .run_folder import RunFolder
from .scorers import make_form, needs_model
from .tables import best_first, full_rows, how_to_read, value


NUM_EXAMPLES = 4
SHOWN_TOKENS = 160  # per response


def report_page(results: Mapping[str, Any], sections: Sequence[tuple[str, Markup | str]], about: str) -> str:
    """HTML report of a run: verdict, table and plot, differences, further `sections`, settings."""
    found = table(*full_rows(results), caption=how_to_read(results))
    if len(results["metrics"]) > 1 and find_spec("matplotlib"):
        found += figure(plot_metric(results), f"{results['main_metric']}; baselines in grey.")
    if results["statements"]:
        lines = Markup("").join(Markup("<li>{}</li>").format(line) for line in results["statements"])
        folded = Markup("<details><summary>Differences from {}</summary><ul>{}</ul></details>")
        found += folded.format(next(iter(results["metrics"])), lines)
    lead = Markup(
        '<p class="verdict">{}</p><p>{} <a href="examples.html">Browse all examples</a>: filter, sort, compare.</p>'
    ).format(plain(results["verdict"]), plain(about))
    settings = {**results["settings"], "data": results["data"], "items": results["num_items"]}
    names = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    return page(
        f"{results['title']}: {results['model']}",
        [("Results", found), *sections, ("Settings", settings_table(settings))],
        lead=lead,
        footer=f"{names} · {results['updated']} · {results['command']}",
    )


def plot_metric(results: Mapping[str, Any]) -> bytes:
    """Main metric per scorer with its interval, best on top; a dotted line at the best content-free scorer."""
    metric, names = results["main_metric"], best_first(results)
    fig, axis = pyplot().subplots(figsize=(6, 0.9 + 0.28 * len(names)), layout="constrained")
    label_rows(axis, names)
    for y, name in enumerate(names):
        estimate, known = results["metrics"][name][metric], name in (*RIVALS, CEILING)
        color = GREY if known else BLUE
        if estimate["low"] is not None:
            axis.plot([estimate["low"], estimate["high"]], [y, y], color=color, linewidth=2, alpha=0.5)
        axis.plot(estimate["value"], y, "s" if known else "o", color=color, markersize=5)
    rival = next((name for name in names if name in RIVALS), None)
    if rival is not None:
        axis.axvline(value(results, rival, metric), color=GREY, linestyle=":", linewidth=1)
    beside = "" if rival is None else f"; dotted: {rival}"
    axis.set(xlabel=f"{metric}, with 95% interval\nfurther right is better{beside}")
    return as_png(fig)


def benchmark_sections(
    results: Mapping[str, Any],
    items: Sequence[Item],
    examples: Sequence[Example],
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
) -> list[tuple[str, Markup | str]]:
    """Sections of a benchmark: its own tables, length, calibration, and tokens of the first scorer's worst errors."""
    sections = {
        "Substance and style": _rm_bench(results) if results["benchmark"] == "rm-bench" else "",
        "Criterion by domain": _dsp(results) if results["benchmark"] == "dsp" else "",
        "Length": _length(results) if results["length"] else "",
        "Calibration": _calibration(results) if results["length"] else "",
        "Most wrong": _most_wrong(results, items, examples, folder, tokenizer),
    }
    return [(title, section) for title, section in sections.items() if section]


def _matrix(
    results: Mapping[str, Any], scorer: str, corner: str, rows: Sequence[str], columns: Sequence[str], caption: str
) -> Markup:
    cells = [[row, *[value(results, scorer, f"{row} > {column}") for column in columns]] for row in rows]
    return table([corner, *columns], cells, caption=caption)


def _rm_bench(results: Mapping[str, Any]) -> Markup:
    about = (
        "Easy: the better response has the fancier style; hard: the plainer one. A reward for substance alone is "
        "right equally often on both."
    )
    first = next(iter(results["metrics"]))
    caption = f"Wins of {first} by style of the better (row) and the worse (column) response."
    wins = _matrix(results, first, "better \\ worse", STYLES, STYLES, caption)
    return paragraph(about) + wins


def _dsp(results: Mapping[str, Any]) -> Markup:
    caption = "{}: accuracy in each domain (column) under each criterion (row).".format
    return Markup("").join(
        _matrix(results, scorer, "criterion", (NONE, *DOMAINS), DOMAINS, caption(scorer))
        for scorer in best_first(results)[:4]
    )


def _length(results: Mapping[str, Any]) -> Markup:
    keys = ["better_is_longer", "similar_length", "better_is_shorter", "length_controlled", "bias"]
    rows = [[name, *[split[key] for key in keys]] for name, split in _ordered(results, "length")]
    counts = next(iter(results["length"].values()))
    longer = counted(counts["num_better_is_longer"], "pair")
    caption = (
        f"Accuracy where the better response is longer ({longer}), of similar length "
        f"({counts['num_similar_length']}, within a factor of 1.2) and shorter ({counts['num_better_is_shorter']}). "
        "Bias is the first minus the third; length-controlled is their mean, 0.5 for length alone."
    )
    return table(["scorer", *[key.replace("_", " ") for key in keys]], rows, caption=caption)


def _calibration(results: Mapping[str, Any]) -> Markup:
    count = max(len(bins) for bins in results["calibration"].values())
    rows = [
        [name, *[part["accuracy"] for part in bins], *[None] * (count - len(bins))]
        for name, bins in _ordered(results, "calibration")
    ]
    headers = ["scorer", *[f"fifth {i + 1}" for i in range(count)]]
    return table(headers, rows, caption="Accuracy of pairs by increasing margin.")


def _ordered(results: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    return [(name, results[key][name]) for name in best_first(results) if name in results[key]]


def _most_wrong(
    results: Mapping[str, Any],
    items: Sequence[Item],
    examples: Sequence[Example],
    folder: RunFolder,
    tokenizer: PreTrainedTokenizerBase,
) -> Markup:
    """Token contributions in the first scorer's worst errors: pairs, or solutions with a wrong step."""
    scorer, steps = next(iter(results["metrics"])), items[0].steps is not None
    margins = [(example.margin[0], i) for i, example in enumerate(examples)]
    found = [(margin, i) for margin, i in margins if margin is not None and -math.inf < margin < 0]
    form = _shown_form(scorer, steps)
    rows: list[HeatMapRow] = []
    for margin, i in sorted(found)[:NUM_EXAMPLES]:
        item, (one, other) = items[i], examples[i].pair[0]
        responses, prompt, place = folder.load_stats(item.key), message_text(item.prompt), f"{item.group} · {item.id}"
        if responses is None:  # scored by an earlier version
            continue
        if steps:
            meta = f"{place} · first wrong step {other + 1}, lowest step {one + 1} of {item.num_scores}"
            rows.append(_heat_map_row(responses[0], form, tokenizer, prompt=prompt, meta=meta))
            continue
        above: dict[str, Any] = {"prompt": prompt, "details": pictures_of(item.prompt, item.images)}
        for which, shown, note in ((one, above, f"margin {number(margin)}"), (other, {}, "preferred, but worse")):
            score, meta = examples[i].scores[0][which], f"{place} · {note}"
            if form.name == scorer:
                shown = {**shown, "meta": meta, "total": score}  # the deciding one
            else:
                shown = {**shown, "meta": f"{meta} · {scorer} {number(score)}"}
            rows.append(_heat_map_row(responses[which], form, tokenizer, **shown))
    if not rows:
        return Markup("")
    what = f"Pairs that {scorer} gets most wrong: the better response, then the one that it prefers."
    if steps:
        what = f"Solutions in which {scorer} scores another step below the first wrong one."
    values = [value for row in rows for value in row.contributions]
    # Never negative, and much alike: the difference to the mean is informative.
    center = math.fsum(values) / max(1, len(values)) if form.token == "self_certainty" else 0.0
    return Markup("<p>{} Colours show token contributions to {}, for the first {} tokens.</p>{}").format(
        what, form.name, SHOWN_TOKENS, heat_maps(rows, f"contribution to {form.name}", form.name, center=center)
    )


def _shown_form(scorer: str, steps: bool) -> Form:
    """
    The form whose contributions are shown for a scorer: its own, or the log-probability if it is not a sum over
    tokens. For steps, the sum: that of Bellman rewards is the log-probability plus a difference of V.
    """
    _, base = split_name(scorer)
    form = None if needs_model(base) else make_form(base)
    if not isinstance(form, Form):
        return Form.parse("log_prob.sum")
    return Form.parse(f"{'log_prob' if form.token == 'bellman' else form.token}.sum") if steps else form


def _heat_map_row(
    response: ScoredResponse, form: Form, tokenizer: PreTrainedTokenizerBase, **shown: Any
) -> HeatMapRow:
    stats = response.stats
    contributions = form.contributions(response)
    tokens = contributions.tokens.tolist()
    count = min(SHOWN_TOKENS, len(tokens))
    text, offsets = decode_with_offsets(tokenizer, stats.token_ids[:count].tolist())
    rest = {
        f"{len(tokens) - count:,} not shown": math.fsum(tokens[count:]),
        "V of the prompt": contributions.prompt,
        "V of the state where it was cut off": contributions.cut_off,
    }
    columns = columns_of(stats, form.token_rewards(response))
    return HeatMapRow(
        text=text,
        offsets=offsets,
        contributions=tokens[:count],
        rest={name: value for name, value in rest.items() if value},
        columns={name: values[:count].tolist() for name, values in columns.items()},
        eos=stats.finished and count == len(tokens),
        **{"total": contributions.total, **shown},
    )
