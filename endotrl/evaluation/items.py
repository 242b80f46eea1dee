# SPDX-License-Identifier: Apache-2.0
"""Benchmark items: a prompt, and responses or steps to score."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..rendering.messages import Completion, Prompt


# Scorers that ignore the content of responses.
CONTROLS = ("length", "shortness", "position", "random")


@dataclass(frozen=True)
class Item:
    """One question of a benchmark: one score per response, or per step of its only response."""

    id: str  # name in the results, such as the benchmark's own id
    group: str  # part of the benchmark: a domain or subset
    prompt: Prompt  # text or messages, as sent by a user
    responses: tuple[Completion, ...]
    better: tuple[tuple[int, int], ...] = ()  # pairs (better, worse) of responses, by the benchmark's labels
    criterion: str | None = None  # system message under which the responses are judged
    cluster: str | None = None  # items of one cluster are resampled together (default: group and id)
    steps: tuple[str, ...] | None = None  # of the only response, joined with an empty line
    facts: Mapping[str, Any] = field(default_factory=dict)  # further input of the benchmark's rule
    response_ids: tuple[tuple[int, ...], ...] | None = None  # as a model generated them
    images: tuple[Any, ...] = ()  # for the image parts of the prompt, in order

    @cached_property
    def key(self) -> str:
        """Digest of the scored content, which identifies an item."""
        content: list[Any] = [self.prompt, self.responses, self.criterion, self.steps]
        if self.response_ids is not None:
            content.append(self.response_ids)
        if self.images:
            # Imported here, as it loads torch, which `eval compare` does not need.
            from ..rendering.images import load_picture, picture_digest

            content.append([picture_digest(load_picture(0, picture)) for picture in self.images])
        text = json.dumps(content, sort_keys=True, default=list)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]

    @property
    def num_scores(self) -> int:
        """Number of scores per scorer."""
        return len(self.responses) if self.steps is None else len(self.steps)


def pair_item(
    id: str, group: str, prompt: Prompt, first: Completion, second: Completion, first_is_better: bool = True
) -> Item:
    """An item with a better and a worse response."""
    return Item(id, group, prompt, (first, second), better=((0, 1),) if first_is_better else ((1, 0),))


def step_item(id: str, group: str, problem: str, steps: list[str], facts: Mapping[str, Any]) -> Item:
    """
    An item with scored steps: a solution, with an empty line between steps. White space around a step is dropped.
    """
    stripped = tuple(step.strip() for step in steps)
    return Item(id, group, problem, ("\n\n".join(stripped),), steps=stripped, facts=facts)
