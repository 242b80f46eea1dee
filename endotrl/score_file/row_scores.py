# SPDX-License-Identifier: Apache-2.0
"""The scores of a block of rows, and the lines that the output gets for them."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from jinja2 import TemplateError

from ..data.formats import about_this_row, images_of
from ..rendering.messages import TEMPLATE_COLUMNS
from .rows import Row


if TYPE_CHECKING:
    from ..rewards.endogenous import EndogenousReward
    from ..rewards.sentence import SentenceReward, SentenceScores
    from ..scoring.token_stats import TokenStats


Reward: TypeAlias = "EndogenousReward | SentenceReward"
Result: TypeAlias = "TokenStats | SentenceScores | str"  # of a row, or the reason why it has none
DECIMALS = 6  # of rewards in the output, in nats: float32 has no more to give


def score_rows(reward: Reward, rows: Sequence[Row]) -> list[Result]:
    """What the model says of each row, or the reason why it says nothing."""
    results: list[Result] = [row.error or _missing_domain(reward, row) or "" for row in rows]
    # A file may mix text and messages, and rows with and without token ids; a call may not.
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, row in enumerate(rows):
        if not results[i]:
            kinds.setdefault((isinstance(row.prompt, str), row.completion_ids is None), []).append(i)
    for indices in kinds.values():
        for i, result in zip(indices, _score_kind(reward, [rows[i] for i in indices]), strict=True):
            results[i] = result
    return results


def _criteria(reward: Reward) -> Mapping[str, str] | None:
    """Criteria by domain, if the reward has them."""
    from ..rewards.endogenous import EndogenousReward

    criterion = reward.criterion if isinstance(reward, EndogenousReward) else None
    return criterion if isinstance(criterion, Mapping) else None


def _missing_domain(reward: Reward, row: Row) -> str | None:
    criteria = _criteria(reward)
    if criteria is None or row.extra.get("domain") is not None:
        return None
    state = "null" if "domain" in row.extra else "missing"
    return f'The key "domain" is {state}, which selects the criterion. There is one for {sorted(criteria)}.'


def _score_kind(reward: Reward, rows: list[Row]) -> list[Result]:
    # Without a token there is no text either, whatever the row says: a mismatch would have the text encoded instead.
    completions = ["" if row.completion_ids == [] else row.completion for row in rows]
    ids = [row.completion_ids for row in rows if row.completion_ids is not None] or None
    try:
        columns: dict[str, Any] = {"images": [images_of(row.extra) for row in rows]}
        columns |= {name: [row.extra.get(name) for row in rows] for name in TEMPLATE_COLUMNS}
        columns = {name: column for name, column in columns.items() if any(column)}
        if _criteria(reward) is not None:
            columns["domain"] = [str(row.extra["domain"]) for row in rows]
        return list(reward.score([row.prompt for row in rows], completions, completion_ids=ids, **columns))
    except (ValueError, TypeError, TemplateError) as error:
        if len(rows) == 1:
            return [about_this_row(str(error))]
    # A bad row fails its whole batch: halve the batch until the row is alone.
    middle = len(rows) // 2
    return _score_kind(reward, rows[:middle]) + _score_kind(reward, rows[middle:])


def output_record(reward: Reward, row: Row, stats: Result, tokens: bool) -> dict[str, Any]:
    """Output line of a row."""
    from ..rewards.endogenous import EndogenousReward
    from ..scoring.token_stats import TokenStats

    if isinstance(stats, str):
        return {**row.head, "reward": None, "error": stats}
    if not isinstance(stats, TokenStats):
        return _sentence_record(row, stats, tokens)
    assert isinstance(reward, EndogenousReward)
    num_tokens = len(stats.token_ids)
    token_rewards = reward.rule.token_rewards(stats).tolist()
    outcome = _finite(reward.aggregate_from(stats))
    record = {**row.head, "reward": outcome}
    if outcome is None:
        empty = "no scored token (the completion_ids are empty)" if row.completion_ids == [] else "no scored token"
        record["reason"] = empty if num_tokens == 0 else "no end-of-sequence token"
    record["num_tokens"] = num_tokens
    record["finished"] = stats.finished
    if num_tokens:
        # As `aggregate="mean"`, whatever the aggregate is: without V(s_1), a constant of the prompt.
        initial_value = stats.soft_values[0].item() if reward.token_reward == "bellman" else 0.0
        record["reward_per_token"] = _finite((math.fsum(token_rewards) - initial_value) / num_tokens)
        if stats.entropies is not None:
            record["entropy"] = _finite(stats.entropies.mean().item())
    if tokens:
        record["tokens"] = stats.tokens
        # What the reward can be computed from again.
        if stats.has_logits:
            record["token_rewards"] = _rounded(token_rewards)
            record["chosen_logits"] = _rounded(stats.chosen_logits.tolist())
            record["soft_values"] = _rounded(stats.soft_values.tolist())
        else:  # without the soft values, Bellman rewards of tokens are these
            record["log_probs"] = _rounded(stats.log_probs.tolist())
        if reward.rule.needs_entropy and stats.entropies is not None:
            record["entropies"] = _rounded(stats.entropies.tolist())
        if reward.rule.needs_mean_logits and stats.mean_logits is not None:
            record["mean_logits"] = _rounded(stats.mean_logits.tolist())
        contributions = reward.rule.contributions(stats)
        if contributions is not None:
            record["contributions"] = _rounded(contributions.tokens.tolist())
            rest = {"prompt_contribution": contributions.prompt, "cut_off_contribution": contributions.cut_off}
            record |= {name: _finite(value) for name, value in rest.items() if value}
    return record


def _sentence_record(row: Row, scores: "SentenceScores", tokens: bool) -> dict[str, Any]:
    record = {
        **row.head,
        "reward": round(scores.score, DECIMALS) + 0.0,
        "num_tokens": len(scores.completion_ids),
    }
    if tokens:
        numbers = [
            {"reward": round(reward, DECIMALS) + 0.0, "weight": round(weight, DECIMALS)}
            for reward, weight in zip(scores.sentence_rewards.tolist(), scores.weights.tolist(), strict=True)
        ]
        texts = [scores.sentences.text[start:end] for start, end in scores.sentences.spans]
        record["sentence_scores"] = {
            "prompt": numbers[0],
            "sentences": [{"text": text, **entry} for text, entry in zip(texts, numbers[1:], strict=True)],
        }
    return record


def _rounded(values: Sequence[float]) -> list[float | None]:
    return [_finite(value) for value in values]


def _finite(value: float | None) -> float | None:
    # JSON has neither NaN nor infinity. Adding 0.0 makes a negative zero positive.
    return round(value, DECIMALS) + 0.0 if value is not None and math.isfinite(value) else None
