# SPDX-License-Identifier: Apache-2.0
"""Verdict of a forecast in plain words, and suggested beta."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.intervals import MIN_CLUSTERS, Estimate, is_noise
from ..reporting import counted
from .policies import Objective
from .summary import MIN_ESS, Summary


Row = Mapping[str, Any]  # per beta
CLOSE = 0.01  # negligible difference in accuracy or agreement


def suggested_beta(summary: Summary) -> float | None:
    """
    Returns the largest beta whose accuracy (without labels, agreement with the majority answer) is within a point of
    the best among the betas with enough samples. `None` if none is better than sampling.
    """
    metric = "accuracy" if summary.has_labels else "agreement"
    rows = _vouched(summary)
    best = max(rows, key=lambda row: row[metric], default=None)
    if best is None or not _is_more(summary.gain(f"beta={best['beta']:g}", metric)):
        return None
    return max(row["beta"] for row in rows if row[metric] >= best[metric] - CLOSE)


def verdict(summary: Summary, objective: Objective, num_questions: int) -> str:
    """The verdict, most important first."""
    words = []
    if num_questions < MIN_CLUSTERS:
        words.append(f"With only {counted(num_questions, 'question')}, this holds for these questions alone.")
    if summary.has_labels and not any(found["accuracy"].value for found in summary.estimates.values()):
        # More often a wrong setting than a weak model
        words.append("No sample is right: compare the completions with the answers. Does the grader expect this form?")
    if rows := _vouched(summary):
        words += _labelled(summary, rows) if summary.has_labels else _unlabelled(summary, rows)
        words += _side_effects(summary, rows[-1])
    elif summary.slope is not None and is_noise(summary.slope):
        words.append("Whether training first improves the answers cannot be told from noise.")
    elif summary.slope is not None:  # which needs no weights
        effect, more = ("improves the", "more") if summary.slope.value > 0 else ("worsens the", "less")
        words.append(f"Training first {effect} answers: right answers are {more} probable than wrong ones.")
    few = f"fewer than {MIN_ESS:g} effective samples for half of the questions"
    if not rows:
        words.append(f"There are too few samples at every beta ({few}): use more samples or larger betas.")
    elif len(rows) < len(summary.betas):
        weak = max(row["beta"] for row in summary.betas if row["ess"] < MIN_ESS)
        words.append(
            f"At beta {weak:g} and below, there are too few samples ({few}): there, the forecast is the sample with "
            "the highest reward."
        )
    if not summary.has_labels:
        words.append("The questions have no answers, so there is no forecast of accuracy.")
    if objective.has_groups and objective.scale_rewards != "none":
        taken = ", assumed to equal that of the token credit" if objective.trainer == "dense_grpo" else ""
        scale = f'With scale_rewards="{objective.scale_rewards}", rewards are divided by their spread{taken}'
        words.append(f"({scale}, so that beta acts as beta times this spread.)")
    return " ".join(words)


def _vouched(summary: Summary) -> list[Row]:
    return [row for row in summary.betas if row["ess"] >= MIN_ESS]


def _is_more(difference: Estimate) -> bool:
    """Whether a difference is beyond noise and not negligible."""
    return difference.low > 0 and difference.value >= CLOSE


def _is_less(difference: Estimate) -> bool:
    return difference.high < 0 and difference.value <= -CLOSE


def _labelled(summary: Summary, rows: Sequence[Row]) -> list[str]:
    free = {name: summary.estimates[name]["accuracy"].value for name in summary.alternatives}
    majority = f"a majority vote of {summary.num_votes} samples gives {free['majority']:.0%}"
    now, best, last = free["sampled"], max(rows, key=lambda row: row["accuracy"]), rows[-1]
    if _is_more(summary.gain(f"beta={best['beta']:g}")):
        beta = suggested_beta(summary)
        chosen = next(row for row in rows if row["beta"] == beta)
        words = [f"Sharpening helps: {_change(now, chosen, 'accuracy')} at beta {beta:g}."]
        if _is_less(summary.gain(f"beta={last['beta']:g}", over=f"beta={beta:g}")):
            words.append(f"A smaller beta is worse again: {last['accuracy']:.0%} at {last['beta']:g}.")
        if free["greedy"] >= chosen["accuracy"] - CLOSE:
            rivals = (
                f"Greedy decoding already gives {free['greedy']:.0%}: prefer temperature 0 unless you need diverse "
                f"samples ({majority})."
            )
        else:
            rivals = (
                f"Without training, greedy decoding gives {free['greedy']:.0%}, T = 0.5 gives "
                f"{free['temperature=0.5']:.0%}, and {majority} at {summary.num_votes} times the cost."
            )
        return [*words, rivals]
    if not _is_less(summary.gain(f"beta={last['beta']:g}")):
        return [
            f"No change beyond noise: {_change(now, best, 'accuracy')} at beta {best['beta']:g}, the best of "
            f"{rows[0]['beta']:g} to {last['beta']:g}."
        ]
    words = [f"Training would hurt: {_change(now, last, 'accuracy')} at beta {last['beta']:g}."]
    if (summary.wrong_more_probable or 0.0) > 0.5:  # at first: a small beta may end differently
        words.append(
            f"Wrong answers are more probable in {summary.wrong_more_probable:.0%} of the "
            f"{counted(summary.num_mixed, 'question')} with both right and wrong answers."
        )
    greedy = summary.gain("greedy")
    better = "" if is_noise(greedy) or greedy.value > 0 else ", which is no better"
    return [*words, f"Greedy decoding gives {free['greedy']:.0%}{better}; {majority}."]


def _unlabelled(summary: Summary, rows: Sequence[Row]) -> list[str]:
    now = summary.estimates["sampled"]["agreement"].value
    best, last = max(rows, key=lambda row: row["agreement"]), rows[-1]
    change = _change(now, best, "agreement")
    if _is_more(summary.gain(f"beta={best['beta']:g}", "agreement")):
        return [
            f"Answers become more alike: {change} agree with the majority answer at beta {best['beta']:g}.",
            "That helps where the majority is right and hurts where it is wrong. Samples without labels cannot tell "
            "which; 50 labelled questions can.",
        ]
    if _is_less(summary.gain(f"beta={last['beta']:g}", "agreement")):
        change = _change(now, last, "agreement")
        return [
            f"Answers move away from the majority answer: {change} agree with it at beta {last['beta']:g}. The most "
            "probable text is not the answer of most samples: do not train without labels."
        ]
    return [f"Answers hardly change: {change} agree with the majority answer at beta {best['beta']:g}."]


def _side_effects(summary: Summary, row: Row) -> list[str]:
    words, now = [], {name: value.value for name, value in summary.estimates["sampled"].items()}
    if not 2 / 3 <= row["length"] / now["length"] <= 1.5:
        words.append(
            f"Completions become {'shorter' if row['length'] < now['length'] else 'longer'}: {now['length']:.0f} -> "
            f"{row['length']:.0f} tokens at beta {row['beta']:g}."
        )
    if now["truncated"] > 0.05:
        words.append(
            f"{now['truncated']:.0%} of the samples are truncated: raise the maximum number of new tokens, or the "
            "forecast describes truncated completions."
        )
    return words


def _change(now: float, row: Row, metric: str) -> str:
    low, high = row[f"{metric}_interval"]
    return f"{now:.0%} -> {row[metric]:.0%} ({100 * low:.0f} to {100 * high:.0f})"
