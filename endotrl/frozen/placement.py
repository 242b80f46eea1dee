# SPDX-License-Identifier: Apache-2.0
"""Whose weights the frozen model uses: its own copy, or a loaded model. A trainer's frozen weights are in [`sharing`]."""

import copy
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import extract_model_from_parallel, has_offloaded_params, is_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..scoring.exclusive import exclusive
from ..scoring.reference_pass import ReferenceRecorder
from ..scoring.scorer import Placement
from .quickstart_model import quickstart_model_path
from .sharded_weights import loaded_whole, whole_weights
from .weights import have_moved, named_weights, sample_weights, weights_digest


NEEDS_CAUSAL_LM = (
    "The endogenous reward is read off the next-token logits of a causal language model: pass one that "
    "`AutoModelForCausalLM` loads."
)


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """
    The dtype of the frozen model. `"auto"` is bfloat16 on accelerators and float32 on CPU.

    Raises:
        `ValueError`: If `dtype` names no floating dtype of torch.
    """
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(dtype), dtype)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f'`dtype` is {dtype!r}, but it must be "auto", "float32", "bfloat16" or "float16".')
    return resolved


def check_device(device: str | torch.device | None) -> None:
    """Raises `ValueError` if `device` names no device of torch. Whether it is there shows when it is used."""
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'`device` is {device!r}, but it must be one of torch, such as "cuda:0" or "cpu".') from error


def load_config(model: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """
    Config of a model by path or hub id.

    Raises:
        `OSError`: If there is no such model, with the reason.
    """
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, as each family checks its values in its own way
        raise OSError(
            f"The frozen model {model!r} cannot be loaded: it is neither a folder with a model's `config.json` nor a "
            f"model that the Hugging Face hub gives. Check the name, or pass a loaded model. Reason: {error}"
        ) from error


def load_tokenizer(model: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """
    Tokenizer of a model by path or hub id.

    Raises:
        `OSError`: If there is none, or it is damaged, with the reason.
    """
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises plain `Exception` for a file that it cannot read
        raise OSError(
            f"The tokenizer of {model!r} cannot be loaded. Are its files (`tokenizer.json`, `tokenizer_config.json`) beside the "
            f"model's? If they are elsewhere, load them from there, and pass `processing_class`. Reason: {error}"
        ) from error


def check_complete(what: str, missing_keys: Collection[str]) -> None:
    """Raises `OSError` if a checkpoint lacks weights. transformers warns, and fills them with random numbers."""
    if missing_keys:
        raise OSError(
            f"The checkpoint of {what} lacks weights: {', '.join(sorted(missing_keys)[:5])}"
            f"{', ...' if len(missing_keys) > 5 else ''}. It was cut off while it was saved or downloaded, or is of another "
            "kind of model."
        )


class OwnCopy:
    """
    The reward's own frozen copy, loaded on first use and kept on one device.

    Every process keeps a whole copy, unless [`shard`] says otherwise.

    Args:
        model (`str`):
            Path or hub id.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            See [`resolve_dtype`].
        device (`str` or `torch.device`, *optional*):
            Defaults to this process's device, as `accelerate` gives it.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.
        offload (`bool`, *optional*, defaults to `False`):
            Whether to keep the weights in CPU memory while they are not used.
        expected_digest (`str`, *optional*):
            [`weights_digest`] that the loaded model must have.
    """

    def __init__(
        self,
        model: str,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
        expected_digest: str | None = None,
    ) -> None:
        resolve_dtype(dtype, torch.device("cpu"))  # raises now if the dtype is none
        check_device(device)
        self.config = load_config(model, trust_remote_code)
        if self.config.is_encoder_decoder:
            raise ValueError(f"{model!r} is an encoder-decoder model. {NEEDS_CAUSAL_LM}")
        of_its_own_code = "AutoModelForCausalLM" in (vars(self.config).get("auto_map") or {})
        if type(self.config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not of_its_own_code:
            raise ValueError(
                f"{model!r} is a model of type {self.config.model_type!r}, which `AutoModelForCausalLM` does not load. "
                f"{NEEDS_CAUSAL_LM} Of a model that reads images too, load it yourself, and pass the instance: it scores text."
            )
        self.eos_token_ids = eos_token_ids(_load_generation_config(model, self.config))
        self.description = f"own copy of {model}"
        self.recorder: ReferenceRecorder | None = None
        self._name = model
        self._dtype, self._device, self._trust_remote_code = dtype, device, trust_remote_code
        self._offload = offload
        self._expected_digest = expected_digest
        self._model: PreTrainedModel | None = None
        # Of a trainer that shards, if this copy is to be sharded too.
        self._accelerator: Accelerator | None = None
        self._wrapped: Any = None

    @property
    def is_own(self) -> bool:
        return self._accelerator is None  # a sharded copy is the engine's as well

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_accelerator": None, "_wrapped": None}

    def shard(self, accelerator: Accelerator) -> None:
        """
        Splits the copy over the processes, as the policy is split. It is put together for each call, which all processes
        must make together.

        Args:
            accelerator ([`~accelerate.Accelerator`]):
                Of a trainer that shards its weights: see [`shards_weights`].

        Raises:
            `ValueError`: If the copy is loaded already, or is to be offloaded or on another device.
        """
        if self._model is not None or self._offload or self._device is not None:
            raise ValueError(
                f"The {self.description} cannot be sharded: it is loaded already, or was given a `device` or `offload=True`. "
                "Shard it before it is used, without these."
            )
        self._accelerator = accelerator
        self.description = f"own copy of {self._name}, sharded"

    def digest(self, dtype: torch.dtype) -> str:
        """
        [`weights_digest`] of this copy. If it is not loaded yet, it is for the time of the call, into CPU memory.

        Args:
            dtype (`torch.dtype`):
                Dtype in which to load it.
        """
        if self._model is not None:
            with self.active() as model:
                return weights_digest(model)
        with loaded_whole():
            return weights_digest(self._from_pretrained(dtype))

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        with exclusive(self), self._loaded() as model:
            yield model

    @contextmanager
    def _loaded(self) -> Iterator[PreTrainedModel]:
        if self._accelerator is not None:
            is_new = self._model is None
            if self._model is None:
                self._model, self._wrapped = self._load_sharded(self._accelerator)
            with whole_weights(self._wrapped, self._accelerator):
                if is_new:
                    self._check_digest(self._model)
                yield self._model
            return
        device = PartialState().device if self._device is None else torch.device(self._device)
        if self._model is None:
            self._model = self._load(device)
        elif self._offload:
            self._model.to(device)
        try:
            yield self._model
        finally:
            if self._offload:
                self._model.to("cpu")

    def _load(self, device: torch.device) -> PreTrainedModel:
        with loaded_whole():
            model = self._from_pretrained(resolve_dtype(self._dtype, device))
        self._check_digest(model)
        return model.to(device).eval().requires_grad_(False)

    def _load_sharded(self, accelerator: Accelerator) -> tuple[PreTrainedModel, Any]:
        """The model, and what wraps it."""
        from trl.models import prepare_deepspeed, prepare_fsdp

        dtype = resolve_dtype(self._dtype, accelerator.device)
        if accelerator.is_fsdp2:
            with loaded_whole():
                model = self._from_pretrained(dtype)
            return model, prepare_fsdp(model.requires_grad_(False), accelerator)
        model = self._from_pretrained(dtype)  # arrives in parts
        return model, prepare_deepspeed(model.requires_grad_(False), accelerator)

    def _from_pretrained(self, dtype: torch.dtype) -> PreTrainedModel:
        model, info = AutoModelForCausalLM.from_pretrained(
            self._name, dtype=dtype, trust_remote_code=self._trust_remote_code, output_loading_info=True
        )
        check_complete(f"the frozen model {self._name!r}", info["missing_keys"])
        return model

    def _check_digest(self, model: PreTrainedModel) -> None:
        if self._expected_digest is not None and weights_digest(model) != self._expected_digest:
            raise OSError(
                f"The reward was made from a model instance that was loaded from {self._name!r} and changed after "
                "that (an adapter merged or put into it, weights trained, quantised or resized), so that its pickle, "
                "which has no weights, cannot give it back. Save the instance (`save_pretrained`), and make the "
                "reward with that path."
            )


class LoadedModel:
    """
    A model instance that the user has loaded. It is used as it is, without a copy, and must not be trained: that would
    move the reward. Training it, or putting an adapter into it, is noticed and refused.
    """

    is_own = False

    def __init__(self, model: PreTrainedModel, trust_remote_code: bool = False) -> None:
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
        self.description = f"the {type(model).__name__} given"
        self.recorder: ReferenceRecorder | None = None
        self._trust_remote_code = trust_remote_code
        self._model: PreTrainedModel = model
        self._versions, self._sample = _versions(model), sample_weights(named_weights(model))

    def __deepcopy__(self, memo: dict[int, Any]) -> "LoadedModel":
        return self  # the instance is not copied, as it is not when the reward is made

    def __reduce__(self) -> tuple[Any, ...]:
        return copy.copy, (self.as_own_copy(),)  # unpickled as a copy of its own

    def as_own_copy(self) -> OwnCopy:
        """
        The same model by name, for a pickle. That it has the same weights is checked when it is loaded.

        Raises:
            `TypeError`: If the model was not loaded from a path or hub.
        """
        name = self.config._name_or_path
        if not name:
            raise TypeError(
                "A reward made from a model instance can be pickled only if the instance was loaded from a path or the "
                "hub, because weights are not pickled. Pass a path to `EndogenousReward`."
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
        with exclusive(self._model), eval_mode(self._model):
            self._check_unchanged()
            yield self._model

    def _check_unchanged(self) -> None:
        if _versions(self._model) != self._versions or have_moved(
            self._sample, sample_weights(named_weights(self._model))
        ):
            raise RuntimeError(
                "The model instance given to the endogenous reward has changed since: its weights were updated, or an "
                "adapter was put into it. The reward must come from a frozen model. If it is the policy that you "
                "train, share its frozen base with `EndogenousReward(model=None)` and `reward.attach(trainer)`; or "
                "pass a path, so that the reward loads its own copy."
            )


def place(
    model: str | PreTrainedModel | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    trust_remote_code: bool,
    offload: bool,
) -> Placement | None:
    """
    Where the frozen weights are to come from, by what the user gave as `model`; `None` if a trainer has them.

    Raises:
        `TypeError`: If `model` is no model.
    """
    if model is None:
        return None
    if isinstance(model, nn.Module):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PreTrainedModel):
        return LoadedModel(model, trust_remote_code)
    if isinstance(model, nn.Module) and is_peft_model(model):
        raise TypeError(
            f"`model` is a {type(model).__name__}, whose adapter may be trained, switched or taken off, so that it is "
            "no frozen model. Merge the adapter (`model.merge_and_unload()`) and pass what this returns. If it is "
            "the policy that you train, share its frozen base with `EndogenousReward(model=None)` and "
            "`reward.attach(trainer)`."
        )
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"`model` is a {type(model).__name__}, but it must be a path or hub id, a loaded causal language model of "
            "transformers, or None to share the weights of a trainer."
        )
    model = os.fspath(model)
    if model == "quickstart":
        model = quickstart_model_path()
    return OwnCopy(model, dtype, device, trust_remote_code, offload)


def _load_generation_config(model: str, config: PretrainedConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # the file is optional
        return GenerationConfig.from_model_config(config)


def eos_token_ids(generation_config: GenerationConfig | None) -> list[int]:
    """Tokens that end a completion; none if the config names none."""
    eos = None if generation_config is None else generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def _versions(model: PreTrainedModel) -> dict[str, tuple[torch.dtype, int]]:
    """
    Changes with most updates of a weight. What it does not see, fused optimizers and `.data`, changes all values of a
    tensor.
    """
    return {
        name: (tensor.dtype, 0 if tensor.is_inference() else tensor._version)
        for name, tensor in named_weights(model)
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
