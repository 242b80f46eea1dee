# SPDX-License-Identifier: Apache-2.0
"""
What holds for every test: no network, one thread a worker, and no deprecated call into the libraries we build on.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator


# Read when the libraries are first imported, hence before any other import.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# TRL warns once per process that its experimental trainers (OnlineDPO) may change. We know.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers already fill the cores; a thread pool in each would make all of them slower.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .support.tiny_policy import save_tiny_policy


# Deprecations that are announced by log message and that upstream itself triggers: a part of the message, and why.
UPSTREAM_DEPRECATIONS: tuple[str, ...] = (
    # TRL 1.12's PPO trainer, when it generates.
    "Passing `generation_config` together with generation-related arguments",
)


class _FailOnDeprecation(logging.Handler):
    """
    Turns a logged deprecation into an exception where it was logged. Warnings of the `warnings` module are turned into
    errors by `filterwarnings` in `pyproject.toml`; transformers announces much by logging instead.
    """

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower() and not any(known in message for known in UPSTREAM_DEPRECATIONS):
            raise AssertionError(f"A deprecated call into {record.name}, logged as: {message}")


@pytest.fixture(scope="session", autouse=True)
def fail_on_logged_deprecations() -> Iterator[None]:
    handler = _FailOnDeprecation(level=logging.WARNING)
    loggers = [logging.getLogger(name) for name in ("transformers", "trl", "peft", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    yield
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(scope="session", autouse=True)
def no_network() -> Iterator[None]:
    """Refuses connections to other machines, so that a test that needs the network fails everywhere, not only here."""
    connect = socket.socket.connect

    def connect_here_only(self: socket.socket, address: object) -> None:
        # Internet addresses are (host, port, ...) tuples; a Unix socket's is a path.
        host = address[0] if isinstance(address, tuple) else None
        if host is not None and host not in ("localhost", "::1") and not str(host).startswith("127."):
            raise AssertionError(f"Tests must not use the network, and this one connects to {address!r}.")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here_only)
        yield


# ChatML, as SmolLM2 and Qwen write it, with the turns of tools as a role of their own.
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """
    Checkpoint of a random Llama (38 k parameters, untied head, context of 256 tokens) with a byte-level BPE tokenizer
    of 308 tokens, which can write any text. Its chat template is ChatML, and pad == eos == `<|im_end|>`.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = str(tmp_path_factory.mktemp("models") / "tiny-llama")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    corpus = ["The capital of France is Paris.", "user assistant system tool", "What is the capital of Italy?"] * 4
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=308,
            special_tokens=["<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML_TEMPLATE
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=False,
            # Larger than usual, so that the random model has opinions: logits of about +-3.
            initializer_range=0.25,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def tokenizer(tiny_model_path: str) -> PreTrainedTokenizerBase:
    """That of the tiny model; a new one for every test, as many change it."""
    return AutoTokenizer.from_pretrained(tiny_model_path)


@pytest.fixture
def warnings_logged(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """What the package has warned of so far."""
    with caplog.at_level(logging.WARNING, logger="endotrl"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name.startswith("endotrl")]


@pytest.fixture(scope="session")
def smollm2_path() -> str:
    """Checkpoint of SmolLM2-135M-Instruct; skips the test if the packages that it comes from are not installed."""
    from endotrl.frozen.quickstart_model import quickstart_model_path

    try:
        return quickstart_model_path()
    except ImportError as error:
        pytest.skip(f"SmolLM2-135M-Instruct is not here: {error}")


@pytest.fixture(scope="session")
def tiny_policy_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Checkpoint of a random Llama with a vocabulary of 19 words, for training: see `tests/support/tiny_policy.py`."""
    path = tmp_path_factory.mktemp("tiny_policy")
    save_tiny_policy(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_dropout_policy_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny_dropout_policy")
    save_tiny_policy(path, attention_dropout=0.5)
    return str(path)
