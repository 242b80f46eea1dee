# SPDX-License-Identifier: Apache-2.0
"""Hidden states of the forward pass that a trainer runs over its reference model anyway, for the reward to read."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .forward_pass import RopeLengths, backbone
from .isolation import reads_padding, why_alone, why_alone_by_length


# Ends of the names of settings that make passes of training mode random.
DROPOUTS = ("dropout", "pdrop", "dropout_prob", "layerdrop", "jitter_noise")


class ReferenceRecorder:
    """
    Keeps what the backbone of a trainer's frozen model computes in the trainer's own reference pass, until the reward
    of the same completions is asked for: one layer's output for the batch. A row is found by its token ids; one that
    the trainer ran over otherwise (with images, or not at all) is just not found. `is_frozen` tells whether the
    weights are the frozen ones right now: with LoRA, whether the adapter is disabled. What was recorded in another
    than the `current_step` of training is dropped.
    """

    def __init__(self, model: PreTrainedModel, is_frozen: Callable[[], bool], current_step: Callable[[], int]) -> None:
        self._is_frozen, self._current_step = is_frozen, current_step
        settings = model.config.get_text_config().to_dict()
        rates = [rate for key, rate in settings.items() if key.endswith(DROPOUTS)]
        parts = [part for name, part in model.named_modules() if "lora_" not in name]  # off with the adapter
        rates += [part.p for part in parts if isinstance(part, nn.Dropout)]
        self._dropout = any(isinstance(rate, int | float) and rate > 0 for rate in rates)
        self._model = model
        # Which rows are those of the row alone is not known before the model has been tried.
        self._reads: tuple[bool, bool] | None = None
        self._step = -1
        self._passes: list[tuple[Tensor, Tensor, Tensor]] = []  # input ids, attention mask, hidden states
        self._rows: dict[tuple[int, ...], Tensor] | None = None
        self._paused = False
        self._handle = backbone(model).register_forward_hook(self._record, with_kwargs=True)

    def close(self) -> None:
        self._handle.remove()
        self.clear()

    def clear(self) -> None:
        self._passes.clear()
        self._rows = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is recorded: the reward's own passes are not the trainer's."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def find(self, token_ids: tuple[int, ...]) -> Tensor | None:
        """Hidden states of shape `(T, D)` of a prompt and completion of `T` tokens, if recorded."""
        if self._rows is None:
            self._rows = {}
            reads_whole, reads_padded = self._reads_rows() if self._passes else (False, False)
            for input_ids, mask, hidden_states in self._passes:
                for ids, keep, states in zip(input_ids, mask.bool(), hidden_states, strict=True):
                    if reads_whole if keep[0] else reads_padded:
                        self._rows[tuple(ids[keep].tolist())] = states[keep.to(states.device)]
        return self._rows.get(token_ids)

    def _reads_rows(self) -> tuple[bool, bool]:
        """Whether rows have the states that they have alone: those that begin with a token, and those padded there."""
        if self._reads is None:
            with self.paused():
                rope = RopeLengths.from_config(self._model.config)
                whole = not (rope.limits or rope.unknown or why_alone(self._model))
                whole = whole and why_alone_by_length(self._model, rope, longest_pass=0) is None
                # Trainers pad prompts on the left and give no positions.
                self._reads = whole, whole and reads_padding(self._model)
        return self._reads

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        # Not a pass over whole rows: generation (a cache), training (gradients), or the reward's own. What is compiled
        # with the model could not look at the step.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or kwargs.get("use_cache") is not False:
            return
        # A row is not found by what else there may be: images, positions, embeddings, a cache.
        given = {key for key, value in kwargs.items() if isinstance(value, Tensor)}
        if input_ids is None or mask is None or not given <= {"input_ids", "attention_mask", "logits_to_keep"}:
            return
        if self._paused or not self._is_frozen() or (module.training and self._dropout):
            return
        if self._step != self._current_step():
            self.clear()
            self._step = self._current_step()
        self._rows = None
        self._passes.append((input_ids.cpu(), mask.cpu(), output.last_hidden_state.detach()))
