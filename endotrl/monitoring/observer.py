# SPDX-License-Identifier: Apache-2.0
"""Observer of the completions and rewards of every batch that a trainer scores, without changing them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer, RLOOTrainer

from ..rendering.ends import until_first
from ..rendering.policy import PolicyTokens, is_online_dpo
from . import detector as keys
from .batch_statistics import (
    ValuesSeen,
    change_since,
    distinct_completions,
    group_correlation,
    mean_and_error,
    repetition,
)
from .first_policy import FirstPolicy


# Minimum number of groups for the standard error of their mean.
MIN_GROUPS = 8
# Consecutive batches in which the policy is too far from the first one for a comparison, after which it is no longer
# attempted.
FAR = 10
# The policy's own log-probabilities if the trainer keeps them, else the reference's.
LOG_PROB_KEYS = ("old_logps", "old_per_token_logps", "sampling_per_token_logps", "ref_per_token_logps")


class BatchObserver:
    """
    Statistics of the batches that a trainer scores, through its private methods: TRL has no public hook with
    completions *and* all their rewards. With another kind of trainer, nothing is observed.
    """

    def __init__(self, trainer: Any, held_out: Sequence[str] | None = None, copy_weights: bool | None = None) -> None:
        self._trainer = trainer
        self._held_out: dict[str, int] = {}
        if isinstance(trainer, GRPOTrainer | RLOOTrainer):
            self._held_out = self._find_held_out(held_out)
            self._explicit = held_out is not None
            first = FirstPolicy(trainer, copy_weights)
            self._first = first if first.is_available else None
            self._far = 0  # consecutive batches
            self._observe_groups()
        elif is_online_dpo(trainer):
            if held_out:
                raise ValueError(
                    f"`held_out` must not be set for OnlineDPO, which only exposes the sum of its rewards, got "
                    f"{list(held_out)}."
                )
            self._observe_pairs()
        self.remember({})

    def pop(self) -> dict[str, float]:
        """Means of the statistics of the batches since the last call, by log key."""
        means = {}
        for key, values in self._sums.items():
            kind, mean, root = key.split("/")[1], sum(values) / len(values), math.sqrt(len(values))
            # A mean of n batches has 1 / sqrt(n) of their error, and sqrt(n) times their evidence.
            means[key] = mean * root if kind == "agreement_z" else mean / root if kind.endswith("_error") else mean
        self._sums.clear()
        return means

    def remember(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        """
        Restores the statistics of an interrupted run (`{}` for a new one), and returns those of this one as JSON
        values, which are updated with each batch.
        """
        self._sums: dict[str, list[float]] = dict(memory.get("sums", {}))
        self._seen = ValuesSeen(memory.get("values_seen", []), memory.get("value_recurs", False))
        names = memory.get("held_out", self._held_out)
        self._held_out = {name: index for name, index in self._held_out.items() if name in names}
        self._memory: dict[str, Any] = {"sums": self._sums, "held_out": self._held_out}
        self._memory |= {"values_seen": self._seen.values, "value_recurs": self._seen.recurs}
        return self._memory

    def _find_held_out(self, names: Sequence[str] | None) -> dict[str, int]:
        weights = dict(zip(self._trainer.reward_func_names, self._trainer.reward_weights.tolist(), strict=True))
        unweighted = [name for name, weight in weights.items() if weight == 0.0]
        for name in names or []:
            if name not in unweighted:
                what = "is trained on" if name in weights else "is not a reward function of this trainer"
                raise ValueError(
                    f"`held_out` must only contain reward functions of weight 0 (`reward_weights`), but {name!r} "
                    f"{what}. Those of weight 0 are: {', '.join(unweighted) or 'none'}."
                )
        return {name: list(weights).index(name) for name in (unweighted if names is None else names)}

    def _observe_groups(self) -> None:
        trainer = self._trainer
        calculate, generate = trainer._calculate_rewards, trainer._generate_and_score_completions
        batch: tuple[Tensor, Tensor] | None = None  # rewards by function, and the trained reward

        def calculate_rewards(
            inputs: Any, prompts: Any, completions: Any, completion_ids_list: list[list[int]]
        ) -> Tensor:
            nonlocal batch
            rewards = calculate(inputs, prompts, completions, completion_ids_list)
            if trainer.model.training:
                trained = (rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1)
                batch = rewards, trained.masked_fill(rewards.isnan().all(dim=1), torch.nan)
                self._observe(completion_ids_list, batch[1], trainer.num_generations)
                self._observe_held_out(*batch)
            return rewards

        def generate_and_score_completions(inputs: Any) -> dict[str, Any]:
            output = generate(inputs)
            if trainer.model.training and batch is not None:
                if self._first is not None:
                    self._observe_change(self._first.log_probs(output), *batch)
                log_probs = next((output[key] for key in LOG_PROB_KEYS if output.get(key) is not None), None)
                if log_probs is not None:
                    if log_probs.ndim == 2:  # per token; RLOO has them per completion
                        log_probs = (log_probs.float() * output["completion_mask"].bool()).sum(dim=1)
                    log_probs = trainer.accelerator.gather(log_probs)
                    self._add_correlation("probability", batch[1], log_probs, trainer.num_generations)
            return output

        trainer._calculate_rewards = calculate_rewards
        trainer._generate_and_score_completions = generate_and_score_completions

    def _observe_pairs(self) -> None:
        calculate = self._trainer._calculate_rewards_from_functions
        stops = frozenset(PolicyTokens.of(self._trainer).eos_token_ids)

        def calculate_rewards(
            prompts: Any, completions: Any, completion_ids_list: list[list[int]], **kwargs: Any
        ) -> Tensor:
            rewards = calculate(prompts, completions, completion_ids_list, **kwargs)
            # The first answers to all prompts come before the second ones.
            order = torch.arange(len(rewards)).view(2, -1).T.flatten()
            ids = [until_first(completion_ids_list[i], stops) for i in order.tolist()]  # without their padding
            self._observe(ids, self._trainer.accelerator.gather(rewards[order.to(rewards.device)]), 2)
            return rewards

        self._trainer._calculate_rewards_from_functions = calculate_rewards

    def _observe(self, completion_ids: Sequence[Sequence[int]], rewards: Tensor, num_generations: int) -> None:
        gather, device = self._trainer.accelerator.gather, rewards.device
        repeated = [math.nan if (part := repetition(ids)) is None else part for ids in completion_ids]
        lengths, repetitions = gather(torch.tensor([[*map(len, completion_ids)], repeated], device=device).T).T
        # Python's hashes of integers, unlike those of text, are the same in every process.
        hashes = gather(torch.tensor([hash(tuple(ids)) for ids in completion_ids], device=device))
        self._add("collapse/repetition", repetitions.nanmean().item())
        self._add("collapse/distinct_completions", distinct_completions(hashes, num_generations))
        self._add_correlation("length", rewards, lengths, num_generations)
        completions = [(i // num_generations, completion) for i, completion in enumerate(hashes.tolist())]
        self._seen.add(completions, rewards.tolist())
        self._memory["value_recurs"] = self._seen.recurs
        self._add("collapse/reward_is_verdict", float(self._seen.is_verdict))

    def _observe_held_out(self, rewards: Tensor, trained: Tensor) -> None:
        size = self._trainer.num_generations
        for name, index in list(self._held_out.items()):
            values = rewards[:, index]
            given = values[~values.isnan()]
            if not self._explicit and ((given < 0) | (given > 1)).any():
                del self._held_out[name]  # not an accuracy: a length, a log-probability
                for key in [key for key in self._sums if key.rpartition("/")[2] == name]:
                    del self._sums[key]
                continue
            groups = values.view(-1, size)
            mean, error = mean_and_error(groups)
            enough = (~groups.isnan()).any(dim=1).sum() >= MIN_GROUPS
            self._add(keys.HELD_OUT + name, mean, error if enough else math.nan)
            correlation = group_correlation(trained, values, size)
            if correlation is not None:
                self._add(f"collapse/agreement/{name}", correlation.rho)
                self._add(keys.AGREEMENT_EVIDENCE + name, correlation.z)
                self._add(keys.SLOPE + name, correlation.slope)

    def _observe_change(self, log_probs: tuple[Tensor, Tensor, Tensor], rewards: Tensor, trained: Tensor) -> None:
        first, present, tokens = (self._trainer.accelerator.gather(x).to(rewards.device) for x in log_probs)
        per_token = first / tokens.clamp(min=1)
        # The number that changes, and the largest difference that one completion can make
        watched = {keys.CHANGE + name: (rewards[:, i], 1.0) for name, i in self._held_out.items()}
        watched[keys.REWARD_CHANGE] = trained, trained.nan_to_num().std().item()
        # A verifier may lead away from the beliefs of the first policy.
        if not (self._seen.is_verdict and all(0 <= value <= 1 for value in self._seen.values)):
            self._add(keys.FIRST_LOG_PROB, per_token.mean().item())
            watched[keys.FIRST_LOG_PROB_CHANGE] = per_token, per_token.std().item()
        self._far += 1
        for key, (values, one) in watched.items():
            change = change_since(values, first - present, self._trainer.num_generations)
            if change is not None:
                # Before the first update, the error over groups is 0.
                self._add(key, change[0], math.hypot(change[1], one / len(rewards)))
                self._far = 0
        # Far for good: drop the copy. Far at first: the comparison is with another model.
        if self._far >= FAR or (self._far and self._trainer.state.global_step == 0):
            self._first = None

    def _add_correlation(self, name: str, rewards: Tensor, others: Tensor, num_generations: int) -> None:
        correlation = group_correlation(rewards, others.to(rewards.device), num_generations)
        if correlation is not None:
            self._add(f"collapse/{name}_correlation", correlation.rho)

    def _add(self, key: str, value: float, error: float = math.nan) -> None:
        for name, number in ((key, value), (keys.error_key(key), error)):
            if math.isfinite(number):
                self._sums.setdefault(name, []).append(number)
