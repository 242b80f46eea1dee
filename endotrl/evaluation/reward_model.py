# SPDX-License-Identifier: Apache-2.0
"""An explicit reward model: a sequence-classification checkpoint with one output, or a sentence reward model."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification

from ..frozen.names import context_length, load_config, load_tokenizer
from ..frozen.own_copy import check_complete, resolve_device, resolve_dtype
from ..rendering.messages import as_messages
from ..rendering.renderer import truncate_left
from ..rewards.sentence import SentenceReward
from ..scoring.batching import pad_ids, plan_batches
from ..scoring.forward_pass import RopeLengths, rope_as_made
from ..sentence.configuration import SentenceRewardConfig
from .engine import Engine, ModelScorer
from .items import Item


logger = logging.getLogger(__name__)


class SentenceModel(ModelScorer):
    """
    Scores responses with a trained [`SentenceRewardModel`], as [`SentenceReward`] does. What does not fit its context
    is cut as [`Engine`] cuts it: the end of a response, and the beginning of a prompt that is too long by itself.
    """

    def __init__(self, path: str, engine: Engine, **loading: Any) -> None:
        self.name, self._engine = f"reward_model:{path}", engine
        self._reward = SentenceReward(path, max_tokens_per_batch=engine.max_tokens_per_batch, **loading)
        self._reward.overlong_prompt = "cut"  # which no reward of a policy may do
        self._reward.load()

    def _score_items(self, items: Sequence[Item], progress: bool) -> list[float]:
        owners = [(item, response) for item in items for response in item.responses]
        rows = self._reward.score(
            [self._engine.prompt(item) for item, _ in owners], [response for _, response in owners], progress=progress
        )
        if number := sum(row.cut for row in rows):
            logger.warning("%d responses to %s are longer than the model's context, and were cut.", number, self.name)
        return [row.score for row in rows]


class RewardModel(ModelScorer):
    """
    Scores responses as TRL's trainers do with a reward model: the conversation in its chat template, tokenized without
    further special tokens, and the only logit. Of a conversation that does not fit the model's context, the beginning
    is cut: a classifier reads its score at the end.
    """

    def __init__(
        self,
        path: str,
        engine: Engine,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.name, self._engine = f"reward_model:{path}", engine
        place = resolve_device(device)
        self._tokenizer = load_tokenizer(path, trust_remote_code)
        self._model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=resolve_dtype(dtype, place), trust_remote_code=trust_remote_code, output_loading_info=True
        )
        check_complete(f"the reward model {path!r}", info["missing_keys"])
        if self._model.config.pad_token_id is None:
            # Where a classifier reads its last token depends on it.
            self._model.config.pad_token_id = (
                self._tokenizer.eos_token_id if self._tokenizer.pad_token_id is None else self._tokenizer.pad_token_id
            )
        self._model = self._model.to(place).eval().requires_grad_(False)

    @torch.no_grad()
    def _score_items(self, items: Sequence[Item], progress: bool) -> list[float]:
        rows = [self._ids(item, response) for item in items for response in item.responses]
        rows = truncate_left(rows, context_length(self._model.config), f"responses to {self.name}")
        scores = [0.0] * len(rows)
        device, rope = self._model.device, RopeLengths.from_config(self._model.config)
        lengths = [len(row) for row in rows]
        batches = plan_batches(lengths, self._engine.max_tokens_per_batch, list(map(rope.length_class, lengths)))
        for batch in tqdm(batches, desc="reward model", unit=" batches", disable=not progress, leave=False):
            ids, mask = pad_ids([rows[i] for i in batch], self._model.config.pad_token_id)
            with rope_as_made(self._model):
                logits = self._model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].float()
            for i, score in zip(batch, logits.tolist(), strict=True):
                scores[i] = score
        return scores

    def _ids(self, item: Item, response: object) -> list[int]:
        prompt = self._engine.prompt(item)
        if isinstance(prompt, str):
            ids = self._tokenizer(prompt + str(response))["input_ids"]
            end = self._tokenizer.eos_token_id
            return ids if end is None or ids[-1] == end else [*ids, end]
        text = self._tokenizer.apply_chat_template([*prompt, *as_messages(response)], tokenize=False)  # type: ignore[arg-type]
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]


def reward_model_class(path: str, trust_remote_code: bool = False) -> type[RewardModel] | type[SentenceModel]:
    """What scores with the reward model at a path, by its configuration."""
    config = load_config(path, trust_remote_code)
    if isinstance(config, SentenceRewardConfig):
        return SentenceModel
    if config.num_labels != 1:
        raise ValueError(f"{path} has {config.num_labels} outputs, but a reward model has one, its score.")
    return RewardModel
