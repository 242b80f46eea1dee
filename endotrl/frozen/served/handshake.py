# SPDX-License-Identifier: Apache-2.0
"""
How servers are asked for the log-probabilities of given tokens, and what must hold of one before its numbers are
believed: model, protocol, tokenizer, normalisation.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from .client import BadAnswer, Broken, Client, Server, ServerError


# Words, white space, digits, scripts: what tokenizers differ in.
SENTENCE = "The cat sat on 3.14 mats.\n\n\tdef f(x): return x**2  # naïve 東京 Привет 🙂"
# What comes next is nearly certain, so that the most probable tokens have nearly all of the probability.
COUNTING = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20"
NEARLY_ALL = 0.9
POSITIVE = 1e-3  # a log-probability above 0, by more than rounding
OTHER_MODEL = 0.1  # nats per token by which two servers of one model do not differ, whatever their dtype


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
    # Numbers of the highest log-probabilities to ask for in the handshake, until one tells enough.
    tops: tuple[int, ...]

    @abstractmethod
    def request(self, model: str, text: Sequence[int] | str, tops: int) -> dict[str, Any]:
        """The body that asks for the tokens of a text, or for token ids."""

    @abstractmethod
    def read(self, answer: Any) -> Answer:
        """Reads the body of an answer; any error if it is none of this protocol."""

    def ask(self, client: Client, server: Server, model: str, text: Sequence[int] | str, tops: int = 0) -> Answer:
        """What a server says of a text; `BadAnswer` if that is not of this protocol."""
        body = client.ask(server, self.path, self.request(model, text, tops))
        try:
            return self.read(body)
        except (AttributeError, LookupError, StopIteration, TypeError, ValueError) as error:
            raise BadAnswer(f"it is not what {self.name} answers ({type(error).__name__}: {error})") from error


class VLLM(ScoreProtocol):
    """vLLM's field `prompt_logprobs` (https://docs.vllm.ai): by position, log-probabilities by token id."""

    name, path, tops = "vLLM", "/v1/completions", (20, 5, 1)

    def request(self, model: str, text: Sequence[int] | str, tops: int) -> dict[str, Any]:
        return _body(model, text, top_p=1.0, prompt_logprobs=tops, return_token_ids=True)

    def read(self, answer: Any) -> Answer:
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
        # The last field is of vLLM's kin; others know no such one.
        return _body(model, text, echo=True, logprobs=max(1, tops), return_tokens_as_token_ids=True)

    def read(self, answer: Any) -> Answer:
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


class Card(NamedTuple):
    """What a server says of its model: its name there, the name it was loaded by, and its length limit in tokens."""

    name: str
    loaded_from: str | None
    max_length: int | None


class Handshake:
    """What is asked of one server, by the `name` of its model there, `None` if it has only one."""

    def __init__(self, client: Client, server: Server, name: str | None) -> None:
        self._client, self._server = client, server
        answer = client.ask(server, "/v1/models")
        models = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(models, list) or not all(isinstance(m, dict) and "id" in m for m in models):
            raise ServerError(f"What answers at {server.root}/v1/models is no server of language models.")
        names = [str(model["id"]) for model in models]
        if name is None and len(names) != 1:
            raise ServerError(
                f"The server {server.root} has the models {', '.join(names)}. Name one behind its address: "
                f"{server.root}/v1#<model>."
            )
        if name is not None and name not in names:
            raise ServerError(f"The server {server.root} has no model {name!r}, only {', '.join(names)}.")
        model = models[0 if name is None else names.index(name)]
        # vLLM needs room for one token that it generates. Its LoRA adapters have the limit of their base.
        longest = next((other["max_model_len"] for other in (model, *models) if other.get("max_model_len")), None)
        length = longest - 1 if isinstance(longest, int) else None
        self.card = Card(str(model["id"]), model.get("root"), length)

    def ask(self, protocol: ScoreProtocol, text: Sequence[int] | str, tops: int = 0) -> Answer:
        """What the server says of a text."""
        return protocol.ask(self._client, self._server, self.card.name, text, tops)

    def find_protocol(self) -> ScoreProtocol:
        """How the server gives log-probabilities of a text that it is given."""
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
            reasons.append(f"{protocol.name}: it tells of one token only")
        raise ServerError(
            f"The server {self._server.root} gives no log-probabilities of the tokens that it is given, so that "
            f"nothing can be scored with it. Tried: {'; '.join(reasons)}."
        )

    def check_tokenizer(self, protocol: ScoreProtocol, tokenizer: PreTrainedTokenizerBase) -> None:
        """The server must read text as the same tokens, BOS included."""
        text = f"{SENTENCE} {tokenizer.eos_token or ''}"
        ours = list(tokenizer(text)["input_ids"])
        answer = self.ask(protocol, text)
        same_number = len(answer.log_probs) == len(ours)
        where = other_token(answer, ours, tokenizer) if same_number else "their number"
        if where is not None:
            raise ServerError(
                f"The server {self._server.root} and the tokenizer {tokenizer.name_or_path!r} read a text as "
                f"different tokens, {len(answer.log_probs)} there and {len(ours)} here: they differ in {where}. Pass "
                f"the tokenizer of {self.card.name!r} ({self.card.loaded_from!r}) as `processing_class`."
            )

    def check_log_probs(self, protocol: ScoreProtocol, ids: Sequence[int], vocab_size: int) -> bool:
        """Refuses what is not normalised: logits, top-k. `False` if the server tells too little to find out."""
        for count in protocol.tops:
            try:
                answer = self.ask(protocol, ids, count)
            except ValueError:  # more than it allows
                continue
            known = False
            for value, tops in zip(answer.log_probs[1:], answer.tops[1:] or [[]] * len(ids), strict=False):
                values = [*tops, *([] if value is None else [value])]
                total = math.fsum(map(math.exp, tops)) if all(number <= POSITIVE for number in values) else math.inf
                # The k most probable of V tokens have at least k / V; some models have more tokens than tokenizers.
                least = 0.5 * len(tops) / vocab_size if len(tops) >= 5 else 0.0
                if not least <= total <= 1.01:
                    raise ServerError(
                        f"What the server {self._server.root} gives as log-probabilities are none: the probabilities "
                        f"of {len(tops)} tokens sum to {total:.4g}. Of vLLM, start it with `--logprobs-mode "
                        "raw_logprobs`, its default, and not with logits."
                    )
                known = known or total >= NEARLY_ALL
            if known:
                return True
        return False


def other_token(answer: Answer, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The first token that the server has read as another one than was meant, in words; `None` if there is none."""
    for place, (told, token_id) in enumerate(zip(answer.token_ids, ids, strict=True)):
        if told is not None and told != token_id:
            return f"token {place}, which is {told} there and {token_id} here"
        text = None if answer.texts is None else answer.texts[place]
        if text is not None and not _same_text(text, tokenizer, token_id):
            return f"token {place}, which is {text!r} there and {tokenizer.decode([token_id])!r} here"
    return None


def mean_difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float:
    """Mean absolute difference of two lists of log-probabilities, in nats per token; infinite if one lacks any."""
    pairs = list(zip(ours, theirs, strict=False))[1:]
    values = [abs(a - b) if a is not None and b is not None else math.inf for a, b in pairs]
    return math.fsum(values) / max(1, len(values))


def _same_text(told: str, tokenizer: PreTrainedTokenizerBase, token_id: int) -> bool:
    """Whether a server's text of a token is the tokenizer's, but for how spaces are written."""
    theirs, ours = (
        text.replace("\u2581", " ").replace("\u0120", " ").strip() for text in (told, tokenizer.decode([token_id]))
    )
    # Of a part of a character, each server writes something else.
    return theirs == ours or "\ufffd" in theirs + ours or theirs.startswith("bytes:")
