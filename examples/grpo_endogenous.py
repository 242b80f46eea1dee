# SPDX-License-Identifier: Apache-2.0
"""
GRPO on the endogenous reward in one file: what endotrl and TRL do together, without either's machinery.

1. Sample `G` completions per prompt from the policy.
2. Run a frozen copy of the base model over them. Its logits are a soft Q-function, so that every token has the reward
   `r = f(s, a) - V(s')` (eq. 11 of https://huggingface.co/papers/2506.23235). Their sum, less the prompt's `V(s_1)`,
   is the reward of the completion: its log-probability under the frozen model.
3. The advantage of a completion is its reward less the mean of its group.
4. Policy gradient with a KL penalty `beta` to the frozen model. The optimum is the frozen model to the power
   `1 + 1 / beta`.

    python examples/grpo_endogenous.py MODEL --steps 50

Suffixes name axes: `P` prompts, `G` completions of a prompt, `N` = P * G, `T` tokens of a completion, `V` vocabulary.
"""

import argparse
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from endotrl.bellman import outcome_reward, soft_value, token_rewards


PROMPTS = ["The capital of France is", "Two plus two is", "The opposite of hot is", "Water freezes at"]


@dataclass
class Batch:
    """Prompts, padded on the left, with their completions, padded on the right."""

    ids: Tensor  # (N, prompt + T)
    attention_mask: Tensor  # (N, prompt + T), 1 = token
    completion_mask_NT: Tensor  # True = token of the policy, the end token included

    @property
    def completion_ids_NT(self) -> Tensor:
        """Tokens of the completions."""
        return self.ids[:, -self.completion_mask_NT.shape[1] :]


@torch.no_grad()
def sample(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], num_generations: int, length: int
) -> Batch:
    """Step 1: completions of at most `length` tokens at temperature 1; those of one prompt stand side by side."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    inputs = {key: value.repeat_interleave(num_generations, dim=0) for key, value in inputs.items()}
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    ids = policy.generate(
        **inputs, max_new_tokens=length, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=pad
    )
    completion_ids_NT = ids[:, inputs["input_ids"].shape[1] :]
    is_end_NT = completion_ids_NT == end
    completion_mask_NT = is_end_NT.int().cumsum(dim=1) - is_end_NT.int() == 0  # no end before it
    attention_mask = torch.cat([inputs["attention_mask"], completion_mask_NT.long()], dim=1)
    return Batch(ids, attention_mask, completion_mask_NT)


def completion_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits of the states before each token and of the state after the last one, of shape `(N, T + 1, V)`."""
    position_ids = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    output = model(input_ids=batch.ids, attention_mask=batch.attention_mask, position_ids=position_ids)
    return output.logits[:, -batch.completion_mask_NT.shape[1] - 1 :].float()


def log_probs(logits: Tensor, batch: Batch) -> Tensor:
    """Log-probability of each token of the completions, of shape `(N, T)`."""
    return logits[:, :-1].log_softmax(dim=-1).gather(-1, batch.completion_ids_NT[..., None]).squeeze(-1)


@torch.no_grad()
def endogenous_rewards(frozen: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Step 2: rewards of completions, of shape `(N,)`, and the frozen model's log-probabilities, of shape `(N, T)`."""
    logits = completion_logits(frozen, batch)
    values = soft_value(logits)  # (N, T + 1)
    chosen_NT = logits[:, :-1].gather(-1, batch.completion_ids_NT[..., None]).squeeze(-1)
    rewards_N = []
    for chosen_T, values_T1, mask_T in zip(chosen_NT, values, batch.completion_mask_NT, strict=True):
        length = int(mask_T.sum())
        # Nothing follows the last token: the value of the state after it is 0.
        row_values = torch.cat([values_T1[:length], torch.zeros(1)])
        rewards_N.append(outcome_reward(token_rewards(chosen_T[:length], row_values), initial_value=row_values[0]))
    return torch.stack(rewards_N), log_probs(logits, batch)


def group_advantages(rewards_N: Tensor, num_generations: int) -> Tensor:
    """Step 3: rewards less the mean of their group."""
    rewards_PG = rewards_N.view(-1, num_generations)
    return (rewards_PG - rewards_PG.mean(dim=1, keepdim=True)).view(-1)


def grpo_loss(
    log_probs_NT: Tensor, frozen_log_probs_NT: Tensor, advantages_N: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """Step 4: one update per batch, so that the importance ratio is 1 and only its gradient counts."""
    ratio_NT = torch.exp(log_probs_NT - log_probs_NT.detach())
    difference_NT = frozen_log_probs_NT - log_probs_NT
    kl_NT = torch.exp(difference_NT) - difference_NT - 1  # never negative: http://joschu.net/blog/kl-approx.html
    # The ratio makes the gradient of the penalty that of the KL divergence (https://huggingface.co/papers/2512.02556).
    loss_NT = ratio_NT * (beta * kl_NT - advantages_N[:, None])
    return (loss_NT * mask).sum() / mask.sum()


def main() -> None:
    """Trains, and prints one line per step."""
    parser = argparse.ArgumentParser(description="GRPO on the endogenous reward, in one file.")
    parser.add_argument("model", help="path or hub id of a causal language model")
    parser.add_argument("--steps", type=int, default=50, help="policy updates (default: 50)")
    parser.add_argument("--num-generations", type=int, default=8, help="completions per prompt (default: 8)")
    parser.add_argument("--length", type=int, default=16, help="longest completion, in tokens (default: 16)")
    parser.add_argument("--beta", type=float, default=0.1, help="KL penalty (default: 0.1)")
    parser.add_argument("--learning-rate", type=float, default=1e-5, help="of AdamW (default: 1e-5)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    policy = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()  # without dropout
    frozen = deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate)
    for step in range(args.steps):
        batch = sample(policy, tokenizer, PROMPTS, args.num_generations, args.length)
        rewards_N, frozen_log_probs_NT = endogenous_rewards(frozen, batch)
        log_probs_NT = log_probs(completion_logits(policy, batch), batch)
        advantages_N = group_advantages(rewards_N, args.num_generations)
        loss = grpo_loss(log_probs_NT, frozen_log_probs_NT, advantages_N, batch.completion_mask_NT, args.beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lengths = batch.completion_mask_NT.sum(dim=1).float()
        print(f"step {step + 1}: reward {rewards_N.mean():.2f} nats, {lengths.mean():.1f} tokens, loss {loss:.4f}")


if __name__ == "__main__":
    main()
