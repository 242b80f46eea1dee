# SPDX-License-Identifier: Apache-2.0
"""Whose weights the frozen model uses: its own copy, a loaded model, or the trainer's frozen weights."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import (
    is_deepspeed_zero3_enabled,
    set_hf_deepspeed_config,
    unset_hf_deepspeed_config,
)

from .recording import ReferenceRecorder


NEEDS_CAUSAL_LM = (
    "The endogenous reward is read off the next-token logits of a causal language model: pass one that "
    "`AutoModelForCausalLM` loads."
)


class Placement(Protocol):
    """Where the frozen weights live. `active` is the only way to reach them."""

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
        self.config = load_config(model, trust_remote_code)
        if self.config.is_encoder_decoder:
            raise ValueError(f"{model!r} is an encoder-decoder model. {NEEDS_CAUSAL_LM}")
        self.eos_token_ids = _eos_token_ids(_load_generation_config(model, self.config))
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
        with _loaded_whole():
            return self._from_pretrained(device).to(device).eval().requires_grad_(False)

    def _load_sharded(self, accelerator: Accelerator) -> tuple[PreTrainedModel, Any]:
        """The model, and what wraps it."""
        from trl.models import prepare_deepspeed, prepare_fsdp

        if accelerator.is_fsdp2:
            with _loaded_whole():
                model = self._from_pretrained(accelerator.device)
            return model, prepare_fsdp(model.requires_grad_(False), accelerator)
        model = self._from_pretrained(accelerator.device)  # arrives in parts
        return model, prepare_deepspeed(model.requires_grad_(False), accelerator)

    def _from_pretrained(self, device: torch.device) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self._name, dtype=resolve_dtype(self._dtype, device), trust_remote_code=self._trust_remote_code
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
        self.eos_token_ids = _eos_token_ids(model.generation_config)
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
        (versions, sample), (first_versions, first_sample) = _fingerprint(self._model), self._fingerprint
        if versions != first_versions or not torch.allclose(sample, first_sample, rtol=0, atol=0, equal_nan=True):
            raise RuntimeError(
                "The model instance given to the endogenous reward has changed since: its weights were updated, or an "
                "adapter was put into it. The reward must come from a frozen model. If it is the policy that you "
                "train, share its frozen base with `EndogenousReward(model=None)` and `reward.attach(trainer)`; or "
                "pass a path, so that the reward loads its own copy."
            )
        with _eval_mode(self._model):
            yield self._model


class AdapterDisabled:
    """The policy of a LoRA run with its adapter disabled: the frozen base model, without another parameter in memory."""

    is_own = False

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._accelerator = trainer.accelerator
        self._policy = trainer.accelerator.unwrap_model(trainer.model)
        self.config = self._policy.config
        self.eos_token_ids = _eos_token_ids(self._policy.generation_config)
        self.description = "the policy's frozen base (adapter disabled)"
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = next((module for module in self._policy.modules() if isinstance(module, BaseTunerLayer)), None)
        # Prompt tuning adapts no layer, and its passes begin with virtual tokens.
        self.recorder: ReferenceRecorder | None = None
        if adapted is not None:
            self.recorder = ReferenceRecorder(
                self._policy.get_base_model(),
                is_frozen=lambda: adapted.disable_adapters,
                current_step=lambda: trainer.state.global_step,
            )

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        # The precision in which the trainer runs its own reference pass.
        with (
            # The trainer wraps the policy when it starts to train.
            whole_weights(self._trainer.model_wrapped, self._accelerator),
            self._accelerator.autocast(),
            _eval_mode(self._policy),
            self._policy.disable_adapter(),
            _paused(self.recorder),
        ):
            yield self._policy.get_base_model()


class SharedReference:
    """The reference model of a trainer with `beta > 0`."""

    is_own = False

    def __init__(self, trainer: Any) -> None:
        self._accelerator = trainer.accelerator
        self._wrapped = trainer.ref_model
        self._model = trainer.accelerator.unwrap_model(trainer.ref_model)
        self.config = self._model.config
        self.eos_token_ids = _eos_token_ids(self._model.generation_config)
        self.description = "the trainer's reference model"
        self.recorder: ReferenceRecorder | None = ReferenceRecorder(
            self._model, is_frozen=lambda: True, current_step=lambda: trainer.state.global_step
        )

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        with (
            whole_weights(self._wrapped, self._accelerator),
            self._accelerator.autocast(),
            _eval_mode(self._model),
            _paused(self.recorder),
        ):
            yield self._model


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
    if isinstance(model, PreTrainedModel):
        return LoadedModel(model)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"`model` is a {type(model).__name__}, but it must be a path or hub id, a loaded causal language model of "
            "transformers, or None to share the weights of a trainer."
        )
    model = os.fspath(model)
    if model == "quickstart":
        from ..quickstart.model import quickstart_model_path

        model = quickstart_model_path()
    return OwnCopy(model, dtype, device, trust_remote_code, offload)


def share_with(trainer: Any) -> AdapterDisabled | SharedReference:
    """
    Finds the frozen weights that a TRL trainer already holds: with LoRA, the policy without its adapter; with
    `beta > 0`, the reference model.

    Raises:
        `ValueError`: If the trainer holds no frozen weights, moves them, or shards them by FSDP1.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "The trainer shards its weights by FSDP1, whose weights cannot be shared. Use FSDP2 (`fsdp_version: 2`) or "
            "DeepSpeed ZeRO-3, or give the reward its own copy: `EndogenousReward(model=<path>)` without `attach`."
        )
    if is_peft_model(policy):
        if "ref" in policy.peft_config:
            raise ValueError(
                "The trainer continues a trained adapter and keeps its start as the adapter 'ref', so the model without "
                "adapter is not the policy's start. Merge the adapter first, or give the reward its own copy."
            )
        # LoRA starts as the identity, B = 0. Anything else was trained before, or has moved weights of the base model
        # into the adapter (PiSSA, OLoRA).
        if any("lora_B" in name and weight.any() for name, weight in policy.named_parameters()):
            raise ValueError(
                "The policy's adapter is not at zero, so the model without it is not the policy's start. Attach the reward "
                "before training; merge an adapter that was trained before; use a LoRA initialisation with B = 0; or "
                "give the reward its own copy: `EndogenousReward(model=<path>)`."
            )
        return AdapterDisabled(trainer)
    if trainer.ref_model is None:
        raise ValueError(
            "The trainer holds no frozen weights to share: it trains all weights (no `peft_config`) and keeps no "
            "reference model (`beta` is 0). Set `beta` > 0, train with LoRA, or give the reward its own copy: "
            "`EndogenousReward(model=<path>)`."
        )
    # OnlineDPO has no such setting: its reference model always stays.
    if getattr(trainer.args, "sync_ref_model", False):
        raise ValueError(
            "The trainer has `sync_ref_model=True`: its reference model follows the policy, so a reward that shares it "
            "would move during training. Set `sync_ref_model=False`, or give the reward its own copy: "
            "`EndogenousReward(model=<path>)`."
        )
    return SharedReference(trainer)


def _load_generation_config(model: str, config: PretrainedConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:  # the file is optional
        return GenerationConfig.from_model_config(config)


def _eos_token_ids(generation_config: GenerationConfig | None) -> list[int]:
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


def _paused(recorder: ReferenceRecorder | None) -> AbstractContextManager[None]:
    return nullcontext() if recorder is None else recorder.paused()


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module is as it was (a plain `train()` would wake frozen dropout)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether a trainer with this accelerator splits weights over processes in a way that [`whole_weights`] knows."""
    return is_deepspeed_zero3_enabled() or accelerator.is_fsdp2


@contextmanager
def whole_weights(wrapped: Any, accelerator: Accelerator) -> Iterator[None]:
    """
    Inside, weights that DeepSpeed ZeRO-3 or FSDP2 split over processes are whole on each, so that passes through the model
    need no communication: processes may run different numbers of them. All processes must enter it together. Others'
    weights are left as they are.

    Args:
        wrapped (`torch.nn.Module`):
            The model as the engine wraps it.
        accelerator ([`~accelerate.Accelerator`]):
            Of the trainer.
    """
    if is_deepspeed_zero3_enabled():
        from trl.models import unwrap_model_for_generation

        with unwrap_model_for_generation(wrapped, accelerator):
            yield
        return
    if not accelerator.is_fsdp2:
        yield
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
    wrapped.set_reshard_after_forward(False)
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
        wrapped.set_reshard_after_forward(accelerator.state.fsdp_plugin.reshard_after_forward)


@contextmanager
def _loaded_whole() -> Iterator[None]:
    """
    Lets `from_pretrained` load whole weights while a trainer shards: under ZeRO-3 it would load a part on every process,
    and under FSDP with `cpu_ram_efficient_loading` all of them on the first process of a machine only.
    """
    with _without_zero3_init():
        key = "FSDP_CPU_RAM_EFFICIENT_LOADING"
        given = os.environ.pop(key, None)
        try:
            yield
        finally:
            if given is not None:
                os.environ[key] = given


@contextmanager
def _without_zero3_init() -> Iterator[None]:
    """Lets `from_pretrained` load whole weights while a ZeRO-3 trainer exists (it would partition them otherwise)."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    from transformers.integrations import deepspeed

    config = deepspeed._hf_deepspeed_config_weak_ref()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)
