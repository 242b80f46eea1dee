# SPDX-License-Identifier: Apache-2.0
"""Fused LM head statistics: hidden states to chosen logit, soft value, entropy, in blocks of logits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import trl
from packaging.version import Version
from torch import Tensor, nn
from transformers import PretrainedConfig

from .forward_pass import is_plain_linear


# Tokens per block of logits. Few blocks, because a matrix multiplication on the CPU repacks the weights each time,
# which costs as much as multiplying them with about 200 tokens.
TOKEN_BLOCK = 512
VOCAB_BLOCK = 4096
# The same for TRL's kernel, whose memory has this width only in the head's own dtype.
KERNEL_VOCAB_BLOCK = 32768
TRL_HAS_KERNEL = Version(trl.__version__) >= Version("1.15.0")
# A head of an unknown kind returns the whole vocabulary at once.
OTHER_HEAD_TOKEN_BLOCK = 64

# Blocks of tokens have one of few sizes: half-precision kernels on a CPU are compiled for each shape and kept.
TOKEN_MULTIPLE = 32

LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class LogitTransform:
    r"""Transformation of the head's output: $f = c \tanh(s z / c)$ with scale $s$ and soft cap $c$."""

    scale: float = 1.0  # Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`, ...
    softcap: float | None = None  # Gemma's `final_logit_softcapping`, ...

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> "LogitTransform":
        """Reads the transform from a model's config. The scorer checks the result against the model's own logits."""
        # A missing key means "not scaled"; `to_dict` rather than attributes, as each family has its own key.
        text_config = config.get_text_config().to_dict()

        def first(*keys: str) -> float | None:
            return next((float(text_config[key]) for key in keys if text_config.get(key) is not None), None)

        scale = first("logit_scale", "output_multiplier", "lm_head_multiplier")
        if scale is None and (width := first("dim_model_base")) is not None:  # MiniCPM
            scale = width / text_config["hidden_size"]
        elif scale is None and (scaling := first("logits_scaling")) is not None:
            scale = scaling if text_config.get("model_type") == "hyperclovax" else 1.0 / scaling
        softcap = first("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
        return cls(1.0 if scale is None else scale, softcap)

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:  # all in place
            logits = logits.mul_(self.scale)
        if self.softcap is not None:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits


class HeadStatistics(NamedTuple):
    """Result of [`token_statistics`] for `N` positions: tensors of shape `(N,)`, float32, entropies in nats."""

    chosen_logits: Tensor
    soft_values: Tensor
    entropies: Tensor | None
    mean_logits: Tensor | None


def token_statistics(
    hidden_states: Tensor,
    head: nn.Module,
    token_ids: Tensor,
    alpha: float = 1.0,
    transform: LogitTransform | None = None,
    entropy: bool = True,
    mean_logits: bool = False,
) -> HeadStatistics:
    r"""
    Chosen logit $f(s, a)$, soft value $V(s) = \alpha \log \sum_a \exp(f(s, a)/\alpha)$, entropy of
    $\mathrm{softmax}(f(s, \cdot)/\alpha)$ and mean logit for every token, computed block by block with a running
    maximum. The same as

    ```python
    logits = transform(head(hidden_states).float())
    chosen = logits.gather(-1, token_ids[:, None]).squeeze(-1)
    value = alpha * torch.logsumexp(logits / alpha, dim=-1)
    entropy = torch.distributions.Categorical(logits=logits / alpha).entropy()
    mean = logits.mean(dim=-1)
    ```

    in the memory of a few blocks of logits. A half-precision head rounds its logits to 8 (bfloat16) or 11 bits; the
    chosen one is recomputed in float32, and also replaces the rounded one in the soft value, so that their difference,
    the log-probability, is never positive and is most accurate where the model is certain.

    Hidden states have shape `(N, D)`, and token ids, of the chosen logits, `(N,)`. A plain linear head is applied in
    blocks of the vocabulary, any other module in blocks of tokens only; `transform` is the model's transformation of
    its output.
    """
    transform = transform or LogitTransform()
    if is_plain_linear(head):
        hidden_states = hidden_states.to(head.weight.dtype)  # differs with `cast_lm_head_to_fp32`
    if hidden_states.device.type == "cuda" and is_plain_linear(head) and TRL_HAS_KERNEL:
        if head.bias is None or head.bias.isfinite().all():  # on a forbidden word, the kernel gives NaN
            with torch.cuda.device(hidden_states.device):  # Triton runs on the current one
                return fused_statistics(hidden_states, head, token_ids, alpha, transform, entropy, mean_logits)
    largest, multiple = (TOKEN_BLOCK, TOKEN_MULTIPLE) if is_plain_linear(head) else (OTHER_HEAD_TOKEN_BLOCK, 1)
    num_tokens = hidden_states.shape[0]
    num_blocks = max(1, math.ceil(num_tokens / largest))
    size = math.ceil(num_tokens / num_blocks / multiple) * multiple
    parts = []
    for hidden, targets in zip(hidden_states.split(size), token_ids.split(size), strict=True):
        filler = (0, -len(targets) % multiple)
        hidden, targets = nn.functional.pad(hidden, (0, 0, *filler)), nn.functional.pad(targets, filler)
        parts.append(_block_statistics(hidden, head, targets, alpha, transform, entropy, mean_logits))
    joined = [
        None if columns[0] is None else torch.cat(columns)[:num_tokens].clone() for columns in zip(*parts, strict=True)
    ]
    return HeadStatistics(*joined)  # type: ignore[arg-type]


def fused_statistics(
    hidden_states: Tensor,
    head: nn.Linear,
    token_ids: Tensor,
    alpha: float,
    transform: LogitTransform,
    entropy: bool,
    mean_logits: bool,
) -> HeadStatistics:
    r"""[`token_statistics`] by TRL's Triton kernel: from its log-probabilities, $V(s) = f - \alpha \log \pi$."""
    from trl.kernels import ChunkedLogProbFunction

    optional = (*(("entropy",) if entropy else ()), *(("mean_logits",) if mean_logits else ()))
    log_probs, entropies, _, means, _ = ChunkedLogProbFunction.apply(
        hidden_states,
        head.weight,
        head.bias,
        token_ids,
        alpha,
        KERNEL_VOCAB_BLOCK,
        transform.softcap,
        transform.scale,
        optional,
    )
    chosen = transform(_exact_logits(hidden_states, head, token_ids))
    return HeadStatistics(chosen, chosen - alpha * log_probs, entropies, None if means is None else alpha * means)


def _block_statistics(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    alpha: float,
    transform: LogitTransform,
    entropy: bool,
    mean_logits: bool,
) -> HeadStatistics:
    """Statistics of one block of tokens, over all blocks of the vocabulary."""
    # Online logsumexp: `maximum` and `total` represent sum(exp(x)) = total * exp(maximum), x = f / alpha. Finite, not
    # minus infinity, because a model may forbid words by a bias of minus infinity, even a whole block of them.
    maximum = torch.full((hidden.shape[0],), LOWEST, dtype=torch.float32, device=hidden.device)
    total, chosen, logit_sum = torch.zeros_like(maximum), torch.zeros_like(maximum), torch.zeros_like(maximum)
    # sum((x - maximum) * exp(x - maximum)): relative to the maximum, so that the entropy stays accurate when the
    # logits are large.
    weighted = torch.zeros_like(maximum)
    vocab_size = 0
    for first, logits in _logit_blocks(hidden, head, targets, transform):
        vocab_size += logits.shape[1]
        inside = (targets >= first) & (targets < first + logits.shape[1])
        picked = logits.gather(1, (targets - first).clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        chosen = torch.where(inside, picked, chosen)
        if mean_logits:
            logit_sum += logits.sum(dim=1)
        scaled = logits if alpha == 1.0 else logits.div_(alpha)
        new_maximum = torch.maximum(maximum, scaled.amax(dim=1))
        centered = scaled.sub_(new_maximum[:, None])
        drop = maximum - new_maximum
        shrink = torch.exp(drop)
        if entropy:
            weights = torch.exp(centered)
            weighted = (weighted + total * drop) * shrink
            total = total * shrink + weights.sum(dim=1)
            # A forbidden word has weight 0 and minus infinity, whose product must be 0.
            weighted += weights.mul_(centered.clamp_(min=LOWEST)).sum(dim=1)
        else:
            total = total * shrink + centered.exp_().sum(dim=1)
        maximum = new_maximum
    log_total = torch.log(total)
    return HeadStatistics(
        chosen,
        alpha * (maximum + log_total),
        log_total - weighted / total if entropy else None,
        logit_sum / vocab_size if mean_logits else None,
    )


def _logit_blocks(
    hidden: Tensor, head: nn.Module, targets: Tensor, transform: LogitTransform
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first word, float32 logits of a block of the vocabulary, which may be overwritten)."""
    if not is_plain_linear(head):
        yield 0, transform(head(hidden).float().clone())
        return
    exact = None
    for first in range(0, head.weight.shape[0], VOCAB_BLOCK):
        block = slice(first, first + VOCAB_BLOCK)
        bias = None if head.bias is None else head.bias[block]
        logits = nn.functional.linear(hidden, head.weight[block], bias)
        if logits.dtype != torch.float32:
            if exact is None:
                exact = _exact_logits(hidden, head, targets)
            logits = logits.float()
            rows = ((targets >= first) & (targets < first + logits.shape[1])).nonzero().squeeze(1)
            logits[rows, targets[rows] - first] = exact[rows]
        yield first, transform(logits)


def _exact_logits(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    """Output of the head for one word at each position, of shape `(N,)`, in float32."""
    # Not a dot product, which autocast would compute in half precision.
    logits = (hidden.float() * head.weight[targets].float()).sum(dim=-1)
    return logits if head.bias is None else logits + head.bias[targets].float()
