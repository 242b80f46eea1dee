# SPDX-License-Identifier: Apache-2.0
"""The second frozen model of [`InformationGain`]."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..frozen.served import is_url
from ..rendering.renderer import Rendered
from ..scoring.token_stats import TokenStats
from .corrections import InformationGain
from .frozen_model_reward import FrozenModelReward
from .rule import RewardRule


class Generalist(FrozenModelReward):
    """Adds its log-probabilities to the token statistics of another frozen model, which has the same tokenizer."""

    def __init__(
        self,
        gain: InformationGain,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
        alpha: float,
        **settings: Any,
    ) -> None:
        if gain.generalist is None:
            raise ValueError(
                "The `generalist` of `InformationGain` is None, but it must be a path, a hub id or a loaded model: no "
                "trainer has one to share."
            )
        self.rule = RewardRule("log_prob", alpha=alpha)
        # Of a loaded or served model, the tokenizer cannot always be found.
        has_own = isinstance(gain.generalist, str) and not is_url(gain.generalist)
        super().__init__(gain.generalist, None if has_own else processing_class, "generalist", **settings)

    def check_tokenizer(self, reward: FrozenModelReward) -> None:
        """Raises `ValueError` if the frozen model of the reward has another tokenizer."""
        theirs, ours = self._tokenizer, reward._tokenizer
        if theirs is not ours and theirs.get_vocab() != ours.get_vocab():
            raise ValueError(
                f"The generalist {self.config._name_or_path!r} has another tokenizer than the frozen model "
                f"{reward.config._name_or_path!r}, so that their log-probabilities are of different tokens. Take two "
                "models of one family."
            )

    def add_log_probs(self, rows: list[Rendered], stats: Sequence[TokenStats], progress: bool) -> list[TokenStats]:
        """The token statistics of rows, with the generalist's log-probabilities."""
        others = self._score_rows(rows, entropy=False, progress=progress)
        return [replace(row, generalist_log_probs=other.log_probs) for row, other in zip(stats, others, strict=True)]
