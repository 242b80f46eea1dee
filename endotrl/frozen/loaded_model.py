# SPDX-License-Identifier: Apache-2.0
"""A frozen model that the user has loaded."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import has_offloaded_params
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..scoring.forward_pass import exclusive
from ..scoring.reference_pass import ReferenceRecorder
from .adapters import UsedAdapter
from .names import eos_token_ids
from .own_copy import NEEDS_CAUSAL_LM, OwnCopy
from .weights import have_moved, named_weights, sample_weights, weights_digest


class LoadedModel:
    """
    A model instance that the user has loaded, or the base model of a [`~peft.PeftModel`] whose `adapter` is on. It is
    used as it is, without a copy, and must not be trained: that would move the reward. Training it, or putting an
    adapter into it, is noticed and refused; other adapters, and their base model, may be a trainer's policy.
    """

    is_own = False

    def __init__(
        self, model: PreTrainedModel, trust_remote_code: bool = False, adapter: UsedAdapter | None = None
    ) -> None:
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            kind = "an encoder-decoder model" if model.config.is_encoder_decoder else "a model without an LM head"
            raise ValueError(f"A {type(model).__name__} was given, {kind}. {NEEDS_CAUSAL_LM}")
        on_meta = [name for name, tensor in named_weights(model) if tensor.is_meta]
        if on_meta and not any(has_offloaded_params(module) for module in model.modules()):
            raise ValueError(
                f"The {type(model).__name__} given has weights on the device `meta` ({on_meta[0]}, ...), and none of "
                "its modules loads them: they were never loaded, or are offloaded as one block. Load it with "
                "`from_pretrained`, which offloads layer by layer where a `device_map` says so."
            )
        self.config = model.config
        self.eos_token_ids = eos_token_ids(model.generation_config)
        with_adapter = "" if adapter is None else f" with the adapter {adapter.name!r}"
        self.description = f"the {type(model).__name__} given{with_adapter}"
        self.recorder: ReferenceRecorder | None = None
        self._trust_remote_code = trust_remote_code
        self._model: PreTrainedModel = model
        self._adapter = adapter
        self._versions, self._sample = _versions(self._weights()), sample_weights(self._weights())

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadedModel":
        return self  # the instance is not copied, as it is not when the reward is made

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.as_own_copy(),)  # unpickled as a copy of its own

    def as_own_copy(self) -> OwnCopy:
        """The same model by name, for a pickle; its weights are compared when it is loaded."""
        name = self.config._name_or_path
        if self._adapter is not None:
            raise TypeError(
                f"A reward made from a `PeftModel` cannot be pickled, because weights are not, and {name!r} is the "
                "name of its base model. Pass the adapter's path to `EndogenousReward`."
            )
        if not name:
            raise TypeError(
                "A reward made from a model instance can be pickled only if the instance was loaded from a path or "
                "the hub, because weights are not pickled. Pass a path to `EndogenousReward`."
            )
        return OwnCopy(
            name,
            self._model.dtype,
            trust_remote_code=self._trust_remote_code,
            expected_digest=weights_digest(self._model),
        )

    def digest(self, dtype: torch.dtype) -> str:
        """[`weights_digest`] of the instance, without an adapter that a trainer has put into it since."""
        base = sample_weights(named_weights(self._model, without_adapters=True))
        return weights_digest(self._model, without_adapters=not have_moved(self._sample, base))

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        adapter = nullcontext() if self._adapter is None else self._adapter.active()
        with exclusive(self._model), eval_mode(self._model), adapter:
            self._check_unchanged()
            yield self._model

    def _weights(self) -> list[tuple[str, Tensor]]:
        weights = named_weights(self._model)
        return list(weights if self._adapter is None else self._adapter.without_others(weights))

    def _check_unchanged(self) -> None:
        if _versions(self._weights()) != self._versions or have_moved(self._sample, sample_weights(self._weights())):
            raise RuntimeError(
                "The model instance given to the endogenous reward has changed since: its weights were updated, or an "
                "adapter was put into it. The reward must come from a frozen model. If it is the policy that you "
                "train, share its frozen base with `EndogenousReward(model=None)` and `reward.attach(trainer)`; or "
                "pass a path, so that the reward loads its own copy."
            )


def _versions(weights: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[torch.dtype, int]]:
    """Changes with updates of weights: with all but fused optimizers and `.data`, which change all of a tensor."""
    return {
        name: (tensor.dtype, 0 if tensor.is_inference() else tensor._version)
        for name, tensor in weights
        # Offloaded weights are made anew by each pass, and kernels rearrange those that are quantised.
        if tensor.is_floating_point() and not tensor.is_meta
    }


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is as it was (a plain `train()` would wake frozen dropout)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
