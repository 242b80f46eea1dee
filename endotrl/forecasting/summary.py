# SPDX-License-Identifier: Apache-2.0
"""From samples of the frozen model to what a run at each beta ends with, what costs no training, and a verdict."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.generation import accuracy_of_choice, majority_scores
from ..evaluation.intervals import Estimate, Unit, differences, estimates, resampling_weights
from ..evaluation.results import plain_means
from .answers import Answers
from .policies import Array, Objective, Samples
from .sampling import GREEDY, Mixture


MIN_ESS = 5.0
METRICS = ("accuracy", "length", "truncated", "distinct", "agreement", "kl", "reward")
Record = Mapping[str, Any]


class Summary:
    """Estimates for each beta, and of what costs no training, from the records of [`collect`] and from `others`."""

    def __init__(
        self,
        records: Sequence[Record],
        mixture: Mixture,
        objective: Objective,
        betas: Sequence[float],
        others: Mapping[str, list[Unit]],
    ) -> None:
        self._records, self._objective = records, objective
        self.has_labels = records[0]["right"] is not None
        self._temperatures = mixture.temperatures
        self.num_votes = self._temperatures.count(1.0)  # among which the majority and the best of n are taken
        log_probs = [{float(t): values for t, values in r["log_probs"].items()} for r in records]
        greedy = self._temperatures.index(GREEDY)
        is_greedy = [[ids == r["token_ids"][greedy] for ids in r["token_ids"]] for r in records]
        log_proposals = [mixture.log_density(*pair) for pair in zip(log_probs, is_greedy, strict=True)]
        self._samples = samples = Samples(
            [r["token_ids"] for r in records],
            [found[1.0] for found in log_probs],
            log_proposals,
            [r["rewards"] for r in records],
        )
        self._right = np.concatenate([r["right"] for r in records]) if self.has_labels else None
        self._lengths = np.array([len(ids) for r in records for ids in r["token_ids"]], float)
        self._truncated = np.array([not end for r in records for end in r["finished"]], float)
        self._answers = [
            Answers(r["token_ids"], r["groups"], np.array(found[1.0]), mixture.log_seen(found, which))
            for r, found, which in zip(records, log_probs, is_greedy, strict=True)
        ]
        self._agrees = np.concatenate([answers.agrees for answers in self._answers])

        policies = {beta: samples.policy(objective, beta) for beta in sorted(set(betas), reverse=True)}
        units = {f"beta={beta:g}": self._units(weights) for beta, weights in policies.items()}
        at_half = np.concatenate([found[0.5] for found in log_probs])
        units |= self._alternatives(samples.normalized(at_half - samples.log_proposals))
        units |= others
        self._resampling = resampling_weights(units["sampled"])
        self._units_of = units
        self.estimates = {name: estimates(rows, plain_means, self._resampling) for name, rows in units.items()}
        self.betas = [self._beta_row(beta, weights) for beta, weights in policies.items()]
        self.alternatives = {
            name: self.estimates[name]["accuracy"].value if self.has_labels else None
            for name in units
            if not name.startswith("beta=")
        }
        self.slope, self.wrong_more_probable, self.num_mixed = self._covariances()

    def gain(self, name: str, metric: str = "accuracy", over: str = "sampled") -> Estimate:
        """Difference of a metric between two policies, with its paired interval."""
        pair = self._units_of[over], self._units_of[name]
        return differences(*pair, plain_means, self._resampling)[metric]

    def _units(self, log_weights: Array, log_densities: Array | None = None) -> list[Unit]:
        """Metrics of a policy with these weights, and log-densities: by default those that the weights stand for."""
        weights, mean = np.exp(log_weights), self._samples.mean
        if log_densities is None:
            log_densities = log_weights + self._samples.log_proposals + math.log(len(self._temperatures))
        shape = len(self._records), -1  # all have as many samples
        rows = zip(self._answers, weights.reshape(shape), log_densities.reshape(shape), strict=True)
        size = self._objective.num_generations
        columns = {
            "length": mean(weights, self._lengths),
            "truncated": mean(weights, self._truncated),
            "distinct": np.array([answers.distinct(own, density, size) for answers, own, density in rows]),
            "agreement": mean(weights, self._agrees),
            "reward": mean(weights, self._samples.rewards),
        }
        if np.isfinite(log_weights).all():
            columns["kl"] = self._samples.divergence(log_weights)
        if self._right is not None:
            columns["accuracy"] = mean(weights, self._right)
        return [
            Unit(r["key"], "questions", {name: float(column[i]) for name, column in columns.items()})
            for i, r in enumerate(self._records)
        ]

    def _alternatives(self, half_temperature: Array) -> dict[str, list[Unit]]:
        """What costs no training. Without labels, only what says something of the samples."""
        at_one = np.tile([0.0 if t == 1.0 else -np.inf for t in self._temperatures], len(self._records))
        votes = [i for i, t in enumerate(self._temperatures) if t == 1.0]
        return {
            # Without weights, and so without bias.
            "sampled": self._units(self._samples.normalized(at_one), self._samples.log_probs),
            "greedy": self._chosen([self._temperatures.index(GREEDY)], lambda r: [0.0]),
            "temperature=0.5": self._units(half_temperature),
            "majority": self._chosen(votes, lambda r: majority_scores([r["groups"][i] for i in votes])),
            "best_of_n": self._chosen(votes, lambda r: [r["rewards"][i] for i in votes]),
            "best_of_n_length": self._chosen(votes, lambda r: [len(r["token_ids"][i]) for i in votes]),
        }

    def _chosen(self, places: Sequence[int], scores_of: Callable[[Record], Sequence[float]]) -> list[Unit]:
        """Of some samples of each question, the one with the highest score, drawn among equals."""
        units = []
        for record in self._records:
            columns = {
                "length": [float(len(ids)) for ids in record["token_ids"]],
                "truncated": [float(not end) for end in record["finished"]],
                "reward": record["rewards"],
                **({"accuracy": record["right"]} if self.has_labels else {}),
            }
            scores = scores_of(record)
            values = {name: accuracy_of_choice(scores, [row[i] for i in places]) for name, row in columns.items()}
            units.append(Unit(record["key"], "questions", values))
        return units

    def _beta_row(self, beta: float, log_weights: Array) -> dict[str, Any]:
        found = self.estimates[f"beta={beta:g}"]
        sizes = self._samples.effective_sizes(log_weights)
        row: dict[str, Any] = {"beta": beta}
        for metric in METRICS:
            estimate = found.get(metric)
            row[metric] = None if estimate is None else estimate.value
            row[f"{metric}_interval"] = None if estimate is None else [estimate.low, estimate.high]
        return row | {"ess": float(np.median(sizes)), "ess_below_5": float((sizes < MIN_ESS).mean())}

    def _covariances(self) -> tuple[Estimate | None, float | None, int]:
        r"""
        Slope of the accuracy in $1/\beta$ at 0, which is the covariance under the frozen model of right and what is
        gained at first; and the fraction of the questions with right and wrong answers in which that of right and
        reward is negative, and their number.
        """
        if self._right is None:
            return None, None, 0
        samples, weights = self._samples, np.exp(self._samples.base)
        right = samples.mean(weights, self._right)
        mixed = (right > 1e-9) & (right < 1 - 1e-9)
        covariances = samples.covariance(weights, self._right, samples.rewards)[mixed]
        below = float((covariances < 0).mean()) if mixed.any() else None
        slopes = samples.covariance(weights, self._right, samples.first_gains(self._objective))
        units = [Unit(r["key"], "questions", {"slope": c}) for r, c in zip(self._records, slopes, strict=True)]
        slope = estimates(units, plain_means, self._resampling)["slope"]
        return slope, below, int(mixed.sum())
