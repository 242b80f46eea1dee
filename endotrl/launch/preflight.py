# SPDX-License-Identifier: Apache-2.0
"""Checks of a recipe's settings before weights are loaded: packages, optimizer, scheduler, generation, model."""

from importlib.util import find_spec
from typing import Any

import torch
import transformers
from huggingface_hub import get_token
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, PretrainedConfig, Trainer
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from transformers.optimization import get_scheduler
from trl import GRPOConfig, ModelConfig, RewardConfig, get_peft_config, get_quantization_config

from ..frozen.names import load_config
from ..frozen.sharded_weights import loaded_whole
from ..learning_rates import has_one_learning_rate


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
