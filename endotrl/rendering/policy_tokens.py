# SPDX-License-Identifier: Apache-2.0
"""The token ids that a policy generates: who reads them, which end a completion, whether padding follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import trl
from packaging.version import Version
from transformers import PreTrainedTokenizerBase, ProcessorMixin


ProcessingClass: TypeAlias = PreTrainedTokenizerBase | ProcessorMixin


class PolicyRow(NamedTuple):
    """What a policy read and wrote in one row of a batch."""

    prompt_ids: list[int]  # without padding
    # For each token of the completion, 1 if the policy wrote it, 0 if a tool did; `None` if it wrote all.
    written: list[int] | None = None


@dataclass(frozen=True)
class PolicyTokens:
    """What is known of the token ids that a policy generates."""

    processing_class: ProcessingClass
    eos_token_ids: Sequence[int] = ()  # none if they are not known
    padded: bool | None = None  # whether padding follows the end of a completion; `None` if not known

    @classmethod
    def of(cls, trainer: Any) -> "PolicyTokens":
        """Those of the policy of a trainer; its `eos_token_ids` are known of TRL's trainers with reward functions."""
        if Version(trl.__version__) < Version("1.14") and hasattr(trainer, "reward_funcs"):
            # Generation stops at the tokenizer's EOS only.
            eos_token_ids: Sequence[int] = [tokenizer_of(trainer.processing_class).eos_token_id]
        else:
            eos_token_ids = getattr(trainer, "eos_token_ids", ())
        return cls(trainer.processing_class, eos_token_ids, padded=is_online_dpo(trainer))


def is_online_dpo(trainer: Any) -> bool:
    """Whether a trainer is an `OnlineDPOTrainer`, which hands completions over with their padding."""
    # By name: importing an experimental module prints a warning.
    return any(
        cls.__name__ == "OnlineDPOTrainer" and cls.__module__.startswith("trl.") for cls in type(trainer).__mro__
    )


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """A tokenizer, or the one that a processor holds."""
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def foreign_token_ids(tokenizer: ProcessingClass, others: ProcessingClass) -> frozenset[int] | None:
    """
    Token ids of the tokenizer `others` that mean something else to `tokenizer`, which is to read them; `None` if their
    vocabularies differ. Of one vocabulary to which different tokens were added (a pad token, tags of reasoning), the
    ids of those that `tokenizer` does not know as such.
    """
    ours, theirs = tokenizer_of(tokenizer), tokenizer_of(others)
    if ours is theirs:
        return frozenset()
    differing = dict(theirs.get_vocab().items() - ours.get_vocab().items())
    return frozenset(differing.values()) if differing.keys() <= theirs.added_tokens_encoder.keys() else None


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that decoding can leave out. `all_special_ids` has only those of them that have a name, such as EOS."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(tokenizer.all_special_ids) | {token_id for token_id, token in added if token.special}
