# SPDX-License-Identifier: Apache-2.0
"""Estimates per beta, and for alternatives without training, from samples of the frozen model."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..evaluation.generation import accuracy_of_choice, majority_scores
from ..evaluation.intervals import Estimate, Unit, differences, estimates, resampling_weights
from ..evaluation.results import plain_means
from .policies import Array, Objective, Samples
from .sampling import GREEDY, Mixture


MIN_ESS = 5.0
METRICS = ("accuracy", "length", "truncated", "distinct", "agreement", "kl", "reward")
Record = Mapping[str, Any]


class Summary:
    """Estimates per beta and for alternatives without training, from the records of [`collect`] and from `others`."""

    def __init__(
        self,
        records: Sequence[Record],
        mixture: Mixture,
        objective: Objective,
        betas: Sequence[float],
        others: Mapping[str, list[Unit]],
    ) -> None:
        self._keys, self._objective = [r["key"] for r in records], objective
        self.has_labels = records[0]["right"] is not None
        temperatures = mixture.temperatures  # of the samples per question
        self._size, greedy = len(temperatures), temperatures.index(GREEDY)
        log_probs = [{float(t): values for t, values in r["log_probs"].items()} for r in records]
        is_greedy = [[ids == r["token_ids"][greedy] for ids in r["token_ids"]] for r in records]
        drawn = list(zip(log_probs, is_greedy, strict=True))
        self._samples = samples = Samples(
            [r["token_ids"] for r in records],
            [found[1.0] for found in log_probs],
            [mixture.log_density(*row) for row in drawn],
            [r["rewards"] for r in records],
        )
        self._answers = [
            Answers(r["token_ids"], r["groups"], np.array(row[0][1.0]), mixture.log_seen(*row))
            for r, row in zip(records, drawn, strict=True)
        ]
        # Per sample
        self._metrics = {
            "length": np.array([len(ids) for r in records for ids in r["token_ids"]], float),
            "truncated": np.array([not end for r in records for end in r["finished"]], float),
            "reward": samples.rewards,
        }
        if self.has_labels:
            self._metrics["accuracy"] = np.concatenate([r["right"] for r in records])
        self._agrees = np.concatenate([answers.agrees for answers in self._answers])

        policies = {beta: samples.policy(objective, beta) for beta in sorted(set(betas), reverse=True)}
        units = {f"beta={beta:g}": self._units(weights) for beta, weights in policies.items()}
        votes = [i for i, t in enumerate(temperatures) if t == 1.0]  # for the majority and the best of n
        self.num_votes = len(votes)
        at_one = np.tile([0.0 if t == 1.0 else -np.inf for t in temperatures], len(records))
        at_half = np.concatenate([found[0.5] for found in log_probs])
        units |= {
            # Unweighted, and so unbiased
            "sampled": self._units(samples.normalized(at_one), samples.log_probs),
            "greedy": self._chosen([greedy], [[0.0]] * len(records)),
            "temperature=0.5": self._units(samples.normalized(at_half - samples.log_proposals)),
            "majority": self._chosen(votes, [majority_scores([r["groups"][i] for i in votes]) for r in records]),
            "best_of_n": self._chosen(votes, self._by_question(samples.rewards)[:, votes]),
            "best_of_n_length": self._chosen(votes, self._by_question(self._metrics["length"])[:, votes]),
            **others,
        }
        self._resampling = resampling_weights(units["sampled"])
        self._units_of = units
        self.estimates = {name: estimates(rows, plain_means, self._resampling) for name, rows in units.items()}
        self.betas = [self._beta_row(beta, weights) for beta, weights in policies.items()]
        self.alternatives = {
            name: found["accuracy"].value if self.has_labels else None
            for name, found in self.estimates.items()
            if not name.startswith("beta=")
        }
        # Slope of the accuracy in 1 / beta at 0; the fraction of the questions with right and wrong answers in which
        # the right ones have lower rewards, and the number of these questions.
        self.slope: Estimate | None = None
        self.wrong_more_probable: float | None = None
        self.num_mixed = 0
        if self.has_labels:
            weights, right = np.exp(samples.base), self._metrics["accuracy"]
            accuracy = samples.mean(weights, right)
            mixed = (accuracy > 1e-9) & (accuracy < 1 - 1e-9)
            self.num_mixed = int(mixed.sum())
            if self.num_mixed:
                below = samples.covariance(weights, right, samples.rewards)[mixed] < 0
                self.wrong_more_probable = float(below.mean())
            # The covariance under the frozen model of correctness and initial gains
            slopes = self._as_units({"slope": samples.covariance(weights, right, samples.first_gains(objective))})
            self.slope = estimates(slopes, plain_means, self._resampling)["slope"]

    def gain(self, name: str, metric: str = "accuracy", over: str = "sampled") -> Estimate:
        """Difference of a metric between two policies, with its paired interval."""
        pair = self._units_of[over], self._units_of[name]
        return differences(*pair, plain_means, self._resampling)[metric]

    def _units(self, log_weights: Array, log_densities: Array | None = None) -> list[Unit]:
        """Metrics of a policy with these weights and log-densities (by default those implied by the weights)."""
        weights, mean = np.exp(log_weights), self._samples.mean
        if log_densities is None:
            log_densities = log_weights + self._samples.log_proposals + math.log(self._size)
        rows = zip(self._answers, self._by_question(weights), self._by_question(log_densities), strict=True)
        size = self._objective.num_generations
        columns: dict[str, ArrayLike] = {name: mean(weights, values) for name, values in self._metrics.items()}
        columns["distinct"] = [answers.distinct(own, density, size) for answers, own, density in rows]
        columns["agreement"] = mean(weights, self._agrees)
        if np.isfinite(log_weights).all():
            columns["kl"] = self._samples.divergence(log_weights)
        return self._as_units(columns)

    def _chosen(self, places: Sequence[int], scores: Sequence[Sequence[float]] | Array) -> list[Unit]:
        """The highest-scoring one of some samples per question; ties are averaged."""
        tables = {name: self._by_question(values)[:, places].tolist() for name, values in self._metrics.items()}
        return self._as_units({name: list(map(accuracy_of_choice, scores, table)) for name, table in tables.items()})

    def _by_question(self, values: Array) -> Array:
        return values.reshape(len(self._keys), self._size)

    def _as_units(self, columns: Mapping[str, ArrayLike]) -> list[Unit]:
        rows = zip(*(np.asarray(column).tolist() for column in columns.values()), strict=True)
        return [
            Unit(key, "questions", dict(zip(columns, row, strict=True)))
            for key, row in zip(self._keys, rows, strict=True)
        ]

    def _beta_row(self, beta: float, log_weights: Array) -> dict[str, Any]:
        found = self.estimates[f"beta={beta:g}"]
        sizes = self._samples.effective_sizes(log_weights)
        row: dict[str, Any] = {"beta": beta}
        for metric in METRICS:
            estimate = found.get(metric)
            row[metric] = None if estimate is None else estimate.value
            row[f"{metric}_interval"] = None if estimate is None else [estimate.low, estimate.high]
        return row | {"ess": float(np.median(sizes)), "ess_below_5": float((sizes < MIN_ESS).mean())}


class Answers:
    r"""
    Repetition of answers among the N samples of a question, from their densities. Counts over a few samples
    overestimate it: 8 samples that all differ give 5.2 answers in a group of 8 drawn *from them*, and each is a
    majority of one. So no sample counts towards its own expectation.

    `agrees`, of shape `(N,)`, is whether each sample gives the frozen model's majority answer (a fraction if several
    answers tie). The mass of an answer is the sum over its seen completions $y$ of
    $\hat\pi(y) / P(y\ \text{is seen})$ (Horvitz and Thompson), except for the sample itself, which counts with its
    $\hat\pi(y)$.
    """

    def __init__(
        self,
        token_ids: Sequence[Sequence[int]],
        groups: Sequence[int],  # for each sample, the index of the first with the same answer
        log_probs: Array,  # under the frozen model
        log_seen: Array,  # see [`Mixture.log_seen`]
    ) -> None:
        rows = [tuple(row) for row in token_ids]
        places = np.array([rows.index(row) for row in rows])
        self._same = places[:, None] == places
        answers = np.array(groups)
        self._alike = answers[:, None] == answers
        expanded = np.exp(log_probs - log_seen)
        masses = np.bincount(answers, expanded * (places == np.arange(len(rows))), len(rows)).astype(float)
        self.agrees = np.zeros(len(rows))
        for i, answer in enumerate(answers):
            without = masses.copy()
            without[answer] += np.exp(log_probs[i]) - expanded[i]
            best = without >= without.max() * (1 - 1e-9)
            self.agrees[i] = best[answer] / best.sum()

    def distinct(self, weights: Array, log_densities: Array, size: int) -> float:
        r"""
        Expected number of different answers among `size` completions of a policy, $\sum_a 1 - (1 - p_a)^G = \sum_i w_i
        \sum_{j<G} (1 - p_{a(i)})^j$, from the weights of the samples and the log-densities of the policy there.
        `(1 - p)^j` is that of the sample's own completion times, for others with its answer, the fraction of all sets
        of j other samples, by the products of their weights, in which none gives it.
        """
        own = np.exp(np.minimum(log_densities, 0.0))
        others = np.where(self._same, 0.0, weights)  # (N, N): weights of the others, per sample
        scale = others.max(axis=1, keepdims=True)
        others /= np.where(scale > 0, scale, 1.0)
        unlike = np.where(self._alike, 0.0, others)
        total = others.sum(axis=1)
        share = np.where(total > 0, unlike.sum(axis=1) / np.where(total > 0, total, 1.0), 1.0)
        powers = np.arange(size)
        missed = share[:, None] ** powers  # where there are fewer than j others
        every, without = _symmetric_sums(others, size), _symmetric_sums(unlike, size)
        missed = np.where(every > 0, without / np.where(every > 0, every, 1.0), missed)
        return float(weights @ ((1.0 - own[:, None]) ** powers * missed).sum(axis=1))


def _symmetric_sums(weights: Array, size: int) -> Array:
    """Elementary symmetric polynomials of rows of shape `(N, M)`, of degrees 0 to `size - 1`: shape `(N, size)`."""
    sums = np.zeros((len(weights), size))
    sums[:, 0] = 1.0
    for column in weights.T:
        sums[:, 1:] += column[:, None] * sums[:, :-1]
    return sums
