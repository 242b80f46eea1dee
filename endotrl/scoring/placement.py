# SPDX-License-Identifier: Apache-2.0
"""Whose weights the frozen model uses: its own copy, or a loaded model. A trainer's frozen weights are in [`sharing`]."""

import os
from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
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

from ..quickstart_model import quickstart_model_path
from .exclusive import exclusive
from .recording import ReferenceRecorder
from .sharding import loaded_whole, whole_weights


NEEDS_CAUSAL_LM = (
    "The endogenous reward is read off the next-token logits of a causal language model: pass one that "
    "`AutoModelForCausalLM` loads."
)


class Placement(Protocol):
    """Where the frozen weights live. `active` is the only way to reach them, one thread at a time."""

    config: PretrainedConfig
    eos_token_ids: list[int]
    description: str
    recorder: ReferenceRecorder | None

    @property
    def is_own(self) -> bool:
        """Whether nobody else uses the weights. Others must not find tensors that inference mode left in the modules."""
        ...

    def active(self) -> AbstractContextManager[PreTrainedModel]:
        """Context manager that yields the model in evaluation mode with exactly the frozen weights."""
        ...


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
    except (OSError, ValueError) as error:
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
    """

    def __init__(
        self,
        model: str,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
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

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        with exclusive(self), self._loaded() as model:
            yield model

    @contextmanager
    def _loaded(self) -> Iterator[PreTrainedModel]:
        if self._accelerator is not None:
            if self._model is None:
                self._model, self._wrapped = self._load_sharded(self._accelerator)
            with whole_weights(self._wrapped, self._accelerator):
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
            model, info = self._from_pretrained(device, output_loading_info=True)
        check_complete(f"the frozen model {self._name!r}", info["missing_keys"])
        return model.to(device).eval().requires_grad_(False)

    def _load_sharded(self, accelerator: Accelerator) -> tuple[PreTrainedModel, Any]:
        """The model, and what wraps it."""
        from trl.models import prepare_deepspeed, prepare_fsdp

        if accelerator.is_fsdp2:
            with loaded_whole():
                model = self._from_pretrained(accelerator.device)
            return model, prepare_fsdp(model.requires_grad_(False), accelerator)
        model = self._from_pretrained(accelerator.device)  # arrives in parts
        return model, prepare_deepspeed(model.requires_grad_(False), accelerator)

    def _from_pretrained(self, device: torch.device, **kwargs: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            self._name, dtype=resolve_dtype(self._dtype, device), trust_remote_code=self._trust_remote_code, **kwargs
        )


class LoadedModel:
    """
    A model instance that the user has loaded. It is used as it is, without a copy, and must not be trained: that would
    move the reward. Training it, or putting an adapter into it, is noticed and refused.
    """

    is_own = False

    def __init__(self, model: PreTrainedModel) -> None:
        if model.config.is_encoder_decoder or model.get_output_embeddings() is None:
            kind = "an encoder-decoder model" if model.config.is_encoder_decoder else "a model without an LM head"
            raise ValueError(f"A {type(model).__name__} was given, {kind}. {NEEDS_CAUSAL_LM}")
        self.config = model.config
        self.eos_token_ids = eos_token_ids(model.generation_config)
        self.description = f"the {type(model).__name__} given"
        self.recorder: ReferenceRecorder | None = None
        self._model: PreTrainedModel = model
        self._fingerprint = _fingerprint(model)

    def as_own_copy(self, trust_remote_code: bool = False) -> OwnCopy:
        """
        The same model by name, for a pickle.

        Raises:
            `TypeError`: If the model was not loaded from a path or hub.
        """
        name = self.config._name_or_path
        if not name:
            raise TypeError(
                "A reward made from a model instance can be pickled only if the instance was loaded from a path or the "
                "hub, because weights are not pickled. Pass a path to `EndogenousReward`."
            )
        return OwnCopy(name, self._model.dtype, trust_remote_code=trust_remote_code)

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        with exclusive(self._model), eval_mode(self._model):
            self._check_unchanged()
            yield self._model

    def _check_unchanged(self) -> None:
        (versions, sample), (first_versions, first_sample) = _fingerprint(self._model), self._fingerprint
        if versions != first_versions or not torch.allclose(sample, first_sample, rtol=0, atol=0, equal_nan=True):
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
        return LoadedModel(model)
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


def _fingerprint(model: nn.Module) -> tuple[list[tuple[int, int]], Tensor]:
    """Changes with the set of parameters (an adapter adds some) and with their values."""
    # In-place updates raise a tensor's version counter, except those of fused optimizers (the default of `Trainer`) and
    # through `.data`. These touch every weight that has a gradient, so that a sample of each tensor shows them.
    versions = [(id(parameter), parameter._version) for parameter in model.parameters()]
    samples = [
        parameter.detach().flatten()[:: max(1, parameter.numel() // 64)].float().cpu()
        for parameter in model.parameters()
        if not parameter.is_meta  # offloaded
    ]
    return versions, torch.cat(samples)


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
