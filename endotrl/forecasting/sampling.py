# SPDX-License-Identifier: Apache-2.0
r"""
Samples of the frozen model at several temperatures, with their density under each.

A completion of $H$ tokens has the density $\prod_h \pi_T(a_h|s_h)$, $\pi_T = \mathrm{softmax}(f/T)$: with its end
token if it has one, else of all completions that begin with these tokens, which the limit makes one.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..evaluation.engine import Engine
from ..evaluation.generation import Sample, Sampler, loaded_placement, plain_generation, prompt_rows, sample_of
from ..rendering.messages import Prompt
from ..rendering.renderer import Rendered
from ..reporting import counted
from ..scoring.batching import pad_ids
from ..scoring.scorer import FrozenScorer


GREEDY = 0.0
KEPT = 4  # tokens whose keys and values are kept, for one whose logits would be: of each row, only the last has logits


@dataclass(frozen=True)
class Mixture:
    r"""How many samples of a prompt are drawn at which temperature (0 is greedy), and their density together."""

    counts: dict[float, int]

    @classmethod
    def of(cls, num_samples: int, temperatures: Sequence[float]) -> "Mixture":
        """
        Half of the samples at T = 1, the others evenly at the other temperatures; the greedy completion is one more.
        Raises `ValueError` if T = 1 is missing, one is below 0.01, or there are too few samples.
        """
        others = sorted({t for t in temperatures if t != 1.0}, reverse=True)
        if 1.0 not in temperatures or any(not 0.01 <= t < math.inf for t in others):
            raise ValueError(f"The temperatures are {[*temperatures]}, but must be at least 0.01, and 1 among them.")
        if num_samples < 2 + len(others):
            few = f"{counted(num_samples, 'sample')} cannot serve the temperatures {[*temperatures]}"
            raise ValueError(f"{few}: give {2 + len(others)} or more.")
        rest = num_samples // 2 if others else 0
        shares = {t: rest // len(others) + (i < rest % len(others)) for i, t in enumerate(others)}
        return cls({1.0: num_samples - rest, **{t: n for t, n in shares.items() if n}, GREEDY: 1})

    @property
    def temperatures(self) -> list[float]:
        """Temperature of each sample."""
        return [t for t, count in self.counts.items() for _ in range(count)]

    @property
    def recorded(self) -> list[float]:
        """Temperatures under which densities are needed."""
        return sorted({1.0, 0.5, *self.counts} - {GREEDY}, reverse=True)

    def log_density(self, log_probs: Mapping[float, Sequence[float]], is_greedy: Sequence[bool]) -> np.ndarray:
        r"""$\log q$ of n samples, from their log-probabilities by temperature, and whether each is the greedy one."""
        total = sum(self.counts.values())
        terms = [math.log(n / total) + np.asarray(log_probs[t]) for t, n in self.counts.items() if t != GREEDY]
        greedy = np.where(is_greedy, math.log(self.counts[GREEDY] / total), -np.inf)
        return np.logaddexp.reduce([*terms, greedy])

    def log_seen(self, log_probs: Mapping[float, Sequence[float]], is_greedy: Sequence[bool]) -> np.ndarray:
        """Log-probability that a completion is among the samples; arguments as of [`Mixture.log_density`]."""
        copies = self.log_density(log_probs, is_greedy) + math.log(sum(self.counts.values()))  # expected number
        drawn = [(n, np.exp(np.minimum(log_probs[t], -1e-15))) for t, n in self.counts.items() if t != GREEDY]
        missed = sum(n * np.log1p(-p) for n, p in drawn)
        some = np.log(-np.expm1(np.minimum(missed, -1e-300)))
        return np.where(is_greedy, 0.0, np.where(copies < -30.0, copies, some))  # probabilities may underflow


@dataclass(frozen=True)
class Drawn:
    """Samples of one prompt, and the log-probabilities of their tokens, in nats, by temperature."""

    samples: list[Sample]
    token_log_probs: dict[float, list[list[float]]]

    @property
    def log_probs(self) -> dict[float, list[float]]:
        """Log-probabilities of the samples."""
        return {t: [math.fsum(row) for row in rows] for t, rows in self.token_log_probs.items()}


class MixtureSampler:
    """
    Samples with transformers: the prompt is read once for all of its samples, which are drawn side by side, each at
    its own temperature. Densities, under the temperatures `recorded`, come from the logits of the sampling.
    """

    def __init__(self, engine: Engine, max_new_tokens: int, recorded: Sequence[float]) -> None:
        self._engine, self._max_new_tokens, self._recorded = engine, max_new_tokens, list(recorded)

    def __call__(self, prompts: Sequence[Prompt], temperatures: Sequence[float], seed: int) -> list[Drawn]:
        """One sample of each prompt at each of `temperatures`: with the same seed, the same ones."""
        return self.continue_ids(prompt_rows(self._engine, prompts, self._max_new_tokens), temperatures, seed)

    @torch.no_grad()
    def continue_ids(self, rows: Sequence[Sequence[int]], temperatures: Sequence[float], seed: int) -> list[Drawn]:
        """The same for token ids, which stand for prompts, or for prompts and beginnings of completions."""
        torch.manual_seed(seed)
        longest = max(map(len, rows)) + self._max_new_tokens
        size = max(1, KEPT * self._engine.max_tokens_per_batch // (len(temperatures) * longest))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        drawn: dict[int, Drawn] = {}
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            drawn |= zip(batch, self._draw([rows[i] for i in batch], temperatures), strict=True)
        return [drawn[i] for i in range(len(rows))]

    def _draw(self, rows: Sequence[Sequence[int]], temperatures: Sequence[float]) -> Iterator[Drawn]:
        engine, num = self._engine, len(temperatures)
        ends = sorted(engine.renderer.eos_token_ids)
        pad = ends[0] if ends else 0
        ids, mask = pad_ids(rows, pad, left=True)
        with loaded_placement(engine).active() as model, plain_generation(model):
            device = model.get_input_embeddings().weight.device
            ids, mask = ids.to(device), mask.to(device)
            cache = _prompt_cache(model, ids, mask, num)
            recorder = _Recorder(torch.tensor([*temperatures] * len(rows), device=device), self._recorded)
            output = model.generate(
                input_ids=ids.repeat_interleave(num, dim=0),
                attention_mask=mask.repeat_interleave(num, dim=0),
                generation_config=GenerationConfig(
                    max_new_tokens=self._max_new_tokens,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    pad_token_id=pad,
                    eos_token_id=ends or None,
                ),
                logits_processor=LogitsProcessorList([recorder]),
                **({} if cache is None else {"past_key_values": cache}),
            )
            recorder.add(output[:, -1])
        samples = [sample_of(engine, row) for row in output[:, ids.shape[1] :].tolist()]
        steps = torch.stack(recorder.steps, dim=2).cpu()  # (rows, temperatures, tokens)
        for i in range(0, len(samples), num):
            own = samples[i : i + num]
            yield Drawn(
                own,
                {
                    t: [
                        row[k, : len(one.token_ids)].tolist() for row, one in zip(steps[i : i + num], own, strict=True)
                    ]
                    for k, t in enumerate(self._recorded)
                },
            )


class ServedMixtureSampler:
    """Samples of another sampler at each temperature, such as vLLM's, whose densities come from scoring passes."""

    def __init__(self, engine: Engine, sampler_at: Callable[[float], Sampler], recorded: Sequence[float]) -> None:
        self._engine, self._sampler_at, self._recorded = engine, sampler_at, list(recorded)
        self._scorer = FrozenScorer(loaded_placement(engine), engine.max_tokens_per_batch)

    def __call__(self, prompts: Sequence[Prompt], temperatures: Sequence[float], seed: int) -> list[Drawn]:
        """As [`MixtureSampler`]."""
        samples: list[list[Sample]] = [[] for _ in prompts]
        for temperature in dict.fromkeys(temperatures):
            drawn = self._sampler_at(temperature)(prompts, [*temperatures].count(temperature), seed)
            samples = [row + more for row, more in zip(samples, drawn, strict=True)]
        rendered = [
            Rendered(ids, list(sample.token_ids), list(range(len(sample.token_ids))), sample.finished)
            for ids, row in zip(self._engine.renderer.prompt_ids(prompts), samples, strict=True)
            for sample in row
        ]
        token_log_probs = {
            t: [stats.log_probs.tolist() for stats in self._scorer(rendered, alpha=t, entropy=False)]
            for t in self._recorded
        }
        num = len(temperatures)
        return [
            Drawn(row, {t: values[i * num : (i + 1) * num] for t, values in token_log_probs.items()})
            for i, row in enumerate(samples)
        ]


class _Recorder(LogitsProcessor):
    """Gives each row its temperature, and keeps the log-probabilities of what is then chosen."""

    def __init__(self, temperatures: Tensor, recorded: Sequence[float]) -> None:
        self._temperatures, self._recorded = temperatures[:, None].float(), recorded
        self._logits: Tensor | None = None
        self.steps: list[Tensor] = []  # of shape (rows, temperatures)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self._logits is not None:
            self.add(input_ids[:, -1])
        self._logits = scores.float()
        greedy = self._temperatures == GREEDY
        best = torch.zeros_like(self._logits, dtype=torch.bool).scatter_(1, self._logits.argmax(1, keepdim=True), True)
        tempered = self._logits / torch.where(greedy, 1.0, self._temperatures)
        return tempered.masked_fill(greedy & ~best, -torch.inf)

    def add(self, chosen: Tensor) -> None:
        """Takes note of the tokens that were chosen from the last logits."""
        assert self._logits is not None
        columns = []
        for temperature in self._recorded:
            logits = self._logits / temperature
            columns.append(logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1))
        self.steps.append(torch.stack(columns, dim=1))


def _prompt_cache(model: PreTrainedModel, ids: Tensor, mask: Tensor, num: int) -> DynamicCache | None:
    """Keys and values of the prompts but for their last tokens, `num` times each; `None` if the model has others."""
    if ids.shape[1] == 1 or not model._supports_default_dynamic_cache():
        return None
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    cache = model(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=positions[:, :-1],
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    if not isinstance(cache, DynamicCache):
        return None
    cache.batch_repeat_interleave(num)
    return cache
