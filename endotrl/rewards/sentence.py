# SPDX-License-Identifier: Apache-2.0
"""A trained sentence-level reward model as a TRL reward function."""

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, get_args

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks import check_choice
from ..frozen.loaded_model import eval_mode
from ..frozen.names import context_length, load_config, load_tokenizer
from ..frozen.own_copy import check_where, resolve_device, resolve_dtype
from ..frozen.sharded_weights import loaded_whole
from ..rendering.images import refuse_images
from ..rendering.messages import Completions, Prompts, TokenIds
from ..rendering.policy import PolicyBinding, PolicyTokens, Reading, tokenizer_of
from ..rendering.renderer import Overlong, OverlongPrompt
from ..scoring.batching import plan_batches
from ..scoring.forward_pass import RopeLengths, exclusive, rope_as_made
from ..scoring.isolation import why_alone, why_alone_by_length
from ..sentence.configuration import SentenceRewardConfig
from ..sentence.encoding import SentenceEncoder, pad_batch
from ..sentence.modeling import SentenceRewardModel
from ..sentence.segmentation import Segmenter, load_segmenter
from ..sentence.tokens import SentenceTokens, transfer
from .protocol import DenseScores


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SentenceScores:
    r"""
    Output of a sentence reward model for one completion of `n` sentences: its `score` $R(y) = \sum_i a_i r_i$, and
    `sentence_rewards` $r_i$ and `weights` $a_i$ of shape `(n + 1,)`, float32, the first of them the prompt's.
    `sentences` and `completion_ids` are by the tokenizer of the reward model. `cut` is `True` if prompt and completion
    were too long and truncated, see [`~endotrl.sentence.SentenceEncoder`].
    """

    score: float
    sentence_rewards: Tensor
    weights: Tensor
    sentences: SentenceTokens
    completion_ids: list[int]
    cut: bool = False

    @property
    def contributions(self) -> Tensor:
        r"""
        $a_i r_i$ of every sentence, of shape `(n,)`; they sum to the score. The first includes that of the prompt,
        which is earned before there is any token to assign it to.
        """
        terms = self.weights * self.sentence_rewards
        return torch.cat([terms[:1] + terms[1:2], terms[2:]]) if len(terms) > 1 else terms[:0]

    @property
    def weakest_sentence(self) -> str:
        """The sentence with the lowest contribution; empty if there is none."""
        if not self.sentences.spans:
            return ""
        start, end = self.sentences.spans[int(self.contributions.argmin())]
        return self.sentences.text[start:end].strip()


class SentenceReward:
    r"""
    A trained [`SentenceRewardModel`] (https://huggingface.co/papers/2503.04793) as a reward: one number per completion
    in TRL's `GRPOTrainer`, `RLOOTrainer` and `OnlineDPOTrainer`; and $a_i r_i$ at the last token of every sentence,
    which sum to that number, in [`DenseGRPOTrainer`] and [`PPOTrainer`].

    The policy and the reward model may have different tokenizers: the text is then re-encoded, and the reward of a
    sentence goes to the policy's token that ends it. Outside of trainers, this requires `policy_processing_class`.

    Args:
        model (`str`, [`SentenceRewardModel`] or [`~peft.PeftModel`]):
            Path or hub id of a sentence reward model, from which the reward loads its own copy on first use; or a
            loaded one, which is used directly.
        segmenter ([`~endotrl.sentence.Segmenter`], *optional*):
            Splits text into sentences. Defaults to the one that the model was trained with.
        processing_class, policy_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of `model`, loaded with it if not given; and of the policy, which is taken from a trainer.
        max_tokens_per_batch, dtype, device, trust_remote_code, name, overlong_prompt, chat_template_kwargs:
            As in [`EndogenousReward`]. Heads stay float32, whatever the `dtype`.
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
        plan_batches([], max_tokens_per_batch)  # raises now for an invalid budget
        check_where(dtype, device)
        check_choice("overlong_prompt", overlong_prompt, get_args(OverlongPrompt))
        if isinstance(model, str | os.PathLike):
            self._path: str | None = os.fspath(model)
            self._model: SentenceRewardModel | None = None  # loaded on first use
            config = load_config(self._path, trust_remote_code)
        else:
            if not isinstance(model, nn.Module):
                kind = type(model).__name__
                raise TypeError(f"`model` is a {kind}, but it must be a path or hub id, or a `SentenceRewardModel`.")
            loaded: Any = model
            self._model = loaded.get_base_model() if is_peft_model(loaded) else loaded
            self._path, config = None, loaded.config
        if not isinstance(config, SentenceRewardConfig):
            raise ValueError(
                f"{self._path or type(model).__name__!r} is a model of type {config.model_type!r}, not a sentence "
                "reward model. Train one with `SentenceRewardTrainer`."
            )
        self.config = config
        self.segmenter = load_segmenter(config.segmenter) if segmenter is None else segmenter
        self.max_tokens_per_batch = max_tokens_per_batch
        self.trust_remote_code = trust_remote_code
        self.overlong_prompt: Overlong = overlong_prompt
        self.__name__ = name  # TRL's name for a callable in logs
        self._dtype, self._device = dtype, device
        # Reason why each row needs its own pass; empty if it does not, `None` until the model has been tried.
        self._alone: str | None = None
        self._own_tokenizer = processing_class
        # Rendering of prompts: in a trainer, like its policy.
        tokens = None if policy_processing_class is None else PolicyTokens(policy_processing_class)
        makers = self._tokenizer, self._make_encoder
        self._prompts = PolicyBinding(processing_class, chat_template_kwargs, *makers, tokens=tokens)
        self._warned = False

    def __repr__(self) -> str:
        return f"SentenceReward({self._source!r}, name={self.__name__!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Weights are not pickled, but loaded again on first use."""
        if self._path is None:
            raise TypeError(
                "A sentence reward of a loaded model cannot be pickled, because weights are not pickled. Save the "
                "model, and create the reward from its path."
            )
        return {**self.__dict__, "_model": None}

    @property
    def _source(self) -> str:
        """Path or hub id of the model; empty if there is none."""
        return self._path or self.config._name_or_path

    @property
    def policy_processing_class(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer of the policy: given, or of the trainer that the reward is bound to."""
        tokens = self._prompts.policy_tokens
        return None if tokens is None else tokenizer_of(tokens.processing_class)

    def __call__(
        self, prompts: Prompts, completions: Completions, completion_ids: TokenIds | None = None, **kwargs: Any
    ) -> list[float | None]:
        """
        One reward per completion, as [`EndogenousReward.__call__`]. In a trainer, logs the sentence with the lowest
        contribution, and the number of sentences per completion.
        """
        return [row.score for row in self._score(prompts, completions, completion_ids, kwargs)]

    def outcome_and_token_rewards(
        self, prompts: Prompts, completions: Completions, completion_ids: TokenIds | None = None, **kwargs: Any
    ) -> DenseScores:
        """
        Scores a batch once, per completion and per token: see [`DenseReward`]. Without `completion_ids`, the tokens
        are the reward model's. Raises `ValueError` if the policy has another tokenizer that is unknown.
        """
        rows = self._score(prompts, completions, completion_ids, kwargs)
        given = [row.completion_ids for row in rows] if completion_ids is None else map(list, completion_ids)
        token_rewards = [self._token_rewards(row, ids) for row, ids in zip(rows, given, strict=True)]
        return DenseScores([row.score for row in rows], token_rewards)

    def score(
        self,
        prompts: Prompts,
        completions: Completions,
        completion_ids: TokenIds | None = None,
        progress: bool = False,
        images: Sequence[Any] | None = None,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Sequence[Any] | None = None,
    ) -> list[SentenceScores]:
        """All outputs of the model for each completion: sentences, their rewards and weights. Images are refused."""
        columns = {"images": images, "tools": tools, "chat_template_kwargs": chat_template_kwargs}
        return self._score(prompts, completions, completion_ids, columns, progress)

    def bind(self, trainer: Any) -> Self:
        """Renders prompts and finds the ends of sentences like the policy: see [`EndogenousReward.bind`]."""
        self._prompts.bind(trainer)
        return self

    attach = bind  # there are no weights to share with a trainer

    def load(self) -> Self:
        """Loads tokenizer and weights now, so that problems show before there is data."""
        self._tokenizer()
        self._loaded()
        return self

    def _loaded(self) -> SentenceRewardModel:
        with exclusive(self):
            if self._model is None:
                assert self._path is not None
                device = resolve_device(self._device)
                with loaded_whole():
                    model = SentenceRewardModel.from_pretrained(self._path, dtype=resolve_dtype(self._dtype, device))
                self._model = model.to(device).eval().requires_grad_(False)
            return self._model

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._own_tokenizer is None:
            self._own_tokenizer = load_tokenizer(self._source, self.trust_remote_code)
        return self._own_tokenizer

    def _make_encoder(self, reading: Reading) -> SentenceEncoder:
        return SentenceEncoder(
            config=self.config,
            segmenter=self.segmenter,
            max_length=context_length(self.config),
            overlong_prompt=self.overlong_prompt,
            **reading._asdict(),
        )

    def _score(
        self,
        prompts: Prompts,
        completions: Completions,
        completion_ids: TokenIds | None,
        columns: Mapping[str, Any],
        progress: bool = False,
    ) -> list[SentenceScores]:
        """Encodes rows, scores them in batches of similar lengths, and logs in trainers. Keeps the order of rows."""
        refuse_images(columns, len(prompts), "the sentence reward model")
        given = prompts, completions, completion_ids
        rows = self._prompts.render(SentenceEncoder.__call__, *given, of_dataset=columns)
        results: dict[int, SentenceScores] = {}
        model = self._loaded()
        rope = RopeLengths.from_config(model.config)
        with (
            exclusive(model),
            torch.no_grad(),
            eval_mode(model),
            tqdm(total=len(rows), desc="Scoring", unit=" completions", disable=not progress) as bar,
        ):
            if self._alone is None:
                self._alone = why_alone(model) or why_alone_by_length(model, rope, self.max_tokens_per_batch) or ""
            lengths = [len(row.input_ids) for row in rows]
            kinds = [(i,) if self._alone else rope.length_class(length) for i, length in enumerate(lengths)]
            for batch in plan_batches(lengths, self.max_tokens_per_batch, kinds):
                inputs = pad_batch([(rows[i].input_ids, rows[i].sentence_ends) for i in batch], pad_token_id=0)
                with rope_as_made(model):
                    output = model(**{key: tensor.to(model.device) for key, tensor in inputs.items()})
                read = output.logits[:, 0].tolist(), output.sentence_rewards.cpu(), output.weights.cpu()
                for i, score, rewards, weights in zip(batch, *read, strict=True):
                    row, count = rows[i], len(rows[i].sentence_ends)
                    sums = score, rewards[:count].clone(), weights[:count].clone()
                    results[i] = SentenceScores(*sums, row.sentences, row.completion_ids, row.cut)
                bar.update(len(batch))
        scored = [results[i] for i in range(len(rows))]
        bad = [i for i, row in enumerate(scored) if not math.isfinite(row.score)]
        if bad:
            raise ValueError(
                f"The sentence reward model returned NaN or infinite scores for rows "
                f"{', '.join(map(str, bad[:10]))} of {len(scored)}. Its weights are damaged, or its dtype is too "
                'narrow: try `dtype="float32"`.'
            )
        if (log_metric := columns.get("log_metric")) is not None:
            log_metric(f"{self.__name__}/sentences", sum(len(row.sentences.spans) for row in rows) / len(rows))
        if (log_extra := columns.get("log_extra")) is not None:
            log_extra(f"{self.__name__}/weakest_sentence", [row.weakest_sentence for row in scored])
        return scored

    def _token_rewards(self, row: SentenceScores, ids: list[int]) -> Tensor:
        tokens = row.sentences.last_tokens
        # Padding after the end, which some trainers pass, gets 0.
        if ids[: len(row.completion_ids)] != row.completion_ids:
            if self.policy_processing_class is None:
                raise ValueError(
                    "The policy and the reward model have different tokenizers, so assigning sentence rewards to the "
                    "policy's tokens requires its tokenizer. Pass it as `policy_processing_class`, or call "
                    "`reward.attach(trainer)`."
                )
            tokens, exact = transfer(row.sentences, self.policy_processing_class, ids)
            if not exact and not self._warned:
                self._warned = True
                logger.warning(
                    "The reward model's tokenizer changes the text of completions, so the positions of sentence ends "
                    "among the policy's tokens are approximate."
                )
        rewards = torch.zeros(len(ids))
        if len(ids) > 0:
            rewards.index_add_(0, torch.tensor(tokens, dtype=torch.long), row.contributions)
        return rewards
