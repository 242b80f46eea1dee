# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a causal language model: its parts, one thread at a time, rotary frequencies by length."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from threading import Lock, RLock
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import has_offloaded_params
from packaging.version import Version
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


# Types of transformers' `ROPE_INIT_FUNCTIONS` that do not look at the length of the pass.
ANY_LENGTH = {"default", "linear", "yarn", "llama3", "proportional"}
NAMES_PRECISION = Version(torch.__version__) >= Version("2.9")  # where `allow_tf32` may raise

# Beside the models and not in them, so that these can be pickled and copied, and two rewards that hold one model wait
# for each other.
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_guard = Lock()
_stance = Lock()
_eager_passes = 0
_leave_eager: Any = None


def backbone(model: PreTrainedModel) -> nn.Module:
    """The part of a causal language model whose hidden states the LM head reads."""
    if model.base_model is not model:
        return model.base_model
    # `base_model_prefix` names a part that the class does not have (Llama 4's text model).
    embeddings = model.get_input_embeddings()
    return next(part for part in model.children() if any(module is embeddings for module in part.modules()))


def execution_device(model: PreTrainedModel, module: nn.Module) -> torch.device:
    """Device on which a module of a model computes: not that of its weights if accelerate offloads them."""
    tensor = next(chain(module.parameters(), module.buffers()), None)
    if tensor is None:
        return torch.device("cpu")  # dynamic quantisation, whose modules have neither
    if not tensor.is_meta:
        return tensor.device
    # Its own hook, or one that loads several modules at once.
    hooked = next(part for part in chain([module], model.modules()) if has_offloaded_params(part))
    return torch.device(hooked._hf_hook.execution_device)


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module just multiplies by its `weight`; quantised and parametrised ones must be called."""
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter


@contextmanager
def exclusive(owner: Any) -> Iterator[None]:
    """Inside, other threads that ask for the same object (a model instance, or who loads one) wait."""
    with _guard:
        lock = _locks.setdefault(owner, RLock())
    with lock:
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, what `torch.compile` has wrapped runs as it is written: each length of a row would compile it again."""
    global _eager_passes, _leave_eager
    # One setting for all threads: the first sets it, the last one sets it back.
    with _guard:
        if _eager_passes == 0:
            _leave_eager = torch.compiler.set_stance("force_eager")
            _leave_eager.__enter__()
        _eager_passes += 1
    try:
        yield
    finally:
        with _guard:
            _eager_passes -= 1
            if _eager_passes == 0:
                _leave_eager.__exit__(None, None, None)


@contextmanager
def compiled() -> Iterator[None]:
    """Inside, what `torch.compile` has wrapped is compiled, also within [`uncompiled`]."""
    with _stance, torch.compiler.set_stance("default"):
        yield


@dataclass(frozen=True)
class RopeLengths:
    """How a model's rotary frequencies depend on the largest position of a pass; lengths are in tokens."""

    is_rotary: bool  # the config names rotary frequencies
    switches: tuple[int, ...]  # lengths beyond which other frequencies hold (`longrope`)
    grows_beyond: int | None  # length beyond which every length has its own (`dynamic`)
    unknown: tuple[str, ...]  # types of which nothing is known

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "RopeLengths":
        # `to_dict`, as models without rotary positions have no such key, and code from before it has another one.
        settings = config.get_text_config().to_dict()
        entries = rope_entries(settings)
        switches, unknown, grows_beyond = set(), set(), None
        longest = settings.get("max_position_embeddings")
        for entry in entries:
            rope_type = entry.get("rope_type") or entry.get("type") or "default"
            key = "original_max_position_embeddings"
            original = entry.get(key) or settings.get(key)
            if "dynamic" in rope_type and longest:
                grows_beyond = longest
            elif rope_type == "longrope" and original:
                switches.add(original)
            elif rope_type not in ANY_LENGTH:
                unknown.add(rope_type)
        is_rotary = bool(entries or settings.get("rope_theta"))
        return cls(is_rotary, tuple(sorted(switches)), grows_beyond, tuple(sorted(unknown)))

    @property
    def limits(self) -> list[int]:
        """Lengths beyond which frequencies change, in order."""
        return sorted([*self.switches, *([] if self.grows_beyond is None else [self.grows_beyond])])

    def length_class(self, length: int) -> tuple[int, ...]:
        """Equal for lengths with the same frequencies."""
        beyond = length if self.grows_beyond is not None and length > self.grows_beyond else 0
        return (*(int(length > switch) for switch in self.switches), beyond)


def rope_entries(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The rotary parameters of a text config as a `dict`: one set of them, or one for each type of layer."""
    parameters = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if any(isinstance(value, dict) for value in parameters.values()):
        return [entry for entry in parameters.values() if isinstance(entry, dict)]
    return [parameters] if parameters else []


@contextmanager
def rope_as_made(model: PreTrainedModel) -> Iterator[None]:
    """
    Inside, `dynamic` rotary frequencies are as the model was made with them: transformers keeps those of the longest
    pass so far until a short one comes. Afterwards, they are as they were found.
    """
    grown = [module for module in model.modules() if _is_dynamic(module)]
    found = [(module, dict(vars(module)), dict(module._buffers)) for module in grown]
    for module in grown:
        state = vars(module)
        for name in [name for name in state if name.endswith("max_seq_len_cached")]:
            state[name] = state["original_max_seq_len"]
        # Tensors or buffers, by version; for each type of layer, or one for all.
        for name, original in [*state.items(), *module._buffers.items()]:
            if name.endswith("original_inv_freq"):
                current = module._buffers[name.replace("original_", "")]
                module._buffers[name.replace("original_", "")] = original.to(current.device)
    try:
        yield
    finally:
        for module, state, buffers in found:
            vars(module).clear()
            vars(module).update(state)
            module._buffers.clear()
            module._buffers.update(buffers)


def _is_dynamic(module: nn.Module) -> bool:
    """Whether this is a rotary embedding that changes with the passes; each family has a class of its own."""
    return {"original_max_seq_len", "rope_type"} <= vars(module).keys() and "dynamic" in str(vars(module)["rope_type"])


def last_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """Hidden states of shape `(B, T, D)` that the LM head reads. Padding on the right needs no mask: none sees it."""
    device = execution_device(model, model.get_input_embeddings())
    input_ids = input_ids.to(device)
    positions = {} if position_ids is None else {"position_ids": position_ids.to(device)}
    # Without a mask, some families (GPT-2) warn of padding.
    mask = torch.ones_like(input_ids) if mask is None else mask.to(device)
    with rope_as_made(model):
        return backbone(model)(
            input_ids=input_ids, attention_mask=mask, use_cache=False, **positions
        ).last_hidden_state


def rounding(model: PreTrainedModel) -> float:
    """Difference of two passes of different shapes that is rounding, relative to the states."""
    device = execution_device(model, model.get_input_embeddings())
    return 1e-3 if multiplies_exactly(model.dtype, device) else 0.1


def multiplies_exactly(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of a dtype are rounded to float32 only: not under autocast, nor on a GPU that may use TF32."""
    matmul = torch.backends.cuda.matmul
    tf32 = device.type == "cuda" and (matmul.fp32_precision == "tf32" if NAMES_PRECISION else matmul.allow_tf32)
    return dtype == torch.float32 and not tf32 and not torch.is_autocast_enabled(device.type)


def relative_difference(states: Tensor, expected: Tensor) -> Tensor:
    """How far each state, of shape `(..., D)`, is from the expected one, as a part of it, of shape `(...)`."""
    states, expected = states.float(), expected.float()
    length = expected.norm(dim=-1)
    # The state of a lone padding token may be 0.
    return (states - expected).norm(dim=-1) / length.clamp(min=length.mean() / 100)
