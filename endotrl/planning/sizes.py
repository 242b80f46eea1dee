# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model from its config: built on torch's meta device, which holds no weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig


@dataclass(frozen=True)
class ModelSize:
    """
    Sizes of a model.

    Attributes:
        parameters (`int`):
            Parameters, tied ones counted once, those of an adapter included.
        trainable (`int`):
            Those that are trained.
        largest_layer (`int`):
            Most parameters that one module has of its own, as DeepSpeed counts: what ZeRO-3 must hold whole at a time.
        block (`int`):
            Parameters of the largest transformer block: what FSDP2 must hold whole at a time.
        layers, hidden, intermediate, key_value, vocabulary (`int`):
            Transformer blocks; widths of the residual stream, of the MLP, of all keys (or values) of a token; and words.
    """

    parameters: int
    trainable: int
    largest_layer: int
    block: int
    layers: int
    hidden: int
    intermediate: int
    key_value: int
    vocabulary: int


def model_size(config: PretrainedConfig, peft_config: Any = None, head: bool = True) -> ModelSize:
    """
    Sizes of the causal language model of a config.

    Args:
        config ([`~transformers.PretrainedConfig`]):
            The config.
        peft_config ([`~peft.PeftConfig`], *optional*):
            The adapter that is trained. By default, all weights are.
        head (`bool`, *optional*, defaults to `True`):
            Whether with the head that gives logits, which a reward model does without.

    Returns:
        [`ModelSize`].

    Example:
    ```python
    >>> from endotrl.planning import model_size
    >>> from transformers import LlamaConfig

    >>> model_size(LlamaConfig()).parameters
    6738415616
    ```
    """
    with torch.device("meta"):
        model: nn.Module = (AutoModelForCausalLM if head else AutoModel).from_config(config)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
    text = config.get_text_config()
    heads = text.num_attention_heads
    # `to_dict`, as each family has its own keys.
    settings = text.to_dict()
    head_dim = settings.get("head_dim") or text.hidden_size // heads
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == text.num_hidden_layers]
    return ModelSize(
        parameters=_count(model.parameters()),
        trainable=_count(p for p in model.parameters() if p.requires_grad),
        largest_layer=max(_count(module.parameters(recurse=False)) for module in model.modules()),
        block=max((_count(block.parameters()) for blocks_ in blocks for block in blocks_), default=0),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=settings.get("intermediate_size") or 4 * text.hidden_size,
        key_value=(settings.get("num_key_value_heads") or heads) * head_dim,
        vocabulary=text.vocab_size,
    )


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in parameters}.values())
