# SPDX-License-Identifier: Apache-2.0
"""Whose weights the frozen model uses, by what the user gave as `model`."""

import copy
import os

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..scoring.scorer import FrozenScorer, Placement
from .loaded_model import LoadedModel
from .own_copy import OwnCopy
from .served import ServedModel, ServedScorer, is_url


def place(
    model: str | PreTrainedModel | ServedModel | None,
    dtype: str | torch.dtype,
    device: str | torch.device | None,
    trust_remote_code: bool,
    offload: bool,
) -> Placement | ServedModel | None:
    """
    Where the frozen weights are to come from, by what the user gave as `model`; `None` if a trainer has them.

    Raises:
        `TypeError`: If `model` is no model.
        `ValueError`: If a model on a server is given settings of one that is loaded.
    """
    if model is None:
        return None
    if is_url(model) or isinstance(model, ServedModel):
        if dtype != "auto" or device is not None or offload:
            raise ValueError(
                f"`dtype` is {dtype!r}, `device` {device!r} and `offload` {offload}, but the model is on a server, "
                "which decides about them. Leave them out."
            )
        # Each reward has connections, and a handshake with its own tokenizer.
        return copy.copy(model) if isinstance(model, ServedModel) else ServedModel(model)
    if isinstance(model, nn.Module):
        model = extract_model_from_parallel(model, keep_torch_compile=False)
    if isinstance(model, PreTrainedModel):
        return LoadedModel(model, trust_remote_code)
    if isinstance(model, nn.Module) and is_peft_model(model):
        raise TypeError(
            f"`model` is a {type(model).__name__}, whose adapter may be trained, switched or taken off, so that it is "
            "no frozen model. Merge the adapter (`model.merge_and_unload()`) and pass what this returns. If it is "
            "the policy that you train, share its frozen base with `EndogenousReward(model=None)` and "
            "`reward.attach(trainer)`."
        )
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            f"`model` is a {type(model).__name__}, but it must be a path or hub id, a loaded causal language model of "
            "transformers, the address of a server, or None to share the weights of a trainer."
        )
    return OwnCopy(os.fspath(model), dtype, device, trust_remote_code, offload)


def make_scorer(placement: Placement | ServedModel, max_tokens_per_batch: int) -> FrozenScorer | ServedScorer:
    """What scores with a placement."""
    if isinstance(placement, ServedModel):
        return ServedScorer(placement)
    return FrozenScorer(placement, max_tokens_per_batch)
