# SPDX-License-Identifier: Apache-2.0
"""
Scorers with a forward pass of their own: LLM-as-a-judge, and explicit reward models.

A judge is the same model, prompted for which answer is better. Verdicts are next-token probabilities, so that a judge
gives a graded score without sampling.

- `judge_pairwise`: which of two answers is better, A or B, asked in both orders and averaged, to cancel position
  bias. A response's score is its mean probability of winning against the item's other responses.
- `judge_pointwise`: a rating from 1 to 9; the score is its expectation.
- `judge_verifier`: is the answer good, Yes or No; the score is P(Yes) (a generative verifier,
  https://huggingface.co/papers/2408.15240).
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForSequenceClassification

from ..data.formats import message_text
from ..frozen.names import context_length, load_config, load_tokenizer
from ..frozen.own_copy import check_complete, resolve_device, resolve_dtype
from ..rendering.messages import Prompt, add_criterion, as_messages
from ..rendering.renderer import truncate_left
from ..rewards.sentence import SentenceReward
from ..scoring.batching import pad_ids, plan_batches
from ..scoring.forward_pass import RopeLengths, rope_as_made
from ..sentence.configuration import SentenceRewardConfig
from .engine import Engine, ScoredResponse
from .items import Item


logger = logging.getLogger(__name__)

_QUESTION = "[Question]\n{question}\n\n"
_ASK = {
    "judge_pairwise": (
        "Here are a question and two answers. Decide which answer is better: more correct, more helpful, safer. "
        "Neither order nor length counts.\n\n" + _QUESTION + "[Answer A]\n{first}\n\n[Answer B]\n{second}\n\n",
        "Which answer is better, A or B? Reply with one letter.",
    ),
    "judge_pointwise": (
        "Here are a question and an answer. Rate how good the answer is: correct, helpful, safe. 1 is the worst, 9 "
        "the best. Length does not count.\n\n" + _QUESTION + "[Answer]\n{first}\n\n",
        "What is your rating, from 1 to 9? Reply with one digit.",
    ),
    "judge_verifier": (
        "Here are a question and an answer.\n\n" + _QUESTION + "[Answer]\n{first}\n\n",
        "Is this a good answer: correct, helpful and safe? Reply with Yes or No.",
    ),
}
_WORDS = {"judge_pairwise": ("A", "B"), "judge_pointwise": tuple("123456789"), "judge_verifier": ("Yes", "No")}
JUDGES = tuple(_WORDS)
REWARD_MODEL = "reward_model:"  # followed by the path of the model


class ModelScorer(ABC):
    """Scorer with a forward pass of its own, on the responses of several items at once."""

    name: str
    needs_alone = False

    def score(self, item: Item, responses: Sequence[ScoredResponse]) -> list[float]:
        """One number per response."""
        return self.score_items([item])[0]

    def score_items(self, items: Sequence[Item], progress: bool = False) -> list[list[float]]:
        """One number per response, for several items at once."""
        flat = iter(self._score_items(items, progress))
        rows = [[next(flat) for _ in item.responses] for item in items]
        # Equal responses must tie, though batching may have changed the last bit.
        return [[row[item.responses.index(r)] for r in item.responses] for item, row in zip(items, rows, strict=True)]

    @abstractmethod
    def _score_items(self, items: Sequence[Item], progress: bool) -> Sequence[float]:
        """One number per response, of all items, flattened."""


class Judge(ModelScorer):
    """A judge, one of [`JUDGES`]."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self._engine = name, engine
        # After a generation prompt a reply begins without a space; after plain text, with one.
        space = " " if engine.tokenizer.chat_template is None else ""
        words = [space + word for word in _WORDS[name]]
        self._words = [engine.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
        if len(set(self._words)) < len(self._words):
            raise ValueError(f"{name} needs a tokenizer with different first tokens for {', '.join(_WORDS[name])}.")

    def _score_items(self, items: Sequence[Item], progress: bool) -> list[float]:
        # Responses shown per question: one, or two in this order.
        shown = 2 if self.name == "judge_pairwise" else 1
        asked = [list(permutations(range(len(item.responses)), shown)) for item in items]
        questions = [self._question(item, *each) for item, row in zip(items, asked, strict=True) for each in row]
        answers = self._ask(questions, progress).split(list(map(len, asked)))  # (questions, words) each
        return [score for row, answer in zip(asked, answers, strict=True) for score in self._scores(row, answer)]

    def _scores(self, asked: list[tuple[int, ...]], answers: Tensor) -> list[float]:
        if self.name == "judge_pointwise":
            return (answers @ torch.arange(1.0, 10.0)).tolist()
        if self.name == "judge_verifier":
            return answers[:, 0].tolist()
        wins: dict[int, float] = {}
        for pair, shares in zip(asked, answers.tolist(), strict=True):
            for response, share in zip(pair, shares, strict=True):
                wins[response] = wins.get(response, 0.0) + share
        # Each response was compared twice with each other one.
        return [wins[response] / (2 * (len(wins) - 1)) for response in sorted(wins)]

    def _question(self, item: Item, *shown: int) -> Prompt:
        setting, request = _ASK[self.name]
        texts = dict(zip(("first", "second"), [message_text(item.responses[i]) for i in shown], strict=False))
        content = setting.format(question=message_text(item.prompt), **texts) + request
        if self._engine.tokenizer.chat_template is None:
            return "\n\n".join(filter(None, [item.criterion, content, "Reply:"]))
        return add_criterion([{"role": "user", "content": content}], item.criterion)

    def _ask(self, questions: list[Prompt], progress: bool) -> Tensor:
        """Probabilities of the replies, of shape `(Q, words)`, normalised over them."""
        engine = self._engine
        ids = engine.renderer.prompt_ids(questions)
        ids = truncate_left(ids, engine.renderer.max_length, f"questions to {self.name}")
        return engine.next_token_logits(ids, self._words, progress).softmax(dim=-1)


class SentenceModel(ModelScorer):
    """
    Scores responses with a trained [`SentenceRewardModel`], like [`SentenceReward`]. What does not fit into its
    context is cut off as in [`Engine`]: the end of a response, and the beginning of a prompt that is too long by
    itself.
    """

    def __init__(self, path: str, engine: Engine, **loading: Any) -> None:
        self.name, self._engine = f"{REWARD_MODEL}{path}", engine
        self._reward = SentenceReward(path, max_tokens_per_batch=engine.max_tokens_per_batch, **loading)
        self._reward.overlong_prompt = "cut"  # not allowed for a policy's reward
        self._reward.load()

    def _score_items(self, items: Sequence[Item], progress: bool) -> list[float]:
        owners = [(item, response) for item in items for response in item.responses]
        rows = self._reward.score(
            [self._engine.prompt(item) for item, _ in owners], [response for _, response in owners], progress=progress
        )
        if number := sum(row.cut for row in rows):
            logger.warning("%d responses to %s are longer than the model's context and were cut.", number, self.name)
        return [row.score for row in rows]


class RewardModel(ModelScorer):
    """
    Scores responses with a reward model as TRL's trainers do: the conversation in its chat template, tokenized without
    further special tokens, and the only logit. If a conversation does not fit into the model's context, its beginning
    is cut off: a classifier reads its score at the end.
    """

    def __init__(
        self,
        path: str,
        engine: Engine,
        dtype: str = "auto",
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.name, self._engine = f"{REWARD_MODEL}{path}", engine
        place = resolve_device(device)
        self._tokenizer = load_tokenizer(path, trust_remote_code)
        self._model, info = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=resolve_dtype(dtype, place), trust_remote_code=trust_remote_code, output_loading_info=True
        )
        check_complete(f"the reward model {path!r}", info["missing_keys"])
        if self._model.config.pad_token_id is None:
            # A classifier locates the last token by it.
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
    """Scorer class for the reward model at a path, by its configuration."""
    config = load_config(path, trust_remote_code)
    if isinstance(config, SentenceRewardConfig):
        return SentenceModel
    if config.num_labels != 1:
        raise ValueError(f"A reward model must have one output, but {path} has {config.num_labels}.")
    return RewardModel
