# SPDX-License-Identifier: Apache-2.0
r"""
Expected advantage of a completion where TRL divides rewards by the standard deviation $s$ of their group,
$A_i = (r_i - m) / (s + \epsilon)$, over the other $G - 1$ of the group. With $\rho(t)$, whose Laplace transform is
$1 / (\sqrt x + \epsilon)$, and $\tau = t / (G - 1)$,

$$
\frac1{s + \epsilon} = \int_0^\infty \rho(t)\, e^{-t s^2} dt, \qquad
e^{-t s^2} = \sqrt{\frac{\tau G}\pi} \int \prod_j e^{-\tau (r_j - \mu)^2} d\mu,
$$

so that given $t$ and $\mu$ the others are independent: an average over one of them is enough.
"""

import math

import numpy as np
from numpy.typing import NDArray


Array = NDArray[np.float64]

EPSILON = 1e-4  # TRL adds it to standard deviations
# Steps of the trapezoidal rule, in the logarithm of t and in widths of the product of G Gaussians, and the exponent at
# which a Gaussian counts as 0. Next to an enumeration of all groups, errors are below 1e-6, or 2e-4 where rewards
# differ by less than epsilon.
SCALE_STEP, WIDTH_STEP, NEGLIGIBLE = 0.25, 0.8, 20.0


class GroupAdvantages:
    """Those of one prompt, over `1 - 1 / size`, whose completions have `rewards` of shape `(N,)`."""

    def __init__(self, rewards: Array, size: int) -> None:
        values, self._places = np.unique(rewards - rewards.mean(), return_inverse=True)
        self._values, self._size = values, size
        gaps, middles = np.diff(values), (values[1:] + values[:-1]) / 2
        unit = max(np.ptp(values), EPSILON)
        # Up to where the closest two rewards are told apart, or epsilon is from 0. Equal rewards have no advantage.
        last = np.log1p(min(6 * math.sqrt(size) / gaps.min(), 20 / EPSILON) * unit) if len(gaps) else -3.0
        reach = math.ceil(math.sqrt(NEGLIGIBLE * size / 2) / WIDTH_STEP)
        factors, gaussians = [np.zeros(0)], [np.zeros((0, len(values)))]
        for place in np.arange(-3.0, last, SCALE_STEP):
            v = math.exp(place - math.exp(-place)) / unit  # the square root of t
            density = 2 / math.sqrt(math.pi) - 2 * v * EPSILON * math.exp((v * EPSILON) ** 2) * math.erfc(v * EPSILON)
            factor = density * v * (1 + math.exp(-place)) * SCALE_STEP
            tau = v**2 / (size - 1)
            step = WIDTH_STEP / math.sqrt(size * tau)
            # Where the Gaussians of two neighbours count
            found = middles[tau * gaps**2 < 2 * NEGLIGIBLE]
            nodes = step * np.unique(np.floor(found / step)[:, None] + np.arange(-reach, reach + 2))
            factors.append(np.full(len(nodes), factor * step * math.sqrt(tau * size / math.pi)))
            gaussians.append(np.exp(-tau * (nodes[:, None] - values) ** 2))
        self._factors, self._gaussians = np.concatenate(factors), np.concatenate(gaussians)

    def __call__(self, weights: Array) -> Array:
        """Of shape `(N,)`, under a policy with these probabilities."""
        masses = np.bincount(self._places, weights, len(self._values))
        each, weighted = self._gaussians @ masses, self._gaussians @ (masses * self._values)
        others = self._factors * each ** (self._size - 2)
        found = self._values * ((others * each) @ self._gaussians) - (others * weighted) @ self._gaussians
        return found[self._places]
