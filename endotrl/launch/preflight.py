# SPDX-License-Identifier: Apache-2.0
"""Preflight checks before weights are loaded: packages, optimizer, model, prompt lengths."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import transformers
from datasets import IterableDataset
from huggingface_hub import get_token
from tqdm.auto import tqdm
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PretrainedConfig, Trainer
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.optimization import get_scheduler
from trl import GRPOConfig, ModelConfig, RewardConfig, get_peft_config, get_quantization_config

from ..frozen.names import context_length, load_config, load_tokenizer
from ..frozen.sharded_weights import loaded_whole
from ..learning_rates import has_one_learning_rate
from ..rendering.messages import Template, add_criterion, criteria_of_rows
from ..reporting import say
from ..rewards import EndogenousReward
from .arguments import RecipeArguments
from .data import Data


# Requirements of settings: module, and what to install. (TRL itself checks for peft early enough.)
PACKAGES = {
    "use_vllm": ("vllm", "'endotrl[vllm]'"),
    "use_liger_kernel": ("liger_kernel", "liger-kernel"),
    "load_in_4bit": ("bitsandbytes", "bitsandbytes"),
    "load_in_8bit": ("bitsandbytes", "bitsandbytes"),
}
# transformers has no availability check for these.
UNKNOWN_TRACKERS = ("azure_ml", "flyte")


def check_settings(training_args: GRPOConfig | RewardConfig, model_args: ModelConfig) -> None:
    """Raises `ValueError`, `OSError` or `ImportError` for a missing package, optimizer or model."""
    settings = vars(training_args) | vars(model_args)
    needed = {f"{name}: true": package for name, package in PACKAGES.items() if settings.get(name)}
    if settings.get("segmenter", "rules") != "rules":
        needed[f"segmenter: {settings['segmenter']}"] = ("wtpsplit", "'endotrl[sat]'")
    for setting, (module, package) in needed.items():
        if find_spec(module) is None:
            raise ImportError(f"`{setting}` requires {module}, which is not installed. Run `pip install {package}`.")
    get_reporting_integration_callbacks(training_args.report_to)  # raises for unknown names
    available = (*get_available_reporting_integrations(), *UNKNOWN_TRACKERS)
    if missing := [name for name in training_args.report_to if name not in available]:
        raise ImportError(
            f"`report_to: {missing[0]}` requires a package that is not installed. Run `pip install {missing[0]}`, or "
            "set `report_to: none`."
        )
    # transformers accepts any name, and vLLM has its own.
    generation = {} if settings.get("use_vllm") else settings.get("generation_kwargs") or {}
    if unknown := sorted(generation.keys() - vars(GenerationConfig()).keys()):
        reason = "transformers' `GenerationConfig` has no such setting"
        raise ValueError(f"`generation_kwargs` has an unknown key {unknown[0]!r}: {reason}. Correct or remove it.")
    if training_args.push_to_hub and training_args.hub_token is None and get_token() is None:
        raise ValueError("`push_to_hub: true` requires a login. Run `hf auth login`, or set `hub_token`.")
    probe = [torch.nn.Parameter(torch.zeros(2, 2))]
    if not has_one_learning_rate(training_args):  # otherwise DeepSpeed has its own optimizer
        try:
            optimizer_class, arguments = Trainer.get_optimizer_cls_and_kwargs(training_args)
            optimizer_class(probe, **arguments)
        except (ImportError, ValueError, TypeError) as error:
            if "need to pass a" not in str(error):  # optimizers that need the model are created with it
                optim = getattr(training_args.optim, "value", training_args.optim)
                raise ValueError(f"Cannot create the optimizer of `optim: {optim}`: {error}") from error
    kind, kwargs = training_args.lr_scheduler_type, training_args.lr_scheduler_kwargs
    try:
        get_scheduler(kind, torch.optim.SGD(probe, training_args.learning_rate), 0, 100, kwargs)
    except (ValueError, TypeError) as error:
        raise ValueError(f"Cannot create the scheduler `{kind.value}` with {kwargs}: {error}") from error
    config = _check_model(training_args, model_args)
    if generation:
        _check_generation(generation, config.get_text_config().vocab_size)


def _check_generation(kwargs: dict[str, Any], vocab_size: int) -> None:
    """Raises `ValueError` for values that transformers refuses when it generates, with a tiny model."""
    settings = {"do_sample": True, "pad_token_id": 0, **kwargs, "max_new_tokens": 1}
    with torch.random.fork_rng([]):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, n_embd=2, n_layer=1, n_head=1))
        try:
            model.generate(torch.zeros(1, 1, dtype=torch.long), generation_config=GenerationConfig(**settings))
        except Exception as error:  # of many kinds, as each setting is checked in its own way
            raise ValueError(f"Cannot generate with `generation_kwargs` {kwargs}: {error}") from error


def _check_model(training_args: GRPOConfig | RewardConfig, model_args: ModelConfig) -> PretrainedConfig:
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("No model given. Set `model_name_or_path`.")
    config = load_config(name, training_args.trust_remote_code, model_args.model_revision, "The model")
    get_quantization_config(model_args)
    get_peft_config(model_args)
    attention = (training_args.model_init_kwargs or {}).get("attn_implementation", model_args.attn_implementation)
    # Resolved as in TRL; a class outside transformers is known only from its code.
    model_class = getattr(transformers, (config.architectures or [""])[0], None)
    if attention is not None and model_class is not None:
        with loaded_whole(), torch.device("meta"):
            try:
                model_class._from_config(config, attn_implementation=attention)
            except (ImportError, ValueError) as error:
                raise type(error)(f"`attn_implementation: {attention}` cannot be used: {error}") from error
    return config


def fit_lengths(
    dataset: Data,
    script_args: RecipeArguments,
    training_args: GRPOConfig,
    model_args: ModelConfig,
    reward_funcs: Sequence[Callable[..., Any]],
) -> Data:
    """
    Raises `ValueError` for prompts that, with the longest completion, do not fit into the context of the policy, or of
    an endogenous reward's frozen model; with `dataset_overlong="drop"`, returns the dataset without them. A stream is
    only checked if such rows are to be dropped.
    """
    drop = script_args.dataset_overlong == "drop"
    for name, context, length in _readers(training_args, model_args, reward_funcs):
        room = context - training_args.max_completion_length
        if isinstance(dataset, IterableDataset):
            if drop:
                dataset = dataset.filter(lambda row, length=length, room=room: length(row) <= room)
            continue
        lengths: list[int] = []
        try:
            for row in tqdm(dataset, desc=f"Prompt lengths for {name}", unit=" prompts", delay=2, leave=False):
                lengths.append(length(row))
        except ValueError as error:
            raise ValueError(f"Row {len(lengths)} of the dataset is invalid: {error}") from error
        overlong = [i for i, tokens in enumerate(lengths) if tokens > room]
        if not overlong:
            continue
        what = (
            f"{len(overlong)} of {len(lengths)} prompts are too long for the context of {name}, {context} tokens, "
            f"with `max_completion_length` {training_args.max_completion_length}. The first is row {overlong[0]}, "
            f"with {lengths[overlong[0]]} tokens."
        )
        if not drop:
            raise ValueError(f"{what} Lower `max_completion_length`, or set `dataset_overlong: drop` to drop them.")
        if len(overlong) == len(lengths):
            raise ValueError(f"{what} No prompt is left. Lower `max_completion_length`.")
        if training_args.process_index == 0:
            say(f"{what} They are dropped.")
        dataset = dataset.select([i for i, tokens in enumerate(lengths) if tokens <= room])
    return dataset


def _readers(
    training_args: GRPOConfig, model_args: ModelConfig, reward_funcs: Sequence[Callable[..., Any]]
) -> Iterator[tuple[str, float, Callable[[dict[str, Any]], int]]]:
    """Readers of prompts and completions: name, token limit, and a function for the prompt length of a row."""

    def template(name: str) -> Template:
        return Template(load_tokenizer(name, training_args.trust_remote_code), training_args.chat_template_kwargs)

    policy = str(model_args.model_name_or_path)
    config = load_config(policy, training_args.trust_remote_code, model_args.model_revision, "The model")
    contexts = [context_length(config), training_args.vllm_max_model_length if training_args.use_vllm else None]
    shortest = min((limit for limit in contexts if limit is not None), default=float("inf"))
    yield "the policy", shortest, partial(_prompt_length, template(policy), None, True)
    for reward in reward_funcs:
        if isinstance(reward, EndogenousReward) and reward.overlong_prompt == "error":
            frozen, context = reward.config._name_or_path, context_length(reward.config)
            # Otherwise the policy's check covers it.
            if context is not None and (frozen != policy or reward.criterion is not None):
                length = partial(_prompt_length, template(frozen), reward.criterion, False)
                yield f"the frozen model {frozen}", context, length


def _prompt_length(template: Template, all_criteria: Any, is_policy: bool, row: dict[str, Any]) -> int:
    (criterion,) = criteria_of_rows(all_criteria, [row.get("domain")], 1)  # type: ignore[list-item]
    prompt = add_criterion(row["prompt"], criterion)
    if isinstance(prompt, str):
        return len(template.encode(prompt, special=True))
    text = template.apply(prompt, add_generation_prompt=True, has_criterion=criterion is not None)
    # TRL passes it to the policy's template unchanged (but a processor gets parts for text).
    in_parts = any(isinstance(message.get("content"), list) for message in prompt)
    if is_policy and in_parts and not template.reads_as_given(prompt):
        raise ValueError(
            "The content of a message is a list of parts, which the policy's chat template cannot read. Make it a "
            "string."
        )
    return len(template.encode(text, special=False))
