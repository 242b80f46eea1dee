# SPDX-License-Identifier: Apache-2.0
"""Frozen model on servers: addresses, handshake, and statistics of given tokens."""

import logging
import math
import os
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from ...rendering.renderer import Rendered
from ...scoring.forward_pass import exclusive
from ...scoring.scorer import check_ids, equal_rows, row_stats
from ...scoring.token_stats import TokenStats
from ..names import eos_token_ids
from .client import API_KEY, BadAnswer, Client, Server, ServerError
from .handshake import COUNTING, OTHER_MODEL, POSITIVE, Card, Handshake, ScoreProtocol, mean_difference, other_token


logger = logging.getLogger(__name__)


def is_url(model: object) -> bool:
    """Whether a model's name is the URL of a server, or several URLs separated by commas."""
    return isinstance(model, str) and model.startswith(("http://", "https://"))


DISCONNECTED = dict.fromkeys(("_client", "_process", "_tokenizer", "_card", "_protocol", "_probe"))


class ServedModel:
    """
    A frozen model behind one or several servers that return log-probabilities of given tokens: vLLM, SGLang, or any
    with OpenAI-style `echo`.

    Before anything is scored, a handshake compares tokenizers, checks that log-probabilities are normalised, and reads
    the length limit; later calls check that the model is still the same. A server that is busy, starting or down is
    retried with back-off, while others take over its work. An API key, if the servers require one, is read from the
    environment variable `ENDOTRL_API_KEY`.

    Args:
        url (`str` or `list[str]`):
            URL, with or without `/v1`; several as a list, or separated by commas. For a server with several models,
            add the model's name there after `#`: `"http://host:8000/v1#math"`.
        concurrency (`int`, *optional*, defaults to `32`):
            Concurrent requests, of all processes of a run together (but at least one per process).
        timeout (`float`, *optional*, defaults to `600.0`):
            Timeout of a request in seconds.
        patience (`float`, *optional*, defaults to `1800.0`):
            Seconds to wait for a server that has responded before, for example during a restart. One that has never
            responded is given up after 20 seconds.
        asynchronous (`bool`, *optional*, defaults to `True`):
            Whether the `__call__` of an [`EndogenousReward`] with this model is `async`, so that TRL's GRPO and RLOO
            trainers (TRL 1.14 or newer) run other reward functions concurrently. `False` for OnlineDPO and for direct
            calls. Its other methods are not asynchronous.

    Raises:
        `ValueError`: If an address is invalid, or contains a password.

    Example:
    ```python
    >>> from endotrl import EndogenousReward, ServedModel

    >>> servers = ServedModel(["http://a:8000/v1", "http://b:8000/v1"], concurrency=64)
    >>> reward = EndogenousReward(servers, processing_class=tokenizer)
    ```
    """

    _client: Client | None
    _process: int | None
    _tokenizer: PreTrainedTokenizerBase | None
    _card: Card | None
    _protocol: ScoreProtocol | None
    _probe: list[float | None] | None  # log-probabilities of a text, which identify the model

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        concurrency: int = 32,
        timeout: float = 600.0,
        patience: float = 1800.0,
        asynchronous: bool = True,
    ) -> None:
        for name, value in (("concurrency", concurrency), ("timeout", timeout), ("patience", patience)):
            if not value > 0:
                raise ValueError(f"`{name}` must be positive, got {value!r}.")
        addresses = [part.strip() for text in ([url] if isinstance(url, str) else url) for part in text.split(",")]
        self.roots = [_root(address) for address in addresses]
        names = {urlsplit(address).fragment for address in addresses}
        if len(names) != 1:
            raise ValueError(f"All URLs must name the same model after `#`, got {sorted(names)}.")
        self.model = names.pop() or None
        self.asynchronous = asynchronous
        self._settings = {"concurrency": concurrency, "timeout": timeout, "patience": patience}
        vars(self).update(DISCONNECTED)

    def __getstate__(self) -> dict[str, Any]:
        """Pickles no connection, and so no key."""
        return {**self.__dict__, **DISCONNECTED}

    def __repr__(self) -> str:
        return f"ServedModel({self.description})"

    @property
    def description(self) -> str:
        return f"{self.model or 'the model'} served at {', '.join(self.roots)}"

    @property
    def card(self) -> Card:
        """The servers' description of the model; `ServerError` if none of them responds."""
        if self._card is None:
            self._http.map(lambda *_: None, [None])
        assert self._card is not None
        return self._card

    @property
    def version(self) -> str:
        return f"{self.card.name} ({self.card.loaded_from or 'of unknown origin'})"

    @property
    def tokenizer_name(self) -> str:
        """The name from which the servers loaded the model, which identifies its tokenizer if it is available here."""
        return self.card.loaded_from or self.card.name

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Performs the handshake, once per tokenizer. `ServerError` if a server does not pass it."""
        with exclusive(self):
            if self._tokenizer is tokenizer:
                return
            vars(self).update(DISCONNECTED, _tokenizer=tokenizer)
            try:
                self._http.map(lambda *_: None, [None])
            except BaseException:
                self._tokenizer = None
                raise

    @property
    def config(self) -> PretrainedConfig:
        """Partial config of the model: the tokenizer's vocabulary size, and the server's context length."""
        assert self._tokenizer is not None  # connected
        return PretrainedConfig(
            vocab_size=len(self._tokenizer),
            max_position_embeddings=self.card.max_length,
            name_or_path=self._tokenizer.name_or_path,
        )

    @property
    def eos_token_ids(self) -> list[int]:
        """Tokens that end a response, besides the tokenizer's own: of the generation config next to the tokenizer."""
        assert self._tokenizer is not None  # connected
        try:
            return eos_token_ids(GenerationConfig.from_pretrained(self._tokenizer.name_or_path))
        except OSError:  # there is none
            return []

    def score(
        self,
        rows: Sequence[Rendered],
        alpha: float = 1.0,
        entropy: bool = False,
        mean_logits: bool = False,
        progress: bool = False,
    ) -> list[TokenStats]:
        r"""
        [`TokenStats`] as from [`FrozenScorer`], but in the gauge $V = 0$, without entropies and mean logits:
        `chosen_logits` are $\log \hat\pi(a_h|s_h)$. Rewards that need more are rejected earlier: see
        [`RewardRule.needs_logits`].

        Raises `ValueError` for an `alpha` other than 1, ids outside the vocabulary and rows that the server rejects or
        gives NaN for; `ServerError` if no server responds, or one responds for other tokens or with logits.
        """
        if alpha != 1.0:
            raise ValueError(f"`alpha` must be 1 for a model on a server, which scores at temperature 1, got {alpha}.")
        check_ids(rows, self.config.vocab_size)
        first = next((i for i, row in enumerate(rows) if row.images is not None), None)
        if first is not None:
            raise ValueError(
                f"The prompt of row {first} has images, but a model on a server is sent token ids only. Load the "
                'model in this process, or score the text alone with `images="ignore"`.'
            )
        equal = [indices for indices in equal_rows(rows) if rows[indices[0]].action_positions]
        with tqdm(total=len(equal), desc="Scoring", unit=" completions", disable=not progress) as bar:
            found = self._http.map(self._ask, [(indices[0], rows[indices[0]]) for indices in equal], bar.update)
        log_probs = {i: values for indices, values in zip(equal, found, strict=True) for i in indices}
        results, vocab_size = [], self.config.vocab_size
        for i, row in enumerate(rows):
            chosen = torch.tensor([log_probs[i][position] for position in row.action_positions], dtype=torch.float32)
            numbers = {"chosen_logits": chosen, "soft_values": torch.zeros(len(chosen) + 1), "entropies": None}
            results.append(row_stats(row, vocab_size, alpha=1.0, has_logits=False, **numbers))
        return results

    @property
    def _http(self) -> Client:
        if self._client is None or self._process != os.getpid():  # a fork must not share connections
            self._client, self._process = Client(self.roots, self._greet, **self._settings), os.getpid()  # type: ignore[arg-type]
        return self._client

    def _greet(self, client: Client, server: Server) -> None:
        """Handshake with one server. Later servers, and those that recover, only repeat the probe of the first."""
        try:
            handshake = Handshake(client, server, self.model)
            self._card = self._card or handshake.card
            if self._tokenizer is not None:
                self._shake_hands(handshake, server, self._tokenizer)
        except BadAnswer:
            raise
        except ValueError as error:
            raise ServerError(f"The handshake with {server.root} failed. {error}") from error

    def _shake_hands(self, handshake: Handshake, server: Server, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = list(tokenizer(COUNTING)["input_ids"])
        if self._protocol is not None and self._probe is not None:
            difference = mean_difference(self._probe, handshake.ask(self._protocol, ids).log_probs)
            if not difference < OTHER_MODEL:
                raise ServerError(
                    f"The server {server.root} now runs another model than before: the log-probabilities of a probe "
                    f"text differ by {difference:.3g} nats per token. Start it with the first model again."
                )
            return
        protocol = handshake.find_protocol()
        handshake.check_tokenizer(protocol, tokenizer)
        if not handshake.check_log_probs(protocol, ids, len(tokenizer)):
            logger.warning(
                "Could not verify that the log-probabilities of the server %s are normalised: the model is too "
                "uncertain, or the server returns too few of them.",
                server.root,
            )
        self._protocol, self._probe = protocol, handshake.ask(protocol, ids).log_probs

    def _ask(self, server: Server, item: tuple[int, Rendered]) -> list[float]:
        """Log-probabilities of the tokens of a row's completion, in nats."""
        number, row = item
        assert self._protocol is not None and self._tokenizer is not None
        ids = [*row.prompt_ids, *row.completion_ids]
        try:
            answer = self._protocol.ask(self._http, server, self.card.name, ids)
        except BadAnswer:
            raise
        except ValueError as error:
            raise ValueError(f"Row {number}: {error}") from error
        if len(answer.log_probs) != len(ids):
            raise BadAnswer(f"{len(answer.log_probs)} log-probabilities for {len(ids)} tokens")
        where = other_token(answer, ids, self._tokenizer)
        if where is not None:
            raise ServerError(f"The server {server.root} scored other tokens than it was sent: {where}.")
        values = [math.nan if value is None else value for value in answer.log_probs[len(row.prompt_ids) :]]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"The server {server.root} returned NaN or infinite log-probabilities for row {number}.")
        if max(values, default=0.0) > POSITIVE:
            raise ServerError(f"The server {server.root} returned a positive log-probability, {max(values):.4g}.")
        return values


def _root(address: str) -> str:
    """URL of a server without `/v1`."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query:
        raise ValueError(f"The URL of a server must look like http://host:8000/v1, got {address!r}.")
    if parts.username or parts.password:
        raise ValueError(
            f"The URL of the server {parts.hostname} contains a user name or password, which would appear in logs. "
            f"Set the environment variable {API_KEY} instead."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
