# SPDX-License-Identifier: Apache-2.0
"""Prompts that with a completion do not fit the policy's or a frozen model's context, found before the run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset
from tqdm.auto import tqdm
from transformers import AutoConfig, PretrainedConfig
from trl import GRPOConfig, ModelConfig

from ..frozen.names import load_tokenizer
from ..rendering.messages import Template, add_criterion, criteria_of_rows
from ..reporting import say
from ..rewards import EndogenousReward
from .arguments import RecipeArguments
from .data import Data


@dataclass
class _Reader:
    """Who reads prompts and completions, and how many tokens fit."""

    name: str
    context: float
    template: Template
    is_policy: bool = False
    criterion: Any = None

    def length(self, row: dict[str, Any]) -> int:
        """Tokens of a row's prompt."""
        (criterion,) = criteria_of_rows(self.criterion, [row.get("domain")], 1)  # type: ignore[list-item]
        prompt = add_criterion(row["prompt"], criterion)
        if isinstance(prompt, str):
            return len(self.template.encode(prompt, special=True))
        text = self.template.apply(prompt, add_generation_prompt=True, has_criterion=criterion is not None)
        # TRL gives it to the policy's template as it is (but a processor's gets parts for text).
        in_parts = any(isinstance(message.get("content"), list) for message in prompt)
        if self.is_policy and in_parts and not self.template.reads_as_given(prompt):
            raise ValueError(
                "The content of a message is a list of parts, which the chat template of the policy cannot read. "
                "Write it as one text."
            )
        return len(self.template.encode(text, special=False))


def fit_lengths(
    dataset: Data,
    script_args: RecipeArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    reward_funcs: Sequence[Callable[..., Any]],
) -> Data:
    """
    Raises `ValueError` for prompts which with the longest completion do not fit the context of the policy, or of an
    endogenous reward's frozen model; with `dataset_overlong="drop"`, returns the dataset without them. Of a stream,
    nothing is looked at unless such rows are to be left out.
    """
    drop = script_args.dataset_overlong == "drop"
    for reader in _readers(training_args, model_args, reward_funcs):
        room = reader.context - training_args.max_completion_length
        if isinstance(dataset, IterableDataset):
            if drop:
                dataset = dataset.filter(lambda row, reader=reader, room=room: reader.length(row) <= room)
            continue
        lengths: list[int] = []
        # Closed before an error is said.
        with tqdm(dataset, desc=f"Lengths for {reader.name}", unit=" prompts", delay=2, leave=False) as rows:
            for row in rows:
                try:
                    lengths.append(reader.length(row))
                except ValueError as error:
                    raise ValueError(f"Row {len(lengths)} of the dataset cannot be used: {error}") from error
        overlong = [i for i, tokens in enumerate(lengths) if tokens > room]
        if not overlong:
            continue
        what = (
            f"{len(overlong)} of {len(lengths)} prompts do not fit the context of {reader.name}, {reader.context} "
            f"tokens, with `max_completion_length` {training_args.max_completion_length}; row {overlong[0]} is the "
            f"first, with {lengths[overlong[0]]} tokens"
        )
        if not drop or len(overlong) == len(lengths):
            fix = "Lower `max_completion_length`, or leave such rows out with `dataset_overlong: drop`."
            raise ValueError(f"{what}. {fix if not drop else 'None is left.'}")
        if training_args.process_index == 0:
            say(f"{what}. They are left out.")
        dataset = dataset.select(sorted(set(range(len(lengths))) - set(overlong)))
    return dataset


def _readers(
    training_args: GRPOConfig, model_args: ModelConfig, reward_funcs: Sequence[Callable[..., Any]]
) -> list[_Reader]:
    name = str(model_args.model_name_or_path)
    config = AutoConfig.from_pretrained(
        name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
    )

    def template(name: str) -> Template:
        return Template(load_tokenizer(name, training_args.trust_remote_code), training_args.chat_template_kwargs)

    contexts = [_context(config), training_args.vllm_max_model_length if training_args.use_vllm else None]
    limits = [limit for limit in contexts if limit is not None]
    readers = [_Reader("the policy", min(limits, default=float("inf")), template(name), is_policy=True)]
    for reward in reward_funcs:
        if isinstance(reward, EndogenousReward) and reward.overlong_prompt == "error":
            frozen = reward.config._name_or_path
            context = _context(reward.config)
            # The policy has said it.
            if context is not None and (frozen != name or reward.criterion is not None):
                what = f"the frozen model {frozen}"
                readers.append(_Reader(what, context, template(frozen), criterion=reward.criterion))
    return readers


def _context(config: PretrainedConfig) -> int | None:
    # Not every family has a limit (state-space models have none).
    return getattr(config.get_text_config(), "max_position_embeddings", None)
