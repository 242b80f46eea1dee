# SPDX-License-Identifier: Apache-2.0
import cmath
import math

import torch

from endotrl.sentence.head import attention_weights, sentence_rewards


def test_rewards_are_differences():
    values = torch.tensor([[1.0, 3.0, 2.0, 7.0], [4.0, 1.5, -9.0, -9.0]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    rewards = sentence_rewards(values, mask)
    assert rewards.tolist() == [[1.0, 2.0, -1.0, 5.0], [4.0, -2.5, 0.0, 0.0]]
    # The plain sum telescopes to the last value of each row: 7 and 1.5.
    assert rewards.sum(dim=-1).tolist() == [7.0, 1.5]
    own = sentence_rewards(values, mask, differences=False)
    assert own.tolist() == [[0.0, 3.0, 2.0, 7.0], [0.0, 1.5, 0.0, 0.0]]


def test_weights_against_complex_numbers():
    generator = torch.Generator().manual_seed(1)
    queries, keys = torch.randn(2, 3, 5, 8, generator=generator)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    weights = attention_weights(queries, keys, mask, theta=100.0)
    for row, count in enumerate((5, 3, 1)):
        scores = []
        for i in range(count):
            score = 0.0
            for j in range(4):  # pairs (x_j, x_{j+4}) as complex numbers, turned by i * theta^(-2j/8)
                q = complex(queries[row, count - 1, j], queries[row, count - 1, j + 4])
                k = complex(keys[row, i, j], keys[row, i, j + 4])
                q *= cmath.exp(1j * (count - 1) * 100.0 ** (-2 * j / 8))
                k *= cmath.exp(1j * i * 100.0 ** (-2 * j / 8))
                score += (q * k.conjugate()).real
            scores.append(math.exp(score / math.sqrt(8)))
        expected = [s / sum(scores) for s in scores] + [0.0] * (5 - count)
        torch.testing.assert_close(weights[row], torch.tensor(expected), rtol=1e-4, atol=1e-5)
