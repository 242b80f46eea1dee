# SPDX-License-Identifier: Apache-2.0
"""Forward passes as a trainer runs them, and a recorder of its reference pass, reused by the reward."""

import inspect
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..rendering.images import TOKEN_KEYS, ImageInputs
from .forward_pass import RopeLengths, backbone
from .isolation import reads_padding, why_alone, why_alone_by_length


# Model inputs of trainers for images: see `_get_per_token_logps_and_entropies` of [`~trl.GRPOTrainer`].
KNOWN_INPUTS = {"pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask", "spatial_shapes", *TOKEN_KEYS}
# Suffixes of settings that make passes in training mode random.
DROPOUTS = ("dropout", "pdrop", "dropout_prob", "layerdrop", "jitter_noise")
# Token ids of a prompt and its completion, and the images of the prompt.
Row = tuple[tuple[int, ...], ImageInputs | None]


class ReferenceRecorder:
    """
    Records the backbone's output in the reference pass of a trainer, until the reward of the same completions is
    requested. A row is found by its token ids and, if it has images, by the trainer's model inputs for them, so a row
    that the trainer ran differently (or not at all) is simply not found.

    Memory: one layer's output for the batch of completions, from the reference pass to the reward. `is_frozen` returns
    whether the current weights are the frozen ones: with LoRA, whether the adapter is disabled. Records of another
    training step than the `current_step` are dropped.
    """

    def __init__(self, model: PreTrainedModel, is_frozen: Callable[[], bool], current_step: Callable[[], int]) -> None:
        self._is_frozen, self._current_step = is_frozen, current_step
        settings = model.config.get_text_config().to_dict()
        rates = [rate for key, rate in settings.items() if key.endswith(DROPOUTS)]
        parts = [part for name, part in model.named_modules() if "lora_" not in name]  # off with the adapter
        rates += [part.p for part in parts if isinstance(part, nn.Dropout)]
        self._dropout = any(isinstance(rate, int | float) and rate > 0 for rate in rates)
        self._model = model
        self._step = -1
        # Input ids, attention mask, hidden states, and inputs for images
        self._passes: list[tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]] = []
        self._paused = False
        self._handle = backbone(model).register_forward_hook(self._record, with_kwargs=True)

    def close(self) -> None:
        self._handle.remove()
        self._passes.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context without recording: the reward's own passes are not the trainer's."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def take(self, rows: Sequence[Row]) -> list[Tensor | None]:
        """Hidden states of shape `(T, D)` of each row of `T` tokens that was recorded. All records are dropped."""
        known: dict[tuple[int, ...], list[ImageInputs | None]] = defaultdict(list)
        for token_ids, images in rows:
            known[token_ids].append(images)
        found: dict[Row, Tensor] = {}
        for input_ids, mask, hidden_states, given in self._passes:
            offsets: Counter[str] = Counter()
            for row, (ids, keep, states) in enumerate(zip(input_ids, mask.bool(), hidden_states, strict=True)):
                key = tuple(ids[keep].tolist())
                theirs: ImageInputs | None = None
                if given:
                    owners = [own for own in known[key] if _is_given(own, given, offsets, row, keep)]
                    if not owners:
                        break  # the offsets of the following rows' images are unknown
                    theirs = owners[0]
                    for name, tensor in () if theirs is None else theirs.tensors.items():
                        offsets[name] += len(tensor)
                reads_whole, reads_padded = self._reads
                if reads_whole if keep[0] else reads_padded:
                    found[key, theirs] = states[keep.to(states.device)]
        self._passes.clear()
        return [found.get(row) for row in rows]

    @cached_property
    def _reads(self) -> tuple[bool, bool]:
        """Whether rows have the same states as alone: those that begin with a token, and those padded there."""
        with self.paused():
            rope = RopeLengths.from_config(self._model.config)
            whole = not (rope.limits or rope.unknown or why_alone(self._model))
            whole = whole and why_alone_by_length(self._model, rope, longest_pass=0) is None
            # Trainers pad prompts on the left and give no positions.
            return whole, whole and reads_padding(self._model)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        input_ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        # Not a pass over whole rows: generation (a cache), training (gradients), or the reward's own. Code compiled
        # with the model could not read the step.
        if torch.compiler.is_compiling() or torch.is_grad_enabled() or kwargs.get("use_cache") is not False:
            return
        own = ("input_ids", "attention_mask", "logits_to_keep")
        given = {key: value for key, value in kwargs.items() if isinstance(value, Tensor) and key not in own}
        # Rows cannot be found by other inputs: positions, embeddings, a cache.
        if input_ids is None or mask is None or not given.keys() <= KNOWN_INPUTS:
            return
        if self._paused or not self._is_frozen() or (module.training and self._dropout):
            return
        if self._step != self._current_step():
            self._passes.clear()
            self._step = self._current_step()
        self._passes.append((input_ids.cpu(), mask.cpu(), output.last_hidden_state.detach(), given))


def _is_given(
    images: ImageInputs | None, given: Mapping[str, Tensor], offsets: Mapping[str, int], row: int, keep: Tensor
) -> bool:
    """
    Whether a row of a pass was given these images. `given` are the pass's concatenated inputs for the images of all
    its rows, and for their tokens; `offsets` are where those of this row would begin in each of them; `keep`, of shape
    `(T,)`, is `True` for the row's tokens, `False` for padding.
    """
    tensors: Mapping[str, Tensor] = {} if images is None else images.tensors
    if images is not None and tensors.keys() != given.keys():
        return False
    for name, whole in given.items():
        own = tensors.get(name)
        if name in TOKEN_KEYS:
            if whole.shape[1] != len(keep):
                return False  # for other tokens than the ids, as seen with Gemma 3 in TRL's RLOO
            types = whole[row][keep.to(whole.device)].cpu()
            length = 0 if own is None else own.shape[1]
            if types[length:].any() or (own is not None and not torch.equal(types[:length], own[0])):
                return False
        elif own is not None:
            theirs = whole[offsets[name] : offsets[name] + len(own)].cpu()
            # Trainers pad inputs whose number of parts (tiles) differs between rows.
            if theirs.ndim != own.ndim or any(a < b for a, b in zip(theirs.shape, own.shape, strict=True)):
                return False
            padded = torch.zeros_like(theirs)
            padded[tuple(map(slice, own.shape))] = own.to(theirs.dtype)
            if not torch.equal(theirs, padded):
                return False
    return True


def token_log_probs(trainer: Any, model: Any, output: Mapping[str, Any], batch_size: int) -> Tensor:
    """
    Log-probabilities of a batch's completions under a `model`, of shape `(B, T)`, as TRL's GRPO and RLOO trainers
    compute those of their policy; `output` is what the trainer made of the batch.
    """
    from trl.models.utils import disable_gradient_checkpointing  # heavy, and who scores a file has no trainer

    compute = trainer._get_per_token_logps_and_entropies
    images = {name: output[name] for name in inspect.signature(compute).parameters if name in output}
    ids, mask = (
        torch.cat([output[f"prompt_{kind}"], output[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
    )
    num_tokens = output["completion_ids"].shape[1]
    with torch.no_grad(), disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs):
        log_probs, *_ = compute(model, ids, mask, num_tokens, batch_size, **images)
    return log_probs


def loss_mask(output: Mapping[str, Any]) -> Tensor:
    """`True` for the tokens that the loss of TRL's trainers counts, of shape `(B, T)`."""
    mask = output["completion_mask"].bool()
    return mask & output["tool_mask"].bool() if "tool_mask" in output else mask
