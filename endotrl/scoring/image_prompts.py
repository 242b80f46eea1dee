# SPDX-License-Identifier: Apache-2.0
"""Hidden states after prompts with images, with one pass per prompt for all of its completions."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..rendering.images import TOKEN_KEYS, ImageInputs
from .batching import pad_ids
from .forward_pass import backbone, execution_device, rope_as_made


class ImagePrompt:
    """A prompt with images after one pass, with the KV cache from which completions continue."""

    def __init__(self, model: PreTrainedModel, prompt_ids: Sequence[int], images: ImageInputs) -> None:
        self._model = model
        with rope_as_made(model):
            output = backbone(model)(**_inputs(model, prompt_ids, images), use_cache=True)
        self._last_state = output.last_hidden_state[:, -1:]  # (1, 1, D)
        self._cache = output.past_key_values

    @property
    def is_repeatable(self) -> bool:
        """Whether several completions can continue from it: not from linear attention's, in transformers 5.23."""
        return all(hasattr(layer, "batch_repeat_interleave") for layer in self._cache.layers)

    def states(self, continuations: Sequence[Sequence[int]]) -> Tensor:
        """Hidden states `(B, T + 1, D)` of continuations. No other prompt may run before: Qwen keeps its positions."""
        first = self._last_state.expand(len(continuations), 1, -1)
        if not any(continuations):
            return first
        input_ids, _ = pad_ids(continuations)
        device = execution_device(self._model, self._model.get_input_embeddings())
        cache = copy.deepcopy(self._cache)  # a pass extends it
        cache.batch_repeat_interleave(len(continuations))
        with rope_as_made(self._model):
            # No mask: padding is on the right, and with a mask, Qwen-VL counts positions from the beginning.
            output = backbone(self._model)(input_ids=input_ids.to(device), past_key_values=cache, use_cache=True)
        return torch.cat([first.to(output.last_hidden_state.device), output.last_hidden_state], dim=1)


def whole_row_states(
    model: PreTrainedModel, prompt_ids: Sequence[int], images: ImageInputs, continuation: Sequence[int]
) -> Tensor:
    """Hidden states of shape `(P + T, D)` of a prompt with images and its continuation, in their own pass."""
    inputs = _inputs(model, prompt_ids, images, continuation)
    with rope_as_made(model):
        return backbone(model)(**inputs, use_cache=False).last_hidden_state[0]


def own_logits(
    model: PreTrainedModel, prompt_ids: Sequence[int], images: ImageInputs, continuation: Sequence[int]
) -> Tensor:
    """The model's own logits at the end of the prompt and in the continuation, of shape `(T + 1, V)`."""
    inputs = _inputs(model, prompt_ids, images, continuation)
    kept = len(continuation) + 1
    # For a long prompt, all logits would take more memory than the model.
    keep = {"logits_to_keep": kept} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with rope_as_made(model):
        return model(**inputs, **keep, use_cache=False).logits[0, -kept:].float()


def check_inputs(model: PreTrainedModel, images: ImageInputs) -> None:
    """Raises `ValueError` if a processor gives other inputs than the model takes: most would ignore them silently."""
    taken = set(inspect.signature(model.forward).parameters)
    unknown = sorted(set(images.tensors) - taken)
    missing = [key for key in ("pixel_values", *TOKEN_KEYS) if key in taken and key not in images.tensors]
    if unknown or missing:
        returns = f"returns {', '.join(unknown)}" if unknown else f"does not return {', '.join(missing)}"
        raise ValueError(
            f"The processor {returns}, which the {type(model).__name__} {'does not take' if unknown else 'expects'}. "
            "Pass the model's own processor as `processing_class`."
        )


@contextmanager
def positions_kept(model: PreTrainedModel) -> Iterator[None]:
    """Restores a model's positions of the prompts that it ran before, such as a trainer's."""
    before = [(module, module.rope_deltas) for module in model.modules() if "rope_deltas" in vars(module)]
    try:
        yield
    finally:
        for module, deltas in before:
            module.rope_deltas = deltas


def _inputs(
    model: PreTrainedModel, prompt_ids: Sequence[int], images: ImageInputs, continuation: Sequence[int] = ()
) -> dict[str, Tensor]:
    device = execution_device(model, model.get_input_embeddings())
    input_ids = torch.tensor([[*prompt_ids, *continuation]], device=device)
    mask = torch.ones_like(input_ids)
    return {"input_ids": input_ids, "attention_mask": mask, **images.before(len(continuation), device)}
