# SPDX-License-Identifier: Apache-2.0
"""The policy at the start of training, as a reference for the current one."""

import copy
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor
from trl.trainer.utils import use_adapter

from ..scoring.reference_pass import loss_mask, token_log_probs


# Weights of up to this many bytes are copied by default.
SMALL = 2**30


class FirstPolicy:
    """
    The policy at the start of training: the base model under a PEFT adapter, or the adapter `ref`, TRL's copy of a
    pretrained one; the trainer's reference model (`beta` above 0); or, if training updates these (`sync_ref_model`), a
    copy of the weights.
    """

    def __init__(self, trainer: Any, copy_weights: bool | None) -> None:
        self._trainer = trainer
        self._model: Any = None
        model = trainer.accelerator.unwrap_model(trainer.model)
        moved = trainer.args.sync_ref_model
        self._adapter = is_peft_model(model) and not (moved and "ref" in model.peft_config)
        self._reference = trainer.beta != 0.0 and not moved
        if copy_weights is None:
            size = sum(p.numel() * p.element_size() for p in model.parameters())
            copy_weights = size <= SMALL and not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled)
        if self._reference and not self._adapter:
            self._model = trainer.ref_model
        elif copy_weights and not self._adapter:
            self._model = copy.deepcopy(model).requires_grad_(False).eval()
        self.is_available = self._adapter or self._reference or self._model is not None

    def log_probs(self, output: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        r"""
        $\log \pi_0(y)$ and $\log \pi_t(y)$ of the completions of a batch, in nats per completion, and their numbers of
        tokens, each of shape `(B,)`.
        """
        mask = loss_mask(output)
        first = output.get("ref_per_token_logps") if self._reference else None
        if first is None and self._model is not None:
            first = self._token_log_probs(output, self._model)
        elif first is None:
            policy = self._trainer.accelerator.unwrap_model(self._trainer.model)
            with use_adapter(policy, adapter_name="ref" if "ref" in policy.peft_config else None):
                first = self._token_log_probs(output, self._trainer.model)
        current = output.get("old_logps")  # of RLOO, per completion
        if current is None:
            tokens = output.get("old_per_token_logps")
            current = _sum(self._token_log_probs(output, self._trainer.model) if tokens is None else tokens, mask)
        return _sum(first, mask), current, mask.sum(dim=1)

    def _token_log_probs(self, output: dict[str, Any], model: Any) -> Tensor:
        training = model.training
        model.eval()  # no dropout: it would draw random numbers, and the run must not change
        log_probs = token_log_probs(self._trainer, model, output, self._trainer.args.per_device_train_batch_size)
        model.train(training)
        return log_probs


def _sum(log_probs: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, log_probs.float(), 0.0).sum(dim=1)
