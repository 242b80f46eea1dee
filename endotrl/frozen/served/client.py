# SPDX-License-Identifier: Apache-2.0
"""HTTP client for one or several servers of one model: round-robin, bounded concurrency, time-outs, retries."""

import logging
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx


logger = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")

API_KEY = "ENDOTRL_API_KEY"
# Status codes of a server, or of a load balancer, that is starting, stopping or overloaded.
BUSY = (408, 425, 429, 502, 503, 504)
FIRST_CONTACT = 20.0  # seconds to wait for servers that have never responded: the address may be wrong
BROKEN_ANSWERS = 8  # retries of a text after a server error or an incomplete response
LONGEST_PAUSE = 30.0  # seconds between two retries


class ServerError(OSError):
    """A server that cannot be used: unreachable, unauthorized, or with the wrong model or protocol."""


class BadAnswer(ValueError):
    """A response that does not follow the protocol, or is incomplete."""


class Broken(BadAnswer):
    """A server error, or an incomplete response: a retry may succeed."""


class _Unreachable(Exception):
    """No response, or that of an overloaded server: it may recover. `pause` is the server's `Retry-After`."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass
class Server:
    """One server; times are on the clock of `time.monotonic`."""

    root: str  # its URL, without `/v1`
    is_greeted: bool = False
    failures: int = 0  # since its last response
    again_at: float = 0.0  # paused until then
    lock: threading.Lock = field(default_factory=threading.Lock)
    greeting: threading.Lock = field(default_factory=threading.Lock)

    def failed(self, reason: Exception, pause: float = 0.0) -> None:
        """Pauses the server, for longer with each failure."""
        with self.lock:
            if time.monotonic() < self.again_at:
                return  # concurrent requests count once
            if not self.failures:
                logger.warning("The server %s does not respond (%s). Retrying.", self.root, reason)
            self.failures += 1
            wait_for = min(LONGEST_PAUSE, 0.25 * 2 ** min(self.failures, 10)) * random.uniform(0.5, 1.0)
            self.again_at = time.monotonic() + max(wait_for, min(pause, LONGEST_PAUSE))
            self.is_greeted = False


class Client:
    """
    Sends requests to servers in turn. `greet` is called before the first request of each [`map`] to a server, and
    after failures: another model may be served there by then. For the other arguments, see [`ServedModel`].
    """

    def __init__(
        self,
        roots: Sequence[str],
        greet: Callable[["Client", Server], None],
        concurrency: int,
        timeout: float,
        patience: float,
    ) -> None:
        self.servers = [Server(root) for root in roots]
        self._greet, self._patience = greet, patience
        self._share = max(1, concurrency // int(os.environ.get("WORLD_SIZE", 1)))  # of torchrun, accelerate, DeepSpeed
        self._slots = threading.BoundedSemaphore(self._share)
        self._key = os.environ.get(API_KEY, "")
        here = all(urlsplit(root).hostname in ("localhost", "127.0.0.1", "::1") for root in roots)
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
            timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=self._share),
            trust_env=not here,  # a proxy would resolve them to its own machine
        )
        self._turn = 0
        self._has_answered = False

    def map(
        self, function: Callable[[Server, T], R], items: Sequence[T], done: Callable[[], Any] = lambda: None
    ) -> list[R]:
        """Applies a function of server and item to all items; if one does not respond, on another one or later."""
        stop = threading.Event()
        for server in self.servers:
            server.is_greeted = False

        def run(item: T) -> R:
            with self._slots:
                result = self._insist(function, item, stop)
            done()
            return result

        pool = ThreadPoolExecutor(min(self._share, max(1, len(items))), thread_name_prefix="endotrl-served")
        try:
            futures = [pool.submit(run, item) for item in items]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises the exception of the failed one
            return [future.result() for future in futures]
        finally:  # also after Ctrl-C; pending requests are not awaited
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def ask(self, server: Server, path: str, body: dict[str, Any] | None = None) -> Any:
        """JSON response to one request: a POST if there is a body, else a GET. `ValueError` if rejected as invalid."""
        try:
            response = self._http.request("GET" if body is None else "POST", f"{server.root}{path}", json=body)
        except httpx.RequestError as error:
            raise _Unreachable(f"{type(error).__name__}: {error}") from error
        status, text = response.status_code, response.text[:300]
        said = f"HTTP {status}, {text.replace(self._key, '***') if self._key else text}"
        if status in BUSY:
            pause = response.headers.get("Retry-After", "")
            raise _Unreachable(said, float(pause) if pause.isdigit() else 0.0)
        if status >= 500:
            raise Broken(said)
        if status in (401, 403):
            raise ServerError(
                f"The server {server.root} refuses access ({said}). Set the environment variable {API_KEY} to its "
                "API key."
            )
        if status in (400, 413, 422):
            raise ValueError(f"The server {server.root} rejected a request: {said}")
        if status != 200:
            raise ServerError(f"The server {server.root} does not support {path} for this model: {said}")
        try:
            return response.json()
        except ValueError as error:
            raise Broken(f"incomplete or invalid JSON: {response.text[:100]!r}") from error

    def _insist(self, function: Callable[[Server, T], R], item: T, stop: threading.Event) -> R:
        """Processes one item, with retries until a server responds."""
        began, broken = time.monotonic(), 0
        while True:
            server = self._next(stop)
            try:
                with server.greeting:
                    if not server.is_greeted:
                        self._greet(self, server)
                        server.is_greeted = True
                result = function(server, item)
            except _Unreachable as error:
                server.failed(error, error.pause)
                waited = time.monotonic() - began
                if waited > (self._patience if self._has_answered else min(FIRST_CONTACT, self._patience)):
                    raise ServerError(
                        f"No server responded at {', '.join(s.root for s in self.servers)} in {waited:.0f} s. Last "
                        f"error: {error}. Check that it is running and can be reached from this machine."
                    ) from error
            except BadAnswer as error:
                server.failed(error)
                broken += 1
                if broken >= BROKEN_ANSWERS:
                    raise ServerError(
                        f"The server {server.root} returned {broken} unusable responses. Last error: {error}."
                    ) from error
            else:
                server.failures, self._has_answered = 0, True
                return result

    def _next(self, stop: threading.Event) -> Server:
        """The next server in turn, among those that are not paused."""
        while not stop.is_set():
            self._turn, now = self._turn + 1, time.monotonic()
            order = [self.servers[(self._turn + i) % len(self.servers)] for i in range(len(self.servers))]
            if ready := [server for server in order if server.again_at <= now]:
                return ready[0]
            stop.wait(max(0.01, min(server.again_at for server in order) - now))
        raise InterruptedError("Scoring was interrupted.")
