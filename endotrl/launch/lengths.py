# SPDX-License-Identifier: Apache-2.0
"""Prompts that with a completion do not fit the policy's or a frozen model's context, found before the run."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from datasets import IterableDataset
from tqdm.auto import tqdm
from trl import GRPOConfig, ModelConfig

from ..frozen.names import context_length, load_config, load_tokenizer
from ..rendering.messages import Template, add_criterion, criteria_of_rows
from ..reporting import say
from ..rewards import EndogenousReward
from .arguments import RecipeArguments
from .data import Data


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
    for name, context, length in _readers(training_args, model_args, reward_funcs):
        room = context - training_args.max_completion_length
        if isinstance(dataset, IterableDataset):
            if drop:
                dataset = dataset.filter(lambda row, length=length, room=room: length(row) <= room)
            continue
        lengths: list[int] = []
        # Closed before an error is said.
        with tqdm(dataset, desc=f"Lengths for {name}", unit=" prompts", delay=2, leave=False) as rows:
            for row in rows:
                try:
                    lengths.append(length(row))
                except ValueError as error:
                    raise ValueError(f"Row {len(lengths)} of the dataset cannot be used: {error}") from error
        overlong = [i for i, tokens in enumerate(lengths) if tokens > room]
        if not overlong:
            continue
        what = (
            f"{len(overlong)} of {len(lengths)} prompts do not fit the context of {name}, {context} "
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
) -> Iterator[tuple[str, float, Callable[[dict[str, Any]], int]]]:
    """Who reads prompts and completions, how many tokens fit, and the tokens of a row's prompt."""
    policy = str(model_args.model_name_or_path)
    config = load_config(policy, training_args.trust_remote_code, model_args.model_revision, "The model")

    def template(name: str) -> Template:
        return Template(load_tokenizer(name, training_args.trust_remote_code), training_args.chat_template_kwargs)

    contexts = [context_length(config), training_args.vllm_max_model_length if training_args.use_vllm else None]
    shortest = min((limit for limit in contexts if limit is not None), default=float("inf"))
    yield "the policy", shortest, partial(_prompt_length, template(policy), None, True)
    for reward in reward_funcs:
        if isinstance(reward, EndogenousReward) and reward.overlong_prompt == "error":
            frozen, context = reward.config._name_or_path, context_length(reward.config)
            # Else the policy has said it.
            if context is not None and (frozen != policy or reward.criterion is not None):
                length = partial(_prompt_length, template(frozen), reward.criterion, False)
                yield f"the frozen model {frozen}", context, length


def _prompt_length(template: Template, all_criteria: Any, is_policy: bool, row: dict[str, Any]) -> int:
    (criterion,) = criteria_of_rows(all_criteria, [row.get("domain")], 1)  # type: ignore[list-item]
    prompt = add_criterion(row["prompt"], criterion)
    if isinstance(prompt, str):
        return len(template.encode(prompt, special=True))
    text = template.apply(prompt, add_generation_prompt=True, has_criterion=criterion is not None)
    # TRL gives it to the policy's template as it is (but a processor's gets parts for text).
    in_parts = any(isinstance(message.get("content"), list) for message in prompt)
    if is_policy and in_parts and not template.reads_as_given(prompt):
        raise ValueError(
            "The content of a message is a list of parts, which the chat template of the policy cannot read. Write it "
            "as one text."
        )
    return len(template.encode(text, special=False))
