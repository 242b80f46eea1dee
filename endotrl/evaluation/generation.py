# SPDX-License-Identifier: Apache-2.0
"""Answers of a model, sampled in batches, and what they are worth: pass@k, best of N."""

import gc
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from typing import Any, Protocol, Self

import torch
from tqdm.auto import tqdm

from ..rendering.ends import until_first
from ..rendering.messages import Prompt
from ..scoring.batching import pad_ids
from .engine import Engine


@dataclass(frozen=True)
class Sample:
    """
    One generated answer.

    Attributes:
        text (`str`):
            The answer, without special tokens.
        token_ids (`tuple[int, ...]`):
            Its tokens, the one that ends it included.
        finished (`bool`):
            `False` if it was cut off at the limit.
    """

    text: str
    token_ids: tuple[int, ...]
    finished: bool


class Generator(Protocol):
    """Gives `num_samples` answers to each prompt."""

    def __call__(
        self, prompts: Sequence[Prompt], num_samples: int, seed: int = 0, progress: bool = False
    ) -> list[list[Sample]]: ...


class Sampler:
    """
    Generates with transformers, prompts padded on the left.

    Args:
        engine ([`Engine`]):
            The model.
        max_new_tokens (`int`):
            Longest answer.
        temperature (`float`, *optional*, defaults to `1.0`):
            0 is greedy.
        top_p (`float`, *optional*, defaults to `1.0`):
            Nucleus. There is no top-k.
    """

    def __init__(self, engine: Engine, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0) -> None:
        _check(temperature, top_p)
        self._engine, self._max_new_tokens = engine, max_new_tokens
        self._temperature, self._top_p = temperature, top_p

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Prompt], num_samples: int, seed: int = 0, progress: bool = False
    ) -> list[list[Sample]]:
        """
        Answers to each prompt. The same seed gives the same answers to the same prompts in the same order.

        Raises:
            `ValueError`: If a prompt and its answer do not fit the model's context.
        """
        engine = self._engine
        rows = prompt_rows(engine, prompts, self._max_new_tokens)
        longest = max(map(len, rows)) + self._max_new_tokens
        per_batch = max(1, engine.max_tokens_per_batch // (num_samples * longest))
        results: list[list[Sample]] = []
        starts = range(0, len(rows), per_batch)
        for start in tqdm(starts, desc="Generating", unit=" batches", disable=not progress, leave=False):
            batch = rows[start : start + per_batch]
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {start}".encode()).digest()[:7]))
            results += self._generate(batch, num_samples)
        return results

    def _generate(self, rows: Sequence[Sequence[int]], num_samples: int) -> list[list[Sample]]:
        engine = self._engine
        ends = sorted(engine.renderer.eos_token_ids)
        pad = engine.tokenizer.pad_token_id
        pad = (ends[0] if ends else 0) if pad is None else pad
        ids, mask = pad_ids(rows, pad, left=True)
        greedy = self._temperature == 0.0
        sampling: dict[str, Any] = (
            {} if greedy else {"temperature": self._temperature, "top_p": self._top_p, "top_k": 0}
        )
        with engine.placement.active() as model:
            device = model.get_input_embeddings().weight.device
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=self._max_new_tokens,
                do_sample=not greedy,
                num_return_sequences=num_samples,
                pad_token_id=pad,
                eos_token_id=ends or None,
                **sampling,
            )[:, ids.shape[1] :].tolist()
        samples = [sample_of(engine, row, set(ends)) for row in output]
        return [samples[i * num_samples : (i + 1) * num_samples] for i in range(len(rows))]


def prompt_rows(engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """
    Token ids of prompts.

    Raises:
        `ValueError`: If one of them and its answer do not fit the model's context.
    """
    rows = engine.renderer.prompt_ids(prompts)
    longest, limit = max(map(len, rows)) + max_new_tokens, engine.renderer.max_length
    if limit is not None and longest > limit:
        raise ValueError(
            f"The longest prompt and {max_new_tokens} new tokens are {longest} tokens, and the model's context has "
            f"{limit}. Lower --max-new-tokens."
        )
    return rows


class VLLMEngine:
    """
    The one vLLM engine of a run, which starts when it is first needed. As a context manager, it ends with the context,
    and gives its memory back.

    Args:
        model (`str`):
            Path or hub id.
        **kwargs:
            Further arguments of [`~vllm.LLM`], such as `dtype`, `trust_remote_code` or `gpu_memory_utilization`.
    """

    def __init__(self, model: str, **kwargs: Any) -> None:
        self._kwargs = {"model": model, **kwargs}
        self._llm: Any = None

    @property
    def llm(self) -> Any:
        """
        The engine.

        Raises:
            `ImportError`: If vLLM is not installed.
        """
        if self._llm is None:
            try:
                from vllm import LLM
            except ImportError as error:
                raise ImportError(
                    '--backend vllm needs vLLM, which is not installed: pip install "endotrl[vllm]".'
                ) from error
            self._llm = LLM(**self._kwargs)
        return self._llm

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._llm = None  # its process ends when the last reference is gone
        gc.collect()


class VLLMSampler:
    """
    The same with vLLM, which takes prompts of any length together. The tests run it with a stand-in for vLLM.

    Args:
        engine ([`Engine`]):
            For tokenizer and rendering; its weights are not loaded.
        vllm ([`VLLMEngine`]):
            What generates.
        max_new_tokens, temperature, top_p:
            As in [`Sampler`].

    Raises:
        `ImportError`: If vLLM is not installed.
    """

    def __init__(
        self, engine: Engine, vllm: VLLMEngine, max_new_tokens: int, temperature: float = 1.0, top_p: float = 1.0
    ) -> None:
        _check(temperature, top_p)
        self._engine, self._vllm = engine, vllm
        self._settings = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}

    def __call__(
        self, prompts: Sequence[Prompt], num_samples: int, seed: int = 0, progress: bool = False
    ) -> list[list[Sample]]:
        """Answers to each prompt."""
        llm = self._vllm.llm
        from vllm import SamplingParams

        ends = sorted(self._engine.renderer.eos_token_ids)
        rows = self._engine.renderer.prompt_ids(prompts)
        settings = SamplingParams(n=num_samples, seed=seed, stop_token_ids=ends, **self._settings)
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=progress)
        return [[sample_of(self._engine, answer.token_ids, set(ends)) for answer in out.outputs] for out in outputs]


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    r"""
    Unbiased estimate of the probability that one of `k` samples is right, $1 - \binom{n - c}{k} / \binom{n}{k}$
    (Codex, https://huggingface.co/papers/2107.03374).

    Raises:
        `ValueError`: If there are fewer than `k` samples.

    Example:
    ```python
    >>> from endotrl.evaluation.generation import pass_at_k

    >>> pass_at_k(num_samples=4, num_right=1, k=2)
    0.5
    ```
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_samples} samples: k must be from 1 to their number.")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def accuracy_of_choice(scores: Sequence[float], right: Sequence[float]) -> float:
    """Probability that the sample with the best score is right, drawn among the best if they tie."""
    best = max(scores)
    chosen = [r for score, r in zip(scores, right, strict=True) if score == best]
    return sum(chosen) / len(chosen)


def majority_scores(groups: Sequence[int]) -> list[float]:
    """
    How many samples give the same answer as each: a score by which the majority wins. `groups` as of [`same_answer`].
    """
    return [float(list(groups).count(group)) for group in groups]


def sample_of(engine: Engine, token_ids: Sequence[int], ends: set[int]) -> Sample:
    """Cuts off the padding behind the token that ends an answer."""
    kept = tuple(until_first(token_ids, ends))
    return Sample(engine.tokenizer.decode(kept, skip_special_tokens=True), kept, bool(kept) and kept[-1] in ends)


def _check(temperature: float, top_p: float) -> None:
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"The temperature is {temperature} and top-p {top_p}, but a temperature is at least 0, and top-p above 0 "
            "and at "
            "most 1."
        )
