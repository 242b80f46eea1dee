# SPDX-License-Identifier: Apache-2.0
"""Report of a forecast: verdict, plot over beta, tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ..reporting import figure, interval_text, page, plain, settings_table, table
from ..reporting.curves import BLUE, COLORS, GREY
from ..reporting.plots import as_png, pyplot
from .summary import METRICS, MIN_ESS


if TYPE_CHECKING:
    from .forecast import Forecast

NAMES = {
    "sampled": "sampled, T = 1",
    "greedy": "greedy",
    "temperature=0.5": "sampled, T = 0.5",
    "majority": "majority of {n}",
    "best_of_n": "best of {n} by the reward",
    "best_of_n_length": "longest of {n}",
    "power_sampling": "power sampling",
}
PAPERS = Markup(
    'Theory: <a href="https://huggingface.co/papers/2605.04542">Tomihari and Sato, 2026</a>. '
    'Baseline without training: <a href="https://huggingface.co/papers/2601.21590">power sampling</a>.'
)


def name_of(forecast: "Forecast", alternative: str) -> str:
    """Display name of an alternative."""
    return NAMES[alternative].format(n=forecast.details["votes"])


def alternative_rows(forecast: "Forecast") -> list[list[Any]]:
    """Cells per alternative: name, and the metrics available for it."""
    return [
        [name_of(forecast, key), *(found.get(metric, {}).get("value") for metric in METRICS)]
        for key, found in forecast.details["alternative_details"].items()
    ]


def body(forecast: "Forecast") -> Markup:
    """Verdict, plot and tables as one block, for a notebook."""
    verdict = Markup("<p><b>{}</b></p>").format(forecast.verdict)
    return Markup("").join([verdict, *(block for _, block in _sections(forecast))])


def report(forecast: "Forecast", title: str, settings: Mapping[str, Any], footer: str) -> str:
    """The HTML page."""
    sections = [*_sections(forecast), ("Settings", settings_table(settings))]
    lead = Markup('<p class="verdict">{}</p>').format(plain(forecast.verdict))
    return page(title, sections, lead=lead, footer=Markup("{} · {}").format(PAPERS, footer))


def plot(forecast: "Forecast") -> bytes:
    """Plot of accuracy (without labels, agreement with the majority answer) over beta, alternatives as lines."""
    metric = "agreement" if forecast.alternatives["sampled"] is None else "accuracy"
    fig, axis = pyplot().subplots(figsize=(5.6, 4.4), layout="constrained")
    rows = forecast.betas
    betas = [row["beta"] for row in rows]
    low, high = ([row[f"{metric}_interval"][side] for row in rows] for side in (0, 1))
    axis.fill_between(betas, low, high, color=BLUE, alpha=0.15, linewidth=0)
    axis.plot(betas, [row[metric] for row in rows], color=BLUE, label="after training")
    for enough, style in ((True, {"color": BLUE}), (False, {"markerfacecolor": "white", "markeredgecolor": BLUE})):
        some = [row for row in rows if (row["ess"] >= MIN_ESS) is enough]
        label = None if enough or not some else "too few samples"
        axis.plot([r["beta"] for r in some], [r[metric] for r in some], "o", markersize=5, **style, label=label)
    colors = [GREY, *COLORS[1:], "#000000"]
    for color, (key, found) in zip(colors, forecast.details["alternative_details"].items(), strict=False):
        if metric in found:
            label = name_of(forecast, key)
            axis.axhline(found[metric]["value"], color=color, linestyle="--", linewidth=1.2, label=label)
    axis.set(
        xscale="log",
        xlabel="beta (smaller: sharper)",
        ylim=(-0.02, 1.02),
        ylabel=metric if metric == "accuracy" else "agreement with the majority answer",
    )
    axis.set_xticks(betas, [f"{beta:g}" for beta in betas])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.grid(alpha=0.3)
    fig.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=2)
    return as_png(fig)


def _sections(forecast: "Forecast") -> list[tuple[str, Markup]]:
    caption = (
        "Length in tokens; truncated: fraction of completions cut off at the length limit; distinct: number of "
        "different answers in a group; agreement with the frozen model's majority answer; KL to the frozen model in "
        "nats per completion; reward: mean, as trainers log it; effective samples: median over questions. With fewer "
        f"than {MIN_ESS:g}, the row is the sample with the highest reward."
    )
    rows, intervals = [], []
    for row in forecast.betas:
        rows.append([f"{row['beta']:g}", *(row[metric] for metric in METRICS), row["ess"]])
        cells = [interval_text(*(row[f"{metric}_interval"] or (None, None))) for metric in METRICS]
        intervals.append([f"{row['beta']:g}", *cells])
    return [
        ("Forecast", figure(plot(forecast), alt="Forecast over beta, with alternatives that need no training")),
        ("After training", table(["beta", *METRICS, "effective samples"], rows, caption)),
        ("95% intervals over questions", table(["beta", *METRICS], intervals)),
        ("Without training", table(["", *METRICS], alternative_rows(forecast))),
    ]
