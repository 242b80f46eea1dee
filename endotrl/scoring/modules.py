# SPDX-License-Identifier: Apache-2.0
"""Parts of a causal language model: its backbone, where a module computes, and whether it is a plain matrix."""

from itertools import chain
from typing import TypeGuard

import torch
from accelerate.utils import has_offloaded_params
from torch import nn
from transformers import PreTrainedModel


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
    """
    Whether a module is no more than a multiplication by its `weight`, which can then be done in parts. Not so for
    quantised and parametrised weights, whose module must be called.
    """
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter
