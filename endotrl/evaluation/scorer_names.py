# SPDX-License-Identifier: Apache-2.0
"""Scorer names: parsing and construction."""

from collections.abc import Sequence
from typing import Any

from ..rewards.residuals import split_name
from .engine import Engine, ModelScorer
from .forms import ALIASES, RELATIVE_PERPLEXITY, STEP_AGGREGATES, Control, Form, RelativePerplexity
from .items import CONTROLS
from .judges import JUDGES, Judge
from .reward_model import reward_model_class


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
# Words that stand for several scorers.
SETS = {"single-pass": SINGLE_PASS, "two-pass": TWO_PASS, "judges": JUDGES, "controls": ("length", "random")}
STEP_SETS = {
    "single-pass": STEP_PASS,
    "two-pass": ("gain.sum", "gain.mean", "relative_perplexity"),
    "controls": ("length", "position", "random"),
}
DEFAULT = ("single-pass", "controls")
REWARD_MODEL = "reward_model:"


Scorer = Form | RelativePerplexity | Control | ModelScorer  # gives a number to each response of an item, or each step


def expand_names(names: Sequence[str], steps: bool) -> list[str]:
    """Names of scorers, the words that stand for several replaced, each name once."""
    sets = STEP_SETS if steps else SETS
    result = list(dict.fromkeys(name for word in names for name in sets.get(word, (word,))))
    for name in result if steps else ():
        aggregate = ALIASES.get(name, name).partition(".")[2].partition("=")[0]
        whole_only = base_name(name) != name or needs_model(name)
        if whole_only or not (aggregate in STEP_AGGREGATES or name in (*CONTROLS, RELATIVE_PERPLEXITY)):
            raise ValueError(
                f"{name!r} does not score steps. Forms that do are TOKEN.AGGREGATE with one of "
                f"{', '.join(STEP_AGGREGATES)}; also {', '.join([*ALIASES, RELATIVE_PERPLEXITY, *CONTROLS])}."
            )
    return result


def base_name(name: str) -> str:
    """The scorer itself, or the one whose residual it is."""
    return split_name(name)[1]


def base_names(names: Sequence[str]) -> list[str]:
    """The scorers that must score: those named, and those whose residuals are."""
    return list(dict.fromkeys(base_name(name) for name in names))


def make_form(name: str) -> Form | RelativePerplexity | Control:
    """A scorer that needs token statistics only."""
    if name in CONTROLS:
        return Control(name)
    if name == RELATIVE_PERPLEXITY:
        return RelativePerplexity()
    return Form.parse(name)


def needs_model(name: str) -> bool:
    """Whether a scorer runs a model by itself, and cannot be made from token statistics."""
    return name in JUDGES or name.startswith(REWARD_MODEL)


def check_name(name: str, trust_remote_code: bool = False) -> None:
    """Raises what [`make_scorer`] would raise for a name, before any weights are loaded."""
    if name.startswith(REWARD_MODEL):
        reward_model_class(name.removeprefix(REWARD_MODEL), trust_remote_code)
    elif not needs_model(name):
        make_form(name)


def served_names(names: Sequence[str], given: bool, steps: bool) -> list[str]:
    """
    The scorers that a model on a server can have, which gives log-probabilities only. If the user has named others
    (`given`), `ValueError`; otherwise they are left out.
    """
    forms = {name: None if needs_model(base_name(name)) else make_form(base_name(name)) for name in names}
    reasons = {name: form.needs_logits(steps) if isinstance(form, Form) else None for name, form in forms.items()}
    for name, reason in reasons.items() if given else ():
        if reason is not None:
            raise ValueError(f"{name!r} cannot be had from a server, which gives log-probabilities only: {reason}.")
    return [name for name, reason in reasons.items() if reason is None]


def make_scorer(name: str, engine: Engine, **loading: Any) -> Scorer:
    """A scorer of any kind. `loading`, `dtype`, `device` and `trust_remote_code`, is of an explicit reward model."""
    if name in JUDGES:
        return Judge(name, engine)
    if name.startswith(REWARD_MODEL):
        path = name.removeprefix(REWARD_MODEL)
        return reward_model_class(path, loading.get("trust_remote_code", False))(path, engine, **loading)
    return make_form(name)
