# SPDX-License-Identifier: Apache-2.0
"""Configuration of the sentence-level reward model."""

from typing import Any, Literal, get_args

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

from ..checks import check_choice


Aggregator = Literal["attention", "sum"]
AttentionInit = Literal["orthogonal", "equal"]


class SentenceRewardConfig(PretrainedConfig):
    r"""
    Configuration of a [`SentenceRewardModel`] (https://huggingface.co/papers/2503.04793).

    Args:
        backbone_config ([`~transformers.PretrainedConfig`] or `dict`, *optional*):
            Configuration of the backbone language model.
        marker, aggregator, differences, attention_dim, attention_init, max_sentences, segmenter:
            See [`SentenceRewardTrainerConfig`]. `segmenter` is `"custom"` for one that was given as an object.
        rope_theta (`float`, *optional*, defaults to `10000.0`):
            Base of the rotary angles of the sentence index.
    """

    model_type = "sentence_reward"
    sub_configs = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PretrainedConfig | dict[str, Any] | None = None,
        marker: bool = True,
        aggregator: Aggregator = "attention",
        differences: bool = True,
        attention_dim: int = 256,
        attention_init: AttentionInit = "orthogonal",
        rope_theta: float = 10_000.0,
        max_sentences: int = 512,
        segmenter: str = "rules",
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            kind = backbone_config.get("model_type")
            if kind not in CONFIG_MAPPING:
                raise ValueError(
                    f"`backbone_config` is of type {kind!r}, which this version of transformers does not support. "
                    "Install the version that the model was trained with."
                )
            backbone_config = CONFIG_MAPPING[kind](**backbone_config)
        check_choice("aggregator", aggregator, get_args(Aggregator))
        check_choice("attention_init", attention_init, get_args(AttentionInit))
        if attention_dim < 2 or attention_dim % 2:
            raise ValueError(
                "`attention_dim` must be positive and even, because rotary embeddings rotate pairs of entries, got "
                f"{attention_dim}."
            )
        if not rope_theta > 0.0:
            raise ValueError(f"`rope_theta` must be positive, got {rope_theta}.")
        if max_sentences < 1:
            raise ValueError(f"`max_sentences` must be at least 1, got {max_sentences}.")
        self.backbone_config: PretrainedConfig | None = backbone_config
        self.marker = marker
        self.aggregator = aggregator
        self.differences = differences
        self.attention_dim = attention_dim
        self.attention_init = attention_init
        self.rope_theta = rope_theta
        self.max_sentences = max_sentences
        self.segmenter = segmenter
        kwargs["num_labels"] = 1  # one score per response: required by TRL for reward models
        super().__init__(**kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PretrainedConfig:
        """
        The backbone's, which defines vocabulary, special tokens and context length of this model. Resizing the
        embeddings changes it.
        """
        if self.backbone_config is None:
            return super().get_text_config(*args, **kwargs)
        return self.backbone_config.get_text_config(*args, **kwargs)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the backbone, read by DeepSpeed's automatic settings."""
        if self.backbone_config is None:
            raise AttributeError("`hidden_size` is the backbone's, but this configuration has no `backbone_config`.")
        return self.get_text_config().hidden_size


AutoConfig.register(SentenceRewardConfig.model_type, SentenceRewardConfig)
