# SPDX-License-Identifier: Apache-2.0
"""Training arguments of the sentence-level reward model."""

from dataclasses import dataclass
from typing import Literal

from trl import RewardConfig

from ..field_help import with_help


ADAPTER_TASK = "TOKEN_CLS"  # PEFT's task type for adapters of a reward model, which has no language modeling head


@with_help
@dataclass
class SentenceRewardTrainerConfig(RewardConfig):
    r"""
    Configuration class for the [`SentenceRewardTrainer`]: TRL's [`~trl.RewardConfig`], and the design of a reward
    model built on a language model, which is ignored if the model is already a sentence reward model.

    Args:
        marker (`bool`, *optional*, defaults to `True`):
            Whether to read the model at markers, before the response and after each sentence, as in the paper. If
            `False`, it is read at the last token of the prompt and of each sentence.
        aggregator (`str`, *optional*, defaults to `"attention"`):
            Aggregation of the sentence rewards into the response's score: `"attention"`, or `"sum"` for weights of 1.
        differences (`bool`, *optional*, defaults to `True`):
            Whether a sentence's reward is the increase of the value over the previous sentence, as in the paper. If
            `False`, it is the sentence's own value, read before EOS. With `aggregator="sum"`, the score then counts
            good sentences, and the rewards tell which ones are bad.
        attention_dim (`int`, *optional*, defaults to `256`):
            Size $d$ of the queries and keys of the attention over sentences. Must be even.
        attention_init (`str`, *optional*, defaults to `"orthogonal"`):
            Initialization of the attention: `"orthogonal"` for random $W_q$ and $W_k$, as in the paper, or `"equal"`
            for $W_q = 0$, and so equal weights of all sentences, which is better with little data.
        max_sentences (`int`, *optional*, defaults to `512`):
            Maximum number of sentences per response. The rest of a longer response is treated as its last sentence.
        segmenter (`str`, *optional*, defaults to `"rules"`):
            Segmentation of text into sentences: `"rules"`, or the name (`"sat-3l"`, as in the paper) or path of a SaT
            model.
        attention_learning_rate (`float`, *optional*):
            Learning rate of the attention over sentences, $W_q$ and $W_k$. Defaults to `learning_rate` divided by
            $4 \sqrt d$, so that a step of Adam moves the logits of the weights a quarter as far as the values. At four
            times this rate or more, most runs put all weight on one position of each response. Also applies to a
            model that is already a sentence reward model.
        center_sentences_coefficient (`float`, *optional*, defaults to `0.0`):
            Coefficient of the mean square of the sentence rewards $r_i$, $i > 1$, in the loss. It removes what does
            not distinguish pairs from the rewards, such as the subject of a sentence, so that they tell wrong ones.
        freeze_layers (`int`, *optional*, defaults to `0`):
            Number of first layers to freeze, with the embeddings and the marker below them. They are run once over the
            dataset, and training starts from their states, which `datasets` caches on disk (2 or 4 bytes times the
            hidden size per token; per sentence if all layers are frozen). The result equals freezing them in place
            without dropout, at a fraction of the cost. Requires a single process and no adapter.
    """

    marker: bool = True
    aggregator: Literal["attention", "sum"] = "attention"
    differences: bool = True
    attention_dim: int = 256
    attention_init: Literal["orthogonal", "equal"] = "orthogonal"
    max_sentences: int = 512
    segmenter: str = "rules"
    attention_learning_rate: float | None = None
    center_sentences_coefficient: float = 0.0
    freeze_layers: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attention_learning_rate", "center_sentences_coefficient", "freeze_layers"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValueError(f"`{name}` must not be negative, got {value}.")
