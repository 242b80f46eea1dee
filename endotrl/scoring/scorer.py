# SPDX-License-Identifier: Apache-2.0
"""Scorer: the frozen model's logit and soft value at every token of a completion."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from ..bellman import check_alpha
from ..rendering.images import ImageInputs, Placeholders
from ..rendering.renderer import Rendered
from .batching import pad_ids, plan_batches
from .forward_pass import (
    Group,
    PackedRow,
    execution_device,
    is_plain_linear,
    last_hidden_states,
    packed_hidden_states,
    rope_as_made,
    uncompiled,
)
from .image_prompts import ImagePrompt, check_inputs, own_logits, positions_kept, whole_row_states
from .isolation import PassRules, multiplies_exactly, pass_rules, probe_tokens
from .lm_head import HeadStatistics, LogitTransform, token_statistics
from .reference_pass import ReferenceRecorder
from .token_stats import TokenStats


logger = logging.getLogger(__name__)


class Pending(NamedTuple):
    """A row that has to be run."""

    number: int  # among the rows
    row: Rendered
    tokens: Sequence[int]  # of the completion, those that the model has to read

    @property
    def length(self) -> int:
        return len(self.row.prompt_ids) + len(self.tokens)


class Pass(NamedTuple):
    """
    A forward pass. State `h` of a row predicts token `h` of its completion, and the last one what follows it: of
    completions a and b of one prompt, for example,

        packed    P P P a a b b b          states of a: 2 3 4    of b: 2 5 6 7
        padded    P P P a a .              states of a: 2 3 4
                  P P P b b b              states of b: 8 9 10 11
    """

    members: list[int]  # numbers of the rows
    hidden_states: Tensor  # (N, D)
    states: Sequence[Sequence[int]]  # of each row: their positions in the hidden states

    @classmethod
    def padded(cls, items: Sequence[Pending], hidden_states: Tensor, firsts: Sequence[int]) -> "Pass":
        """From hidden states `(B, T, D)` of rows padded on the right, and the position of the first state in each."""
        starts = [i * hidden_states.shape[1] + first for i, first in enumerate(firsts)]
        states = [range(start, start + len(item.tokens) + 1) for start, item in zip(starts, items, strict=True)]
        return cls([item.number for item in items], hidden_states.flatten(0, 1), states)


def by_prompt(pending: Sequence[Pending]) -> list[list[Pending]]:
    """Groups of rows of equal prompts."""
    groups: dict[object, list[Pending]] = {}
    for item in pending:
        groups.setdefault(item.row.prompt, []).append(item)
    return list(groups.values())


def plan_packs(groups: Sequence[Sequence[Pending]], max_tokens: int) -> list[list[list[Pending]]]:
    """
    Plans packed rows of at most `max_tokens` tokens, in which every prompt counts once, from groups of rows of equal
    prompts. A group that does not fit is spread over several, each with the prompt; a row that does not fit at all has
    its own. The largest come first, as in [`plan_batches`].
    """
    parts: list[tuple[int, int, list[Pending]]] = []  # (tokens, group, rows)
    for group, items in enumerate(groups):
        size = prompt_length = len(items[0].row.prompt_ids)
        members: list[Pending] = []
        for item in sorted(items, key=lambda item: -item.length):
            if members and size + len(item.tokens) > max_tokens:
                parts.append((size, group, members))
                size, members = prompt_length, []
            size += len(item.tokens)
            members.append(item)
        parts.append((size, group, members))
    packs: list[list[list[Pending]]] = []
    used = 0
    for size, _, members in sorted(parts, key=lambda part: (-part[0], *part[1:])):
        if not packs or used + size > max_tokens:
            packs.append([])
            used = 0
        packs[-1].append(members)
        used += size
    return packs


class Placement(Protocol):
    """Location of the frozen weights. `active` is the only access to them, one thread at a time."""

    config: PretrainedConfig
    eos_token_ids: list[int]
    description: str

    @property
    def recorder(self) -> ReferenceRecorder | None:
        """Recorder of the passes of a trainer that has the weights, too."""

    @property
    def is_own(self) -> bool:
        """Whether nobody else uses the weights: others would find tensors that inference mode left in the modules."""

    def active(self) -> AbstractContextManager[PreTrainedModel]:
        """Context manager that yields the model in evaluation mode with exactly the frozen weights."""


def equal_rows(rows: Sequence[Rendered]) -> list[list[int]]:
    """Groups of indices of equal rows, which are scored once."""
    equal: dict[object, list[int]] = {}
    for i, row in enumerate(rows):
        key = (row.prompt, tuple(row.completion_ids), tuple(row.action_positions), row.finished)
        equal.setdefault(key, []).append(i)
    return list(equal.values())


def row_stats(row: Rendered, vocab_size: int, **numbers: Any) -> TokenStats:
    """[`TokenStats`] of a row, with its `numbers`."""
    positions = torch.tensor(row.action_positions, dtype=torch.long)
    return TokenStats(
        token_ids=torch.tensor(row.completion_ids, dtype=torch.long)[positions],
        positions=positions,
        finished=row.finished,
        num_completion_tokens=len(row.completion_ids),
        vocab_size=vocab_size,
        **numbers,
    )


def check_ids(rows: Sequence[Rendered], vocab_size: int) -> None:
    """Raises `ValueError` for a token id outside a vocabulary."""
    for i, row in enumerate(rows):
        for ids in (row.prompt_ids, row.completion_ids):
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ValueError(
                    f"Row {i} contains a token id outside the frozen model's vocabulary of {vocab_size} tokens "
                    f"(ids from {min(ids)} to {max(ids)}). Was it encoded with another tokenizer?"
                )


class FrozenScorer:
    """
    Scores rendered completions with a frozen language model, with as little work as exact results allow:

    - Completions of one prompt share its pass, and equal completions are scored once.
    - Nothing is padded: prompts and completions are packed in one row, separated by the attention ([`forward_pass`]).
      Models whose attention cannot do that (state-space and hybrid models, sequences longer than a sliding window,
      soft-capped attention) get rows of similar length, padded on the right.
    - A prompt with images is run once for all of its completions, which continue from its cache ([`image_prompts`]).
    - The LM head is applied only to the scored positions, in blocks, so that no (tokens, vocabulary) tensor exists.
    - A row that a trainer has just run through the same frozen weights is not run again ([`reference_pass`]).

    `max_tokens_per_batch` is that of a forward pass: in packed rows, with each prompt once and without padding;
    otherwise, rows times the longest. It bounds memory and does not change results.
    """

    def __init__(self, placement: Placement, max_tokens_per_batch: int = 8192) -> None:
        plan_batches([], max_tokens_per_batch)  # raises now for an invalid budget
        self.placement = placement
        self.max_tokens_per_batch = max_tokens_per_batch
        self._transform = LogitTransform.from_config(placement.config)
        self._head_checked = False
        # Unknown until the model has been tested: which rows may share a pass, and whether completions can continue
        # from the cache of a prompt with images.
        self._rules: PassRules | None = None
        self._shares_image_prompts: bool | None = None

    def __call__(
        self,
        rows: Sequence[Rendered],
        alpha: float = 1.0,
        entropy: bool = True,
        mean_logits: bool = False,
        progress: bool = False,
    ) -> list[TokenStats]:
        """[`TokenStats`] of completions, on the CPU. `ValueError` for ids outside the vocabulary and for NaN."""
        check_alpha(alpha)
        check_ids(rows, self.placement.config.get_text_config().vocab_size)
        scored = self._score(rows, alpha, entropy, mean_logits, progress)
        values = [torch.cat([row.chosen_logits, row.soft_values]) for row in scored]
        if bad := [str(i) for i, of_row in enumerate(values) if not of_row.isfinite().all()]:
            raise ValueError(
                f"The frozen model ({self.placement.description}) gives NaN or infinite logits for rows "
                f"{', '.join(bad[:10])}{', ...' if len(bad) > 10 else ''} of {len(scored)}. Its weights are damaged, "
                'or its dtype overflows: try `dtype="float32"`.'
            )
        return scored

    def _score(
        self, rows: Sequence[Rendered], alpha: float, entropy: bool, mean_logits: bool, progress: bool
    ) -> list[TokenStats]:
        equal = equal_rows(rows)
        unique = [rows[indices[0]] for indices in equal]
        # Split into one result per row only at the end: small long-lived tensors between large short-lived ones would
        # keep memory from being freed.
        read: list[tuple[list[int], HeadStatistics]] = []  # (rows, their numbers one after the other)
        statistics = partial(
            token_statistics, alpha=alpha, transform=self._transform, entropy=entropy, mean_logits=mean_logits
        )
        with (
            torch.inference_mode() if self.placement.is_own else torch.no_grad(),
            self.placement.active() as model,
            uncompiled(),
            tqdm(total=len(unique), desc="Scoring", unit=" completions", disable=not progress) as bar,
        ):
            if not self._head_checked:
                self._check_head(model)
                self._head_checked = True
            for run in self._passes(model, unique):
                read.append((run.members, self._read(model, [unique[k] for k in run.members], run, statistics)))
                bar.update(len(run.members))
        results: dict[int, TokenStats] = {}
        vocab_size = self.placement.config.get_text_config().vocab_size
        while read:
            members, columns = read.pop()
            for k, own in zip(members, _split([unique[k] for k in members], columns), strict=True):
                for i in equal[k]:
                    tensors = {name: None if column is None else column.clone() for name, column in own.items()}
                    results[i] = row_stats(rows[i], vocab_size, alpha=alpha, **tensors)
        return [results[i] for i in range(len(rows))]

    def _passes(self, model: PreTrainedModel, rows: Sequence[Rendered]) -> Iterator[Pass]:
        """Runs the backbone over all rows, except for those that a trainer has run."""
        recorded = self._recorded(rows)
        if recorded:
            edges = [0, *accumulate(map(len, recorded.values()))]
            # All at once, so that the head reads its weights once for all of them.
            yield Pass(list(recorded), torch.cat(list(recorded.values())), list(map(range, edges, edges[1:])))
        if len(recorded) == len(rows):
            return
        if self._rules is None:
            self._rules = pass_rules(model, self.max_tokens_per_batch)
        rules = self._rules
        # What follows the end of a completion is not needed, so its last token need not be run.
        pending = [
            Pending(i, row, row.completion_ids[:-1] if row.finished and not rules.whole else row.completion_ids)
            for i, row in enumerate(rows)
            if i not in recorded
        ]
        yield from self._image_passes(model, [item for item in pending if item.row.images is not None])
        kinds: dict[object, list[Pending]] = {}  # rows that may share a pass
        for item in sorted(pending, key=lambda item: -item.length):  # longest first: memory runs out now or never
            if item.row.images is None:
                kind = item.number if rules.alone else rules.rope.length_class(item.length)
                kinds.setdefault(kind, []).append(item)
        for together in map(sorted, kinds.values()):
            yield from self._packed_passes(model, [i for i in together if i.length <= rules.longest_packable])
            if padded := [i for i in together if i.length > rules.longest_packable]:
                yield from self._padded_passes(model, padded)

    def _recorded(self, rows: Sequence[Rendered]) -> dict[int, Tensor]:
        """By number, the states `(L + 1, D)` of rows that a trainer has run, from the end of the prompt on."""
        if self.placement.recorder is None:
            return {}
        found = self.placement.recorder.take([((*row.prompt_ids, *row.completion_ids), row.images) for row in rows])
        pairs = enumerate(zip(rows, found, strict=True))
        return {i: states[len(row.prompt_ids) - 1 :] for i, (row, states) in pairs if states is not None}

    def _packed_passes(self, model: PreTrainedModel, pending: Sequence[Pending]) -> Iterator[Pass]:
        """[`_passes`] of rows that are packed."""
        for groups in plan_packs(by_prompt(pending), self.max_tokens_per_batch):
            row = PackedRow.of([Group(items[0].row.prompt_ids, [item.tokens for item in items]) for items in groups])
            states = [row.states(g, k) for g, items in enumerate(groups) for k in range(len(items))]
            yield Pass([item.number for items in groups for item in items], packed_hidden_states(model, row), states)

    def _padded_passes(self, model: PreTrainedModel, pending: Sequence[Pending]) -> Iterator[Pass]:
        """[`_passes`] of rows that are padded on the right."""
        for batch in plan_batches([item.length for item in pending], self.max_tokens_per_batch):
            items = [pending[k] for k in batch]
            input_ids, _ = pad_ids([[*item.row.prompt_ids, *item.tokens] for item in items])
            firsts = [len(item.row.prompt_ids) - 1 for item in items]
            yield Pass.padded(items, last_hidden_states(model, input_ids), firsts)

    def _image_passes(self, model: PreTrainedModel, pending: Sequence[Pending]) -> Iterator[Pass]:
        """[`_passes`] of rows whose prompts have images: each prompt once, for all of its completions."""
        for members in by_prompt(pending):
            prompt_ids, images = members[0].row.prompt_ids, members[0].row.images
            assert images is not None
            with positions_kept(model):
                check_inputs(model, images)
                if self._shares_image_prompts is None:
                    tokens = members[0].row.completion_ids
                    self._shares_image_prompts = self._check_images(model, prompt_ids, images, tokens)
                if not self._shares_image_prompts:
                    for item in members:
                        hidden_states = whole_row_states(model, prompt_ids, images, item.tokens)
                        yield Pass.padded([item], hidden_states[None], [len(prompt_ids) - 1])
                    continue
                prompt = ImagePrompt(model, prompt_ids, images)
                for batch in plan_batches([item.length for item in members], self.max_tokens_per_batch):
                    items = [members[k] for k in batch]
                    yield Pass.padded(items, prompt.states([item.tokens for item in items]), [0] * len(items))

    def _check_images(
        self, model: PreTrainedModel, prompt_ids: Sequence[int], images: ImageInputs, tokens: Sequence[int]
    ) -> bool:
        """Whether completions can continue from the pass of their prompt: tested against the model's own logits."""
        # A completion may have no tokens, or one.
        special = Placeholders.of(model.config).all
        tokens = ([token for token in (*tokens, *reversed(prompt_ids)) if token not in special] * 8)[:8]
        expected = own_logits(model, prompt_ids, images, tokens)  # (T + 1, V)
        whole = whole_row_states(model, prompt_ids, images, tokens)[len(prompt_ids) - 1 :]
        self._check_logits(model, whole, expected, " where the prompt has images")
        assert self._rules is not None
        prompt = None if self._rules.whole else ImagePrompt(model, prompt_ids, images)
        if prompt is not None and prompt.is_repeatable:
            # With another completion beside it, and padding.
            pairs = zip(prompt.states([tokens[:3], tokens]), (expected[:4], expected), strict=True)
            if not any(self._head_error(model, states[: len(logits)], logits) for states, logits in pairs):
                return True
        logger.info(
            "With %s, completions cannot continue from the cache of a prompt with images, so each one runs the prompt "
            "again. Results are the same, but scoring is slower.",
            type(model).__name__,
        )
        return False

    def _read(
        self,
        model: PreTrainedModel,
        rows: Sequence[Rendered],
        run: Pass,
        statistics: Callable[[Tensor, nn.Module, Tensor], HeadStatistics],
    ) -> HeadStatistics:
        """The head's statistics of the rows' scored tokens and, if a row is not finished, after them; on the CPU."""
        hidden_states = run.hidden_states
        read: list[tuple[int, int]] = []  # (position of the state, token)
        for row, states in zip(rows, run.states, strict=True):
            read += [(states[action], row.completion_ids[action]) for action in row.action_positions]
            if not row.finished:
                read.append((states[len(row.completion_ids)], 0))  # only its value is used: any token will do
        positions = torch.tensor([position for position, _ in read], dtype=torch.long, device=hidden_states.device)
        token_ids = torch.tensor([token for _, token in read], dtype=torch.long)
        head = model.get_output_embeddings()
        device = execution_device(model, head)  # may differ from that of the hidden states
        with align_module_device(head):  # an offloaded head is loaded once for all blocks
            if self._rules is not None and self._rules.alone and not is_plain_linear(head):
                # One scale for all tokens: the head must get the same input as in the model, one whole row.
                selected, head = head(hidden_states.to(device))[positions.to(device)], nn.Identity()  # (N, V)
            else:
                selected = hidden_states[positions]  # (N, D)
            on_device = statistics(selected.to(device), head, token_ids.to(device))
        return HeadStatistics(*(None if column is None else column.cpu() for column in on_device))  # type: ignore[arg-type]

    def _check_head(self, model: PreTrainedModel) -> None:
        """Verifies on eight tokens that hidden states and head reproduce the model's own logits."""
        device = execution_device(model, model.get_input_embeddings())
        input_ids = torch.tensor([probe_tokens(model, 8)], device=device)
        mask = torch.ones_like(input_ids)
        with rope_as_made(model):
            expected = model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[0].float()  # (8, V)
        self._check_logits(model, last_hidden_states(model, input_ids)[0], expected)

    def _check_logits(self, model: PreTrainedModel, hidden_states: Tensor, expected: Tensor, where: str = "") -> None:
        """Raises `ValueError` if the head's output for `N` states is not the model's own logits, of shape `(N, V)`."""
        error = self._head_error(model, hidden_states, expected)
        if error and "_original_forward" in vars(model):
            raise ValueError(
                f"The {type(model).__name__} given to the endogenous reward is the policy that is trained, not a "
                "frozen model: its trainer has put it into mixed precision. Share its frozen base with "
                "`EndogenousReward(model=None)` and `reward.attach(trainer)`, or pass a path, so that the reward "
                "loads its own copy."
            )
        if error:
            raise ValueError(
                f"The logits of {type(model).__name__} differ from its LM head applied to its hidden states{where}, "
                f"by {error:.3g}. This model family transforms its logits in a way that endotrl does not support, so "
                "rewards would be wrong. Please open an issue with the model's name."
            )

    def _head_error(self, model: PreTrainedModel, hidden_states: Tensor, expected: Tensor) -> float:
        """Error of the head's output against the model's own logits; 0 if within rounding, or not finite."""
        head = model.get_output_embeddings()
        targets = expected.argmax(dim=-1)
        with align_module_device(head):
            chosen, values, *_ = token_statistics(
                hidden_states.to(expected.device), head, targets, transform=self._transform, entropy=False
            )
        reference = expected.gather(1, targets[:, None]).squeeze(1)
        errors = torch.maximum((chosen - reference).abs(), (values - torch.logsumexp(expected, -1)).abs())
        # Half precision keeps 8 (bfloat16) or 11 bits of a logit, and the two passes may round differently.
        exact = multiplies_exactly(hidden_states.dtype, expected.device)
        tolerance = (1e-4 if exact else 0.02) * max(1.0, reference.abs().max().item())
        error = errors.max().item()
        return error if math.isfinite(error) and error > tolerance else 0.0


def _split(rows: Sequence[Rendered], columns: HeadStatistics) -> Iterator[dict[str, Tensor | None]]:
    """Tensors of [`TokenStats`] per row, from the result of [`FrozenScorer._read`]."""
    sizes = [len(row.action_positions) + (not row.finished) for row in rows]
    pieces = [[None] * len(rows) if column is None else column.split(sizes) for column in columns]
    for row, *parts in zip(rows, *pieces, strict=True):
        named = dict(zip(columns._fields, parts, strict=True))
        own = {name: None if part is None else part[: len(row.action_positions)] for name, part in named.items()}
        # The terminal state has no value: only then does the sum of rewards telescope to the outcome (eq. 12 of
        # https://huggingface.co/papers/2506.23235).
        values = named["soft_values"]
        yield {**own, "soft_values": torch.cat([values, torch.zeros(1)]) if row.finished else values}
