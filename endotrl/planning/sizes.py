# SPDX-License-Identifier: Apache-2.0
"""Sizes of a model from its config: built on torch's meta device, which holds no weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model."""

    parameters: int  # tied ones counted once, those of an adapter included
    trainable: int
    largest_layer: int  # most parameters that one module has of its own: what ZeRO-3 must hold whole at a time
    block: int  # parameters of the largest transformer block: what FSDP2 must hold whole at a time
    layers: int  # transformer blocks
    hidden: int  # widths, each of the layer in which it is largest
    intermediate: int
    key_value: int  # of all keys (or values) of a token
    vocabulary: int


def model_size(config: PretrainedConfig, peft_config: Any = None, head: bool = True) -> ModelSize:
    """
    Sizes of the causal language model of a config, or of one that reads images too; with `peft_config`, of one of
    which an adapter is trained; without a `head` that gives logits, of a reward model.
    """
    model = _on_meta(config, head)
    if peft_config is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, peft_config)
    text = config.get_text_config()
    embeddings = model.get_input_embeddings().weight
    longest = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=())
    layers = _largest(text, "num_hidden_layers") or len(longest)
    hidden = _largest(text, "hidden_size") or embeddings.shape[1]
    heads = _largest(text, "num_attention_heads")
    if heads:
        head_dim = _largest(text, "head_dim") or hidden // heads
        key_value = (_largest(text, "num_key_value_heads") or heads) * head_dim
    else:  # no attention, or not said
        key_value = 0 if model._is_stateful else hidden
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return ModelSize(
        parameters=_count(model.parameters()),
        trainable=_count(p for p in model.parameters() if p.requires_grad),
        largest_layer=max(_count(module.parameters(recurse=False)) for module in model.modules()),
        block=max((_count(block.parameters()) for blocks_ in blocks for block in blocks_), default=0),
        layers=layers,
        hidden=hidden,
        intermediate=_largest(text, "intermediate_size") or 4 * hidden,
        key_value=key_value,
        vocabulary=_largest(text, "vocab_size") or embeddings.shape[0],
    )


def _on_meta(config: PretrainedConfig, head: bool) -> Any:
    """A model without weights."""
    kind = type(config)
    reads_images = kind not in MODEL_FOR_CAUSAL_LM_MAPPING
    if (reads_images and kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING) or config.is_encoder_decoder:
        raise ValueError(
            f"A config of type {config.model_type!r} is not of a causal language model, and only these can be planned."
        )
    with_head = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
    try:
        with torch.device("meta"):
            return (with_head if head else AutoModel).from_config(config)
    except Exception as error:  # of many kinds: what a config lacks, or a package
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        what = f"transformers cannot build a model of type {config.model_type!r} from its config"
        raise ValueError(f"{what}: {reason}") from error


def _largest(config: PretrainedConfig, name: str) -> int:
    """A number of a config, the largest where layers or experts differ; 0 if it has none of that name."""
    settings = config.to_dict()  # attributes that differ by layer must not be read
    parts = [settings, *(settings.get("per_layer_config") or {}).values()]
    return max(_numbers([part.get(config.attribute_map.get(name, name)) for part in parts]), default=0)


def _numbers(value: Any) -> list[int]:
    if isinstance(value, dict | list | tuple):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in _numbers(part)]
    return [int(value)] if isinstance(value, int | float) else []


def _count(parameters: Any) -> int:
    return sum(parameter.numel() for parameter in {id(p): p for p in parameters}.values())
