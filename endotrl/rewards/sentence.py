# SPDX-License-Identifier: Apache-2.0
"""A trained sentence-level reward model as a TRL reward function, and other rewards by sentence."""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, get_args

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..bellman import check_choice
from ..scoring.batching import plan_batches
from ..scoring.messages import Completion, Prompt
from ..scoring.offsets import decode_with_offsets
from ..scoring.placement import check_device, eval_mode, load_config, load_tokenizer, resolve_dtype
from ..scoring.rendering import OverlongPrompt
from ..scoring.sharding import loaded_whole
from ..sentence.configuration import SentenceRewardConfig
from ..sentence.encoding import EncodedResponse, SentenceEncoder, SentenceTokens, pad_batch
from ..sentence.modeling import SentenceRewardModel
from ..sentence.segmentation import Segmenter, last_tokens, load_segmenter
from .dense import DenseScores


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SentenceScores:
    r"""
    What a sentence reward model says about one completion of `n` sentences.

    Attributes:
        score (`float`):
            $R(y) = \sum_i a_i r_i$.
        sentence_rewards (`torch.Tensor` of shape `(n + 1,)`):
            $r_i$, float32. The first is the value of the prompt, the others what each sentence added.
        weights (`torch.Tensor` of shape `(n + 1,)`):
            $a_i$, float32.
        sentences ([`~endotrl.sentence.SentenceTokens`]):
            Text, spans and last tokens of the sentences, by the tokenizer of the reward model.
        completion_ids (`list[int]`):
            The completion's tokens, by the tokenizer of the reward model.
    """

    score: float
    sentence_rewards: Tensor
    weights: Tensor
    sentences: SentenceTokens
    completion_ids: list[int]

    @property
    def contributions(self) -> Tensor:
        r"""
        $a_i r_i$ of every sentence, of shape `(n,)`; they sum to the score. The first has that of the prompt with it,
        which is earned before there is any token to give it to.
        """
        terms = self.weights * self.sentence_rewards
        return torch.cat([terms[:1] + terms[1:2], terms[2:]]) if len(terms) > 1 else terms[:0]


class SentenceReward:
    r"""
    A trained [`SentenceRewardModel`] (https://huggingface.co/papers/2503.04793) as a reward: one number a completion in
    TRL's `GRPOTrainer`, `RLOOTrainer` and `OnlineDPOTrainer`; and $a_i r_i$ at the last token of every sentence, which sum to that
    number, in [`DenseGRPOTrainer`] and [`PPOTrainer`].

    Policy and reward model may have different tokenizers: the text is encoded again then, and a sentence's reward goes to
    the token of the policy that ends it. That takes the policy's tokenizer: see `policy_processing_class`.

    Args:
        model (`str`, [`SentenceRewardModel`] or [`~peft.PeftModel`]):
            Path or hub id of a sentence reward model, from which the reward loads its own copy on first use; or a loaded
            one, which is used as it is.
        processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of `model`. Loaded with the model if not given.
        segmenter ([`~endotrl.sentence.Segmenter`], *optional*):
            Splits text into sentences. Defaults to the one that the model was trained with.
        policy_processing_class ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Tokenizer of the policy, if it is another. [`attach`] takes it from a trainer.
        max_tokens_per_batch (`int`, *optional*, defaults to `8192`):
            Padded tokens of one forward pass. It bounds memory and does not change rewards.
        dtype (`str` or `torch.dtype`, *optional*, defaults to `"auto"`):
            Dtype of the reward's own copy: `"auto"` is bfloat16 on accelerators and float32 on CPU. Heads stay float32.
        device (`str` or `torch.device`, *optional*):
            Device of the reward's own copy. Defaults to this process's device, as `accelerate` gives it.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether code from the model's repository may run.
        name (`str`, *optional*, defaults to `"sentence_reward"`):
            Name in logs.
        overlong_prompt (`str`, *optional*, defaults to `"error"`):
            What to do when prompt and completion do not fit the model's context: `"error"`, or `"truncate_left"` to drop the
            beginning of the prompt.
        chat_template_kwargs (`dict[str, Any]`, *optional*):
            Further arguments for the chat template.

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
        plan_batches([], max_tokens_per_batch)  # raises now if the budget is not a budget
        resolve_dtype(dtype, torch.device("cpu"))
        check_device(device)
        check_choice("overlong_prompt", overlong_prompt, get_args(OverlongPrompt))
        if isinstance(model, str | os.PathLike):
            self._path: str | None = os.fspath(model)
            self._model: SentenceRewardModel | None = None  # loaded on first use
            config = load_config(self._path, trust_remote_code)
        else:
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"`model` is a {type(model).__name__}, but it must be a path or hub id, or a `SentenceRewardModel`."
                )
            loaded: Any = model
            self._model = loaded.get_base_model() if is_peft_model(loaded) else loaded
            self._path, config = None, loaded.config
        if not isinstance(config, SentenceRewardConfig):
            raise ValueError(
                f"{self._path or type(model).__name__!r} is a model of type {config.model_type!r}, not a sentence reward "
                "model. Train one on it with `SentenceRewardTrainer`."
            )
        self.config = config
        self.segmenter = load_segmenter(config.segmenter) if segmenter is None else segmenter
        self.policy_processing_class = policy_processing_class
        self.max_tokens_per_batch = max_tokens_per_batch
        self.trust_remote_code = trust_remote_code
        self.overlong_prompt: OverlongPrompt = overlong_prompt
        self.chat_template_kwargs = chat_template_kwargs
        self.__name__ = name  # TRL's name for a callable in logs
        self._dtype, self._device = dtype, device
        self._processing_class = processing_class
        self._encoder: SentenceEncoder | None = None
        self._said_other_text = False

    def __repr__(self) -> str:
        return f"SentenceReward({self._path or self.config._name_or_path!r}, name={self.__name__!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Weights are not pickled, but loaded again on first use."""
        if self._path is None:
            raise TypeError(
                "A sentence reward made from a loaded model cannot be pickled, because weights are not pickled. Save the "
                "model, and make the reward from its path."
            )
        return {**self.__dict__, "_model": None, "_encoder": None}

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
        One reward a completion: TRL's contract for reward functions.

        Args:
            prompts (`list[str]` or `list[list[dict]]`):
                Prompts, as text or as messages.
            completions (`list[str]` or `list[list[dict]]`):
                Completions.
            completion_ids (`list[list[int]]`, *optional*):
                Token ids of the completions as the policy generated them, EOS included, without padding. Scored as
                they are if they are of the reward model's tokenizer; otherwise, or if not given, the text is encoded.
            log_extra (`Callable`, *optional*), log_metric (`Callable`, *optional*):
                TRL's loggers. Columns: the sentence that contributes least. Metrics: sentences a completion.
            **kwargs:
                Other columns; not used.

        Returns:
            `list[float]`

        Raises:
            `ValueError`, `TypeError`: For a batch that cannot be encoded (before anything is computed; see
            [`~endotrl.sentence.SentenceEncoder`]), and for NaN scores.
        """
        rows = self.score(prompts, completions, completion_ids)
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
        Scores a batch once, by completion and by token: the contract of [`DenseReward`].

        Args:
            prompts, completions, completion_ids, log_extra, log_metric, **kwargs:
                As in [`__call__`].

        Returns:
            [`DenseScores`]: the scores; and one tensor of shape `(H_i,)` a completion, float32, on the CPU, with a number for each of its
            `completion_ids` (without them, of the reward model's tokens): $a_i r_i$ at the last token of every sentence, 0
            elsewhere. They sum to the score, unless there is no token.

        Raises:
            `ValueError`: As [`__call__`], and if policy and reward model have different tokenizers and the policy's is not
            known.
        """
        rows = self.score(prompts, completions, completion_ids)
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
        """
        All that the model says about each completion, for looking at: sentences, their rewards and weights.

        Args:
            prompts, completions, completion_ids:
                As in [`__call__`].
            progress (`bool`, *optional*, defaults to `False`):
                Whether to show a progress bar.

        Returns:
            `list[SentenceScores]`, in the order given.
        """
        rows = self._encode(prompts, completions, completion_ids)
        results: list[SentenceScores | None] = [None] * len(rows)
        model = self._load()
        device = model.device
        with (
            torch.no_grad(),
            eval_mode(model),
            tqdm(total=len(rows), desc="Scoring", unit=" completions", disable=not progress) as bar,
        ):
            for batch in plan_batches([len(row.input_ids) for row in rows], self.max_tokens_per_batch):
                inputs = pad_batch([(rows[i].input_ids, rows[i].sentence_ends) for i in batch], pad_token_id=0)
                output = model(**{key: tensor.to(device) for key, tensor in inputs.items()})
                scores = output.logits.squeeze(-1).cpu()  # (B,)
                rewards, weights = output.sentence_rewards.cpu(), output.weights.cpu()  # (B, N)
                for j, i in enumerate(batch):
                    count = len(rows[i].sentence_ends)
                    results[i] = SentenceScores(
                        scores[j].item(),
                        rewards[j, :count].clone(),
                        weights[j, :count].clone(),
                        rows[i].sentences,
                        rows[i].completion_ids,
                    )
                bar.update(len(batch))
        scored = [result for result in results if result is not None]
        bad = [i for i, row in enumerate(scored) if not torch.isfinite(torch.tensor(row.score))]
        if bad:
            raise ValueError(
                f"The sentence reward model gives NaN or infinite scores for rows {', '.join(map(str, bad[:10]))} of "
                f'{len(scored)}. Its weights are damaged, or its dtype is too narrow: try `dtype="float32"`.'
            )
        return scored

    def attach(self, trainer: Any) -> "SentenceReward":
        """
        Takes the policy's tokenizer from a trainer, to find the policy's tokens that end sentences.

        Args:
            trainer ([`~transformers.Trainer`]):
                The trainer that has this reward among its `reward_funcs`.

        Returns:
            This reward.
        """
        self.policy_processing_class = trainer.processing_class
        return self

    def load(self) -> "SentenceReward":
        """
        Loads tokenizer and weights now instead of on first use, so that what is wrong with the model shows before there
        is data.

        Returns:
            This reward.
        """
        self._tokenizer()
        self._load()
        return self

    def _load(self) -> SentenceRewardModel:
        if self._model is None:
            assert self._path is not None
            device = PartialState().device if self._device is None else torch.device(self._device)
            with loaded_whole():
                model = SentenceRewardModel.from_pretrained(self._path, dtype=resolve_dtype(self._dtype, device))
            self._model = model.to(device).eval().requires_grad_(False)
        return self._model

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self._processing_class is None:
            name = self._path or self.config._name_or_path
            if not name:
                raise ValueError(
                    "The model instance given to the sentence reward was not loaded from a path or the hub, so its "
                    "tokenizer cannot be found. Pass it as `processing_class`."
                )
            self._processing_class = load_tokenizer(name, self.trust_remote_code)
        return self._processing_class

    def _encode(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None,
    ) -> list[EncodedResponse]:
        if self._encoder is None:
            self._encoder = SentenceEncoder(
                self._tokenizer(),
                self.config,
                self.segmenter,
                # Not every family has a limit (state-space models have none).
                max_length=getattr(self.config.get_text_config(), "max_position_embeddings", None),
                overlong_prompt=self.overlong_prompt,
                chat_template_kwargs=self.chat_template_kwargs,
            )
        return self._encoder(prompts, completions, completion_ids)

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
                "Policy and reward model have different tokenizers, and rewards of sentences go to tokens of the policy. Pass "
                "its tokenizer as `policy_processing_class`, or call `reward.attach(trainer)`."
            )
        text, offsets = decode_with_offsets(self.policy_processing_class, ids)
        # Templates and tokenizers differ in whitespace: a place is found in both texts by the other characters before it.
        visible = [position for position, character in enumerate(text) if not character.isspace()]
        pieces = ["".join(row.sentences.text[start:end].split()) for start, end in row.sentences.spans[:-1]]
        if not "".join(text.split()).startswith("".join(pieces)) and not self._said_other_text:
            logger.warning(
                "The reward model's tokenizer changes the text of completions, so that the ends of sentences among the "
                "policy's tokens are approximate. (Said once.)"
            )
            self._said_other_text = True
        ends = [visible[count] if count < len(visible) else len(text) for count in accumulate(map(len, pieces))]
        return last_tokens(text, list(zip([0, *ends], [*ends, len(text)], strict=True)), offsets)

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
