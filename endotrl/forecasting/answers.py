# SPDX-License-Identifier: Apache-2.0
"""How often the samples of a question give the same answer, from their densities and not from their counts alone."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]


class Answers:
    r"""
    Estimates for one question from N samples. Counts of a few samples say that answers repeat more than they do: 8
    samples that all differ are 5.2 answers in a group of 8 drawn *from them*, and each is a majority of one. So no
    sample counts for what is expected of itself, and of a completion that was drawn its own probability is known.

    Attributes:
        agrees (`np.ndarray` of shape `(N,)`):
            Whether each sample gives the frozen model's majority answer (a fraction, if several answers tie). The mass
            of an answer is the sum over its completions $y$ that were seen of $\hat\pi(y) / P(y\ \text{is seen})$
            (Horvitz and Thompson), but for the sample itself, which counts with the expectation of that,
            $\hat\pi(y)$.
    """

    def __init__(
        self,
        token_ids: Sequence[Sequence[int]],
        groups: Sequence[int],  # for each sample, the first that gives the same answer
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
        others = np.where(self._same, 0.0, weights)  # (N, N): those of each sample
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
