# SPDX-License-Identifier: Apache-2.0
"""What a benchmark asks: a prompt, and responses or steps to score."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..rendering.messages import Completion, Prompt


# Scorers that know nothing of what a response says.
CONTROLS = ("length", "shortness", "position", "random")


@dataclass(frozen=True)
class Item:
    """One question of a benchmark: each of its responses gets a number, or each step of its only response."""

    id: str  # name in the results, such as the benchmark's own id
    group: str  # part of the benchmark: a domain or subset
    prompt: Prompt  # text or messages, as a user would send them
    responses: tuple[Completion, ...]
    better: tuple[tuple[int, int], ...] = ()  # pairs (better, worse) of responses, as the benchmark's labels have it
    criterion: str | None = None  # system message under which the responses are judged
    cluster: str | None = None  # items of one cluster are resampled together (default: group and id)
    steps: tuple[str, ...] | None = None  # that the only response consists of, joined with an empty line
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else the benchmark's rule needs
    response_ids: tuple[tuple[int, ...], ...] | None = None  # as a model generated them
    images: tuple[Any, ...] = ()  # for the image parts of the prompt, in order

    @cached_property
    def key(self) -> str:
        """Digest of what is scored, by which an item is known again."""
        content: list[Any] = [self.prompt, self.responses, self.criterion, self.steps]
        if self.response_ids is not None:
            content.append(self.response_ids)
        if self.images:
            # Here, as it brings torch, which `eval compare` does without.
            from ..rendering.images import load_picture, picture_digest

            content.append([picture_digest(load_picture(0, picture)) for picture in self.images])
        text = json.dumps(content, sort_keys=True, default=list)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:20]

    @property
    def num_scores(self) -> int:
        """How many numbers a scorer gives."""
        return len(self.responses) if self.steps is None else len(self.steps)


def pair_item(
    id: str, group: str, prompt: Prompt, first: Completion, second: Completion, first_is_better: bool = True
) -> Item:
    """An item with a better and a worse response."""
    return Item(id, group, prompt, (first, second), better=((0, 1),) if first_is_better else ((1, 0),))


def step_item(id: str, group: str, problem: str, steps: list[str], facts: Mapping[str, Any]) -> Item:
    """
    An item whose steps are scored: a solution, with an empty line between steps. White space around a step is dropped.
    """
    stripped = tuple(step.strip() for step in steps)
    return Item(id, group, problem, ("\n\n".join(stripped),), steps=stripped, facts=facts)
