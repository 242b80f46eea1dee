# SPDX-License-Identifier: Apache-2.0
r"""
Samples of the frozen model at several temperatures, with their density under each.

A completion of $H$ tokens has the density $\prod_h \pi_T(a_h|s_h)$, $\pi_T = \mathrm{softmax}(f/T)$: including its end
token if it has one; otherwise that of all completions with these first tokens, which the length limit merges into one.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..evaluation.engine import Engine
from ..evaluation.generation import Sample, Sampler, generating, loaded_placement, prompt_rows, sample_of
from ..rendering.messages import Prompt
from ..rendering.renderer import Rendered
from ..reporting import counted
from ..scoring.scorer import FrozenScorer


GREEDY = 0.0
KEPT = 4  # times `max_tokens_per_batch` fit into a batch: keys and values are kept, but logits of last tokens only


@dataclass(frozen=True)
class Mixture:
    r"""Number of samples per prompt at each temperature (0 is greedy), and their joint density."""

    counts: dict[float, int]

    @classmethod
    def of(cls, num_samples: int, temperatures: Sequence[float]) -> "Mixture":
        """
        Mixture with half of the samples at T = 1, the others evenly at the other temperatures, plus the greedy
        completion. Raises `ValueError` if T = 1 is missing, one is below 0.01, or there are too few samples.
        """
        others = sorted({t for t in temperatures if t != 1.0}, reverse=True)
        if 1.0 not in temperatures or any(not 0.01 <= t < math.inf for t in others):
            raise ValueError(f"`temperatures` must be at least 0.01 and include 1, got {[*temperatures]}.")
        if num_samples < 2 + len(others):
            few = f"`samples` must be at least {2 + len(others)} for {counted(len(others) + 1, 'temperature')}"
            raise ValueError(f"{few}, got {num_samples}.")
        rest = num_samples // 2 if others else 0
        shares = {t: rest // len(others) + (i < rest % len(others)) for i, t in enumerate(others)}
        return cls({1.0: num_samples - rest, **{t: n for t, n in shares.items() if n}, GREEDY: 1})

    @property
    def temperatures(self) -> list[float]:
        """Temperature of each sample."""
        return [t for t, count in self.counts.items() for _ in range(count)]

    @property
    def recorded(self) -> list[float]:
        """Temperatures at which densities are needed."""
        return sorted({1.0, 0.5, *self.counts} - {GREEDY}, reverse=True)

    def log_density(self, log_probs: Mapping[float, Sequence[float]], is_greedy: Sequence[bool]) -> np.ndarray:
        r"""$\log q$ of n samples, from their log-probabilities by temperature, and whether each is the greedy one."""
        total = sum(self.counts.values())
        terms = [math.log(n / total) + np.asarray(log_probs[t]) for t, n in self.counts.items() if t != GREEDY]
        return np.logaddexp.reduce([*terms, np.where(is_greedy, math.log(self.counts[GREEDY] / total), -np.inf)])

    def log_seen(self, log_probs: Mapping[float, Sequence[float]], is_greedy: Sequence[bool]) -> np.ndarray:
        """Log-probability that a completion is among the samples; arguments as in [`Mixture.log_density`]."""
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
    Samples with transformers: one prefill per prompt for all of its samples, which are drawn in parallel, each at its
    own temperature. Densities, at the temperatures `recorded`, come from the logits of the sampling.
    """

    def __init__(self, engine: Engine, max_new_tokens: int, recorded: Sequence[float]) -> None:
        self._engine, self._max_new_tokens, self._recorded = engine, max_new_tokens, list(recorded)

    def __call__(self, prompts: Sequence[Prompt], temperatures: Sequence[float], seed: int) -> list[Drawn]:
        """One sample of each prompt at each of `temperatures`; reproducible with the same seed."""
        return self.continue_ids(prompt_rows(self._engine, prompts, self._max_new_tokens), temperatures, seed)

    @torch.no_grad()
    def continue_ids(self, rows: Sequence[Sequence[int]], temperatures: Sequence[float], seed: int) -> list[Drawn]:
        """The same for token ids, of prompts, or of prompts and the beginnings of completions."""
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
        with generating(engine, rows) as (model, ids, mask):
            cache = _prompt_cache(model, ids, mask, num)
            recorder = _Recorder(torch.tensor([*temperatures] * len(rows), device=ids.device), self._recorded)
            output = model.generate(
                input_ids=ids.repeat_interleave(num, dim=0),
                attention_mask=mask.repeat_interleave(num, dim=0),
                max_new_tokens=self._max_new_tokens,
                do_sample=True,
                top_k=0,
                logits_processor=LogitsProcessorList([recorder]),
                **({} if cache is None else {"past_key_values": cache}),
            )
            recorder.add(output[:, -1])
        samples = [sample_of(engine, row) for row in output[:, ids.shape[1] :].tolist()]
        steps = torch.stack(recorder.steps, dim=2).cpu()  # (rows, temperatures, tokens)
        for i in range(0, len(samples), num):
            own = list(zip(samples[i : i + num], steps[i : i + num], strict=True))
            log_probs = {
                t: [row[k, : len(one.token_ids)].tolist() for one, row in own] for k, t in enumerate(self._recorded)
            }
            yield Drawn([one for one, _ in own], log_probs)


class ServedMixtureSampler:
    """Samples from another sampler at each temperature, such as vLLM's, with densities from scoring passes."""

    def __init__(self, engine: Engine, sampler_at: Callable[[float], Sampler], recorded: Sequence[float]) -> None:
        self._engine, self._sampler_at, self._recorded = engine, sampler_at, list(recorded)
        self._scorer = FrozenScorer(loaded_placement(engine), engine.max_tokens_per_batch)

    def __call__(self, prompts: Sequence[Prompt], temperatures: Sequence[float], seed: int) -> list[Drawn]:
        """As in [`MixtureSampler`]."""
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
        places = [slice(start, start + len(temperatures)) for start in range(0, len(rendered), len(temperatures))]
        return [
            Drawn(row, {t: values[place] for t, values in token_log_probs.items()})
            for row, place in zip(samples, places, strict=True)
        ]


class _Recorder(LogitsProcessor):
    """Applies each row's temperature, and records the log-probabilities of the tokens chosen then."""

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
        """Records the tokens chosen from the last logits."""
        assert self._logits is not None
        tempered = [self._logits / temperature for temperature in self._recorded]
        columns = [logits.gather(1, chosen[:, None])[:, 0] - logits.logsumexp(1) for logits in tempered]
        self.steps.append(torch.stack(columns, dim=1))


def _prompt_cache(model: PreTrainedModel, ids: Tensor, mask: Tensor, num: int) -> DynamicCache | None:
    """KV cache of the prompts without their last tokens, `num` times each; `None` for other types of cache."""
    if ids.shape[1] == 1 or not model._supports_default_dynamic_cache():
        return None
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    cache = model(**{k: v[:, :-1] for k, v in inputs.items()}, use_cache=True, logits_to_keep=1).past_key_values
    if not isinstance(cache, DynamicCache):
        return None
    cache.batch_repeat_interleave(num)
    return cache


# Tokens of a completion, with their log-probabilities at T = 1 and at the proposal temperature.
_State = list[tuple[int, float, float]]


def power_samples(
    engine: Engine,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    exponent: float,
    steps: int,
    seed: int = 0,
    progress: bool = False,
) -> list[Sample]:
    r"""
    Draws one sample per prompt from the power distribution $\hat\pi^{1+k}$, `exponent` $1 + k$, without training: the
    baseline for RL with the endogenous reward. A step costs half a completion.

    By Metropolis-Hastings (https://huggingface.co/papers/2510.14901): in a completion $y$ of $H$ tokens, a position
    $t$ is drawn uniformly, and everything from there on is resampled at the temperature $1/(1+k)$. The new $y'$
    replaces $y$ with probability

    $$
    \min\left(1, \frac{\hat\pi(y')^{1+k}}{\hat\pi(y)^{1+k}} \cdot
    \frac{\pi_T(y_{\geq t}|y_{<t}) / H'}{\pi_T(y'_{\geq t}|y_{<t}) / H}\right).
    $$
    """
    temperature = 1.0 / exponent
    generator = random.Random(seed)
    sampler = MixtureSampler(engine, max_new_tokens, [1.0, temperature])
    rows = prompt_rows(engine, prompts, max_new_tokens)

    def draw(prefixes: Sequence[Sequence[int]]) -> list[_State]:
        begun = [[*row, *prefix] for row, prefix in zip(rows, prefixes, strict=True)]
        drawn, states = sampler.continue_ids(begun, [temperature], generator.randrange(2**63)), []
        for one, prefix in zip(drawn, prefixes, strict=True):
            log_probs = (one.token_log_probs[t][0] for t in (1.0, temperature))
            state = list(zip(one.samples[0].token_ids, *log_probs, strict=True))
            states.append(state[: max_new_tokens - len(prefix)])
        return states

    states = draw([[] for _ in rows])
    for _ in tqdm(range(steps), desc="Power sampling", unit=" steps", disable=not progress):
        places = [generator.randrange(len(state)) for state in states]
        prefixes = [[token for token, *_ in state[:i]] for state, i in zip(states, places, strict=True)]
        for i, (state, place, new) in enumerate(zip(states, places, draw(prefixes), strict=True)):
            old = state[place:]
            log_ratio = exponent * (math.fsum(p for _, p, _ in new) - math.fsum(p for _, p, _ in old))
            log_ratio += math.fsum(p for *_, p in old) - math.fsum(p for *_, p in new)
            log_ratio += math.log(len(state) / (place + len(new)))
            if math.log(generator.random() or 1e-300) < log_ratio:
                states[i] = state[:place] + new
    return [sample_of(engine, [token for token, *_ in state]) for state in states]
