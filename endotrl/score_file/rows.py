# SPDX-License-Identifier: Apache-2.0
"""Input rows and output lines of file scoring: validation, scores, and output format."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

from jinja2 import TemplateError

from ..data.formats import about_this_row, images_of, responses_of
from ..data.sources import Reader
from ..rendering.messages import TEMPLATE_COLUMNS
from ..rewards.endogenous import EndogenousReward
from ..rewards.sentence import SentenceReward, SentenceScores
from ..runs.jsonl import json_number
from ..scoring.token_stats import TokenStats


Reward = EndogenousReward | SentenceReward
Result = TokenStats | SentenceScores | str  # for a row, or the reason why it has none
DECIMALS = 6  # of rewards in the output, in nats: the precision of float32
# Possible keys of an output line. A row of the input must not contain them.
OUTPUT_KEYS = {"line", "error", "reward", "reason", "num_tokens", "finished", "reward_per_token", "entropy"}
# Keys left out by `--no-tokens`.
TOKEN_KEYS = {"tokens", "token_rewards", "chosen_logits", "soft_values", "entropies", "contributions"}
TOKEN_KEYS |= {"log_probs", "mean_logits", "prompt_contribution", "cut_off_contribution", "sentence_scores"}
OUTPUT_KEYS |= {"base_reward", *TOKEN_KEYS}

finite = partial(json_number, decimals=DECIMALS)


@dataclass(frozen=True)
class Row:
    """One response of the input."""

    line: int  # from 1
    prompt: Any = ""  # text, or messages
    completion: Any = ""
    extra: dict[str, Any] = field(default_factory=dict)  # other keys of the row, which are copied to the output
    error: str | None = None  # why the row cannot be scored
    completion_ids: list[int] | None = None  # as the policy generated them; `None` if there is only text
    response: str | int | None = None  # of several in the row: "chosen", "rejected" or its index, from 0

    @property
    def head(self) -> dict[str, Any]:
        """First keys of its output line."""
        return {"line": self.line, **({} if self.response is None else {"response": self.response}), **self.extra}


Scored = tuple[Row, dict[str, Any]]  # a response, and its output line


def rows_of(line: int, data: Mapping[str, Any], problem: str | None = None) -> list[Row]:
    """The responses of an input row; a problem is reported in `error`, and never raised."""
    try:
        if problem is not None:
            raise ValueError(problem)
        responses = responses_of(data)
        own = OUTPUT_KEYS if responses.names == [None] else OUTPUT_KEYS | {"response"}
        taken = sorted(own & responses.extra.keys())
        if taken:
            raise ValueError(f'The key "{taken[0]}" is reserved for the output. Rename it in the input.')
        try:
            json.dumps(data, allow_nan=False, default=str)  # a dataset may have images
        except ValueError:
            raise ValueError("A number is NaN, infinite or too large for a float: not valid JSON.") from None
    except ValueError as error:
        row_id = data.get("id")
        keep_id = isinstance(row_id, int) or (isinstance(row_id, str) and row_id.isprintable())
        return [Row(line, extra={"id": row_id} if keep_id else {}, error=str(error))]
    return [
        Row(line, responses.prompt, completion, responses.extra, completion_ids=ids, response=name)
        for name, completion, ids in zip(responses.names, responses.completions, responses.completion_ids, strict=True)
    ]


def read_responses(reader: Reader, limit: int | None = None) -> Iterator[Row]:
    """The responses of the first rows of an input."""
    return chain.from_iterable(rows_of(row.number, row.data, row.problem) for row in islice(reader, limit))


def score_rows(reward: Reward, rows: Sequence[Row]) -> list[Result]:
    """The model's scores for each row, or the reason why there are none."""
    results: list[Result] = [row.error or "" for row in rows]
    # A file may mix text and messages, and rows with and without token ids; a call must not.
    kinds: dict[tuple[bool, bool], list[int]] = {}
    for i, row in enumerate(rows):
        if not results[i]:
            kinds.setdefault((isinstance(row.prompt, str), row.completion_ids is None), []).append(i)
    for indices in kinds.values():
        for i, result in zip(indices, _score_kind(reward, [rows[i] for i in indices]), strict=True):
            results[i] = result
    return results


def _score_kind(reward: Reward, rows: list[Row]) -> list[Result]:
    # Without a token there is no text either, whatever the row contains: on a mismatch the text would be encoded
    # instead.
    completions = ["" if row.completion_ids == [] else row.completion for row in rows]
    ids = [row.completion_ids for row in rows if row.completion_ids is not None] or None
    try:
        columns: dict[str, Any] = {"images": [images_of(row.extra) for row in rows]}
        columns |= {name: [row.extra.get(name) for row in rows] for name in TEMPLATE_COLUMNS}
        columns = {name: column for name, column in columns.items() if any(column)}
        if isinstance(reward, EndogenousReward) and isinstance(reward.criterion, Mapping):
            domains = [row.extra.get("domain") for row in rows]
            columns["domain"] = [None if domain is None else str(domain) for domain in domains]
        return list(reward.score([row.prompt for row in rows], completions, completion_ids=ids, **columns))
    except (ValueError, TypeError, TemplateError) as error:
        if len(rows) == 1:
            return [about_this_row(str(error))]
    # An invalid row fails its whole batch: halve the batch until the row is alone.
    middle = len(rows) // 2
    return _score_kind(reward, rows[:middle]) + _score_kind(reward, rows[middle:])


def output_records(
    reward: Reward, rows: Sequence[Row], results: Sequence[Result], tokens: bool
) -> list[dict[str, Any]]:
    """Output lines of rows, from what [`score_rows`] says of them."""
    return [_output_record(reward, row, result, tokens) for row, result in zip(rows, results, strict=True)]


def _output_record(reward: Reward, row: Row, stats: Result, tokens: bool) -> dict[str, Any]:
    if isinstance(stats, str):
        return {**row.head, "reward": None, "error": stats}
    if not isinstance(stats, TokenStats):
        return _sentence_record(row, stats, tokens)
    assert isinstance(reward, EndogenousReward)
    num_tokens = len(stats.token_ids)
    token_rewards = reward.rule.token_rewards(stats).tolist()
    outcome = finite(reward.aggregate_from(stats))
    record = {**row.head, "reward": outcome}
    if outcome is None:
        empty = "no scored token (the completion_ids are empty)" if row.completion_ids == [] else "no scored token"
        record["reason"] = empty if num_tokens == 0 else "no end-of-sequence token"
    record |= {"num_tokens": num_tokens, "finished": stats.finished}
    if num_tokens:
        # Like `aggregate="mean"`, whatever the aggregate: without V(s_1), a constant of the prompt.
        initial_value = stats.soft_values[0].item() if reward.token_reward == "bellman" else 0.0
        record["reward_per_token"] = finite((math.fsum(token_rewards) - initial_value) / num_tokens)
        if stats.entropies is not None:
            record["entropy"] = finite(stats.entropies.mean().item())
    if tokens:
        record["tokens"] = stats.tokens
        # Sufficient to recompute the reward; without logits, Bellman rewards of tokens are log-probabilities.
        columns = {"log_probs": stats.log_probs}
        if stats.has_logits:
            columns = {"chosen_logits": stats.chosen_logits, "soft_values": stats.soft_values}
            record["token_rewards"] = list(map(finite, token_rewards))
        if reward.rule.needs_entropy and stats.entropies is not None:
            columns["entropies"] = stats.entropies
        if reward.rule.needs_mean_logits and stats.mean_logits is not None:
            columns["mean_logits"] = stats.mean_logits
        contributions, rest = reward.rule.contributions(stats), {}
        if contributions is not None:
            columns["contributions"] = contributions.tokens
            rest = {"prompt_contribution": contributions.prompt, "cut_off_contribution": contributions.cut_off}
        record |= {name: list(map(finite, values.tolist())) for name, values in columns.items()}
        record |= {name: finite(value) for name, value in rest.items() if value}
    return record


def _sentence_record(row: Row, scores: SentenceScores, tokens: bool) -> dict[str, Any]:
    record = {**row.head, "reward": finite(scores.score), "num_tokens": len(scores.completion_ids)}
    if tokens:
        pairs = zip(scores.sentence_rewards.tolist(), scores.weights.tolist(), strict=True)
        numbers = [{"reward": finite(reward), "weight": finite(weight)} for reward, weight in pairs]
        texts = [scores.sentences.text[start:end] for start, end in scores.sentences.spans]
        record["sentence_scores"] = {
            "prompt": numbers[0],
            "sentences": [{"text": text, **entry} for text, entry in zip(texts, numbers[1:], strict=True)],
        }
    return record
