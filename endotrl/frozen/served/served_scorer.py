# SPDX-License-Identifier: Apache-2.0
"""Token statistics from a server's log-probabilities, which are the logits in the gauge V = 0."""

from collections.abc import Sequence

import torch
from tqdm.auto import tqdm

from ...rendering.renderer import Rendered
from ...scoring.scorer import check_ids, score_once
from ...scoring.token_stats import TokenStats
from .model import ServedModel


class ServedScorer:
    r"""
    Scores completions on servers that are connected to, as [`FrozenScorer`] does with a loaded model. It has the gauge
    $V = 0$ only: `chosen_logits` are $\log \hat\pi(a_h|s_h)$, `soft_values` 0, and `has_logits` is `False`. Rewards
    that need more are refused before: see [`RewardRule.needs_logits`].
    """

    def __init__(self, placement: ServedModel) -> None:
        self.placement = placement

    def __call__(
        self,
        rows: Sequence[Rendered],
        alpha: float = 1.0,
        entropy: bool = False,
        mean_logits: bool = False,
        progress: bool = False,
    ) -> list[TokenStats]:
        """
        [`TokenStats`] in the order of `rows`, without entropies and mean logits, which a server has not. `ValueError`
        for another `alpha` than 1, ids outside the vocabulary and rows that the server refuses; `ServerError` if none
        answers.
        """
        if alpha != 1.0:
            raise ValueError(f"`alpha` is {alpha}, but a server gives log-probabilities at temperature 1 only.")
        vocab_size = self.placement.config.vocab_size
        check_ids(rows, vocab_size)
        first = next((i for i, row in enumerate(rows) if row.images is not None), None)
        if first is not None:
            raise ValueError(
                f"The prompt of row {first} has images, and a server is sent token ids only. Load the model here, or "
                'judge the text alone with `images="ignore"`.'
            )

        def score(unique: list[Rendered]) -> list[TokenStats]:
            asked = [row for row in unique if row.action_positions]
            with tqdm(total=len(asked), desc="Scoring", unit=" completions", disable=not progress) as bar:
                log_probs = self.placement.log_probs(
                    [[*row.prompt_ids, *row.completion_ids] for row in asked],
                    [len(row.prompt_ids) for row in asked],
                    bar.update,
                )
            answers = iter(log_probs)
            return [_token_stats(row, next(answers) if row.action_positions else [], vocab_size) for row in unique]

        return score_once(rows, score)


def _token_stats(row: Rendered, log_probs: list[float], vocab_size: int) -> TokenStats:
    positions = torch.tensor(row.action_positions, dtype=torch.long)
    return TokenStats(
        token_ids=torch.tensor(row.completion_ids, dtype=torch.long)[positions],
        positions=positions,
        chosen_logits=torch.tensor(log_probs, dtype=torch.float32)[positions],
        soft_values=torch.zeros(len(positions) + 1),
        entropies=None,
        finished=row.finished,
        alpha=1.0,
        num_completion_tokens=len(row.completion_ids),
        vocab_size=vocab_size,
        has_logits=False,
    )
