# SPDX-License-Identifier: Apache-2.0
"""Hidden states to (chosen logit, soft value, entropy), without ever holding the logits of all tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig


# 256 tokens by 8192 words are 8 MiB of float32 logits, which stay in the cache of a CPU core.
TOKEN_BLOCK = 256
VOCAB_BLOCK = 8192

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class LogitTransform:
    """
    What a model does to the output of its head: $f = c \\tanh(s z / c)$ with scale $s$ and soft cap $c$.

    Attributes:
        scale (`float`, *optional*, defaults to `1.0`):
            Factor of the logits (Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`, ...).
        softcap (`float`, *optional*):
            Soft cap of the logits (Gemma's `final_logit_softcapping`, ...).
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "LogitTransform":
        """Reads the transform from a model's config. The scorer checks the result against the model's own logits."""
        # A missing key means "not scaled"; `to_dict` rather than attributes, as each family has its own key.
        text_config = config.get_text_config().to_dict()
        scale = 1.0
        for key in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            if text_config.get(key) is not None:
                scale = float(text_config[key])
                break
        else:
            if text_config.get("logits_scaling") is not None:
                scaling = float(text_config["logits_scaling"])
                scale = scaling if text_config.get("model_type") == "hyperclovax" else 1.0 / scaling
        for key in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
            if text_config.get(key) is not None:
                return cls(scale, float(text_config[key]))
        return cls(scale)

    def __call__(self, logits: Tensor) -> Tensor:
        """Transforms a block of float32 logits, in place."""
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


def token_statistics(
    hidden_states: Tensor,
    head: nn.Module,
    token_ids: Tensor,
    alpha: float = 1.0,
    transform: LogitTransform | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""
    Chosen logit $f(s, a)$, soft value $V(s) = \alpha \log \sum_a \exp(f(s, a)/\alpha)$ and entropy of
    $\mathrm{softmax}(f(s, \cdot)/\alpha)$ for every token, computed block by block with a running maximum. The same as

    ```python
    logits = transform(head(hidden_states).float())
    chosen = logits.gather(-1, token_ids[:, None]).squeeze(-1)
    value = alpha * torch.logsumexp(logits / alpha, dim=-1)
    entropy = torch.distributions.Categorical(logits=logits / alpha).entropy()
    ```

    in the memory of `TOKEN_BLOCK * VOCAB_BLOCK` float32 logits.

    Args:
        hidden_states (`torch.Tensor` of shape `(N, D)`):
            Last hidden states of the scored positions.
        head (`torch.nn.Module`):
            LM head. An `nn.Linear` is applied in blocks of the vocabulary, any other module in blocks of tokens only.
        token_ids (`torch.Tensor` of shape `(N,)`):
            Token whose logit is wanted at each position.
        alpha (`float`, *optional*, defaults to `1.0`):
            Temperature of the soft value.
        transform (`LogitTransform`, *optional*):
            What the model does to the output of its head.
        entropy (`bool`, *optional*, defaults to `True`):
            Whether to compute the entropy.

    Returns:
        Three float32 tensors of shape `(N,)`: chosen logits, soft values, and entropies in nats (`None` if not asked).
    """
    transform = transform or LogitTransform()
    num_tokens = hidden_states.shape[0]
    chosen = torch.empty(num_tokens, dtype=torch.float32, device=hidden_states.device)
    values = torch.empty_like(chosen)
    entropies = torch.empty_like(chosen) if entropy else None
    for start in range(0, num_tokens, TOKEN_BLOCK):
        rows = slice(start, start + TOKEN_BLOCK)
        hidden, targets = hidden_states[rows], token_ids[rows]
        # Online logsumexp: `maximum` and `total` stand for sum(exp(x)) = total * exp(maximum), x = f / alpha. Finite, not
        # minus infinity, because a model may forbid words by a bias of minus infinity, even a whole block of them.
        maximum = torch.full((hidden.shape[0],), LOWEST, dtype=torch.float32, device=hidden.device)
        total = torch.zeros_like(maximum)
        # sum((x - maximum) * exp(x - maximum)): relative to the maximum, so that the entropy keeps its digits when the
        # logits are large.
        weighted = torch.zeros_like(maximum)
        for first, logits in _logit_blocks(hidden, head, transform):
            inside = (targets >= first) & (targets < first + logits.shape[1])
            picked = logits.gather(1, (targets - first).clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
            chosen[rows] = torch.where(inside, picked, chosen[rows])
            scaled = logits if alpha == 1.0 else logits.div_(alpha)
            new_maximum = torch.maximum(maximum, scaled.amax(dim=1))
            centered = (scaled - new_maximum[:, None]).clamp_(min=LOWEST)
            weights = torch.exp(centered)
            drop = maximum - new_maximum
            shrink = torch.exp(drop)
            if entropy:
                weighted = (weighted + total * drop) * shrink
            total = total * shrink + weights.sum(dim=1)
            if entropy:
                weighted += weights.mul_(centered).sum(dim=1)
            maximum = new_maximum
        log_total = torch.log(total)
        values[rows] = alpha * (maximum + log_total)
        if entropies is not None:
            entropies[rows] = log_total - weighted / total
    return chosen, values, entropies


def _logit_blocks(hidden: Tensor, head: nn.Module, transform: LogitTransform):  # type: ignore[no-untyped-def]
    """Yields (first word, float32 logits of a block of the vocabulary)."""
    if type(head) is not nn.Linear:
        yield 0, transform(head(hidden).float().clone())
        return
    for first in range(0, head.weight.shape[0], VOCAB_BLOCK):
        block = slice(first, first + VOCAB_BLOCK)
        bias = None if head.bias is None else head.bias[block]
        logits = nn.functional.linear(hidden, head.weight[block], bias)
        yield first, transform(logits.float())
