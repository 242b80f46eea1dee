# SPDX-License-Identifier: Apache-2.0
"""A real vLLM server with SmolLM2, for `make test-vllm`, which names the Python that has vLLM in `VLLM_PYTHON`."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pytest


PYTHON = os.environ.get("VLLM_PYTHON")
STARTS_WITHIN = 900  # seconds: without a GPU most of them are imports, in three processes


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if PYTHON is None and here in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="needs vLLM: run `make test-vllm`"))


class VLLMServer:
    """The server as a group of processes, of which the first one's end would leave the others alive."""

    def __init__(self, model: str, log: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._command = [
            *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"),
            *("--port", str(self.port), "--dtype", "float32", "--max-model-len", "1024", "--enforce-eager", *flags),
        ]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "2", "VLLM_NO_USAGE_STATS": "1"}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env={**os.environ, **settings, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> None:
        began = time.monotonic()
        while time.monotonic() < began + STARTS_WITHIN:
            assert self._process is not None and self._process.poll() is None, self._log.read_text()[-3000:]
            with suppress(httpx.TransportError):
                if httpx.get(self.url.replace("/v1", "/health"), timeout=5, trust_env=False).status_code == 200:
                    return
            time.sleep(1)
        raise TimeoutError(self._log.read_text()[-3000:])

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@pytest.fixture(scope="module")
def start_vllm(smollm2_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., VLLMServer]]:
    """Starts servers with further flags; all end with the module."""
    servers: list[VLLMServer] = []

    def start(*flags: str) -> VLLMServer:
        server = VLLMServer(smollm2_path, tmp_path_factory.mktemp("vllm") / "log", *flags)
        servers.append(server)
        server.start()
        server.wait()
        return server

    yield start
    for server in servers:
        server.kill()
