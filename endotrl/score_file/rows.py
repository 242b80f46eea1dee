# SPDX-License-Identifier: Apache-2.0
"""Rows of the input: what a line must be."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..data.formats import responses_of


# Keys that an output line can have. A row of the input must not bring its own.
OUTPUT_KEYS = {"line", "error", "reward", "reason", "num_tokens", "finished", "reward_per_token", "entropy"}
# Those that `--no-tokens` leaves out.
TOKEN_KEYS = {"tokens", "token_rewards", "chosen_logits", "soft_values", "entropies", "contributions"}
TOKEN_KEYS |= {"log_probs", "mean_logits", "prompt_contribution", "cut_off_contribution", "sentence_scores"}
OUTPUT_KEYS |= {"base_reward", *TOKEN_KEYS}


@dataclass(frozen=True)
class Row:
    """One response of the input."""

    line: int  # from 1
    prompt: Any = ""  # text, or messages
    completion: Any = ""
    extra: dict[str, Any] = field(default_factory=dict)  # other keys of the row, which are carried over
    error: str | None = None  # why the row cannot be scored
    completion_ids: list[int] | None = None  # as the policy generated them; `None` if there is only text
    response: str | int | None = None  # of several in the row: "chosen", "rejected" or its number, from 0

    @property
    def head(self) -> dict[str, Any]:
        """What its output line begins with."""
        return {"line": self.line, **({} if self.response is None else {"response": self.response}), **self.extra}


def rows_of(line: int, data: Mapping[str, Any], problem: str | None = None) -> list[Row]:
    """The responses of a row of the input; what is wrong with it is said in `error`, and nothing is raised."""
    try:
        if problem is not None:
            raise ValueError(problem)
        responses = responses_of(data)
        own = OUTPUT_KEYS if responses.names == [None] else OUTPUT_KEYS | {"response"}
        taken = sorted(own & responses.extra.keys())
        if taken:
            raise ValueError(f'The key "{taken[0]}" is one that the output uses itself. Rename it in the input.')
        try:
            json.dumps(data, allow_nan=False, default=str)  # a dataset has pictures, too
        except ValueError:
            raise ValueError("A number is NaN, infinite or too large for a float, which JSON does not have.") from None
    except ValueError as error:
        row_id = data.get("id")
        keep_id = isinstance(row_id, int) or (isinstance(row_id, str) and row_id.isprintable())
        return [Row(line, extra={"id": row_id} if keep_id else {}, error=str(error))]
    return [
        Row(line, responses.prompt, completion, responses.extra, completion_ids=ids, response=name)
        for name, completion, ids in zip(responses.names, responses.completions, responses.completion_ids, strict=True)
    ]
