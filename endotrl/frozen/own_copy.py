# SPDX-License-Identifier: Apache-2.0
"""The reward's own copy of the frozen model: loading by name, dtype and device, offloading, sharding."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ..scoring.forward_pass import exclusive
from .adapters import adapter_config, check_adapter, load_with_adapter
from .loaded_model import NEEDS_CAUSAL_LM, weights_digest
from .names import eos_token_ids, load_config, load_generation_config, reads_images, resolve_model
from .sharded_weights import loaded_whole, whole_weights


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of the frozen model: `"auto"` is bfloat16 on accelerators and float32 on CPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    resolved = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(str(dtype), dtype)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f'`dtype` must be "auto", "float32", "bfloat16" or "float16", got {dtype!r}.')
    return resolved


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Device of the frozen model: that of this process, unless `device` is given."""
    return PartialState().device if device is None else torch.device(device)


def check_where(dtype: str | torch.dtype, device: str | torch.device | None) -> None:
    """Raises `ValueError` if torch knows no such dtype or device. Whether it is available shows on first use."""
    resolve_dtype(dtype, torch.device("cpu"))
    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f'`device` must be a torch device such as "cuda:0" or "cpu", got {device!r}.') from error


def check_complete(what: str, missing_keys: Collection[str]) -> None:
    """Raises `OSError` if a checkpoint lacks weights. transformers only warns, and initializes them at random."""
    if missing_keys:
        raise OSError(
            f"The checkpoint of {what} lacks weights: "
            f"{', '.join(sorted(missing_keys)[:5])}{', ...' if len(missing_keys) > 5 else ''}. It was truncated while "
            "it was saved or downloaded, or it belongs to another kind of model."
        )


def _check_settings(
    init_kwargs: dict[str, Any], dtype: str | torch.dtype, device: str | torch.device | None, offload: bool
) -> str | torch.dtype:
    """Returns the dtype, which `model_init_kwargs` may contain. `ValueError` for contradictory arguments."""
    given = [init_kwargs.pop(key) for key in ("dtype", "torch_dtype") if key in init_kwargs]
    if given and dtype not in ("auto", given[0]):
        raise ValueError(f"`dtype` is {dtype!r}, but `model_init_kwargs` sets {given[0]!r}. Set only one of them.")
    dtype = given[0] if given else dtype
    check_where(dtype, device)
    for key in ("trust_remote_code", "output_loading_info", "config", "state_dict"):
        if key in init_kwargs:
            raise ValueError(
                f"`model_init_kwargs` cannot contain {key!r}: it is a separate argument, or set by the reward."
            )
    placed = [key for key in ("device_map", "quantization_config") if init_kwargs.get(key) is not None]
    if placed and (offload or (device is not None and "device_map" in placed)):
        raise ValueError(
            f"`model_init_kwargs` has {placed[0]!r}, which places the weights. Remove `device` and `offload`."
        )
    return dtype


class OwnCopy:
    """The reward's own frozen copy, loaded on first use, unsharded in every process unless [`shard`] is called."""

    recorder = None

    def __init__(
        self,
        model: str,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        offload: bool = False,
        model_init_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._init_kwargs = dict(model_init_kwargs or {})
        self._dtype = _check_settings(self._init_kwargs, dtype, device, offload)
        self._name = model = resolve_model(model)
        self._revision = self._init_kwargs.pop("revision", None)
        self._adapter = adapter_config(model, self._revision)
        if self._adapter is not None:
            check_adapter(repr(model), self._adapter)
        self.config = load_config(model, trust_remote_code, self._revision)
        if self.config.is_encoder_decoder:
            raise ValueError(f"{model!r} is an encoder-decoder model. {NEEDS_CAUSAL_LM}")
        sees = reads_images(self.config)
        self._loader = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        of_its_own_code = "AutoModelForCausalLM" in (vars(self.config).get("auto_map") or {})
        if not (sees or of_its_own_code or type(self.config) in MODEL_FOR_CAUSAL_LM_MAPPING):
            raise ValueError(f"{model!r} is a model of type {self.config.model_type!r}. {NEEDS_CAUSAL_LM}")
        self.eos_token_ids = eos_token_ids(load_generation_config(model, self.config, self._revision))
        self.description = f"own copy of {model}"
        self._device, self._offload, self._trust_remote_code = device, offload, trust_remote_code
        self._model: PreTrainedModel | None = None
        self._accelerator: Accelerator | None = None  # of a trainer that shards, if this copy is to be sharded too
        self._wrapped: Any = None

    @property
    def is_own(self) -> bool:
        return self._accelerator is None  # a sharded copy belongs to the engine as well

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_accelerator": None, "_wrapped": None}

    def shard(self, accelerator: Accelerator) -> None:
        """Shards the copy over the processes, all of which gather it for each call."""
        elsewhere = self._offload or self._device is not None or self._placed_by_accelerate
        if self._model is not None or elsewhere or self._adapter is not None:
            raise ValueError(
                f"The {self.description} cannot be sharded, because it is already loaded, an adapter, quantised, or "
                "was made with `device`, `device_map` or `offload=True`. Make the reward with a plain path, and shard "
                "it before its first use."
            )
        self._accelerator = accelerator
        self.description = f"own copy of {self._name}, sharded"

    def digest(self, dtype: torch.dtype) -> str:
        """[`weights_digest`] of this copy, loaded into CPU memory for this call if it was not loaded."""
        if self._model is not None:
            with self.active() as model:
                return weights_digest(model)
        with loaded_whole():
            return weights_digest(self._from_pretrained(dtype))

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        with exclusive(self):
            if self._accelerator is not None:
                if self._model is None:
                    self._model, self._wrapped = self._load_sharded(self._accelerator)
                with whole_weights(self._wrapped, self._accelerator):
                    yield self._model
                return
            device = resolve_device(self._device)
            if self._model is None:
                with loaded_whole():
                    model = self._from_pretrained(resolve_dtype(self._dtype, device), device)
                self._model = (model if self._placed_by_accelerate else model.to(device)).eval().requires_grad_(False)
            elif self._offload:
                self._model.to(device)
            try:
                yield self._model
            finally:
                if self._offload:
                    self._model.to("cpu")

    def _load_sharded(self, accelerator: Accelerator) -> tuple[PreTrainedModel, Any]:
        from trl.models import prepare_deepspeed, prepare_fsdp

        # For DeepSpeed, it arrives in shards.
        with loaded_whole() if accelerator.is_fsdp2 else nullcontext():
            model = self._from_pretrained(resolve_dtype(self._dtype, accelerator.device)).requires_grad_(False)
        return model, (prepare_fsdp if accelerator.is_fsdp2 else prepare_deepspeed)(model, accelerator)

    @property
    def _placed_by_accelerate(self) -> bool:
        """Whether `from_pretrained` places the weights for good."""
        is_quantised = "quantization_config" in self._init_kwargs or hasattr(self.config, "quantization_config")
        return is_quantised or "device_map" in self._init_kwargs

    def _from_pretrained(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        settings = {"dtype": dtype, "trust_remote_code": self._trust_remote_code, **self._init_kwargs}
        if self._placed_by_accelerate:
            settings.setdefault("device_map", {"": device or "cpu"})
        if self._adapter is not None:
            model, missing = load_with_adapter(self._name, self._adapter, self._revision, **settings)
        else:
            settings |= {"revision": self._revision or "main", "output_loading_info": True}
            model, info = self._loader.from_pretrained(self._name, **settings)
            missing = info["missing_keys"]
        check_complete(f"the frozen model {self._name!r}", missing)
        return model
