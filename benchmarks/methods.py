# SPDX-License-Identifier: Apache-2.0
"""The ways of scoring that are compared: endotrl, and what a user of TRL has instead."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from endotrl.frozen.loaded_model import LoadedModel
from endotrl.frozen.own_copy import OwnCopy
from endotrl.rendering.renderer import Rendered
from endotrl.scoring.scorer import FrozenScorer


Batches = Sequence[Sequence[Rendered]]


class Method(ABC):
    """
    One way of scoring.

    Args:
        source (`str` or [`~transformers.PreTrainedModel`]):
            Checkpoint of the frozen model, or the model, whose weights are shared.
        dtype (`torch.dtype`), device (`str`):
            Of the weights of a checkpoint.
    """

    label: str

    @abstractmethod
    def __init__(self, source: str | PreTrainedModel, dtype: torch.dtype, device: str) -> None: ...

    @abstractmethod
    def __call__(self, batches: Batches) -> list[Tensor]:
        """
        Scores micro-batches of finished completions. One tensor per completion, on the CPU and float32, whose sum is the
        reward: log-probabilities of shape `(H_i,)` in nats, or the one score of a reward model.
        """


class PaddedLogits(Method):
    """One padded batch, full logits, `log_softmax`, `gather`."""

    label = "(a) padded batch, full logits"

    def __init__(self, source: str | PreTrainedModel, dtype: torch.dtype, device: str) -> None:
        self.model = load(source, dtype, device)

    @torch.inference_mode()
    def __call__(self, batches: Batches) -> list[Tensor]:
        results = []
        for rows in batches:
            input_ids, mask = pad(rows, self.model.device)
            logits = self.model(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            log_probs = torch.log_softmax(logits, dim=-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
            results.extend(completions_of(log_probs, rows))
        return results


class FusedHead(Method):
    """The same batch through TRL's fused LM head, as GRPO runs its reference model."""

    label = "(b) padded batch, TRL's fused head"

    def __init__(self, source: str | PreTrainedModel, dtype: torch.dtype, device: str) -> None:
        from trl.trainer import add_fused_lm_head  # TRL >= 1.15

        self.model = load(source, dtype, device)
        add_fused_lm_head(self.model)

    @torch.inference_mode()
    def __call__(self, batches: Batches) -> list[Tensor]:
        results = []
        for rows in batches:
            input_ids, mask = pad(rows, self.model.device)
            labels = input_ids.masked_fill(mask == 0, -100)
            for line, row in zip(labels, rows, strict=True):
                line[: len(row.prompt_ids)] = -100
            output = self.model(input_ids=input_ids, attention_mask=mask, labels=labels, fused_lm_head=True)
            results.extend(completions_of(output.log_probs, rows))
        return results


class RewardModel(Method):
    """A reward model of the same backbone (with a random score head), as TRL's GRPO calls it."""

    label = "(c) reward model, same backbone"

    def __init__(self, source: str | PreTrainedModel, dtype: torch.dtype, device: str) -> None:
        if isinstance(source, str):
            model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=dtype)
        else:
            config = copy.deepcopy(source.config)
            config.num_labels = 1
            with torch.device("meta"):
                model = AutoModelForSequenceClassification.from_config(config, dtype=source.dtype)
            setattr(model, model.base_model_prefix, source.base_model)
            model.score = nn.Linear(source.config.hidden_size, 1, bias=False, dtype=source.dtype)
        self.model = model.to(device).eval()
        # It reads the last token that is no padding. SmolLM2's own padding token also ends turns.
        self.model.config.pad_token_id = self.model.config.vocab_size - 1

    @torch.inference_mode()
    def __call__(self, batches: Batches) -> list[Tensor]:
        results: list[Tensor] = []
        for rows in batches:
            input_ids, mask = pad(rows, self.model.device, self.model.config.pad_token_id)
            scores = self.model(input_ids=input_ids, attention_mask=mask).logits[:, 0]
            results.extend(scores.float().cpu().split(1))
        return results


class Endotrl(Method):
    """endotrl's scorer, as the endogenous reward calls it."""

    label = "endotrl"
    entropy = False

    def __init__(self, source: str | PreTrainedModel, dtype: torch.dtype, device: str) -> None:
        own = isinstance(source, str)
        self.scorer = FrozenScorer(OwnCopy(source, dtype, device) if own else LoadedModel(source))

    def __call__(self, batches: Batches) -> list[Tensor]:
        # It makes micro-batches itself.
        rows = [row for batch in batches for row in batch]
        return [stats.log_probs for stats in self.scorer(rows, entropy=self.entropy)]


class EndotrlEntropy(Endotrl):
    """The same with entropies, which the reward logs in a trainer."""

    label = "endotrl, with entropies"
    entropy = True


METHODS: dict[str, type[Method]] = {
    "padded_logits": PaddedLogits,
    "fused_head": FusedHead,
    "reward_model": RewardModel,
    "endotrl": Endotrl,
    "endotrl_entropy": EndotrlEntropy,
}
RIVALS = ("padded_logits", "fused_head", "reward_model")


def load(source: str | PreTrainedModel, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A checkpoint, or the model as it is."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype) if isinstance(source, str) else source
    return model.to(device).eval()


def exact_log_probs(path: str, dtype: torch.dtype, device: str, rows: Sequence[Rendered]) -> list[Tensor]:
    """The truth: the same weights (rounded to `dtype`) in float32, one sequence at a time, without any trick."""
    return log_probs_of(load(path, dtype, device).float(), rows)


@torch.inference_mode()
def log_probs_of(model: PreTrainedModel, rows: Sequence[Rendered]) -> list[Tensor]:
    """Log-probabilities, of shape `(H_i,)`, of one sequence at a time from full logits."""
    results = []
    for row in rows:
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]], device=model.device)
        log_probs = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].float(), dim=-1)
        chosen = log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1)
        results.append(chosen[len(row.prompt_ids) - 1 :].cpu())
    return results


def pad(rows: Sequence[Rendered], device: torch.device, pad_token_id: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (1 = token), both of shape `(B, T)`, padded on the right."""
    sequences = [torch.tensor([*row.prompt_ids, *row.completion_ids]) for row in rows]
    input_ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_token_id)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True)
    return input_ids.to(device), mask.to(device)


def completions_of(log_probs: Tensor, rows: Sequence[Rendered]) -> list[Tensor]:
    """Log-probabilities of every completion, from those of shape `(B, T - 1)` of every next token."""
    log_probs = log_probs.float().cpu()
    return [
        line[len(row.prompt_ids) - 1 : len(row.prompt_ids) + len(row.completion_ids) - 1]
        for line, row in zip(log_probs, rows, strict=True)
    ]
