# SPDX-License-Identifier: Apache-2.0
"""The page of a run: tables, plots, and the tokens of what the reward got most wrong."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from markupsafe import Markup
from transformers import PreTrainedTokenizerBase

from .. import __version__
from ..reporting import ColorScale, figure, legend, number, page, table, token_heat_map
from ..score_file import message_text
from ..scoring.offsets import decode_with_offsets
from .benchmarks import BENCHMARKS
from .engine import ScoredResponse
from .forms import Form, token_values
from .items import Item
from .plots import plot_calibration, plot_length, plot_levels, plot_metric
from .scorers import base_name, make_form, needs_model
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
    """
    The page of a run.

    Args:
        results (`dict`):
            As in `results.json`.
        items (`Sequence[Item]`):
            The items.
        stats ([`StatsCache`]):
            Token statistics; items that are not there are not shown.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer of the model.
        vocab_size (`int`):
            Size of the model's vocabulary.
    """
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
            "<p>Easy: the better response is in the fancier style; hard: in the plainer one. A reward that looks at substance "
            "has them equal.</p>"
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
        f"({counts['num_similar_length']}, within a factor of 1.2) and shorter ({counts['num_better_is_shorter']}). Bias is the "
        "first minus the third, length-controlled their mean: length alone gets 0.5."
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
    """Token rewards of the pairs that the first scorer gets most wrong."""
    scorer = next(iter(results["metrics"]))
    token = "log_prob"
    base = base_name(scorer)
    if not needs_model(base):
        form = make_form(base, vocab_size)
        token = form.token if isinstance(form, Form) and form.token != "bellman" else "log_prob"
    if items[0].steps is not None:
        return _missed_steps(results, items, stats, tokenizer, vocab_size, scorer, token)
    worst = _worst_pairs(results, items, stats, scorer)
    if not worst:
        return None
    responses = [(item, which, stats.load(item.key)[which], margin) for item, pair, margin in worst for which in pair]
    values = [token_values(response, token, vocab_size)[:SHOWN_TOKENS].tolist() for _, _, response, _ in responses]
    center = sum(map(sum, values)) / max(1, sum(map(len, values))) if token == "self_certainty" else 0.0
    scale = ColorScale.of(values, center=center)
    blocks = [
        Markup("<p>{}</p>").format(
            f"The pairs that {scorer} gets most wrong: first the better response, then the one that it prefers. Colour is the "
            f"token reward {token}, for the first {SHOWN_TOKENS} tokens."
        ),
        legend(scale),
    ]
    for i, (item, which, response, margin) in enumerate(responses):
        first = i % 2 == 0
        example = next(e for e in results["examples"] if e["key"] == item.key)
        score = number(example["scores"][scorer][which])
        note = f"margin {number(margin)}" if first else "preferred, but worse"
        meta = f"{item.group} · {item.id} · score {score} · {response.num_tokens} tokens · {note}"
        prompt = message_text(item.prompt) if first else ""
        blocks.append(_heat_map(response, values[i], tokenizer, scale, prompt, meta))
    return Markup("").join(blocks)


def _missed_steps(
    results: Mapping[str, Any],
    items: Sequence[Item],
    stats: StatsCache,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    scorer: str,
    token: str,
) -> Markup | None:
    """Token rewards of the solutions in which the first wrong step scores highest above the lowest step."""
    found = []
    for item, example in zip(items, results["examples"], strict=True):
        scores = example["scores"][scorer]
        wrong = item.facts["label"] if "label" in item.facts else min(item.facts["errors"], default=-1)
        if wrong >= 0 and item.key in stats and scores[wrong] > min(scores):
            found.append((scores[wrong] - min(scores), item, wrong, scores.index(min(scores))))
    worst = sorted(found, key=lambda entry: -entry[0])[:NUM_EXAMPLES]
    if not worst:
        return None
    responses = [stats.load(item.key)[0] for _, item, _, _ in worst]
    values = [token_values(response, token, vocab_size)[:SHOWN_TOKENS].tolist() for response in responses]
    scale = ColorScale.of(values)
    blocks = [
        Markup("<p>{}</p>").format(
            f"Solutions in which {scorer} finds another step worse than the first wrong one. Colour is the token reward {token}, "
            f"for the first {SHOWN_TOKENS} tokens."
        ),
        legend(scale),
    ]
    for (_, item, wrong, lowest), response, row in zip(worst, responses, values, strict=True):
        meta = (
            f"{item.group} · {item.id} · first wrong step {wrong + 1}, lowest step {lowest + 1} of {item.num_scores}"
        )
        blocks.append(_heat_map(response, row, tokenizer, scale, message_text(item.prompt), meta))
    return Markup("").join(blocks)


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


def _heat_map(
    response: ScoredResponse,
    values: list[float],
    tokenizer: PreTrainedTokenizerBase,
    scale: ColorScale,
    prompt: str,
    meta: str,
) -> Markup:
    token_stats = response.stats
    count = len(values)
    text, offsets = decode_with_offsets(tokenizer, token_stats.token_ids[:count].tolist())
    return token_heat_map(
        text,
        offsets,
        values,
        scale,
        log_probs=token_stats.log_probs[:count].tolist(),
        soft_values=token_stats.soft_values[:count].tolist(),
        entropies=None if token_stats.entropies is None else token_stats.entropies[:count].tolist(),
        eos=token_stats.finished and count == len(token_stats.token_ids),
        prompt=prompt,
        meta=meta,
    )
