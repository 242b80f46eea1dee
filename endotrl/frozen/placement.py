# SPDX-License-Identifier: Apache-2.0
"""Placement of the frozen weights, by the user's `model` argument: own copy, loaded instance, or server."""

import copy
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..scoring.scorer import FrozenScorer, Placement
from ..scoring.token_stats import TokenStats
from .adapters import UsedAdapter
from .loaded_model import LoadedModel
from .own_copy import OwnCopy
from .served import ServedModel, is_url


def place(
    model: str | PreTrainedModel | ServedModel | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    trust_remote_code: bool,
    offload: bool,
    model_init_kwargs: Mapping[str, Any] | None = None,
    adapter_name: str | None = None,
) -> Placement | ServedModel | None:
    """Placement of the frozen weights, by the user's `model` argument; `None` if a trainer provides them."""
    if model is None:
        return None
    if is_url(model) or isinstance(model, ServedModel):
        given = {"dtype": dtype != "auto", "device": device is not None, "offload": offload}
        given |= {"model_init_kwargs": bool(model_init_kwargs)}
        if any(given.values()):
            names = ", ".join(f"`{name}`" for name, is_given in given.items() if is_given)
            raise ValueError(f"{names} cannot be set for a model on a server. Set this when you start the server.")
        # Each reward has its own connections, and a handshake with its own tokenizer.
        return copy.copy(model) if isinstance(model, ServedModel) else ServedModel(model)
    if isinstance(model, nn.Module):
        if model_init_kwargs:
            raise ValueError("`model_init_kwargs` is given, but the model is already loaded. Remove it.")
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        if is_peft_model(model):
            adapter = UsedAdapter(model, adapter_name)
            return LoadedModel(adapter.model.get_base_model(), adapter)
    if adapter_name is not None:
        raise ValueError(
            f"`adapter_name` is {adapter_name!r}, but it requires a `PeftModel`, and `model` is a "
            f"{type(model).__name__}. To load an adapter by itself, pass its path or hub id as `model`."
        )
    if isinstance(model, PreTrainedModel):
        return LoadedModel(model)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"`model` is a {type(model).__name__}, but it must be a path or hub id, a loaded causal language model of "
            "transformers, the URL of a server, or None to share the weights of a trainer."
        )
    return OwnCopy(os.fspath(model), dtype, device, trust_remote_code, offload, model_init_kwargs)


def make_scorer(placement: Placement | ServedModel, max_tokens_per_batch: int) -> Callable[..., list[TokenStats]]:
    """Scoring function for a placement."""
    if isinstance(placement, ServedModel):
        return placement.score
    return FrozenScorer(placement, max_tokens_per_batch)
