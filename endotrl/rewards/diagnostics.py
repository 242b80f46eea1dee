# SPDX-License-Identifier: Apache-2.0
"""Figures of a scored batch that tell how a run is doing."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..scoring.token_stats import TokenStats
from .rule import RewardRule


def batch_diagnostics(
    rewards: Sequence[float | None], per_token: Sequence[float | None], stats: Sequence[TokenStats]
) -> dict[str, float]:
    """
    Mean over completions of the reward per token, mean over tokens of log-probability, soft value and entropy (nats; a
    server gives the first only), the fraction of truncated completions, and the correlation (Pearson) of the reward
    with the length in tokens. Without what is not defined for the batch (no scored token, all lengths the same).
    """
    figures = {"truncated_fraction": sum(not row.finished for row in stats) / len(stats)}
    scored = [(r, row) for r, row in zip(rewards, stats, strict=True) if r is not None]
    if not scored:
        return figures
    values = torch.tensor([r for r, _ in scored], dtype=torch.float64)
    lengths = torch.tensor([len(row.token_ids) for _, row in scored], dtype=torch.float64)
    means = [mean for mean in per_token if mean is not None]
    figures["reward_per_token"] = sum(means) / len(means)
    figures["log_prob_per_token"] = torch.cat([row.log_probs for _, row in scored]).mean().item()
    if all(row.has_logits for _, row in scored):
        figures["soft_value"] = torch.cat([row.soft_values[: len(row.token_ids)] for _, row in scored]).mean().item()
    entropies = [row.entropies for _, row in scored if row.entropies is not None]
    if entropies:
        figures["entropy"] = torch.cat(entropies).mean().item()
    if len(scored) > 1 and values.std() > 0 and lengths.std() > 0:
        figures["length_correlation"] = torch.corrcoef(torch.stack([values, lengths]))[0, 1].item()
    return figures


def log_batch(
    name: str,
    rule: RewardRule,
    rewards: Sequence[float | None],
    stats: Sequence[TokenStats],
    log_extra: Callable[[str, list[Any]], None] | None,
    log_metric: Callable[[str, float], None] | None,
) -> None:
    """Gives TRL's loggers the column `per_token`, [`batch_diagnostics`], and the mean of what a correction adds."""
    mean = replace(rule, aggregate="mean")  # so that runs with different aggregates can be compared
    per_token = [mean.outcome(row) for row in stats]
    if log_extra is not None:
        log_extra(f"{name}/per_token", per_token)
    if log_metric is None:
        return
    figures = batch_diagnostics(rewards, per_token, stats)
    if rule.correction is not None:
        without = map(replace(rule, correction=None).outcome, stats)
        changes = [r - p for r, p in zip(rewards, without, strict=True) if r is not None and p is not None]
        if changes:
            figures["correction"] = sum(changes) / len(changes)
    for key, value in figures.items():
        log_metric(f"{name}/{key}", value)


def is_evaluation(log_metric: Callable[[str, float], None] | None) -> bool:
    """Whether a trainer evaluates: TRL's loggers are methods of the trainer, and nothing else that it passes tells."""
    # Not by `isinstance`: importing `Trainer` takes seconds.
    model = getattr(log_metric.__self__, "model", None) if isinstance(log_metric, MethodType) else None
    return isinstance(model, nn.Module) and not model.training
