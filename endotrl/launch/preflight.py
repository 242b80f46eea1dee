# SPDX-License-Identifier: Apache-2.0
"""Checks before any data or weights are loaded: packages, optimizer, generation, model."""

from importlib.util import find_spec
from typing import Any

import torch
import transformers
from huggingface_hub import get_token
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    Trainer,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
from trl import GRPOConfig, ModelConfig, RewardConfig, get_peft_config, get_quantization_config

from ..frozen.names import load_config
from ..frozen.sharded_weights import loaded_whole
from ..learning_rates import has_one_learning_rate
from ..sentence import SentenceRewardConfig, SentenceRewardTrainerConfig
from .ranges import check_value


# What a tracker or a setting needs: name of the module, and what to install.
PACKAGES = {
    "wandb": "pip install 'endotrl[wandb]'",
    "tensorboard": "pip install tensorboard",
    "trackio": "pip install trackio",
    "peft": "pip install 'endotrl[peft]'",
    "vllm": "pip install 'endotrl[vllm]'",
    "deepspeed": "pip install 'endotrl[deepspeed]'",
    "wtpsplit": "pip install 'endotrl[sat]'",
    "bitsandbytes": "pip install bitsandbytes",
    "liger-kernel": "pip install liger-kernel",
}
# transformers does not say whether these are there: the first is a part of another, and the second it does not know.
UNKNOWN_TRACKERS = ("azure_ml", "flyte")


def check_packages(training_args: TrainingArguments, model_args: ModelConfig) -> None:
    """Raises `ImportError` for a package that settings need, and `ValueError` for what no package has."""
    needed = {f"report_to: {name}": name for name in training_args.report_to if name in PACKAGES}
    if model_args.use_peft:
        needed["use_peft: true"] = "peft"
    if model_args.load_in_4bit or model_args.load_in_8bit:
        needed["quantization"] = "bitsandbytes"
    if isinstance(training_args, GRPOConfig) and training_args.use_vllm:
        needed["use_vllm: true"] = "vllm"
    if training_args.use_liger_kernel:
        needed["use_liger_kernel: true"] = "liger-kernel"
    if isinstance(training_args, SentenceRewardTrainerConfig) and training_args.segmenter != "rules":
        needed[f"segmenter: {training_args.segmenter}"] = "wtpsplit"
    for setting, package in needed.items():
        names = (package.replace("-", "_"), *(["tensorboardX"] if package == "tensorboard" else []))
        if not any(map(find_spec, names)):
            fallback = "set `report_to: none`" if setting.startswith("report_to") else "leave that setting out"
            raise ImportError(
                f"`{setting}` needs {package}, which is not installed: {PACKAGES[package]}, or {fallback}."
            )
    get_reporting_integration_callbacks(training_args.report_to)  # raises for names that it does not know
    for name in training_args.report_to:
        if name not in (*PACKAGES, *UNKNOWN_TRACKERS, *get_available_reporting_integrations()):
            raise ImportError(
                f"`report_to: {name}` needs a package that is not installed. Install it, or set `report_to: none`."
            )
    if training_args.push_to_hub and training_args.hub_token is None and get_token() is None:
        raise ValueError("`push_to_hub: true` needs an account: run `hf auth login`, or set `hub_token`.")


def check_optimizer(training_args: TrainingArguments) -> None:
    """Raises `ImportError` or `ValueError` if the optimizer, or its schedule, cannot be made as the settings say."""
    if has_one_learning_rate(training_args):  # DeepSpeed has an optimizer of its own
        return
    optim, schedule = training_args.optim, training_args.lr_scheduler_type
    what = f"optim: {getattr(optim, 'value', optim)}"
    try:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(training_args)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(2, 2))], **settings)
        what = f"lr_scheduler_type: {getattr(schedule, 'value', schedule)}"
        # Of one step of warm-up and two of training
        get_scheduler(schedule, optimizer, 1, 2, training_args.lr_scheduler_kwargs)
    except ImportError as error:
        raise ImportError(f"`{what}` needs a package that is not installed: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        if "need to pass a" not in str(error):  # those that look at the model, too, are made with it
            raise ValueError(f"`{what}` cannot be made with these settings: {error}") from error


def check_generation(training_args: GRPOConfig) -> None:
    """Raises `ValueError` for settings of generation that transformers refuses. vLLM has its own."""
    if training_args.use_vllm:
        return
    further: dict[str, Any] = training_args.generation_kwargs or {}
    if unknown := sorted(further.keys() - vars(GenerationConfig()).keys()):
        raise ValueError(f"`generation_kwargs` has {unknown[0]!r}, which is no setting of transformers' generation.")
    for name, value in further.items():  # these go before the trainer's
        check_value(name, value, Any)
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "cache_implementation")
    settings = {name: vars(training_args)[name] for name in names}
    settings |= {"max_new_tokens": training_args.max_completion_length, "do_sample": True}
    GenerationConfig(**{**settings, **further}).validate()


def check_model(model_args: ModelConfig, training_args: GRPOConfig | RewardConfig) -> None:
    """Raises `ValueError`, `OSError` or `ImportError` if the model cannot be made as the settings say; loads none."""
    name = model_args.model_name_or_path
    if name is None:
        raise ValueError("There is no model to train. Set `model_name_or_path`.")
    config = load_config(name, training_args.trust_remote_code, model_args.model_revision, "The model")
    get_quantization_config(model_args)
    peft_config = get_peft_config(model_args)
    attention = (training_args.model_init_kwargs or {}).get("attn_implementation", model_args.attn_implementation)
    if isinstance(config, SentenceRewardConfig):
        config = config.backbone_config
    model_class = _policy_class(name, config) if isinstance(training_args, GRPOConfig) else None
    adapted = peft_config is not None and isinstance(training_args, GRPOConfig)
    if attention is None and not adapted:
        return
    make = AutoModelForCausalLM.from_config if model_class is None else model_class._from_config
    with loaded_whole(), torch.device("meta"):
        try:
            model = make(config, attn_implementation=attention)
        except (ImportError, ValueError) as error:
            raise type(error)(f"`attn_implementation` is {attention!r}, which cannot be used: {error}") from error
        if adapted:
            from peft import get_peft_model

            try:
                get_peft_model(model, peft_config)
            except ValueError as error:
                raise ValueError(f"The adapter (`lora_...`) does not go with {name}: {error}") from error


def _policy_class(name: str, config: PretrainedConfig) -> Any:
    """What TRL loads the policy as: the class that its config names, if it is transformers' own."""
    if not config.architectures:
        raise ValueError(f"The `config.json` of {name} names no `architectures`, by which TRL knows what to load.")
    model_class = getattr(transformers, config.architectures[0], None)
    if model_class is not None and (config.is_encoder_decoder or not issubclass(model_class, GenerationMixin)):
        raise ValueError(
            f"{name} is a {model_class.__name__}, but a policy must be a model that generates text from left to right."
        )
    return model_class
