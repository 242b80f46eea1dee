# SPDX-License-Identifier: Apache-2.0
"""A rough time of a training step from counts of operations and bytes."""

from dataclasses import dataclass

from .memory import Workload
from .sizes import ModelSize


@dataclass(frozen=True)
class Speed:
    """
    What is assumed of a GPU: its peak of dense bfloat16 products (`flops`, operations per second), the `bandwidth` of
    its memory (bytes per second), and the fractions of the peak (for decoding: of the bandwidth) that are reached.
    """

    flops: float = 312e12
    bandwidth: float = 2.0e12
    training_utilization: float = 0.35
    scoring_utilization: float = 0.5
    decoding_utilization: float = 0.5


def plan_time(
    size: ModelSize, work: Workload, accumulation: int, iterations: int = 1, speed: Speed | None = None
) -> dict[str, float]:
    """
    Seconds that a GPU spends on one generation batch, of `accumulation` micro-batches and for `iterations` epochs, in
    `"generation"`, `"scoring"` and `"training"`. A pass costs 2 operations a parameter and token, a backward pass 4 (2
    with an adapter), a second forward pass for checkpointing 2; decoding reads all weights and the cache once a token.
    Communication is not counted.
    """
    speed = speed or Speed()
    length = work.prompt_tokens + work.completion_tokens
    tokens = work.micro_batch * work.sequences * length * accumulation
    backward = 2 if size.trainable < size.parameters else 4
    again = 2 if work.gradient_checkpointing else 0
    training = (2 + backward + again) * size.parameters * tokens * iterations * (2 if work.value_model else 1)
    # The frozen models; without one, the policy without its adapter is.
    scored = sum(m.size.parameters for m in work.frozen) or size.parameters if work.sequences == 1 else 0
    generation = 0.0
    if work.generation_batch:
        cache = 4 * size.layers * size.key_value * (work.prompt_tokens + work.completion_tokens / 2)
        read = 2 * size.parameters + work.generation_batch * cache
        generation = work.completion_tokens * read / (speed.bandwidth * speed.decoding_utilization)
    return {
        "generation": generation,
        "scoring": 2 * scored * tokens / (speed.flops * speed.scoring_utilization),
        "training": training / (speed.flops * speed.training_utilization),
    }
