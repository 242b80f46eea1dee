# SPDX-License-Identifier: Apache-2.0
"""Whose weights the frozen model uses, by what the user gave as `model`."""

import os

import torch
from accelerate.utils import extract_model_from_parallel, is_peft_model
from torch import nn
from transformers import PreTrainedModel

from ..scoring.scorer import Placement
from .loaded_model import LoadedModel
from .own_copy import OwnCopy


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
            "transformers, or None to share the weights of a trainer."
        )
    return OwnCopy(os.fspath(model), dtype, device, trust_remote_code, offload)
