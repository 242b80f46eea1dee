# SPDX-License-Identifier: Apache-2.0
"""A trained sentence reward model, run over text: what it says about each sentence."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from accelerate import PartialState
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..checks import check_choice
from ..frozen.loaded_model import eval_mode
from ..frozen.names import context_length, load_config, load_tokenizer
from ..frozen.own_copy import check_device, resolve_dtype
from ..frozen.sharded_weights import loaded_whole
from ..rendering.messages import Completion, Prompt
from ..rendering.policy import PolicyBinding, Reading
from ..rendering.renderer import OverlongPrompt
from ..scoring.batching import plan_batches
from ..scoring.forward_pass import RopeLengths, exclusive, rope_as_made
from ..scoring.isolation import why_alone, why_alone_by_length
from .configuration import SentenceRewardConfig
from .encoding import SentenceEncoder, SentenceTokens, pad_batch
from .modeling import SentenceRewardModel
from .segmentation import Segmenter, load_segmenter


@dataclass(frozen=True)
class SentenceScores:
    r"""
    What a sentence reward model says about one completion of `n` sentences: its `score` $R(y) = \sum_i a_i r_i$, and
    `sentence_rewards` $r_i$ and `weights` $a_i$ of shape `(n + 1,)`, float32, the first of them the prompt's.
    `sentences` and `completion_ids` are by the tokenizer of the reward model. `cut` is `True` if prompt and completion
    were too long and lost something, see [`~endotrl.sentence.SentenceEncoder`].
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
        $a_i r_i$ of every sentence, of shape `(n,)`; they sum to the score. The first has that of the prompt with it,
        which is earned before there is any token to give it to.
        """
        terms = self.weights * self.sentence_rewards
        return torch.cat([terms[:1] + terms[1:2], terms[2:]]) if len(terms) > 1 else terms[:0]


class SentenceScorer:
    """
    Encodes prompts and completions and runs a sentence reward model over them, in batches of like lengths. The
    arguments are those of [`SentenceReward`], and `cut_overlong`: whether to cut rows that do not fit the model's
    context, as [`~endotrl.rendering.renderer.fit`] does.
    """

    def __init__(
        self,
        model: str | SentenceRewardModel | Any,
        processing_class: PreTrainedTokenizerBase | None = None,
        segmenter: Segmenter | None = None,
        max_tokens_per_batch: int = 8192,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
        overlong_prompt: OverlongPrompt = "error",
        chat_template_kwargs: dict[str, Any] | None = None,
        cut_overlong: bool = False,
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
                    f"`model` is a {type(model).__name__}, but it must be a path or hub id, or a "
                    "`SentenceRewardModel`."
                )
            loaded: Any = model
            self._model = loaded.get_base_model() if is_peft_model(loaded) else loaded
            self._path, config = None, loaded.config
        if not isinstance(config, SentenceRewardConfig):
            raise ValueError(
                f"{self._path or type(model).__name__!r} is a model of type {config.model_type!r}, not a sentence "
                "reward model. Train one on it with `SentenceRewardTrainer`."
            )
        self.config = config
        self.segmenter = load_segmenter(config.segmenter) if segmenter is None else segmenter
        self.max_tokens_per_batch = max_tokens_per_batch
        self.trust_remote_code = trust_remote_code
        self.overlong_prompt: OverlongPrompt = overlong_prompt
        self.cut_overlong = cut_overlong
        self._dtype, self._device = dtype, device
        # Why each row has a pass of its own; empty if it has none, and not known before the model has been tried.
        self._alone: str | None = None
        self._processing_class = processing_class
        # How prompts are read: in a trainer, as its policy does.
        self.prompts = PolicyBinding(processing_class, chat_template_kwargs, self.tokenizer, self._make_encoder)

    @property
    def name(self) -> str:
        """Path or hub id of the model; empty if there is none."""
        return self._path or self.config._name_or_path

    def __getstate__(self) -> dict[str, Any]:
        """Weights are not pickled, but loaded again on first use."""
        if self._path is None:
            raise TypeError(
                "A sentence reward made from a loaded model cannot be pickled, because weights are not pickled. Save "
                "the model, and make the reward from its path."
            )
        return {**self.__dict__, "_model": None}

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Completion],
        completion_ids: Sequence[Sequence[int]] | None = None,
        progress: bool = False,
        log_extra: Callable[..., Any] | None = None,
        environment: Sequence[str] | None = None,
    ) -> list[SentenceScores]:
        """
        Scores a batch, in the order given. `log_extra` and `environment` are what a trainer hands over. Raises
        `ValueError` or `TypeError` for a batch that cannot be encoded (before anything is computed), and for NaN
        scores.
        """
        rows = self.prompts.render(
            SentenceEncoder.__call__,
            prompts,
            completions,
            completion_ids,
            log_extra=log_extra,
            environment=environment,
        )
        results: list[SentenceScores | None] = [None] * len(rows)
        model = self.load()
        device = model.device
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
                        rows[i].cut,
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

    def load(self) -> SentenceRewardModel:
        """Loads tokenizer and weights now instead of on first use, and returns the model."""
        self.tokenizer()
        with exclusive(self):
            if self._model is None:
                assert self._path is not None
                device = PartialState().device if self._device is None else torch.device(self._device)
                with loaded_whole():
                    model = SentenceRewardModel.from_pretrained(self._path, dtype=resolve_dtype(self._dtype, device))
                self._model = model.to(device).eval().requires_grad_(False)
            return self._model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the model."""
        if self._processing_class is None:
            if not self.name:
                raise ValueError(
                    "The model instance given to the sentence reward was not loaded from a path or the hub, so its "
                    "tokenizer cannot be found. Pass it as `processing_class`."
                )
            self._processing_class = load_tokenizer(self.name, self.trust_remote_code)
        return self._processing_class

    def _make_encoder(self, reading: Reading) -> SentenceEncoder:
        kwargs = reading._asdict()
        return SentenceEncoder(
            kwargs.pop("processing_class"),
            self.config,
            self.segmenter,
            max_length=context_length(self.config),
            overlong_prompt="cut" if self.cut_overlong else self.overlong_prompt,
            **kwargs,
        )
