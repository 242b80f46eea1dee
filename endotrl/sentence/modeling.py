# SPDX-License-Identifier: Apache-2.0
"""Sentence-level reward model: a language model with a value at the end of every sentence."""

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from ..frozen.names import resolve_model
from ..frozen.own_copy import check_complete
from .configuration import SentenceRewardConfig
from .head import SentenceHead, attention_weights, sentence_rewards


@dataclass
class SentenceRewardOutput(ModelOutput):
    r"""
    Output of a [`SentenceRewardModel`] for a batch, float32: `logits`, the scores $R(y) = \sum_i a_i r_i$ of shape
    `(batch_size, 1)`, and `sentence_rewards` $r_i$ and `weights` $a_i$ of shape `(batch_size, N)`, 0 where a row is
    padded. `N` is the largest number of states of a response: one before it, and one per sentence. `loss` is not set:
    it is defined for a pair, and computed by the trainer.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    sentence_rewards: Tensor | None = None
    weights: Tensor | None = None


class SentenceRewardModel(PreTrainedModel):
    r"""
    Sentence-level reward model (https://huggingface.co/papers/2503.04793): a language model reads prompt and response
    once, and has an output at the end of every sentence. With hidden states $h_i$, the first one right before the
    response,

    $$
    v_i = w^\top h_i + b, \qquad r_1 = v_1, \quad r_i = v_i - v_{i-1}, \qquad
    a = \mathrm{softmax}_i \left( \frac{\mathrm{RoPE}_N(W_q h_N) \cdot \mathrm{RoPE}_i(W_k h_i)}{\sqrt d} \right),
    \qquad R(y) = \sum_i a_i r_i .
    $$

    The states are read at markers: positions without a token, where the input is a learned vector. It is not an entry
    of the vocabulary, so that no text can contain one. [`SentenceEncoder`] inserts them; [`SentenceRewardTrainer`]
    trains the model, and [`SentenceReward`] scores text with it.

    Example:
    ```python
    >>> from endotrl import SentenceRewardModel

    >>> model = SentenceRewardModel.from_backbone("Qwen/Qwen2.5-0.5B-Instruct")
    >>> model.save_pretrained("sentence-reward-model")
    >>> model = SentenceRewardModel.from_pretrained("sentence-reward-model")
    ```
    """

    config_class = SentenceRewardConfig
    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _keep_in_fp32_modules_strict = ["sentence_head"]

    def __init__(self, config: SentenceRewardConfig, backbone: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if config.backbone_config is None:
            raise ValueError(
                "The configuration has no `backbone_config`. Build a reward model on a language model with "
                "`SentenceRewardModel.from_backbone`."
            )
        self.backbone = AutoModel.from_config(config.backbone_config) if backbone is None else backbone
        self.marker = nn.Embedding(1, config.hidden_size) if config.marker else None
        self.sentence_head = SentenceHead(config)
        self.post_init()

    @classmethod
    def from_backbone(
        cls,
        model: str | os.PathLike[str] | PreTrainedModel,
        config: SentenceRewardConfig | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> "SentenceRewardModel":
        """
        Builds a reward model for training on a pretrained language model, without its LM head. The marker is
        initialized to the mean of the token embeddings, like new tokens in transformers; the value head small and
        random, the attention by `config.attention_init`. Seed torch before, for a reproducible initialization.

        `model` is the path or hub id of a causal language model, `"quickstart"` for the demo's model, or a loaded one;
        `backbone_config` of `config` is filled in. Other arguments, such as `dtype`, are those of
        [`~transformers.AutoModelForCausalLM.from_pretrained`].
        """
        if not isinstance(model, PreTrainedModel):
            model = AutoModelForCausalLM.from_pretrained(
                resolve_model(model), trust_remote_code=trust_remote_code, **kwargs
            )
        if model.config.is_encoder_decoder or isinstance(model, SentenceRewardModel):
            raise ValueError(
                "The backbone of a sentence reward model must be a decoder-only language model, got "
                f"{model.config._name_or_path!r}, a {type(model).__name__}. Load a trained sentence reward model with "
                "`from_pretrained`."
            )
        backbone = model.base_model
        config = SentenceRewardConfig() if config is None else copy.deepcopy(config)  # the caller's stays unchanged
        config.backbone_config = backbone.config
        config._name_or_path = backbone.config._name_or_path  # location of the tokenizer
        config.dtype = backbone.dtype
        reward_model = cls(config, backbone=backbone)
        reward_model.sentence_head.to(backbone.device)
        if reward_model.marker is not None:
            embeddings = backbone.get_input_embeddings()
            with torch.no_grad(), gathered([embeddings.weight]):
                # Through the module, since some models scale embeddings there; in parts, to hold no second table.
                ids = torch.arange(embeddings.weight.shape[0], device=embeddings.weight.device)
                total = torch.stack([embeddings(part).float().sum(dim=0) for part in ids.split(8192)]).sum(dim=0)
                reward_model.marker.to(device=total.device, dtype=backbone.dtype)
                reward_model.marker.weight.copy_(total / len(ids))
        return reward_model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *args: Any, **kwargs: Any
    ) -> "SentenceRewardModel":
        """
        Loads a trained sentence reward model, see [`~transformers.PreTrainedModel.from_pretrained`]. From a folder in
        which [`SentenceRewardTrainer`] saved a LoRA adapter, it loads the base model with the adapter merged.
        """
        path = str(pretrained_model_name_or_path)
        if os.path.isfile(os.path.join(path, "adapter_config.json")):
            return cls._from_adapter(path, *args, **kwargs)
        if "config" not in kwargs:
            kind = PretrainedConfig.get_config_dict(path, **kwargs)[0].get("model_type")
            if kind != SentenceRewardConfig.model_type:
                raise ValueError(
                    f"{path!r} is a model of type {kind!r}, not a sentence reward model. Train one on it with "
                    "`SentenceRewardTrainer`, or build an untrained one with `SentenceRewardModel.from_backbone`."
                )
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        if not is_deepspeed_zero3_enabled():  # its weights arrive in shards
            check_complete(f"the sentence reward model {path!r}", info["missing_keys"])
        return model

    @classmethod
    def _from_adapter(cls, path: str, *args: Any, **kwargs: Any) -> "SentenceRewardModel":
        from peft import PeftConfig, PeftModel

        peft_config = PeftConfig.from_pretrained(path)
        base = peft_config.base_model_name_or_path
        if isinstance(AutoConfig.from_pretrained(base), SentenceRewardConfig):
            model = cls.from_pretrained(base, *args, **kwargs)
        else:
            config = SentenceRewardConfig.from_pretrained(path)
            missing = set(new_modules(config)) - set(peft_config.modules_to_save or [])
            check_complete(f"the sentence reward model {path!r}", missing)
            model = cls.from_backbone(base, config, **kwargs)
        return PeftModel.from_pretrained(model, path).merge_and_unload()

    def _init_weights(self, module: nn.Module) -> None:
        """Initialises the reward model's own modules; the backbone initialises itself."""
        head = self.sentence_head
        if module is self.marker or module is head.value:
            nn.init.normal_(module.weight, std=0.02)  # `initializer_range` of most models; some have none
        if module is head.value:
            nn.init.zeros_(module.bias)
        elif head.has_attention and module is head.query and self.config.attention_init == "equal":
            nn.init.zeros_(module.weight)
        elif head.has_attention and (module is head.query or module is head.key):
            nn.init.orthogonal_(module.weight)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sentence_ends: Tensor | None = None,
        **kwargs: Any,
    ) -> SentenceRewardOutput:
        """
        Scores a batch of responses.

        `input_ids` and `attention_mask`, of shape `(batch_size, seq_len)`, are prompts and responses, padded on the
        right; ids at markers are ignored. `sentence_ends`, of shape `(batch_size, N)`, are the positions at which the
        model is read, those of its markers if it has them: right before the response, then at the end of each
        sentence; padded on the right with -1. `**kwargs` (`use_cache`, `margin`) are ignored.
        """
        if sentence_ends is None:
            raise ValueError(
                "`sentence_ends` is missing. This model is read at the ends of sentences and cannot score token ids "
                "alone. Pass it to TRL's trainers as `SentenceReward(model)`."
            )
        mask = sentence_ends >= 0  # (B, N)
        if not mask[:, 0].all():
            raise ValueError("A row of `sentence_ends` is empty. Each needs the position before the response.")
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("The batch is padded on the left. Pad it on the right, as `sentence_ends` are positions.")
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None]  # (B, 1)
        positions = sentence_ends.clamp(min=0)
        inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, T, D)
        if self.marker is not None:
            is_marker = torch.zeros_like(input_ids, dtype=torch.bool)
            is_marker[rows.expand_as(positions)[mask], positions[mask]] = True
            marker = self.marker(torch.zeros(1, dtype=torch.long, device=input_ids.device))  # (1, D)
            inputs_embeds = torch.where(is_marker[..., None], marker.to(inputs_embeds.dtype), inputs_embeds)
        hidden_states = self.backbone(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state  # (B, T, D)
        values, queries, keys = self.sentence_head(hidden_states[rows, positions])  # (B, N), (B, N, d), (B, N, d)
        rewards = sentence_rewards(values, mask, self.config.differences)
        has_attention = queries is not None
        weights = attention_weights(queries, keys, mask, self.config.rope_theta) if has_attention else mask.float()
        score = (weights * rewards).sum(dim=-1, keepdim=True)
        return SentenceRewardOutput(logits=score, sentence_rewards=rewards, weights=weights)


def new_modules(config: SentenceRewardConfig) -> list[str]:
    """Names of the modules without pretrained weights: trained and saved in full if the backbone gets an adapter."""
    return ["sentence_head", *(["marker"] if config.marker else [])]


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Context in which parameters partitioned by ZeRO-3 are gathered."""
    if not is_deepspeed_zero3_enabled():
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters)):
        yield


AutoModel.register(SentenceRewardConfig, SentenceRewardModel)
