# SPDX-License-Identifier: Apache-2.0
"""Training arguments of the sentence-level reward model."""

from dataclasses import dataclass
from typing import Literal

from trl import RewardConfig

from ..field_help import with_help


@with_help
@dataclass
class SentenceRewardTrainerConfig(RewardConfig):
    r"""
    Configuration class for the [`SentenceRewardTrainer`]: TRL's [`~trl.RewardConfig`], and the design of a reward
    model built from a language model, which is ignored for a model that is a sentence reward model already.

    Args:
        marker (`bool`, *optional*, defaults to `True`):
            Whether the model is read at markers, before the response and after every sentence, as in the paper; or,
            with `False`, at the last tokens of prompt and sentences.
        aggregator (`str`, *optional*, defaults to `"attention"`):
            Aggregation of sentence rewards to the response's score: `"attention"`, or `"sum"`, with all weights 1.
        differences (`bool`, *optional*, defaults to `True`):
            Whether a sentence's reward is its increase of the value, as in the paper, or, with `False`, its own
            value, read before EOS: with `aggregator="sum"`, the score then counts good sentences, and bad ones are
            found.
        attention_dim (`int`, *optional*, defaults to `256`):
            Size $d$ of the queries and keys of the attention over sentences; even.
        attention_init (`str`, *optional*, defaults to `"orthogonal"`):
            Initialization of the attention: `"orthogonal"`, random $W_q$ and $W_k$ as in the paper, or `"equal"`, $W_q
            = 0$ and so equal weights for all sentences, which is better for little data.
        max_sentences (`int`, *optional*, defaults to `512`):
            Maximum number of sentences per response. The rest of a longer one counts as one last sentence.
        segmenter (`str`, *optional*, defaults to `"rules"`):
            Segmentation of text into sentences: `"rules"`, or the name (`"sat-3l"`, as in the paper) or path of a SaT
            model.
        attention_learning_rate (`float`, *optional*):
            Learning rate of the attention over sentences, $W_q$ and $W_k$. Defaults to `learning_rate` divided by
            $4 \sqrt d$: a step of Adam then moves the logits of the weights a quarter as far as the values. With as
            far or more, most runs end with all weight at one place of every response. Also applies to a model that is
            a sentence reward model already.
        center_sentences_coefficient (`float`, *optional*, defaults to `0.0`):
            Coefficient of the mean square of the sentence rewards $r_i$, $i > 1$, in the loss. It removes from them
            what does not distinguish pairs, such as the subject of a sentence, so that wrong ones are found.
        freeze_layers (`int`, *optional*, defaults to `0`):
            Number of first layers to freeze, with the embeddings and the marker below them. They are run once over the
            dataset, and training starts from their states, cached on disk by `datasets`, 2 or 4 bytes times the hidden
            size per token; with all layers frozen, per sentence. Equal to freezing them in place without dropout, at a
            fraction of the cost. For one process, without an adapter.
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
