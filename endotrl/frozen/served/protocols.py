# SPDX-License-Identifier: Apache-2.0
"""What servers are asked for the log-probabilities of given tokens, and how their answers are read."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class BadAnswer(ValueError):
    """An answer that is not of the protocol, or not whole."""


class Answer(NamedTuple):
    """What a server says of the tokens of one text. Lists have one entry per token."""

    log_probs: list[float | None]  # of each token after those before it, in nats; `None` for the first
    token_ids: list[int | None]  # as the server has read them, where it says so
    texts: list[str] | None  # of the tokens, from a server that tells no ids
    tops: list[list[float]]  # the highest log-probabilities at each token's place, if they were asked for


class ScoreProtocol(ABC):
    """One kind of server."""

    name: str
    path: str  # below the server's root
    starts_late: bool  # whether answers have entries from the place on that `start` names, and not from the first
    # Numbers of the highest log-probabilities to ask for in the handshake, -1 for all, until one tells enough.
    tops: tuple[int, ...]

    @abstractmethod
    def request(self, model: str, text: Sequence[int] | str, start: int = 0, tops: int = 0) -> dict[str, Any]:
        """The body that asks for the tokens after `start` of a text or of token ids."""

    @abstractmethod
    def read(self, answer: Any) -> Answer:
        """Reads the body of an answer; `BadAnswer` if it is none of this protocol."""


class VLLM(ScoreProtocol):
    """vLLM's field `prompt_logprobs` (https://docs.vllm.ai): by position, log-probabilities by token id."""

    name, path, starts_late, tops = "vLLM", "/v1/completions", False, (20, -1, 5, 1)

    def request(self, model: str, text: Sequence[int] | str, start: int = 0, tops: int = 0) -> dict[str, Any]:
        return _body(model, text, top_p=1.0, prompt_logprobs=tops, return_token_ids=True)

    def read(self, answer: Any) -> Answer:
        choice = _choice(answer)
        entries = choice.get("prompt_logprobs")
        if not isinstance(entries, list) or not entries or not all(isinstance(e, dict | None) for e in entries):
            raise BadAnswer("it has no list `prompt_logprobs`")
        if any(not entry for entry in entries[1:]):
            raise BadAnswer("`prompt_logprobs` has no log-probability at some place after the first")
        # The token itself comes first, the most probable ones follow.
        own = [next(iter(entry.items())) if entry else (None, {}) for entry in entries]
        log_probs = [None if key is None else _number(item) for key, item in own]
        ids = [None if key is None else int(key) for key, _ in own]
        told = choice.get("prompt_token_ids")
        if isinstance(told, list):
            if len(told) != len(ids) or told[1:] != ids[1:]:
                raise BadAnswer("`prompt_token_ids` and `prompt_logprobs` are of different tokens")
            ids = list(told)
        tops = [[_number(item) for item in (entry or {}).values()] for entry in entries]
        return Answer(log_probs, ids, None, tops)


class SGLang(ScoreProtocol):
    """SGLang's native `/generate` (https://docs.sglang.ai): lists of (log-probability, token id, text)."""

    name, path, starts_late, tops = "SGLang", "/generate", True, (20, 5, 1)

    def request(self, model: str, text: Sequence[int] | str, start: int = 0, tops: int = 0) -> dict[str, Any]:
        prompt = {"text": text} if isinstance(text, str) else {"input_ids": list(text)}
        return {
            **prompt,
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": tops,
        }

    def read(self, answer: Any) -> Answer:
        info = answer.get("meta_info") if isinstance(answer, dict) else None
        entries = info.get("input_token_logprobs") if isinstance(info, dict) else None
        if not isinstance(entries, list) or not all(isinstance(e, list) and len(e) >= 2 for e in entries):
            raise BadAnswer("`meta_info` has no list `input_token_logprobs`")
        assert isinstance(info, dict)
        tops = [[pair[0] for pair in row or []] for row in info.get("input_top_logprobs") or [None] * len(entries)]
        return Answer([entry[0] for entry in entries], [int(entry[1]) for entry in entries], None, tops)


class Echo(ScoreProtocol):
    """OpenAI's legacy `echo` with `logprobs`: the text of each token, and its log-probability."""

    name, path, starts_late, tops = "OpenAI's `echo`", "/v1/completions", False, (5, 1)

    def request(self, model: str, text: Sequence[int] | str, start: int = 0, tops: int = 0) -> dict[str, Any]:
        # The last field is of vLLM's kin; others know no such one.
        return _body(model, text, echo=True, logprobs=max(1, tops), return_tokens_as_token_ids=True)

    def read(self, answer: Any) -> Answer:
        found = _choice(answer).get("logprobs")
        found = found if isinstance(found, dict) else {}
        log_probs, texts = found.get("token_logprobs"), found.get("tokens")
        if not isinstance(log_probs, list) or not isinstance(texts, list) or len(texts) != len(log_probs):
            raise BadAnswer("`logprobs` has no lists `token_logprobs` and `tokens`")
        # The generated token is behind the echoed ones.
        log_probs, texts = log_probs[:-1], [str(text) for text in texts[:-1]]
        if not log_probs or log_probs[0] is not None:
            raise BadAnswer("it has the generated token only, and not those that were given")
        tops = [list((entry or {}).values()) for entry in (found.get("top_logprobs") or [])[: len(texts)]]
        prefix = "token_id:"
        if all(text.startswith(prefix) for text in texts):
            return Answer(log_probs, [int(text.removeprefix(prefix)) for text in texts], None, tops)
        return Answer(log_probs, [None] * len(texts), texts, tops)


# In the order in which they are tried.
PROTOCOLS: tuple[ScoreProtocol, ...] = (VLLM(), SGLang(), Echo())


def _body(model: str, text: Sequence[int] | str, **more: Any) -> dict[str, Any]:
    prompt = text if isinstance(text, str) else [list(text)]
    # Temperature 1, because the model's generation config would set another one, which some servers apply here.
    return {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, **more}


def _choice(answer: Any) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, Mapping) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("it has not one choice")
    return choices[0]


def _number(entry: Any) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else None
    return float(value) if isinstance(value, int | float) else math.nan
