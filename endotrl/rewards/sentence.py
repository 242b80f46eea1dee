# SPDX-License-Identifier: Apache-2.0
"""A trained sentence-level reward model as a TRL reward function."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..rendering.images import refuse_images
from ..rendering.messages import Completion, Prompt
from ..rendering.policy_tokens import PolicyTokens, tokenizer_of
from ..rendering.renderer import OverlongPrompt
from ..sentence.configuration import SentenceRewardConfig
from ..sentence.modeling import SentenceRewardModel
from ..sentence.segmentation import Segmenter
from ..sentence.sentence_scorer import SentenceScorer, SentenceScores
from ..sentence.tokens import transfer
from .protocol import DenseScores


logger = logging.getLogger(__name__)


class SentenceReward:
    r"""
    A trained [`SentenceRewardModel`] (https://huggingface.co/papers/2503.04793) as a reward: one number per completion
    in TRL's `GRPOTrainer`, `RLOOTrainer` and `OnlineDPOTrainer`; and $a_i r_i$ at the last token of every sentence,
    which sum to that number, in [`DenseGRPOTrainer`] and [`PPOTrainer`].

    Policy and reward model may have different tokenizers: the text is encoded again then, and a sentence's reward goes
    to the token of the policy that ends it. Outside of trainers, that takes `policy_processing_class`.

    Args:
        model (`str`, [`SentenceRewardModel`] or [`~peft.PeftModel`]):
            Path or hub id of a sentence reward model, from which the reward loads its own copy on first use; or a
            loaded one, which is used as it is.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of `model`. Loaded with the model if not given.
        segmenter ([`~endotrl.sentence.Segmenter`], *optional*):
            Splits text into sentences. Defaults to the one that the model was trained with.
        policy_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the policy, if it is another. In a trainer, it is found.
        max_tokens_per_batch, dtype, device, trust_remote_code, name, overlong_prompt, chat_template_kwargs:
            As in [`EndogenousReward`]. Heads stay float32, whatever the `dtype`.

    Raises:
        `ValueError`: If a setting is out of range, or the model is another kind of model.
        `OSError`: If there is no model of that name.

    Example:
    ```python
    >>> from endotrl import SentenceReward
    >>> from trl import GRPOTrainer

    >>> reward = SentenceReward("sentence-reward-model")
    >>> trainer = GRPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", reward_funcs=reward, train_dataset=dataset)
    ```
    """

    def __init__(
        self,
        model: str | SentenceRewardModel | Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        segmenter: Segmenter | None = None,
        policy_processing_class: PreTrainedTokenizerBase | None = None,
        max_tokens_per_batch: int = 8192,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        name: str = "sentence_reward",
        overlong_prompt: OverlongPrompt = "error",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self._scorer = SentenceScorer(
            model,
            processing_class,
            segmenter,
            max_tokens_per_batch,
            dtype,
            device,
            trust_remote_code,
            overlong_prompt,
            chat_template_kwargs,
        )
        self.policy_processing_class = policy_processing_class
        self.__name__ = name  # TRL's name for a callable in logs
        self._said_other_text = False

    def __repr__(self) -> str:
        return f"SentenceReward({self._scorer.name!r}, name={self.__name__!r})"

    @property
    def policy_processing_class(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer of the policy: given, or of the trainer that the reward is bound to."""
        tokens = self._scorer.prompts.policy_tokens
        return None if tokens is None else tokenizer_of(tokens.processing_class)

    @policy_processing_class.setter
    def policy_processing_class(self, processing_class: PreTrainedTokenizerBase | None) -> None:
        self._scorer.prompts.know(None if processing_class is None else PolicyTokens(processing_class))

    @property
    def config(self) -> SentenceRewardConfig:
        """Configuration of the model."""
        return self._scorer.config

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        One reward per completion: TRL's contract for reward functions. `completion_ids` are scored as they are if they
        are of the reward model's tokenizer; otherwise, or if not given, the text is encoded. Logs, in a trainer, the
        sentence that contributes least, and the number of sentences per completion.

        Raises `ValueError` or `TypeError` for a batch that cannot be encoded (before anything is computed; see
        [`~endotrl.sentence.SentenceEncoder`]), and for NaN scores.
        """
        refuse_images(kwargs, len(prompts), "the sentence reward model")
        rows = self._scorer(
            prompts, completions, completion_ids, log_extra=log_extra, environment=kwargs.get("environment")
        )
        self._log(rows, log_extra, log_metric)
        return [row.score for row in rows]

    def outcome_and_token_rewards(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> DenseScores:
        """
        Scores a batch once, by completion and by token: the contract of [`DenseReward`]. Tokens get $a_i r_i$ at the
        last token of every sentence, 0 elsewhere (of the reward model's tokens, without `completion_ids`), which sum
        to the score, unless there is no token.

        Raises, next to what [`__call__`] does, `ValueError` if policy and reward model have different tokenizers and
        the policy's is not known.
        """
        refuse_images(kwargs, len(prompts), "the sentence reward model")
        rows = self._scorer(
            prompts, completions, completion_ids, log_extra=log_extra, environment=kwargs.get("environment")
        )
        self._log(rows, log_extra, log_metric)
        token_rewards = [
            self._token_rewards(row, None if completion_ids is None else list(completion_ids[i]))
            for i, row in enumerate(rows)
        ]
        return DenseScores([row.score for row in rows], token_rewards)

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        progress: bool = False,
    ) -> list[SentenceScores]:
        """All that the model says about each completion, for looking at: sentences, their rewards and weights."""
        return self._scorer(prompts, completions, completion_ids, progress)

    def bind(self, trainer: Any) -> "SentenceReward":
        """Reads prompts, and finds the ends of sentences, as the policy does: see [`EndogenousReward.bind`]."""
        self._scorer.prompts.bind(trainer)
        return self

    def attach(self, trainer: Any) -> "SentenceReward":
        """As [`bind`]: no trainer has weights that it could share."""
        return self.bind(trainer)

    def load(self) -> "SentenceReward":
        """Loads tokenizer and weights now, so that what is wrong shows before there is data."""
        self._scorer.load()
        return self

    def _token_rewards(self, row: SentenceScores, ids: list[int] | None) -> Tensor:
        tokens = row.sentences.last_tokens
        if ids is None:
            ids = row.completion_ids
        elif ids[: len(row.completion_ids)] != row.completion_ids:
            tokens = self._policy_tokens(row, ids)
        # Padding behind the end, which some trainers hand over, gets 0.
        rewards = torch.zeros(len(ids))
        if len(ids) > 0:
            rewards.index_add_(0, torch.tensor(tokens, dtype=torch.long), row.contributions)
        return rewards

    def _policy_tokens(self, row: SentenceScores, ids: list[int]) -> list[int]:
        """The token of the policy that ends each sentence, where policy and reward model have different tokenizers."""
        if self.policy_processing_class is None:
            raise ValueError(
                "Policy and reward model have different tokenizers, and rewards of sentences go to tokens of the "
                "policy. Pass its tokenizer as `policy_processing_class`, or call `reward.attach(trainer)`."
            )
        tokens, exact = transfer(row.sentences, self.policy_processing_class, ids)
        if not exact and not self._said_other_text:
            logger.warning(
                "The reward model's tokenizer changes the text of completions, so that the ends of sentences among "
                "the policy's tokens are approximate. (Said once.)"
            )
            self._said_other_text = True
        return tokens

    def _log(
        self,
        rows: list[SentenceScores],
        log_extra: Callable[[str, list[Any]], None] | None,
        log_metric: Callable[[str, float], None] | None,
    ) -> None:
        if log_metric is not None:
            log_metric(f"{self.__name__}/sentences", sum(len(row.sentences.spans) for row in rows) / len(rows))
        if log_extra is not None:
            log_extra(f"{self.__name__}/weakest_sentence", [_weakest_sentence(row) for row in rows])


def _weakest_sentence(row: SentenceScores) -> str:
    if not row.sentences.spans:
        return ""
    start, end = row.sentences.spans[int(row.contributions.argmin())]
    return row.sentences.text[start:end].strip()
