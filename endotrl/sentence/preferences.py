# SPDX-License-Identifier: Apache-2.0
"""Preference data for a sentence reward model: encoding of rows in TRL's formats, and batches."""

import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.data.data_collator import DataCollatorMixin
from trl.data_utils import is_conversational, maybe_extract_prompt

from ..rendering.images import refuse_images
from ..rendering.messages import template_kwargs_of
from ..rendering.policy import PolicyBinding, Reading
from .configuration import SentenceRewardConfig
from .encoding import SentenceEncoder, pad_batch, pad_states
from .segmentation import Segmenter


class PairEncoder:
    """
    Adds a preference row's encoding: `chosen_ids`, `chosen_ends`, `rejected_ids`, `rejected_ends`, and `length`, the
    length of the longer response with its prompt in tokens.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: SentenceRewardConfig, segmenter: Segmenter | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.segmenter = segmenter
        # Rows may have their own `tools` and `chat_template_kwargs`, columns that TRL's trainers support as well.
        self._encoders = PolicyBinding(tokenizer, None, lambda: tokenizer, self._make_encoder)

    def __call__(self, example: dict[str, Any]) -> dict[str, Any]:
        """Encodes a row."""
        columns = {key: [example[key]] for key in ("image", "images") if example.get(key) is not None}
        refuse_images(columns, 1, "a sentence reward model")
        pair = maybe_extract_prompt(example) if is_conversational(example) else _split_text(example)
        prompt = pair["prompt"]
        if prompt == "" and not self.tokenizer("")["input_ids"]:
            prompt = self.tokenizer.eos_token  # responses without a prompt need a token before them
        encoder = self._encoders.of(template_kwargs=template_kwargs_of(example))
        chosen, rejected = encoder([prompt] * 2, [pair["chosen"], pair["rejected"]])
        return {
            "chosen_ids": chosen.input_ids,
            "chosen_ends": chosen.sentence_ends,
            "rejected_ids": rejected.input_ids,
            "rejected_ends": rejected.sentence_ends,
            "length": max(len(chosen.input_ids), len(rejected.input_ids)),
        }

    def _make_encoder(self, reading: Reading) -> SentenceEncoder:
        return SentenceEncoder(config=self.config, segmenter=self.segmenter, **reading._asdict())


@dataclass
class DataCollatorForSentencePreference(DataCollatorMixin):
    """
    Batches of [`SentenceRewardTrainer`], padded on the right: as in TRL's `DataCollatorForPreference`, the first half
    contains the chosen responses and the second the rejected ones, and there is a `margin` if the examples have one;
    and `states` of [`FrozenLayers`], of `states_dtype`, if that is given.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    states_dtype: torch.dtype | None = None

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes a batch; see [`~endotrl.sentence.encoding.pad_batch`]."""

        def column(name: str) -> list[Any]:
            return [example[f"{which}_{name}"] for which in ("chosen", "rejected") for example in examples]

        rows = list(zip(column("ids"), column("ends"), strict=True))
        batch = pad_batch(rows, self.pad_token_id, self.pad_to_multiple_of or 1)
        if self.states_dtype is not None:
            states = [
                torch.frombuffer(bytearray(stored), dtype=self.states_dtype).view(len(ids), -1)
                for stored, ids in zip(column("states"), column("ids"), strict=True)
            ]
            batch["states"] = pad_states(states, batch["input_ids"].shape[1])
        if "margin" in examples[0]:
            batch["margin"] = torch.tensor([example["margin"] for example in examples], dtype=torch.float)
        return batch


def _split_text(example: dict[str, Any]) -> dict[str, Any]:
    """Prompt and responses as text. An implicit prompt is the common prefix, up to a whole word."""
    if "prompt" in example:
        return example
    chosen, rejected = example["chosen"], example["rejected"]
    shared = os.path.commonprefix([chosen, rejected])
    # A partly shared word goes to the responses, with the space before it, as in tokenizers.
    prompt = re.sub(r" ?\S*$", "", shared)
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}
