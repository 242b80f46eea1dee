# SPDX-License-Identifier: Apache-2.0
"""From samples of the frozen model to what a run at each beta ends with, what costs no training, and a verdict."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..evaluation.generation import accuracy_of_choice, majority_scores
from ..evaluation.intervals import Estimate, Unit, differences, estimates, resampling_weights
from ..evaluation.results import plain_means
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
        log_proposals = [
            mixture.log_density(found, [ids == r["token_ids"][greedy] for ids in r["token_ids"]])
            for r, found in zip(records, log_probs, strict=True)
        ]
        self._samples = samples = Samples(
            [r["token_ids"] for r in records],
            [found[1.0] for found in log_probs],
            log_proposals,
            [r["rewards"] for r in records],
        )
        self._right = np.concatenate([r["right"] for r in records]) if self.has_labels else None
        self._lengths = np.array([len(ids) for r in records for ids in r["token_ids"]], float)
        self._truncated = np.array([not end for r in records for end in r["finished"]], float)
        sizes = np.array([len(r["groups"]) for r in records])
        offsets = np.concatenate([[0], sizes.cumsum()[:-1]])
        # The answer that a sample gives, as the index of the first sample that gives it.
        self._answers = np.concatenate([np.array(r["groups"]) + o for r, o in zip(records, offsets, strict=True)])
        masses = np.bincount(self._answers, np.exp(samples.base), len(self._answers))
        self._majority = np.array([o + masses[o : o + n].argmax() for o, n in zip(offsets, sizes, strict=True)])

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

    def _units(self, log_weights: Array) -> list[Unit]:
        weights, mean = np.exp(log_weights), self._samples.mean
        shares = np.bincount(self._answers, weights, len(self._answers))
        columns = {
            "length": mean(weights, self._lengths),
            "truncated": mean(weights, self._truncated),
            "distinct": np.bincount(
                self._samples.owner, 1.0 - (1.0 - shares.clip(0, 1)) ** self._objective.num_generations
            ),
            "agreement": shares[self._majority],
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
            "sampled": self._units(self._samples.normalized(at_one)),  # without weights, and so without bias
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
        Slope of the accuracy in $1/\beta$ at 0, which is the covariance of right and reward under the frozen model;
        and the fraction of the questions with right and wrong answers in which it is negative, and their number.
        """
        if self._right is None:
            return None, None, 0
        samples, weights = self._samples, np.exp(self._samples.base)
        right = samples.mean(weights, self._right)
        deviations = samples.rewards - samples.mean(weights, samples.rewards)[samples.owner]
        covariances = samples.mean(weights, (self._right - right[samples.owner]) * deviations)
        mixed = (right > 1e-9) & (right < 1 - 1e-9)
        below = float((covariances[mixed] < 0).mean()) if mixed.any() else None
        units = [Unit(r["key"], "questions", {"slope": c}) for r, c in zip(self._records, covariances, strict=True)]
        slope = estimates(units, plain_means, self._resampling)["slope"]
        return slope, below, int(mixed.sum())
