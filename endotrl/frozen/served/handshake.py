# SPDX-License-Identifier: Apache-2.0
"""
Server protocols for log-probabilities of given tokens, and the checks that a server must pass before its numbers are
used: model, protocol, tokenizer, normalisation.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .client import BadAnswer, Broken, Client, Server, ServerError


# Words, white space, digits, scripts: where tokenizers differ.
SENTENCE = "The cat sat on 3.14 mats.\n\n\tdef f(x): return x**2  # naïve 東京 Привет 🙂"
# The next number is nearly certain, so that the most probable tokens have nearly all of the probability mass.
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20"
NEARLY_ALL = 0.9
POSITIVE = 1e-3  # a log-probability above 0, by more than rounding
OTHER_MODEL = 0.1  # nats per token: more than two servers of one model differ by, whatever their dtype


class Answer(NamedTuple):
    """A server's response for the tokens of one text. Lists have one entry per token."""

    log_probs: list[float | None]  # of each token given the previous ones, in nats; `None` for the first
    token_ids: list[int | None]  # as tokenized by the server, if it returns them
    texts: list[str] | None  # of the tokens, from a server that returns no ids
    tops: list[list[float]]  # the highest log-probabilities at each position, if requested


class ScoreProtocol(ABC):
    """Protocol of one kind of server."""

    name: str
    path: str  # below the server's root
    # Numbers of top log-probabilities to request in the handshake, until one is enough.
    tops: tuple[int, ...]

    @abstractmethod
    def request(self, model: str, text: Sequence[int] | str, tops: int) -> dict[str, Any]:
        """Request body for the log-probabilities of a text, or of token ids."""

    @abstractmethod
    def read(self, answer: Any) -> Answer:
        """Parses a response body; raises any error if it does not follow this protocol."""

    def ask(self, client: Client, server: Server, model: str, text: Sequence[int] | str, tops: int = 0) -> Answer:
        """A server's response for a text; `BadAnswer` if it does not follow this protocol."""
        body = client.ask(server, self.path, self.request(model, text, tops))
        try:
            return self.read(body)
        except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
            raise BadAnswer(f"not a response of {self.name} ({type(error).__name__}: {error})") from error


class VLLM(ScoreProtocol):
    """vLLM's field `prompt_logprobs` (https://docs.vllm.ai): by position, log-probabilities by token id."""

    name, path, tops = "vLLM", "/v1/completions", (20, 5, 1)

    def request(self, model: str, text: Sequence[int] | str, tops: int) -> dict[str, Any]:
        return _body(model, text, top_p=1.0, prompt_logprobs=tops, return_token_ids=True)

    def read(self, answer: Any) -> Answer:
        (choice,) = answer["choices"]
        _, *entries = choice["prompt_logprobs"]  # the first token has none
        # The token itself comes first, followed by the most probable ones.
        own = [next(iter(entry.items())) for entry in entries]
        ids: list[int | None] = [None, *(int(key) for key, _ in own)]
        told = choice.get("prompt_token_ids")
        if told is not None and told[1:] != ids[1:]:
            raise ValueError("`prompt_token_ids` and `prompt_logprobs` contain different tokens")
        tops = [[float(item["logprob"]) for item in entry.values()] for entry in entries]
        return Answer([None, *(float(item["logprob"]) for _, item in own)], told or ids, None, [[], *tops])


class SGLang(ScoreProtocol):
    """SGLang's native `/generate` (https://docs.sglang.ai): lists of (log-probability, token id, text)."""

    name, path, tops = "SGLang", "/generate", (20, 5, 1)

    def request(self, model: str, text: Sequence[int] | str, tops: int) -> dict[str, Any]:
        prompt = {"text": text} if isinstance(text, str) else {"input_ids": list(text)}
        sampling = {"sampling_params": {"max_new_tokens": 1, "temperature": 1.0}}
        return prompt | sampling | {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": tops}

    def read(self, answer: Any) -> Answer:
        info = answer["meta_info"]
        entries = info["input_token_logprobs"]
        tops = [[pair[0] for pair in row or []] for row in info.get("input_top_logprobs") or [None] * len(entries)]
        return Answer([entry[0] for entry in entries], [int(entry[1]) for entry in entries], None, tops)


class Echo(ScoreProtocol):
    """OpenAI's legacy `echo` with `logprobs`: the text of each token, and its log-probability."""

    name, path, tops = "OpenAI's `echo`", "/v1/completions", (5, 1)

    def request(self, model: str, text: Sequence[int] | str, tops: int) -> dict[str, Any]:
        # The last field is specific to vLLM and its kin; other servers ignore it.
        return _body(model, text, echo=True, logprobs=max(1, tops), return_tokens_as_token_ids=True)

    def read(self, answer: Any) -> Answer:
        (choice,) = answer["choices"]
        found = choice["logprobs"]
        # The generated token follows the echoed ones.
        *log_probs, _ = found["token_logprobs"]
        *texts, _ = map(str, found["tokens"])
        if len(texts) != len(log_probs) or log_probs[0] is not None:
            raise ValueError("it does not contain the tokens of the request")
        tops = [list((entry or {}).values()) for entry in (found.get("top_logprobs") or [])[: len(texts)]]
        prefix = "token_id:"
        if all(text.startswith(prefix) for text in texts):
            return Answer(log_probs, [int(text.removeprefix(prefix)) for text in texts], None, tops)
        return Answer(log_probs, [None] * len(texts), texts, tops)


# In the order in which they are tried.
PROTOCOLS: tuple[ScoreProtocol, ...] = (VLLM(), SGLang(), Echo())


def _body(model: str, text: Sequence[int] | str, **more: Any) -> dict[str, Any]:
    prompt = text if isinstance(text, str) else [list(text)]
    # Temperature 1, because the model's generation config may set another one, which some servers apply here.
    return {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1.0, **more}


class Card(NamedTuple):
    """A server's model: its name there, the name it was loaded from, and its length limit in tokens."""

    name: str
    loaded_from: str | None
    max_length: int | None


class Handshake:
    """Checks of one server, by the `name` of its model there, `None` if it has only one."""

    def __init__(self, client: Client, server: Server, name: str | None) -> None:
        self._client, self._server = client, server
        answer = client.ask(server, "/v1/models")
        models = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(models, list) or not all(isinstance(m, dict) and "id" in m for m in models):
            raise ServerError(f"{server.root}/v1/models lists no models, so it is not a language model server.")
        names = [str(model["id"]) for model in models]
        if name is None and len(names) != 1:
            raise ServerError(
                f"The server {server.root} has the models {', '.join(names)}. Add the name of one to the URL: "
                f"{server.root}/v1#<model>."
            )
        if name is not None and name not in names:
            raise ServerError(f"The server {server.root} has no model {name!r}. Its models: {', '.join(names)}.")
        model = models[0 if name is None else names.index(name)]
        # vLLM needs room for one generated token. Its LoRA adapters have the limit of their base model.
        longest = next((other["max_model_len"] for other in (model, *models) if other.get("max_model_len")), None)
        length = longest - 1 if isinstance(longest, int) else None
        self.card = Card(str(model["id"]), model.get("root"), length)

    def ask(self, protocol: ScoreProtocol, text: Sequence[int] | str, tops: int = 0) -> Answer:
        """The server's response for a text."""
        return protocol.ask(self._client, self._server, self.card.name, text, tops)

    def find_protocol(self) -> ScoreProtocol:
        """Returns the protocol by which the server gives log-probabilities of a given text."""
        reasons = []
        for protocol in PROTOCOLS:
            try:
                answer = self.ask(protocol, COUNTING)
            except Broken:
                raise
            except (ServerError, ValueError) as error:
                reasons.append(f"{protocol.name}: {error}")
                continue
            if len(answer.log_probs) > 1:
                return protocol
            reasons.append(f"{protocol.name}: log-probability of one token only")
        raise ServerError(
            f"The server {self._server.root} does not return log-probabilities of prompt tokens, so it cannot score "
            f"completions. Tried: {'; '.join(reasons)}."
        )

    def check_tokenizer(self, protocol: ScoreProtocol, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises unless the server tokenizes text to the same tokens, including BOS."""
        text = f"{SENTENCE} {tokenizer.eos_token or ''}"
        ours = list(tokenizer(text)["input_ids"])
        answer = self.ask(protocol, text)
        same_number = len(answer.log_probs) == len(ours)
        where = other_token(answer, ours, tokenizer) if same_number else "their number"
        if where is not None:
            raise ServerError(
                f"The server {self._server.root} and the tokenizer {tokenizer.name_or_path!r} split a text into "
                f"different tokens, {len(answer.log_probs)} there and {len(ours)} here: they differ in {where}. Pass "
                f"the tokenizer of {self.card.name!r} ({self.card.loaded_from!r}) as `processing_class`."
            )

    def check_log_probs(self, protocol: ScoreProtocol, ids: Sequence[int], vocab_size: int) -> bool:
        """Rejects values that are not normalised: logits, top-k. `False` if the server returns too few to tell."""
        for count in protocol.tops:
            try:
                answer = self.ask(protocol, ids, count)
            except ValueError:  # more than the server allows
                continue
            known = False
            for value, tops in zip(answer.log_probs[1:], answer.tops[1:] or [[]] * len(ids), strict=False):
                values = [*tops, *([] if value is None else [value])]
                total = math.fsum(map(math.exp, tops)) if all(number <= POSITIVE for number in values) else math.inf
                # The k most probable of V tokens have at least k / V; some models have more tokens than their
                # tokenizers.
                least = 0.5 * len(tops) / vocab_size if len(tops) >= 5 else 0.0
                if not least <= total <= 1.01:
                    raise ServerError(
                        f"The server {self._server.root} returns values that are not log-probabilities: the "
                        f"probabilities of {len(tops)} tokens sum to {total:.4g}. Start vLLM with `--logprobs-mode "
                        "raw_logprobs`, which is its default."
                    )
                known = known or total >= NEARLY_ALL
            if known:
                return True
        return False


def other_token(answer: Answer, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Description of the first token that the server has read as another one; `None` if all are as sent."""
    for place, (told, token_id) in enumerate(zip(answer.token_ids, ids, strict=True)):
        if told is not None and told != token_id:
            return f"token {place}, which is {told} there and {token_id} here"
        text = None if answer.texts is None else answer.texts[place]
        if text is not None and not _same_text(text, tokenizer, token_id):
            return f"token {place}, which is {text!r} there and {tokenizer.decode([token_id])!r} here"
    return None


def mean_difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """Mean absolute difference of two lists of log-probabilities, in nats per token; infinite if one has gaps."""
    pairs = list(zip(ours, theirs, strict=False))[1:]
    values = [abs(a - b) if a is not None and b is not None else math.inf for a, b in pairs]
    return math.fsum(values) / max(1, len(values))


def _same_text(told: str, tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether a server's text of a token equals the tokenizer's, apart from how spaces are written."""
    theirs, ours = (
        text.replace("\u2581", " ").replace("\u0120", " ").strip() for text in (told, tokenizer.decode([token_id]))
    )
    # Part of a character is written differently by each server.
    return theirs == ours or "\ufffd" in theirs + ours or theirs.startswith("bytes:")
