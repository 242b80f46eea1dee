# SPDX-License-Identifier: Apache-2.0
"""What servers are asked for the log-probabilities of given tokens, and how their answers are read."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
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
    def _read(self, answer: Any) -> Answer:
        """As [`read`], with any error."""

    def read(self, answer: Any) -> Answer:
        """Reads the body of an answer; `BadAnswer` if it is none of this protocol."""
        try:
            return self._read(answer)
        except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
            raise BadAnswer(f"it is not what {self.name} answers ({type(error).__name__}: {error})") from error


class VLLM(ScoreProtocol):
    """vLLM's field `prompt_logprobs` (https://docs.vllm.ai): by position, log-probabilities by token id."""

    name, path, starts_late, tops = "vLLM", "/v1/completions", False, (20, -1, 5, 1)

    def request(self, model: str, text: Sequence[int] | str, start: int = 0, tops: int = 0) -> dict[str, Any]:
        return _body(model, text, top_p=1.0, prompt_logprobs=tops, return_token_ids=True)

    def _read(self, answer: Any) -> Answer:
        (choice,) = answer["choices"]
        _, *entries = choice["prompt_logprobs"]  # the first token has none
        # The token itself comes first, the most probable ones follow.
        own = [next(iter(entry.items())) for entry in entries]
        ids: list[int | None] = [None, *(int(key) for key, _ in own)]
        told = choice.get("prompt_token_ids")
        if told is not None and told[1:] != ids[1:]:
            raise ValueError("`prompt_token_ids` and `prompt_logprobs` are of different tokens")
        tops = [[float(item["logprob"]) for item in entry.values()] for entry in entries]
        return Answer([None, *(float(item["logprob"]) for _, item in own)], told or ids, None, [[], *tops])


class SGLang(ScoreProtocol):
    """SGLang's native `/generate` (https://docs.sglang.ai): lists of (log-probability, token id, text)."""

    name, path, starts_late, tops = "SGLang", "/generate", True, (20, 5, 1)

    def request(self, model: str, text: Sequence[int] | str, start: int = 0, tops: int = 0) -> dict[str, Any]:
        prompt = {"text": text} if isinstance(text, str) else {"input_ids": list(text)}
        sampling = {"sampling_params": {"max_new_tokens": 1, "temperature": 1.0}}
        return prompt | sampling | {"return_logprob": True, "logprob_start_len": start, "top_logprobs_num": tops}

    def _read(self, answer: Any) -> Answer:
        info = answer["meta_info"]
        entries = info["input_token_logprobs"]
        tops = [[pair[0] for pair in row or []] for row in info.get("input_top_logprobs") or [None] * len(entries)]
        return Answer([entry[0] for entry in entries], [int(entry[1]) for entry in entries], None, tops)


class Echo(ScoreProtocol):
    """OpenAI's legacy `echo` with `logprobs`: the text of each token, and its log-probability."""

    name, path, starts_late, tops = "OpenAI's `echo`", "/v1/completions", False, (5, 1)

    def request(self, model: str, text: Sequence[int] | str, start: int = 0, tops: int = 0) -> dict[str, Any]:
        # The last field is of vLLM's kin; others know no such one.
        return _body(model, text, echo=True, logprobs=max(1, tops), return_tokens_as_token_ids=True)

    def _read(self, answer: Any) -> Answer:
        (choice,) = answer["choices"]
        found = choice["logprobs"]
        # The generated token is behind the echoed ones.
        *log_probs, _ = found["token_logprobs"]
        *texts, _ = map(str, found["tokens"])
        if len(texts) != len(log_probs) or log_probs[0] is not None:
            raise ValueError("it has not the tokens that were given")
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
