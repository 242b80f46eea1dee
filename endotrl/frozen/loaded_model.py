# SPDX-License-Identifier: Apache-2.0
"""Frozen model loaded by the user; named weights of a model, their digest, and detection of changes to them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import is_peft_available

from ..scoring.forward_pass import backbone, exclusive
from .adapters import UsedAdapter
from .names import eos_token_ids


NEEDS_CAUSAL_LM = (
    "The endogenous reward is computed from the logits of a causal language model. Pass one that "
    "`AutoModelForCausalLM` can load or, if it reads images, `AutoModelForImageTextToText`."
)
# Values per tensor that are compared to detect a change.
SAMPLED_VALUES = 512
# Settings of a model family that trainers and generation set, and that do not affect logits.
HARMLESS_SETTINGS = ("use_cache", "output_", "router_aux_loss_coef", "router_z_loss_coef")


class LoadedModel:
    """
    A model instance loaded by the user, or the base model of a [`~peft.PeftModel`] with `adapter` enabled: not a copy.
    Training it, or adding an adapter to it, is detected and refused; other adapters may belong to a policy.
    """

    is_own, recorder = False, None

    def __init__(self, model: PreTrainedModel, adapter: UsedAdapter | None = None) -> None:
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            kind = "is an encoder-decoder model" if model.config.is_encoder_decoder else "has no LM head"
            raise ValueError(f"The {type(model).__name__} given {kind}. {NEEDS_CAUSAL_LM}")
        on_meta = [name for name, tensor in named_weights(model) if tensor.is_meta]
        if on_meta and not any(has_offloaded_params(module) for module in model.modules()):
            raise ValueError(
                f"The {type(model).__name__} given has weights on the `meta` device ({on_meta[0]}, ...), and no hook "
                "that loads them. Load the model with `from_pretrained`, which offloads it layer by layer."
            )
        self.config = model.config
        self.eos_token_ids = eos_token_ids(model.generation_config)
        with_adapter = "" if adapter is None else f" with the adapter {adapter.name!r}"
        self.description = f"the {type(model).__name__} given{with_adapter}"
        self._model: PreTrainedModel = model
        self._adapter = adapter
        self._state = self._weights_state()

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadedModel":
        return self  # the instance is not copied, as it was not when the reward was made

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError(
            "A reward made from a loaded model cannot be pickled, because weights are not pickled. Save the model, or "
            "its adapter, with `save_pretrained`, and make the reward with that path."
        )

    def digest(self, dtype: torch.dtype) -> str:
        """[`weights_digest`] of the instance, without an adapter that a trainer has added to it since."""
        base = sample_weights(named_weights(self._model, without_adapters=True))
        return weights_digest(self._model, without_adapters=not have_moved(self._state[1], base))

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        adapter = nullcontext() if self._adapter is None else self._adapter.active()
        with exclusive(self._model), eval_mode(self._model), adapter:
            versions, sample = self._weights_state()
            if versions != self._state[0] or have_moved(self._state[1], sample):
                raise RuntimeError(
                    "The model given to the endogenous reward has changed since: its weights were updated, or an "
                    "adapter was added. Pass a path, so that the reward loads its own copy, or share the policy's "
                    "frozen base with `EndogenousReward(model=None)` and `reward.attach(trainer)`."
                )
            yield self._model

    def _weights_state(self) -> tuple[dict[str, tuple[torch.dtype, int]], dict[str, Tensor]]:
        weights = named_weights(self._model)
        kept = list(weights if self._adapter is None else self._adapter.without_others(weights))
        return _versions(kept), sample_weights(kept)


def named_weights(
    model: PreTrainedModel, without_adapters: bool = False, load_offloaded: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers of backbone and head; optionally without PEFT's, and with offloaded ones loaded."""
    yield from _walk(backbone(model), "backbone", without_adapters, load_offloaded)
    yield from _walk(model.get_output_embeddings(), "head", without_adapters, load_offloaded)


def _walk(module: nn.Module, name: str, without_adapters: bool, load_offloaded: bool) -> Iterator[tuple[str, Tensor]]:
    if without_adapters and is_peft_available():
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            own = module.base_layer if isinstance(module, BaseTunerLayer) else module.original_module
            yield from _walk(own, name, without_adapters, load_offloaded)
            return
    with align_module_device(module) if load_offloaded else nullcontext():
        saved = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, tensor in chain(module._parameters.items(), saved.items()):
            if tensor is not None:
                yield from _plain_tensors(f"{name}.{key}", tensor)
        for key, part in module._modules.items():
            if part is not None:
                yield from _walk(part, f"{name}.{key}", without_adapters, load_offloaded)


def _plain_tensors(name: str, tensor: Any) -> Iterator[tuple[str, Tensor]]:
    """The plain tensors of a tensor subclass (quantised by torchao, sharded), or the tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{part}", getattr(tensor, part))


@torch.no_grad()
def weights_digest(model: PreTrainedModel, without_adapters: bool = False) -> str:
    """Digest of the weights, rounded to bfloat16 so that copies in any dtype agree, and of settings of the logits."""
    digest = hashlib.blake2b(_settings(model.config).encode())
    for name, tensor in named_weights(model, without_adapters, load_offloaded=True):
        digest.update(f"{name}{list(tensor.shape)}".encode())
        bits = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
        bits = bits.contiguous().flatten().view(torch.uint8)
        words = pad(bits, (0, -bits.numel() % 8192)).view(torch.int64).view(-1, 1024)
        # Integer sums are equal in any order, hence on any device. Odd factors distinguish positions.
        digest.update((words * torch.arange(1, 2048, 2, device=words.device)).sum(dim=1).cpu().numpy().tobytes())
    return digest.hexdigest()


def _settings(config: PretrainedConfig) -> str:
    text_config = config.get_text_config()
    common = PretrainedConfig().to_dict()
    settings = {
        key: value
        for key, value in text_config.to_dict().items()
        if key not in common and not key.startswith(HARMLESS_SETTINGS) and not key.endswith(("token_id", "dropout"))
    }
    return json.dumps(settings, sort_keys=True, default=str)


def sample_weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Some values per tensor for [`have_moved`]; none of offloaded ones and integers, which kernels rearrange."""
    return {
        # An odd stride: an even one would hit the same few columns of every matrix.
        name: tensor.detach().flatten()[:: max(1, tensor.numel() // SAMPLED_VALUES) | 1].to("cpu", copy=True)
        for name, tensor in weights
        if tensor.is_floating_point() and not tensor.is_meta
    }


def have_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether two samples are of different weights, in the lower of their dtypes: a trainer may cast its model."""
    if before.keys() != after.keys():
        return True
    for name, first in before.items():
        lower = min(first.dtype, after[name].dtype, key=lambda dtype: dtype.itemsize)
        # Bitwise, so that NaN equals itself.
        if not torch.equal(first.to(lower).view(torch.uint8), after[name].to(lower).view(torch.uint8)):
            return True
    return False


def _versions(weights: Iterable[tuple[str, Tensor]]) -> dict[str, tuple[torch.dtype, int]]:
    """Version counters of weights, changed by all updates but fused optimizers' and `.data`'s (of whole tensors)."""
    return {
        name: (tensor.dtype, 0 if tensor.is_inference() else tensor._version)
        for name, tensor in weights
        # Offloaded weights are recreated in each pass, and kernels rearrange quantised ones.
        if tensor.is_floating_point() and not tensor.is_meta
    }


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Context in evaluation mode; on exit every module is restored (a plain `train()` would enable frozen dropout)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
