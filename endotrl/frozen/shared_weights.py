# SPDX-License-Identifier: Apache-2.0
"""Frozen weights shared with a trainer: the policy without its adapter, or the reference model."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..scoring.forward_pass import exclusive, execution_device
from ..scoring.isolation import probe_tokens
from ..scoring.reference_pass import ReferenceRecorder
from .adapters import UsedAdapter
from .loaded_model import eval_mode, have_moved, named_weights, sample_weights, weights_digest
from .names import eos_token_ids
from .sharded_weights import whole_weights


OR_OWN_COPY = "or give the reward its own copy: `EndogenousReward(model=<path>)`."


class SharedWeights:
    """
    Weights held by a TRL trainer, which must not change from the creation of this object on: of a LoRA run's `policy`
    with its adapter disabled, or with TRL's copy of a previously trained adapter; otherwise of the reference model.
    """

    is_own = False

    def __init__(self, trainer: Any, policy: Any = None) -> None:
        self._trainer, self._accelerator, self._policy = trainer, trainer.accelerator, policy
        # TRL's copy, which in this case is the policy's starting point.
        self._adapter = UsedAdapter(policy, "ref") if policy is not None and "ref" in policy.peft_config else None
        if policy is None:
            self._model = self._accelerator.unwrap_model(trainer.ref_model, keep_torch_compile=False)
            self.description = "the trainer's reference model"
        else:
            self._model = policy.get_base_model()
            used = "base (adapter disabled)" if self._adapter is None else "adapter 'ref'"
            self.description = f"the policy's frozen {used}"
        self.config, self.dtype = self._model.config, self._model.dtype
        self.eos_token_ids = eos_token_ids(self._model.generation_config)
        self.recorder: ReferenceRecorder | None = None
        self._sample: dict[str, Tensor] | None = None
        with self.active():
            pass  # from now on, they must not move
        adapted: Any = None
        if policy is not None:
            with self._whole(), torch.no_grad():
                # Used while the adapter is disabled
                trained = [name for name, weight in self._weights() if weight.requires_grad]
                if trained:
                    raise ValueError(
                        f"The trainer trains weights of the base model ({', '.join(trained[:3])}, ...), which changes "
                        'the reward. Set `bias="none"` in the `peft_config` and unfreeze only the adapter, '
                        f"{OR_OWN_COPY}"
                    )
                if self._adapter is None:
                    _check_adapter_is_at_zero(policy)
                elif trainer.state.global_step == 0 and not _starts_as(policy, self._adapter.active):
                    raise ValueError(
                        "The trainer's copy of the policy's adapter, 'ref', is not the adapter that training starts "
                        "from: TRL does not copy all parameters of adapted embeddings, `trainable_token_indices`, "
                        f"IA3 and others. Merge the adapter into the model, {OR_OWN_COPY}"
                    )
            if getattr(trainer.args, "use_vllm", False):
                _keep_base_in_merges(trainer, self._model)
            from peft.tuners.tuners_utils import BaseTunerLayer

            adapted = next((module for module in policy.modules() if isinstance(module, BaseTunerLayer)), None)
        # Prompt tuning adapts no layer, and its passes begin with virtual tokens: then the reward runs its own passes,
        # as it does with a frozen adapter.
        if policy is None or (adapted is not None and self._adapter is None):
            self.recorder = ReferenceRecorder(
                self._model,
                is_frozen=lambda: adapted is None or adapted.disable_adapters,
                current_step=lambda: trainer.state.global_step,
            )

    @contextmanager
    def active(self) -> Iterator[PreTrainedModel]:
        switched: AbstractContextManager[None] = nullcontext()
        if self._policy is not None:
            switched = self._policy.disable_adapter() if self._adapter is None else self._adapter.active()
        with (
            exclusive(self._model),
            self._whole(),
            # The precision of the trainer's own reference pass.
            self._accelerator.autocast(),
            switched,
            nullcontext() if self.recorder is None else self.recorder.paused(),
        ):
            sample = sample_weights(self._weights())
            if self._sample is not None and have_moved(self._sample, sample):
                raise RuntimeError(
                    f"The reward reads {self.description}, whose weights have changed since `attach`: they were "
                    "trained, synchronised by a callback, or merged with an adapter. Keep them frozen, "
                    f"{OR_OWN_COPY}"
                )
            self._sample = sample
            yield self._model

    def digest(self) -> str:
        """[`weights_digest`] of the frozen weights. With a frozen adapter, it equals that of no other model."""
        with self.active() as model:
            return weights_digest(model, without_adapters=self._adapter is None)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        if self._adapter is None:
            return named_weights(self._model, without_adapters=True)
        return self._adapter.without_others(named_weights(self._model))

    @contextmanager
    def _whole(self) -> Iterator[None]:
        # The trainer wraps the policy when training begins.
        wrapped = self._trainer.ref_model if self._policy is None else self._trainer.model_wrapped
        module = self._model if self._policy is None else self._policy
        with whole_weights(wrapped, self._accelerator), eval_mode(module):
            yield


def share_with(trainer: Any) -> SharedWeights:
    """Frozen weights of a TRL trainer; `ValueError` if it has none, changes them, or shards them by FSDP1."""
    policy = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise ValueError(
            "The trainer shards its weights with FSDP1, so a reward cannot share them. Use FSDP2 (`fsdp_version: 2`) "
            "or DeepSpeed ZeRO-3, or give the reward its own copy: `EndogenousReward(model=<path>)` without `attach`."
        )
    is_adapted = is_peft_model(policy)
    if not is_adapted and trainer.ref_model is None:
        raise ValueError(
            "The trainer holds no frozen weights to share: it trains all weights (no `peft_config`) and keeps no "
            f"reference model (`beta` is 0). Set `beta` > 0, train with LoRA, {OR_OWN_COPY}"
        )
    from trl.trainer.callbacks import SyncRefModelCallback  # imports trackers, not needed to score a file

    # `sync_ref_model=True` adds this callback; so may users.
    synchronised = any(isinstance(callback, SyncRefModelCallback) for callback in trainer.callback_handler.callbacks)
    if synchronised and (not is_adapted or "ref" in policy.peft_config):
        raise ValueError(
            "The trainer synchronises its reference model with the policy (`sync_ref_model=True`, or a "
            f"`SyncRefModelCallback`), which would change the reward. Turn this off, {OR_OWN_COPY}"
        )
    return SharedWeights(trainer, policy if is_adapted else None)


def _check_adapter_is_at_zero(policy: Any) -> None:
    """Raises `ValueError` if the policy does not start as its base model: trained, random, PiSSA, OLoRA."""
    if policy.active_peft_config.is_prompt_learning:
        return  # Virtual tokens before an unchanged base model. None of them are nothing.
    trained = any(
        f"lora_B.{adapter}." in name and weight.any()
        for name, weight in policy.named_parameters()
        for adapter in policy.active_adapters
    )
    if trained or not _starts_as(policy, policy.disable_adapter):
        raise ValueError(
            "The policy's adapter is not at zero, so the policy without it is not the model that training started "
            "from. Attach the reward before training, merge a previously trained adapter into the model, use an "
            f"initialisation that changes no output (LoRA with B = 0), {OR_OWN_COPY}"
        )


def _starts_as(policy: Any, frozen: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Whether the policy has the embeddings, and for a few tokens the logits, that it has in the context `frozen`."""
    embeddings = policy.get_input_embeddings()
    device, vocab_size = execution_device(policy, embeddings), policy.config.get_text_config().vocab_size
    tokens = torch.tensor([probe_tokens(policy, 32)], device=device)
    passes: list[Callable[[], Tensor]] = [
        lambda: policy(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits,
        # An adapter of the embedding may have changed only tokens of its training data.
        *(partial(embeddings, block) for block in torch.arange(vocab_size, device=device).split(8192)),
    ]
    for run in passes:
        adapted = run()
        with frozen():
            base = run()
        # LoRA adds zeros, others (DoRA, HRA) multiply by 1 up to rounding.
        tolerance = 1e-5 if base.dtype == torch.float32 else 0.03
        if (adapted - base).abs().max() > tolerance * base.abs().max():
            return False
    return True


def _keep_base_in_merges(trainer: Any, base: PreTrainedModel) -> None:
    """
    Restores the base model's weights, to the bit, each time the trainer has merged the adapter into them for vLLM and
    unmerged it again: rounding errors grow to 1% of a bfloat16 weight in 1,000 steps.
    """
    if not all(type(weight) is nn.Parameter and weight.is_floating_point() for weight in base.parameters()):
        raise ValueError(
            "The trainer has `use_vllm=True` and a quantised base model: each time it sends the policy to vLLM, it "
            f"merges the adapter into that model, which would change the reward. Turn one of them off, {OR_OWN_COPY}"
        )
    # OnlineDPO sends the weights itself.
    owner, method = trainer, "_move_model_to_vllm"
    if "vllm_generation" in vars(trainer):
        owner, method = trainer.vllm_generation, "sync_weights"
    send = getattr(owner, method)

    @torch.no_grad()
    def send_and_restore() -> None:
        kept = {key: weight.to("cpu", copy=True) for key, weight in named_weights(base, without_adapters=True)}
        send()
        for key, weight in named_weights(base, without_adapters=True):
            weight.copy_(kept.pop(key))

    setattr(owner, method, send_and_restore)
