# SPDX-License-Identifier: Apache-2.0
"""
PPO critic: a value for every state, computed in the policy's own forward pass. It is a submodule of the policy, so
that DDP, DeepSpeed and FSDP treat its parameters like the policy's own, but not part of the exported model.
"""

import functools
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import FusedCausalLMOutput

from ..sentence.modeling import gathered


CRITIC = "ppo_critic"  # among the policy's submodules
CRITIC_FILE = "value_head.safetensors"
# Inputs of the policy for its LM head and its loss, which a model without them does not accept.
OF_THE_LM_HEAD = {"fused_lm_head", "labels", "shift_labels", "num_items_in_batch", "output_router_logits"}


class ValueHead(nn.Module):
    r"""Linear head $u(s) = w^\top h(s) + b$ that starts at zero, computed in float32."""

    def __init__(self, hidden_size: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(1, dtype=dtype))

    def copy_from(self, head: nn.Linear) -> None:
        """Copies a trained head, such as that of a sequence classification model with one label."""
        with torch.no_grad(), gathered(head.parameters()):
            self.weight.copy_(head.weight[0])
            if head.bias is not None:
                self.bias.copy_(head.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Values of shape `(B, L)`, float32, of hidden states of shape `(B, L, D)`."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            return F.linear(hidden_states.float(), self.weight.float()[None], self.bias.float()).squeeze(-1)


class Critic(nn.Module):
    """A value per state: a head on the policy's hidden states (`detach`: without gradient), or on the `backbone`'s."""

    def __init__(self, head: ValueHead, backbone: nn.Module | None = None, detach: bool = True) -> None:
        super().__init__()
        self.head, self.backbone, self.detach = head, backbone, detach

    def forward(self, hidden_states: Tensor, **inputs: Any) -> Tensor:
        """Values `(B, L)`, float32, of the states after each token, from the policy's hidden states and inputs."""
        if self.backbone is not None:
            hidden_states = self.backbone(**inputs, use_cache=False).last_hidden_state
        elif self.detach:
            hidden_states = hidden_states.detach()
        return self.head(hidden_states)


@dataclass
class FusedValueOutput(FusedCausalLMOutput):
    """Output of TRL's fused forward, with the value of the state after each token: shape `(B, L)`, float32."""

    # Not `values`, which is a method of every model output: they are dictionaries.
    state_values: Tensor | None = None


def add_critic(model: PreTrainedModel, critic: Critic) -> None:
    """
    Adds a critic, as the submodule `ppo_critic`, to a policy (with PEFT, its base model) with TRL's fused LM head:
    `model(..., fused_lm_head=True, return_values=True)` returns [`FusedValueOutput`]. Other calls are unchanged.
    """
    model.add_module(CRITIC, critic)
    # As a function, so that a deep copy of the model calls it on itself.
    fused_forward = model.forward.__func__

    # Keep the original signature: `generate` validates its model kwargs against it
    @functools.wraps(type(model).forward)
    def forward(self: PreTrainedModel, *args: Any, return_values: bool = False, **kwargs: Any) -> Any:
        if self is not model and not kwargs.get("fused_lm_head"):
            return type(self).forward(self, *args, **kwargs)
        if not return_values:
            return fused_forward(self, *args, **kwargs)
        hidden_states: list[Tensor] = []
        # TRL's fused forward does not return the hidden states.
        keep = self.base_model.register_forward_hook(lambda *args: hidden_states.append(args[2].last_hidden_state))
        with keep:  # removed at the end
            outputs = fused_forward(self, *args, **kwargs)
        # The critic is looked up on each call, since FSDP replaces modules after patching
        inputs = {name: value for name, value in kwargs.items() if name not in OF_THE_LM_HEAD}
        return FusedValueOutput(**outputs, state_values=critic_of(self)(hidden_states[0], **inputs))

    model.forward = types.MethodType(forward, model)


class ForwardRecorder:
    """
    Replaces a policy where TRL computes log-probabilities, so that one forward pass yields `log_probs`, `(B, T)`,
    and with `return_values` the `values` before each token and after the last one, `(B, T + 1)`.
    """

    log_probs: Tensor
    values: Tensor

    def __init__(self, model: nn.Module, return_values: bool) -> None:
        self._model, self._return_values = model, return_values
        self._chunks: list[Tensor] = []

    def __call__(self, **inputs: Any) -> FusedCausalLMOutput:
        if not self._return_values:
            return self._model(**inputs)
        outputs = self._model(**inputs, return_values=True)
        self._chunks.append(outputs.state_values)
        return outputs

    def finish(self, log_probs: Tensor, attention_mask: Tensor) -> None:
        """Completes the pass over all rows, possibly computed in chunks, with TRL's log-probabilities."""
        self.log_probs = log_probs
        if self._return_values:
            values = torch.cat(self._chunks)
            if len(values) != len(attention_mask) or values.shape[1] < attention_mask.shape[1]:
                raise RuntimeError(
                    f"The policy returned state values of shape {tuple(values.shape)} for {len(attention_mask)} rows: "
                    "this version of TRL computes them differently. Use `critic='none'`, or another version of TRL."
                )
            self.values = values[:, -(log_probs.shape[1] + 1) :]
            self._chunks = []


def critic_of(model: PreTrainedModel) -> Critic:
    """The critic added to a policy by [`add_critic`]; with PEFT, pass its base model."""
    return model.get_submodule(CRITIC)


def is_critic(name: str) -> bool:
    """Whether a parameter of the policy belongs to the critic, by its name."""
    return CRITIC in name.split(".")


class SyncPolicyOnly(TrainerCallback):
    """Excludes the critic from TRL's synchronisation of the reference model, which pairs all parameters of the two."""

    def __init__(self, sync: TrainerCallback, policy: PreTrainedModel) -> None:
        self._sync, self._policy = sync, policy

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        with without_critic(self._policy):
            self._sync.on_step_end(*args, **kwargs)


def send_policy_only(generation: VLLMGeneration) -> None:
    """Excludes the critic's parameters from vLLM, which does not know them."""
    named_params = generation._iter_named_params
    # Gathering a sharded parameter is a collective operation: every process must iterate over all.
    generation._iter_named_params = lambda: ((name, tensor) for name, tensor in named_params() if not is_critic(name))


def split_state_dict(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits a state dict into the policy's, unchanged, and the critic's, with the names of [`Critic`]."""
    policy = {name: tensor for name, tensor in state_dict.items() if not is_critic(name)}
    critic = {name.split(f"{CRITIC}.")[-1]: tensor for name, tensor in state_dict.items() if is_critic(name)}
    return policy, critic


@contextmanager
def without_critic(model: PreTrainedModel) -> Iterator[None]:
    """Removes the critic from the policy's submodules, so that a plain checkpoint fits."""
    critic = model._modules.pop(CRITIC)
    try:
        yield
    finally:
        model._modules[CRITIC] = critic


def save_critic(critic: Mapping[str, Tensor], folder: str) -> None:
    """Writes the critic's state dict to a checkpoint folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in critic.items()}
    save_file(tensors, Path(folder) / CRITIC_FILE, metadata={"format": "pt"})


def load_critic(critic: Critic, folder: str) -> None:
    """Loads the file written by [`save_critic`]."""
    path = Path(folder) / CRITIC_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"The checkpoint {folder!r} has no {CRITIC_FILE!r}, so it was not written by a PPO run with a critic. "
            "Resume from a checkpoint of such a run, or start a new run from these weights."
        )
    critic.load_state_dict(load_file(path))
