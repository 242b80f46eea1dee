# SPDX-License-Identifier: Apache-2.0
"""
The endogenous reward once more, as naively as it can be written, for comparison. From the paper's formulas
(https://huggingface.co/papers/2506.23235), not from the package: one sequence at a time, no padding, all logits, every
reward a loop over tokens. Nothing here may import `endotrl`.
"""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ReferenceScores:
    """
    What the formulas need of one response of `H` tokens.

    Attributes:
        taken (`list[float]`): f(s_h, a_h), for h = 1..H.
        values (`list[float]`): V(s_h), for h = 1..H+1, the last one as the model gives it (not the terminal 0).
        log_probs (`list[float]`): log pi(a_h | s_h), for h = 1..H.
        entropies (`list[float]`): entropy of pi(. | s_h) in nats, for h = 1..H.
    """

    taken: list[float]
    values: list[float]
    log_probs: list[float]
    entropies: list[float]


@torch.no_grad()
def state_logits(model: torch.nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> torch.Tensor:
    """Logits at the states s_1, ..., s_{H+1}, of shape (H + 1, V): one forward pass over this sequence alone."""
    logits = model(torch.tensor([prompt_ids + completion_ids])).logits[0]
    return logits[len(prompt_ids) - 1 :]


def completion_log_probs(model: torch.nn.Module, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    """log pi(a_h | s_h), for h = 1..H."""
    logits = state_logits(model, prompt_ids, completion_ids)
    return scores_from_logits(logits, completion_ids, alpha=1.0).log_probs


def scores_from_logits(logits: torch.Tensor, actions: list[int], alpha: float) -> ReferenceScores:
    """Reads logits of shape (H + 1, V) as a soft Q-function."""
    taken, values, log_probs, entropies = [], [], [], []
    for h in range(len(actions) + 1):
        f = logits[h].double()
        # V(s) = alpha log sum_a exp(f(s, a) / alpha), with the largest term taken out so that nothing overflows.
        largest = f.max()
        value = float(alpha * torch.log(torch.sum(torch.exp((f - largest) / alpha))) + largest)
        values.append(value)
        if h < len(actions):
            probabilities = torch.exp((f - value) / alpha)  # pi(a|s) = exp((f - V) / alpha)
            taken.append(float(f[actions[h]]))
            log_probs.append(math.log(float(probabilities[actions[h]])))
            entropies.append(-float(torch.sum(torch.xlogy(probabilities, probabilities))))  # 0 log 0 = 0
    return ReferenceScores(taken, values, log_probs, entropies)


def token_rewards(
    scores: ReferenceScores, form: str, alpha: float, gamma: float, finished: bool, truncation: str
) -> list[float]:
    """r(s_h, a_h) for every token."""
    horizon = len(scores.taken)
    rewards = []
    for h in range(horizon):
        # What follows the last token: nothing (a terminal state has V = 0), unless the response was cut off and the
        # rule is to bootstrap.
        last = h == horizon - 1
        next_value = 0.0 if last and (finished or truncation == "terminal") else scores.values[h + 1]
        if form == "bellman":
            rewards.append(scores.taken[h] - gamma * next_value)
        elif form == "log_prob":
            rewards.append(alpha * scores.log_probs[h])
        elif form == "centered":
            rewards.append(alpha * (scores.log_probs[h] + scores.entropies[h]))
        else:
            raise AssertionError(form)
    return rewards


def chatml(messages: list[dict[str, str]], generation_prompt: bool = False) -> str:
    """Messages as ChatML, written out by hand rather than by a template."""
    text = ""
    for message in messages:
        text += f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
    return text + ("<|im_start|>assistant\n" if generation_prompt else "")
