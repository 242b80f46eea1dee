# SPDX-License-Identifier: Apache-2.0
"""Best, top and paired responses to a prompt by reward, as rows of TRL's dataset formats. No models."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..checks import check_choice
from ..reporting import counted
from ..score_file.rows import Row, Scored


@dataclass(frozen=True)
class Choice:
    """
    Selection from the responses to a prompt: `"pairs"`, rows of TRL's preference format, the best with the worst
    response, the second best with the second worst, and so on; `"best"` and `"top"`, rows of the prompt-completion
    format for SFT, the best response or a fraction; `"ranked"`, one row with all `completions`, the best first, and
    their `scores`. Raises `ValueError` if a setting is out of range.
    """

    kind: str = "pairs"
    margin: float = 0.0  # a pair's rewards differ by more than this: so ties make no pair
    num_pairs: int = 1  # maximum number of pairs per prompt
    fraction: float = 0.25  # of the responses per prompt kept by `"top"`, in (0, 1]; rounded up
    unfinished: bool = False  # whether to include responses cut off at a token limit, as `completion_ids` show

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("pairs", "best", "top", "ranked"))
        if not 0.0 <= self.margin < math.inf:
            raise ValueError(f"`margin` must be a finite number of at least 0, got {self.margin}.")
        if self.num_pairs < 1:
            raise ValueError(f"`num_pairs` must be at least 1, got {self.num_pairs}.")
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"`fraction` must be greater than 0 and at most 1, got {self.fraction}.")

    def rows(self, group: Sequence[Scored], counts: "Counts") -> list[dict[str, Any]]:
        """
        Rows for the responses to one prompt ([`~endotrl.score_file.by_prompt.by_prompt`]); of equal rewards the
        earlier response is the better one. Updates `counts`.
        """
        counts.prompts += 1
        counts.responses += len(group)
        kept = [one for one in group if self.unfinished or one[1].get("finished", True)]
        counts.unfinished += len(group) - len(kept)
        # The order of two equal responses is noise.
        kept = [one for i, one in enumerate(kept) if one[0].completion not in [row.completion for row, _ in kept[:i]]]
        kept.sort(key=_reward, reverse=True)
        if self.kind == "pairs":
            return self._pairs(kept, counts)
        if self.kind == "ranked" and kept:
            completions, scores = [_alike(row) for row, _ in kept], list(map(_reward, kept))
            return [{"prompt": kept[0][0].prompt, "completions": completions, **_common(kept), "scores": scores}]
        # Rounded up, but robust to the rounding of the product: 0.55 * 20 is more than 11.
        count = 1 if self.kind == "best" else max(1, math.ceil(self.fraction * len(kept) - 1e-9))
        return [
            {"prompt": one[0].prompt, "completion": _alike(one[0]), **one[0].extra, "score": _reward(one)}
            for one in kept[:count]
        ]

    def _pairs(self, kept: Sequence[Scored], counts: "Counts") -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        if len(kept) < 2:
            counts.alone += 1
        for better, worse in zip(kept[: min(self.num_pairs, len(kept) // 2)], reversed(kept), strict=False):
            if _reward(better) - _reward(worse) <= self.margin:
                counts.close += not rows
                break
            counts.add_pair(better, worse)
            pair = {"prompt": better[0].prompt, "chosen": _alike(better[0]), "rejected": _alike(worse[0])}
            rows.append({**pair, **_common(kept), "score_chosen": _reward(better), "score_rejected": _reward(worse)})
        return rows


@dataclass
class Counts:
    """Counts of prompts and responses, and of the reasons why some are in no row."""

    prompts: int = 0
    responses: int = 0
    bad: int = 0  # responses without a reward
    unfinished: int = 0  # responses that were cut off
    alone: int = 0  # prompts with fewer than two different responses
    close: int = 0  # prompts whose rewards are all within the margin
    rows: int = 0
    margins: float = 0.0  # sum over pairs
    longer: Counter[int] = field(default_factory=Counter)  # sign of the chosen response's length minus the other's
    labels: Counter[str] = field(default_factory=Counter)  # original label of the chosen response

    def why_not(self) -> str:
        """Reasons why some prompts and responses are in no row, in words; empty if there are none."""
        if not self.prompts:
            return "The input has no rows."
        reasons = [
            (self.bad, "response", "without a reward"),
            (self.unfinished, "response", "cut off"),
            (self.alone, "prompt", "with fewer than two different responses"),
            (self.close, "prompt", "whose rewards do not differ by more than the margin"),
        ]
        found = "; ".join(f"{counted(count, noun)} {what}" for count, noun, what in reasons if count)
        return f"Left out: {found}." if found else ""

    def add_pair(self, better: Scored, worse: Scored) -> None:
        """Counts a pair."""
        self.margins += _reward(better) - _reward(worse)
        if "num_tokens" in better[1]:
            difference = better[1]["num_tokens"] - worse[1]["num_tokens"]
            self.longer[(difference > 0) - (difference < 0)] += 1
        if isinstance(label := better[0].response, str):
            self.labels[label] += 1


def _reward(one: Scored) -> float:
    return one[1]["reward"]


def _common(group: Sequence[Scored]) -> dict[str, Any]:
    """The other keys that all responses share, with equal values."""
    first, *others = [row.extra for row, _ in group]
    missing = object()
    return {key: value for key, value in first.items() if all(other.get(key, missing) == value for other in others)}


def _alike(row: Row) -> Any:
    """A response in the same format as its prompt, as required by TRL."""
    if isinstance(row.completion, str) and not isinstance(row.prompt, str):
        return [{"role": "assistant", "content": row.completion}]
    return row.completion
