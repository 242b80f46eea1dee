# SPDX-License-Identifier: Apache-2.0
r"""
Power sampling: samples of $\hat\pi^{1+k}$ without training, the rival of RL with the endogenous reward.

By Metropolis-Hastings, as in https://huggingface.co/papers/2510.14901; https://huggingface.co/papers/2601.21590 has a
faster approximation of the same distribution. From a completion $y$ of $H$ tokens, a place $t$ is drawn evenly, and
all from there on written anew at the temperature $1/(1+k)$. The new $y'$ replaces $y$ with probability

$$
\min\left(1, \frac{\hat\pi(y')^{1+k}}{\hat\pi(y)^{1+k}} \cdot
\frac{\pi_T(y_{\geq t}|y_{<t}) / H'}{\pi_T(y'_{\geq t}|y_{<t}) / H}\right).
$$
"""

import math
import random
from collections.abc import Sequence

from tqdm.auto import tqdm

from ..evaluation.engine import Engine
from ..evaluation.generation import Sample, prompt_rows, sample_of
from ..rendering.messages import Prompt
from .sampling import MixtureSampler


# Tokens of a completion, with their log-probabilities at T = 1 and at the temperature of the proposals.
State = list[tuple[int, float, float]]


def power_samples(
    engine: Engine,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    exponent: float,
    steps: int,
    seed: int = 0,
    progress: bool = False,
) -> list[Sample]:
    r"""One sample a prompt of the power distribution with `exponent` $1 + k$; a step costs half a completion."""
    temperature = 1.0 / exponent
    generator = random.Random(seed)
    sampler = MixtureSampler(engine, max_new_tokens, [1.0, temperature])
    rows = prompt_rows(engine, prompts, max_new_tokens)

    def draw(prefixes: Sequence[Sequence[int]]) -> list[State]:
        drawn = sampler.continue_ids(
            [[*row, *prefix] for row, prefix in zip(rows, prefixes, strict=True)],
            [temperature],
            generator.randrange(2**63),
        )
        states = []
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
