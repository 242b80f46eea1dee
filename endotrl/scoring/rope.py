# SPDX-License-Identifier: Apache-2.0
"""
Rotary frequencies that depend on the length of a pass: which lengths share them, and passes that leave nothing behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


# Types of transformers' `ROPE_INIT_FUNCTIONS` that do not look at the length of the pass.
ANY_LENGTH = {"default", "linear", "yarn", "llama3", "proportional"}


@dataclass(frozen=True)
class RopeLengths:
    """
    How a model's rotary frequencies depend on the largest position of a pass.

    Attributes:
        is_rotary (`bool`):
            Whether the config names rotary frequencies at all.
        switches (`tuple[int, ...]`):
            Lengths in tokens beyond which other frequencies hold (`longrope`).
        grows_beyond (`int`, *optional*):
            Length in tokens beyond which every length has its own (`dynamic`).
        unknown (`tuple[str, ...]`):
            Types of which nothing is known.
    """

    is_rotary: bool
    switches: tuple[int, ...]
    grows_beyond: int | None
    unknown: tuple[str, ...]

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "RopeLengths":
        """Reads them from a model's config."""
        text_config = config.get_text_config()
        # `to_dict`, as models without rotary positions have no such key, and code from before it has another one.
        settings = text_config.to_dict()
        entries = rope_entries(settings)
        switches, unknown, grows_beyond = set(), set(), None
        for entry in entries:
            rope_type = entry.get("rope_type") or entry.get("type") or "default"
            longest = settings.get("max_position_embeddings")
            original = entry.get("original_max_position_embeddings") or settings.get(
                "original_max_position_embeddings"
            )
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
        """Lengths in tokens beyond which frequencies change, in order."""
        return sorted([*self.switches, *([] if self.grows_beyond is None else [self.grows_beyond])])

    def length_class(self, length: int) -> tuple[int, ...]:
        """Equal for lengths (in tokens) with the same frequencies."""
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
    """Whether this is a rotary embedding of transformers that changes with the passes."""
    # Each family has a class of its own for it.
    return {"original_max_seq_len", "rope_type"} <= vars(module).keys() and "dynamic" in str(vars(module)["rope_type"])
