# SPDX-License-Identifier: Apache-2.0
"""The frozen weights that a trainer holds already: the policy without its adapter, or the reference model."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedModel

from .exclusive import exclusive
from .placement import eos_token_ids, eval_mode
from .recording import ReferenceRecorder
from .sharding import whole_weights


class AdapterDisabled:
    """The policy of a LoRA run with its adapter disabled: the frozen base model, without another parameter in memory."""

    is_own = False

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._accelerator = trainer.accelerator
        self._policy = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        self.config = self._policy.config
        self.eos_token_ids = eos_token_ids(self._policy.generation_config)
        self.description = "the policy's frozen base (adapter disabled)"
        from peft.tuners.tuners_utils import BaseTunerLayer

        adapted = next((module for module in self._policy.modules() if isinstance(module, BaseTunerLayer)), None)
        # Prompt tuning adapts no layer, and its passes begin with virtual tokens.
        self.recorder: ReferenceRecorder | None = None
        if adapted is not None:
            self.recorder = ReferenceRecorder(
                self._policy.get_base_model(),
                is_frozen=lambda: adapted.disable_adapters,
                current_step=lambda: trainer.state.global_step,
            )

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        # The precision in which the trainer runs its own reference pass.
        with (
            exclusive(self._policy.get_base_model()),
            # The trainer wraps the policy when it starts to train.
            whole_weights(self._trainer.model_wrapped, self._accelerator),
            self._accelerator.autocast(),
            eval_mode(self._policy),
            self._policy.disable_adapter(),
            _paused(self.recorder),
        ):
            yield self._policy.get_base_model()


class SharedReference:
    """The reference model of a trainer with `beta > 0`."""

    is_own = False

    def __init__(self, trainer: Any) -> None:
        self._accelerator = trainer.accelerator
        self._wrapped = trainer.ref_model
        self._model = trainer.accelerator.unwrap_model(trainer.ref_model, keep_torch_compile=False)
        self.config = self._model.config
        self.eos_token_ids = eos_token_ids(self._model.generation_config)
        self.description = "the trainer's reference model"
        self.recorder: ReferenceRecorder | None = ReferenceRecorder(
            self._model, is_frozen=lambda: True, current_step=lambda: trainer.state.global_step
        )

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        with (
            exclusive(self._model),
            whole_weights(self._wrapped, self._accelerator),
            self._accelerator.autocast(),
            eval_mode(self._model),
            _paused(self.recorder),
        ):
            yield self._model


def share_with(trainer: Any) -> AdapterDisabled | SharedReference:
    """
    Finds the frozen weights that a TRL trainer already holds: with LoRA, the policy without its adapter; with
    `beta > 0`, the reference model.

    Raises:
        `TypeError`: If it is no trainer with reward functions.
        `ValueError`: If the trainer holds no frozen weights, moves them, or shards them by FSDP1.
    """
    # TRL's trainers with reward functions have no class of their own in common.
    if not hasattr(trainer, "reward_funcs"):
        raise TypeError(
            f"`attach` was given a {type(trainer).__name__}, but it needs the trainer that has this reward among its "
            "`reward_funcs`: a `GRPOTrainer`, `RLOOTrainer`, `OnlineDPOTrainer`, `DenseGRPOTrainer` or `PPOTrainer`."
        )
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "The trainer shards its weights by FSDP1, whose weights cannot be shared. Use FSDP2 (`fsdp_version: 2`) or "
            "DeepSpeed ZeRO-3, or give the reward its own copy: `EndogenousReward(model=<path>)` without `attach`."
        )
    if is_peft_model(policy):
        if "ref" in policy.peft_config:
            raise ValueError(
                "The trainer continues a trained adapter and keeps its start as the adapter 'ref', so the model without "
                "adapter is not the policy's start. Merge the adapter first, or give the reward its own copy."
            )
        # LoRA starts as the identity, B = 0. Anything else was trained before, or has moved weights of the base model
        # into the adapter (PiSSA, OLoRA).
        if any("lora_B" in name and weight.any() for name, weight in policy.named_parameters()):
            raise ValueError(
                "The policy's adapter is not at zero, so the model without it is not the policy's start. Attach the reward "
                "before training; merge an adapter that was trained before; use a LoRA initialisation with B = 0; or "
                "give the reward its own copy: `EndogenousReward(model=<path>)`."
            )
        return AdapterDisabled(trainer)
    if trainer.ref_model is None:
        raise ValueError(
            "The trainer holds no frozen weights to share: it trains all weights (no `peft_config`) and keeps no "
            "reference model (`beta` is 0). Set `beta` > 0, train with LoRA, or give the reward its own copy: "
            "`EndogenousReward(model=<path>)`."
        )
    # OnlineDPO has no such setting: its reference model always stays.
    if getattr(trainer.args, "sync_ref_model", False):
        raise ValueError(
            "The trainer has `sync_ref_model=True`: its reference model follows the policy, so a reward that shares it "
            "would move during training. Set `sync_ref_model=False`, or give the reward its own copy: "
            "`EndogenousReward(model=<path>)`."
        )
    return SharedReference(trainer)


def _paused(recorder: ReferenceRecorder | None) -> AbstractContextManager[None]:
    return nullcontext() if recorder is None else recorder.paused()
