# SPDX-License-Identifier: Apache-2.0
"""Sampling of answers in batches, and their metrics: pass@k, best of N."""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..frozen.served import ServedModel
from ..rendering.ends import until_first
from ..rendering.messages import Prompt
from ..scoring.batching import pad_ids
from ..scoring.scorer import Placement
from .engine import Engine


@dataclass(frozen=True)
class Sample:
    """One generated answer."""

    text: str  # without special tokens
    token_ids: tuple[int, ...]  # including the end token
    finished: bool  # `False` if it was cut off


def loaded_placement(engine: Engine) -> Placement:
    """Placement of the generating model's weights. Raises `ValueError` if it is on a server."""
    if isinstance(engine.placement, ServedModel):
        raise ValueError(f"Answers need a local model, got {engine.placement!r}. Pass a path or hub id.")
    return engine.placement


@contextmanager
def generating(engine: Engine, rows: Sequence[Sequence[int]]) -> Iterator[tuple[PreTrainedModel, Tensor, Tensor]]:
    """
    The loaded model, with token ids and mask of the rows, `(B, T)`, padded on the left, on its device. Inside the
    context, the model's own generation settings, such as a repetition penalty, are disabled, except its end tokens.
    """
    ends = sorted(engine.renderer.eos_token_ids)
    pad = ends[0] if ends else 0
    ids, mask = pad_ids(rows, pad, left=True)
    with loaded_placement(engine).active() as model:
        own = model.generation_config
        model.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=ends or None)
        device = model.get_input_embeddings().weight.device
        try:
            yield model, ids.to(device), mask.to(device)
        finally:
            model.generation_config = own


def seed_of(*parts: Any) -> int:
    """32-bit seed from `parts`: torch's CPU generator ignores higher bits."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:4])


class Sampler:
    """
    Generation with transformers, or with `vllm` ([`vllm_engine`]), which does not load the weights of the `engine`. A
    temperature of 0 is greedy. There is no top-k, and the model's own generation settings are disabled.
    """

    def __init__(
        self,
        engine: Engine,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        vllm: Callable[[], Any] | None = None,
    ) -> None:
        if temperature < 0 or not 0 < top_p <= 1:
            raise ValueError(
                "`temperature` must be at least 0 and `top_p` greater than 0 and at most 1, got "
                f"{temperature} and {top_p}."
            )
        loaded_placement(engine)  # raises now if it is on a server
        self._engine, self._max_new_tokens = engine, max_new_tokens
        self._temperature, self._top_p, self._vllm = temperature, top_p, vllm

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], num_samples: int, seed: int = 0) -> list[list[Sample]]:
        """Answers per prompt. The same seed gives the same answers to the same prompts in the same order."""
        rows = prompt_rows(self._engine, prompts, self._max_new_tokens)
        if self._vllm is not None:
            return self._generate_by_vllm(self._vllm(), rows, num_samples, seed)
        longest = max(map(len, rows)) + self._max_new_tokens
        per_batch = max(1, self._engine.max_tokens_per_batch // (num_samples * longest))
        results: list[list[Sample]] = []
        for start in range(0, len(rows), per_batch):
            torch.manual_seed(seed_of(seed, start))
            results += self._generate(rows[start : start + per_batch], num_samples)
        return results

    def _generate(self, rows: Sequence[Sequence[int]], num_samples: int) -> list[list[Sample]]:
        greedy = self._temperature == 0.0
        sampling = {} if greedy else {"temperature": self._temperature, "top_p": self._top_p, "top_k": 0}
        with generating(self._engine, rows) as (model, ids, mask):
            output = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self._max_new_tokens,
                do_sample=not greedy,
                num_return_sequences=num_samples,
                **sampling,
            )[:, ids.shape[1] :].tolist()
        samples = [sample_of(self._engine, row) for row in output]
        return [samples[i * num_samples : (i + 1) * num_samples] for i in range(len(rows))]

    def _generate_by_vllm(
        self, llm: Any, rows: Sequence[Sequence[int]], num_samples: int, seed: int
    ) -> list[list[Sample]]:
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                n=num_samples,
                seed=seed_of(seed, self._temperature, i),  # with one seed, all rows would have the same noise
                stop_token_ids=sorted(self._engine.renderer.eos_token_ids),
                max_tokens=self._max_new_tokens,
                temperature=self._temperature,
                top_p=self._top_p,
            )
            for i in range(len(rows))
        ]
        outputs = llm.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)
        return [[sample_of(self._engine, answer.token_ids) for answer in out.outputs] for out in outputs]


def prompt_rows(engine: Engine, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
    """Token ids of prompts. Raises `ValueError` if a prompt and its answer do not fit into the model's context."""
    rows = engine.renderer.prompt_ids(prompts)
    limit, longest = engine.renderer.max_length, max(range(len(rows)), key=lambda i: len(rows[i]))
    if limit is not None and len(rows[longest]) + max_new_tokens > limit:
        fix = "Lower" if len(rows[longest]) < limit else "Remove or shorten that question: it leaves no room for"
        raise ValueError(
            f"Prompt {longest + 1}, the longest, has {len(rows[longest])} tokens, and answers have up to "
            f"{max_new_tokens}, but the model's context has {limit}. {fix} `max_new_tokens`."
        )
    return rows


@contextmanager
def vllm_engine(model: str, **kwargs: Any) -> Iterator[Callable[[], Any]]:
    """
    Yields a function that returns the run's only vLLM engine, which starts on first use and ends with the context.
    `kwargs` are further arguments of [`~vllm.LLM`], such as `gpu_memory_utilization`. Raises `ImportError` if vLLM is
    not installed.
    """

    @cache
    def engine() -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise ImportError('--backend vllm needs vLLM: pip install "endotrl[vllm]".') from error
        return LLM(model=model, **kwargs)

    try:
        yield engine
    finally:
        engine.cache_clear()  # its process ends when the last reference is gone
        gc.collect()


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    r"""
    Unbiased estimate of the probability that one of `k` samples is right, $1 - \binom{n - c}{k} / \binom{n}{k}$
    (Codex, https://huggingface.co/papers/2107.03374).
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` of pass@k must be from 1 to the number of samples, {num_samples}, got {k}.")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def accuracy_of_choice(scores: Sequence[float], right: Sequence[float]) -> float:
    """Probability that the best-scored sample is right, drawn uniformly among ties."""
    best = max(scores)
    chosen = [r for score, r in zip(scores, right, strict=True) if score == best]
    return sum(chosen) / len(chosen)


def majority_scores(groups: Sequence[int]) -> list[float]:
    """For each sample, the number of samples with the same answer ([`same_answer`])."""
    return [float(list(groups).count(group)) for group in groups]


def sample_of(engine: Engine, token_ids: Sequence[int]) -> Sample:
    """The sample without the padding after its end token."""
    ends = set(engine.renderer.eos_token_ids)
    kept = tuple(until_first(token_ids, ends))
    return Sample(engine.tokenizer.decode(kept, skip_special_tokens=True), kept, bool(kept) and kept[-1] in ends)
