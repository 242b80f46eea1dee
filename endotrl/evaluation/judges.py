# SPDX-License-Identifier: Apache-2.0
"""
LLM-as-a-judge: the same model, asked in words which answer is better. Verdicts are next-token probabilities, so that a
judge gives a graded number without sampling.

- `judge_pairwise`: which of two answers is better, A or B, asked in both orders and averaged, so that liking the first
  does not count. A response's score is its mean probability of winning against the item's other responses.
- `judge_pointwise`: a rating from 1 to 9; the score is its expectation.
- `judge_verifier`: is the answer good, Yes or No; the score is P(Yes) (a generative verifier,
  https://huggingface.co/papers/2408.15240).
"""

from collections.abc import Sequence
from itertools import permutations

import torch
from torch import Tensor

from ..data.formats import message_text
from ..rendering.messages import Prompt, add_criterion
from ..rendering.renderer import truncate_left
from .engine import Engine, ModelScorer
from .items import Item


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


class Judge(ModelScorer):
    """A judge, one of [`JUDGES`]."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name, self._engine = name, engine
        # After a generation prompt a reply begins without a space; after plain text, with one.
        space = " " if engine.tokenizer.chat_template is None else ""
        words = [space + word for word in _WORDS[name]]
        self._words = [engine.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words]
        if len(set(self._words)) < len(self._words):
            raise ValueError(f"{name} needs a tokenizer that begins {', '.join(_WORDS[name])} with different tokens.")

    def _score_items(self, items: Sequence[Item], progress: bool) -> list[float]:
        # The responses that each question shows: one, or two in this order.
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
        # Each response was asked about twice against each other one.
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
