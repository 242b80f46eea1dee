# SPDX-License-Identifier: Apache-2.0
"""One forward pass for all scorers that can share it: from items to the frozen model's token statistics."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..frozen.names import load_tokenizer, model_renderer
from ..frozen.placement import make_scorer
from ..frozen.served import ServedModel
from ..rendering.messages import Prompt, add_criterion, as_messages
from ..rendering.offsets import decode_with_offsets
from ..rendering.policy import ProcessingClass, Reading, tokenizer_of
from ..rendering.renderer import Rendered, cut_completion
from ..rewards.intrinsic import without_prompts
from ..scoring.scorer import Placement
from ..scoring.token_stats import TokenStats
from .items import Item


@dataclass(frozen=True)
class ScoredResponse:
    """Statistics of the frozen model for one response of `H` tokens."""

    stats: TokenStats
    log_probs_alone: Tensor | None = None  # (H,), without its prompt: log pi(a_h|a_<h), in nats
    step_of_token: Tensor | None = None  # (H,), the step that each token belongs to; -1 for the end of the response
    cut: bool = False  # at the token limit


class Engine:
    """Scoring of items with a frozen model."""

    def __init__(
        self,
        placement: Placement | ServedModel,  # of the weights
        processing_class: ProcessingClass | None = None,  # with images a processor; by default the model's tokenizer
        chat: bool = True,  # a text prompt is a user message; `False` to continue it
        separator: str = "",  # between a continued prompt and the response
        alpha: float = 1.0,  # temperature of the soft value
        max_response_tokens: int | None = None,  # responses are cut there, and at the model's context in any case
        max_tokens_per_batch: int = 8192,  # per forward pass, to bound memory: results do not depend on it
    ) -> None:
        self.placement, self.alpha, self.chat, self.separator = placement, alpha, chat, separator
        self.max_response_tokens, self.max_tokens_per_batch = max_response_tokens, max_tokens_per_batch
        processing_class = processing_class or load_tokenizer(placement.config._name_or_path)
        self.tokenizer = tokenizer_of(processing_class)
        eos_token_ids = [*placement.eos_token_ids, self.tokenizer.eos_token_id]
        self.renderer = model_renderer(placement.config, eos_token_ids, Reading(processing_class, {}), "cut")
        self._scorer = make_scorer(placement, max_tokens_per_batch)

    def score(self, items: Sequence[Item], alone: bool = False) -> list[list[ScoredResponse]]:
        """
        Scores all responses of items, of which either all or none have `response_ids`; with `alone`, also without
        their prompts. Raises `ValueError` if a response has no token, or steps cannot be located in the tokens.
        """
        owners = [item for item in items for _ in item.responses]
        responses = [response for item in items for response in item.responses]
        generated = [ids for item in items for ids in item.response_ids or ()]
        images = [item.images for item in owners]
        rows = self.renderer.render(list(map(self.prompt, owners)), responses, generated or None, images=images)
        if self.max_response_tokens is not None:
            rows = [cut_completion(row, self.max_response_tokens) for row in rows]
        for item, row in zip(owners, rows, strict=True):
            if not row.action_positions:
                raise ValueError(f"A response of item {item.id!r} is empty and has no end token, so it has no score.")
        all_stats = self._scorer(rows, alpha=self.alpha, entropy=True, mean_logits=True)
        scored = [ScoredResponse(stats, cut=row.cut) for stats, row in zip(all_stats, rows, strict=True)]
        if alone:
            chats = [self.chat or not isinstance(item.prompt, str) for item in owners]
            others = without_prompts(self.renderer, rows, chats)
            for i, stats in enumerate(self._scorer(others, alpha=self.alpha, entropy=False)):
                scored[i] = replace(scored[i], log_probs_alone=stats.log_probs)
        pieces = iter(scored)
        return [[self._with_steps(item, next(pieces)) for _ in item.responses] for item in items]

    def next_token_logits(
        self, rows: Sequence[Sequence[int]], token_ids: Sequence[int], progress: bool = False
    ) -> Tensor:
        """Logits of some tokens after each row of ids, of shape `(rows, tokens)`, float32, on the CPU."""
        # Each token as a completion of its own: the scorer handles every model family.
        pairs = [(list(row), token_id) for row in rows for token_id in token_ids]
        completions = [Rendered(row, [token_id], action_positions=[0], finished=True) for row, token_id in pairs]
        stats = self._scorer(completions, entropy=False, progress=progress)
        return torch.cat([row.chosen_logits for row in stats]).view(len(rows), len(token_ids))

    def prompt(self, item: Item) -> Prompt:
        """The item's prompt as the model sees it: in a chat as a message, preceded by its criterion."""
        if self.chat or not isinstance(item.prompt, str):
            return add_criterion(as_messages(item.prompt, "user"), item.criterion)
        return add_criterion(item.prompt + self.separator, item.criterion)

    def _with_steps(self, item: Item, scored: ScoredResponse) -> ScoredResponse:
        if item.steps is None:
            return scored
        text, offsets = decode_with_offsets(self.tokenizer, scored.stats.token_ids.tolist())
        spans = step_spans(item.steps, text, whole=not scored.cut)
        if spans is None:
            raise ValueError(f"Item {item.id!r} has steps that its decoded tokens lack: the tokenizer changes text.")
        step_of_token = [
            next((i for i, (start, end) in enumerate(spans) if start <= max(first, last - 1) < end), -1)
            for first, last in offsets
        ]
        return replace(scored, step_of_token=torch.tensor(step_of_token, dtype=torch.long))


def step_spans(steps: Sequence[str], text: str, whole: bool = True) -> list[tuple[int, int]] | None:
    """
    Character span of each step in a text, including the white space after it; `None` if they do not occur in this
    order. If the text is not `whole`, the steps after its end have empty spans.
    """
    starts, position = [], 0
    for step in steps:
        start = text.find(step, position)
        if start < 0:
            if whole:
                return None
            cut = (i for i in range(position, len(text)) if text[i:].strip() and step.startswith(text[i:]))
            start = next(cut, len(text))
        starts.append(start)
        position = min(start + len(step), len(text))
    return list(zip(starts, [*starts[1:], position], strict=True))
