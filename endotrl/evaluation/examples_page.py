# SPDX-License-Identifier: Apache-2.0
"""Browser of all examples of a run: filter, sort, and compare two responses, in one self-contained file."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from markupsafe import Markup

from ..data.formats import message_text
from ..grading import accepted_answers
from ..reporting import page, plain, png_address
from ..rewards.scored import thumbnails
from ..runs.jsonl import json_number
from .generation import accuracy_of_choice
from .items import Item
from .questions import Question


LONGEST = 6000  # characters shown per text
WITH_IMAGES = 200  # examples shown with their images; more would make the page too large
_SCRIPT = files(__package__).joinpath("examples.js").read_text(encoding="utf-8")
_CONTROLS = Markup("""<p>{about}</p>
<form class="controls" autocomplete="off">
<label>Scorer <select id="scorer"></select></label>
<label>beside <select id="other"></select></label>
<label>Show <select id="outcome"><option value="all">all<option value="right">right<option value="wrong">wrong
<option value="differ">where the two differ</select></label>
<label>Part <select id="group"></select></label>
<label>Sort by <select id="sort"><option value="worst">margin, most wrong first<option value="best">margin, most right
first<option value="close">margin, closest first<option value="long">length<option value="file">file</select></label>
<label>Search <input id="search" type="search"></label>
</form>
<p class="meta" id="count" role="status"></p><ul class="examples" id="list"></ul>
<button type="button" id="more">Show more</button>
<noscript><p>This page needs JavaScript; <code>results.json</code> has the same examples.</p></noscript>""")


@dataclass(frozen=True)
class Example:
    """An example as displayed: pieces (responses, samples or steps), and each scorer's scores for them."""

    id: str
    group: str
    prompt: str
    pieces: Sequence[tuple[str, str]]  # text and label
    scores: Sequence[Sequence[float]]  # by scorer
    right: Sequence[float | None]
    margin: Sequence[float | None]
    pair: Sequence[tuple[int, int]]
    choice: Sequence[int] | None = None  # each scorer's top piece
    note: str = ""
    images: Sequence[str] = ()  # of the prompt, as URLs


def examples_of(results: Mapping[str, Any], items: Sequence[Item]) -> list[Example]:
    """Examples of a benchmark: right if the better response, or the first wrong step, stands out in every pair."""
    found: list[Example] = []
    for item, example in zip(items, results["examples"], strict=True):
        scores = [example["scores"][name] for name in results["metrics"]]
        if item.steps is None:
            good = {better for better, _ in item.better}
            pieces = [(message_text(r), "better" if i in good else "worse") for i, r in enumerate(item.responses)]
            pairs: Sequence[tuple[int, int]] = item.better
        else:
            wrong = {item.facts["label"]} if "label" in item.facts else set(item.facts["errors"])
            pieces = [(text, "wrong step" if i in wrong else "step") for i, text in enumerate(item.steps)]
            first = min((i for i in wrong if i >= 0), default=None)
            pairs = () if first is None else [(i, first) for i in range(len(item.steps)) if i != first]
        unknown = (None, (0, len(pieces) - 1))
        told = [min(((row[a] - row[b], (a, b)) for a, b in pairs), default=unknown) for row in scores]
        shown = thumbnails(item.prompt, item.images) if item.images and len(found) < WITH_IMAGES else []
        found.append(
            Example(
                item.id,
                item.group,
                message_text(item.prompt),
                pieces,
                scores,
                right=[None if margin is None else float(margin > 0) for margin, _ in told],
                margin=[margin for margin, _ in told],
                pair=[pair for _, pair in told],
                note=f"Criterion: {item.criterion}" if item.criterion else "",
                images=list(map(png_address, shown)),
            )
        )
    return found


def answer_example(
    question: Question, group: str, row: Mapping[str, Any], scores: Mapping[str, Sequence[float]]
) -> Example:
    """Sampled answers to a question, as in `answers.jsonl`, with the scores by which scorers choose."""
    right = [float(r) for r in row["right"]]
    labels = [
        ("right" if r else "wrong") + ("" if finished else ", cut off")
        for r, finished in zip(right, row["finished"], strict=True)
    ]
    told = [_best_of_both(values, right) for values in scores.values()]
    mean = sum(right) / len(right)
    return Example(
        question.id,
        group,
        message_text(question.prompt),
        list(zip(row["texts"], labels, strict=True)),
        list(scores.values()) or [right],
        [accuracy_of_choice(values, right) for values in scores.values()] or [mean],
        [margin for margin, _ in told] or [mean],
        [pair for _, pair in told] or [_best_of_both(right, right)[1]],
        [list(values).index(max(values)) for values in scores.values()] or None,
        f"Right answer: {' or '.join(accepted_answers(question.answer))}",
    )


def _best_of_both(scores: Sequence[float], right: Sequence[float]) -> tuple[float | None, tuple[int, int]]:
    """Margin of the best right sample over the best wrong one in score, and the indices of these two."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    good, bad = ([i for i in order if (right[i] > 0) is kind] for kind in (True, False))
    if good and bad:
        return scores[good[0]] - scores[bad[0]], (good[0], bad[0])
    return None, (order[0], order[min(1, len(order) - 1)])


def examples_page(title: str, scorers: Sequence[str], examples: Sequence[Example], about: str) -> str:
    """The HTML page; text of models is escaped, so that it cannot run anything."""
    data = {
        "scorers": [plain(name) for name in scorers],
        "groups": list(dict.fromkeys(plain(example.group) for example in examples)),
        "examples": [
            {
                **vars(example),
                **{name: plain(getattr(example, name)) for name in ("id", "group", "note")},
                "prompt": _shown(example.prompt),
                "pieces": [{"text": _shown(text), "label": plain(label)} for text, label in example.pieces],
                "scores": [[json_number(score, 6) for score in row] for row in example.scores],
                "margin": [json_number(margin, 6) for margin in example.margin],
            }
            for example in examples
        ],
    }
    return page(title, [("", _CONTROLS.format(about=about))], script=_SCRIPT, data=data)


def _shown(text: str) -> str:
    rest = len(text) - LONGEST
    return plain(text if rest <= 0 else f"{text[:LONGEST]} … ({rest:,} more characters)")
