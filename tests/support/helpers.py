# SPDX-License-Identifier: Apache-2.0
"""Instruments to watch a model with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


# A trainer that says nothing, keeps nothing and needs no accelerator.
QUIET = {"save_strategy": "no", "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True}
# Sizes of a random model, as most families name them.
SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
# A run of a recipe that says nothing and needs no accelerator.
ON_CPU = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, without special tokens around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings as on a recipe's command line."""
    return [str(part) for key, value in settings.items() for part in (f"--{key}", value)]


class LargestTensor(TorchDispatchMode):
    """Notes the size, in elements, of the largest tensor that any operation returns inside the context."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in result if isinstance(result, tuple | list) else [result]:
            if isinstance(output, Tensor):
                self.numel = max(self.numel, output.numel())
        return result


@contextmanager
def count_forwards(model: nn.Module) -> Iterator[list[str]]:
    """Lists the modules of a model that run inside the context."""
    ran: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda module, args: ran.append(type(module).__name__))
        for module in model.modules()
    ]
    yield ran
    for handle in handles:
        handle.remove()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_to_the_bit(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
