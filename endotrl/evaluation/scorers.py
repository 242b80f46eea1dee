# SPDX-License-Identifier: Apache-2.0
"""Scorer names: parsing and construction; resumable scoring of items, block by block."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ..rewards.residuals import split_name
from .engine import Engine
from .forms import ALIASES, RELATIVE_PERPLEXITY, STEP_AGGREGATES, Control, Form, RelativePerplexity, token_counts
from .items import CONTROLS, Item
from .model_scorers import JUDGES, REWARD_MODEL, Judge, ModelScorer, reward_model_class
from .run_folder import RunFolder, in_blocks


SINGLE_PASS = (
    *("bellman.sum", "bellman.mean"),
    *(f"{token}.discounted={discount}" for token in ("bellman", "log_prob") for discount in (0.93, 0.95, 0.97)),
    *("log_prob.power=0.5", "centered.sum", "centered.mean", "centered.discounted=0.95"),
    *("self_certainty", "negative_entropy", "residual:bellman.sum"),
    *(
        f"{residual}:{form}"
        for residual in ("residual", "style_residual")
        for form in ("bellman.discounted=0.93", "bellman.discounted=0.95", "log_prob.discounted=0.95")
    ),
)
STEP_PASS = (
    *("bellman.sum", "bellman.mean", "log_prob.sum", "log_prob.mean", "log_prob.min", "centered.sum", "centered.mean"),
    *("self_certainty", "negative_entropy"),
)
TWO_PASS = ("gain.sum", "gain.mean", "gain.discounted=0.95", "relative_perplexity")
# Names of sets of scorers.
SETS = {"single-pass": SINGLE_PASS, "two-pass": TWO_PASS, "judges": JUDGES, "controls": ("length", "random")}
STEP_SETS = {
    "single-pass": STEP_PASS,
    "two-pass": ("gain.sum", "gain.mean", "relative_perplexity"),
    "controls": ("length", "position", "random"),
}
DEFAULT = ("single-pass", "controls")
BLOCK_SIZE = 32  # items scored and saved together


Scorer = Form | RelativePerplexity | Control | ModelScorer  # scores each response of an item, or each step


def expand_names(names: Sequence[str], steps: bool) -> list[str]:
    """Expands names of scorer sets, without duplicates. Raises `ValueError` for scorers that cannot score `steps`."""
    sets = STEP_SETS if steps else SETS
    result = list(dict.fromkeys(name for word in names for name in sets.get(word, (word,))))
    for name in result if steps else ():
        _, _, aggregate = ALIASES.get(name, name).partition(".")
        scores_steps = aggregate.partition("=")[0] in STEP_AGGREGATES or name in (*CONTROLS, RELATIVE_PERPLEXITY)
        if not scores_steps or split_name(name)[0] or needs_model(name):
            raise ValueError(
                f"{name!r} cannot score steps. Use TOKEN.AGGREGATE, where AGGREGATE is one of "
                f"{', '.join(STEP_AGGREGATES)}; or {', '.join([*ALIASES, RELATIVE_PERPLEXITY, *CONTROLS])}."
            )
    return result


def base_names(names: Sequence[str]) -> list[str]:
    """Names of the scorers to run: those given, and those whose residuals are."""
    return list(dict.fromkeys(split_name(name)[1] for name in names))


def needs_model(name: str) -> bool:
    """Whether a scorer has a forward pass of its own, rather than using token statistics."""
    return name in JUDGES or name.startswith(REWARD_MODEL)


def make_form(name: str) -> Form | RelativePerplexity | Control:
    """Returns a scorer that needs token statistics only."""
    if name in CONTROLS:
        return Control(name)
    return RelativePerplexity() if name == RELATIVE_PERPLEXITY else Form.parse(name)


def make_scorer(name: str, engine: Engine, **loading: Any) -> Scorer:
    """Returns a scorer of any kind. `loading` (`dtype`, `device`, `trust_remote_code`): for explicit reward models."""
    if name in JUDGES:
        return Judge(name, engine)
    if name.startswith(REWARD_MODEL):
        path = name.removeprefix(REWARD_MODEL)
        return reward_model_class(path, loading.get("trust_remote_code", False))(path, engine, **loading)
    return make_form(name)


def check_names(names: Sequence[str], trust_remote_code: bool = False) -> None:
    """Raises the errors of [`make_scorer`] for these names, before any weights are loaded."""
    for name in base_names(names):
        if name.startswith(REWARD_MODEL):
            reward_model_class(name.removeprefix(REWARD_MODEL), trust_remote_code)
        elif name not in JUDGES:
            make_form(name)


def served_names(names: Sequence[str], given: bool, steps: bool) -> list[str]:
    """
    The scorers that need only log-probabilities, which is all that a server returns. Others raise `ValueError` if the
    user named them (`given`), and are left out otherwise.
    """
    kept = []
    for name in names:
        base = split_name(name)[1]
        form = None if needs_model(base) else make_form(base)
        reason = form.needs_logits(steps) if isinstance(form, Form) else None
        if given and reason:
            raise ValueError(f"{name!r} needs a local model, as a server returns only log-probabilities: {reason}.")
        kept += [] if reason else [name]
    return kept


def score_items(
    items: Sequence[Item],
    names: Sequence[str],  # in [`expand_names`]'s form
    folder: RunFolder,
    make_engine: Callable[[], Engine],  # loads the model on first use
    make_scorer: Callable[[str, Engine], Any],  # for scorers with a forward pass of their own
    block_size: int = BLOCK_SIZE,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """
    Scores the items without scores; returns, by item key, `{"tokens", "scores": {scorer: [...]}, "seconds", "cut"}`.
    All forms of the reward share one forward pass over an item, or none if its token statistics are in the folder:
    unless something else needs the model, it is not even loaded. The processes of `accelerate launch` share the items.
    """
    bases = base_names(names)
    forms = {name: make_form(name) for name in bases if not needs_model(name)}
    alone = any(form.needs_alone for form in forms.values())
    records = folder.read_scores()
    known = {item.key: records.get(item.key, {"scores": {}})["scores"] for item in items}
    complete = {key for key, scores in known.items() if scores.keys() >= set(bases)}
    engine = cache(make_engine)
    scorer = cache(lambda name: make_scorer(name, engine()))

    def score(block: list[Item]) -> list[dict[str, Any]]:
        found = ((item.key, folder.load_stats(item.key, alone)) for item in block)
        responses = {key: row for key, row in found if row is not None}
        if missing := [item for item in block if item.key not in responses]:
            fresh = dict(zip([item.key for item in missing], engine().score(missing, alone=alone), strict=True))
            folder.save_stats(fresh)
            responses |= fresh
        new: dict[str, dict[str, list[float]]] = {item.key: {} for item in block}
        for name in bases:
            wanted = [item for item in block if name not in known[item.key]]
            if name in forms:
                rows = [forms[name].score(item, responses[item.key]) for item in wanted]
            else:
                rows = scorer(name).score_items(wanted, progress) if wanted else []
            for item, row in zip(wanted, rows, strict=True):
                new[item.key][name] = row
        return [
            {
                "key": item.key,
                "id": item.id,
                "tokens": token_counts(item, responses[item.key]),
                "cut": sum(response.cut for response in responses[item.key]),
                "scores": new[item.key],
            }
            for item in block
        ]

    path = folder.scores_path
    in_blocks(items, complete, path, score, "Evaluating", progress, block_size, lambda item: len(str(item.responses)))
    return folder.read_scores()
