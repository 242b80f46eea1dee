# SPDX-License-Identifier: Apache-2.0
"""
A server of a tiny model that speaks the protocols of vLLM, SGLang and OpenAI's `echo`, written from their documentation
and from answers of vLLM 0.32, and that makes mistakes on command. Nothing here imports `endotrl`.
"""

import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class FakeServer:
    """
    Args:
        path (`str`): checkpoint of the model that answers.
        tokenizer (`str`, *optional*): checkpoint of the tokenizer, if it is another one.
        protocol (`str`): `"vllm"`, `"sglang"`, `"echo"`, or `"generated"` (of generated tokens only, as llama.cpp's).
        mode (`str`): `"raw_logprobs"`, or `"raw_logits"`, to which `shift` is added.
        key (`str`, *optional*): what clients must know.
        max_logprobs (`int`): highest number of most probable tokens per place, -1 for all.

    Attributes:
        faults (`list[str]`): what goes wrong with the next requests that score, one each: `"500"`, `"503"`, `"429"`,
            `"half"`, `"short"`, `"drop"`, `"slow"`, `"nan"`, `"wrong_id"`, `""` (nothing).
        bodies (`list[dict]`): what was asked.
        most_at_once (`int`): the highest number of requests that were under way together.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        protocol: str = "vllm",
        mode: str = "raw_logprobs",
        shift: float = 0.0,
        key: str | None = None,
        max_logprobs: int = -1,
        max_model_len: int = 256,
        port: int = 0,
        names: tuple[str, ...] = ("tiny",),
    ) -> None:
        self.path, self.protocol, self.mode, self.shift, self.key = path, protocol, mode, shift, key
        self.max_logprobs, self.max_model_len, self.names = max_logprobs, max_model_len, names
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer or path)
        self.faults: list[str] = []
        self.bodies: list[dict[str, Any]] = []
        self.delay = 0.0
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._http = _Http(("127.0.0.1", port), _handler(self))
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.close_connections()
        self._http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Status and JSON of a POST."""
        with self._lock:
            self.bodies.append(body)
            fault = self.faults.pop(0) if self.faults else ""
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            time.sleep(self.delay)
            if fault == "slow":
                time.sleep(3.0)
            if fault in ("500", "503", "429"):
                return int(fault), {"error": {"message": f"fault {fault}"}}
            return self._score(path, body, fault)
        finally:
            with self._lock:
                self._at_once -= 1

    def _score(self, path: str, body: dict[str, Any], fault: str) -> tuple[int, Any]:
        sglang = path == "/generate"
        if sglang != (self.protocol == "sglang"):
            return 404, {"detail": "Not Found"}
        if not sglang and body["model"] not in self.names:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        prompt = body.get("text", body.get("input_ids")) if sglang else body["prompt"]
        prompt = prompt[0] if prompt and isinstance(prompt[0], list) else prompt
        ids = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        vocab_size = self.model.config.vocab_size
        if not ids or min(ids) < 0 or max(ids) >= vocab_size:
            return 400, {"error": {"message": "Token id out of vocabulary, or no token"}}
        if len(ids) >= self.max_model_len:
            return 400, {"error": {"message": f"This model's maximum context length is {self.max_model_len} tokens."}}
        top = body.get("top_logprobs_num" if sglang else "prompt_logprobs" if self.protocol == "vllm" else "logprobs")
        top = int(top or 0)
        if self.max_logprobs >= 0 and (top < 0 or top > self.max_logprobs):
            return 400, {"error": {"message": f"Requested {top} logprobs, but {self.max_logprobs} are allowed."}}
        top = vocab_size if top < 0 else min(top, vocab_size)
        with self._lock, torch.no_grad():
            table = self.model(torch.tensor([ids])).logits[0].double()
        table = table + self.shift if self.mode == "raw_logits" else table.log_softmax(-1)
        best = table.topk(max(1, top), dim=-1)
        rows: list[tuple[int, float | None, list[tuple[int, float]]]] = [(ids[0], None, [])]
        for i, token in enumerate(ids[1:]):
            tops = list(zip(best.indices[i].tolist(), best.values[i].tolist(), strict=True))[:top]
            rows.append((token, table[i, token].item(), tops))
        if fault == "nan":
            rows[-1] = (rows[-1][0], float("nan"), rows[-1][2])
        if fault == "wrong_id":
            rows[-1] = ((rows[-1][0] + 1) % vocab_size, *rows[-1][1:])
        if fault == "short":
            rows = rows[:-1]
        return 200, getattr(self, f"_{self.protocol}")(rows, body)

    def _vllm(self, rows: list[Any], body: dict[str, Any]) -> Any:
        def entry(token: int, value: float) -> dict[str, Any]:
            return {"logprob": value, "rank": 1, "decoded_token": self.tokenizer.decode([token])}

        places: list[Any] = [None]
        for token, value, tops in rows[1:]:
            places.append({str(t): entry(t, v) for t, v in [(token, value), *tops]})
        choice = {"index": 0, "text": "a", "token_ids": [5], "prompt_logprobs": places}
        return {"choices": [{**choice, "prompt_token_ids": [token for token, *_ in rows]}]}

    def _sglang(self, rows: list[Any], body: dict[str, Any]) -> Any:
        start = body["logprob_start_len"]
        own = [[None if i == 0 else value, token, None] for i, (token, value, _) in enumerate(rows[start:])]
        tops = [None if i == 0 else [[v, t, None] for t, v in top] for i, (*_, top) in enumerate(rows[start:])]
        return {"text": "a", "meta_info": {"input_token_logprobs": own, "input_top_logprobs": tops}}

    def _echo(self, rows: list[Any], body: dict[str, Any]) -> Any:
        texts = [*(self.tokenizer.decode([token]) for token, *_ in rows), "generated"]
        values = [*(value for _, value, _ in rows), -1.0]
        tops = [{self.tokenizer.decode([t]): v for t, v in top} for *_, top in rows] + [{}]
        return {"choices": [{"logprobs": {"tokens": texts, "token_logprobs": values, "top_logprobs": tops}}]}

    def _generated(self, rows: list[Any], body: dict[str, Any]) -> Any:
        return {"choices": [{"logprobs": {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}}]}


class _Http(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._open: set[Any] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that gave up

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def close_connections(self) -> None:
        """As a process that is killed does: connections that are kept alive end, too."""
        for request in list(self._open):
            with suppress(OSError):
                request.shutdown(2)


def _handler(server: FakeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, answer: Any, half: bool = False) -> None:
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if half else data)
            self.close_connection = half

        def allowed(self) -> bool:
            if server.key is None or self.headers.get("Authorization") == f"Bearer {server.key}":
                return True
            self.reply(401, {"error": f"{self.headers.get('Authorization')} is not the key"})
            return False

        def do_GET(self) -> None:
            if not self.allowed():
                return
            models = [{"id": n, "root": server.path, "max_model_len": server.max_model_len} for n in server.names]
            self.reply(*((200, {"data": models}) if self.path == "/v1/models" else (404, {})))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not self.allowed():
                return
            fault = server.faults[0] if server.faults else ""
            if fault == "drop":
                server.faults.pop(0)
                self.close_connection = True
                self.connection.shutdown(2)
                return
            self.reply(*server.answer(self.path, body), half=fault == "half")

    return Handler
