# SPDX-License-Identifier: Apache-2.0
"""Types and ranges of settings. TRL and transformers take most values as they are, and fail where they are used."""

import types
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin


INF = float("inf")

# By range, in words and as a test. `null` is left to the type.
RANGES: dict[tuple[str, Callable[[float], bool]], tuple[str, ...]] = {
    ("at least 1", lambda n: n >= 1): (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("num_generations", "num_generations_eval", "generation_batch_size", "steps_per_generation"),
        *("num_iterations", "max_completion_length", "max_length", "ref_model_sync_steps", "lora_r"),
        *("eval_accumulation_steps", "torch_empty_cache_steps", "dataloader_prefetch_factor", "ddp_timeout"),
        *("vllm_max_model_length", "vllm_tensor_parallel_size", "dataset_num_proc", "max_sentences"),
        *("ddp_bucket_cap_mb", "pad_to_multiple_of", "max_new_tokens", "num_beams"),
    ),
    ("greater than 0", lambda n: n > 0): (
        *("learning_rate", "temperature", "repetition_penalty", "logging_steps", "eval_steps", "save_steps"),
        *("lora_alpha", "delta", "sapo_temperature_neg", "sapo_temperature_pos", "vllm_server_timeout"),
    ),
    ("at least 0", lambda n: n >= 0): (
        *("beta", "epsilon", "epsilon_high", "weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"),
        *("top_k", "eval_delay", "save_total_limit", "dataloader_num_workers", "neftune_noise_alpha"),
        *("max_tool_calling_iterations", "num_completions_to_print", "center_rewards_coefficient"),
        *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg", "router_aux_loss_coef"),
        *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
    ),
    ("greater than 0 and at most 1", lambda n: 0 < n <= 1): (
        "top_p",
        "top_entropy_quantile",
        "vllm_gpu_memory_utilization",
    ),
    ("greater than 0 and less than 1", lambda n: 0 < n < 1): ("test_split_size",),
    ("at least 0 and at most 1", lambda n: 0 <= n <= 1): ("min_p", "ref_model_mixup_alpha", "label_smoothing_factor"),
    ("at least 0 and less than 1", lambda n: 0 <= n < 1): ("adam_beta1", "adam_beta2", "lora_dropout"),
    ("at least 0 and less than 4294967296", lambda n: 0 <= n < 2**32): ("seed", "data_seed"),
    ("at least 1 and less than 65536", lambda n: 1 <= n < 65536): ("vllm_server_port", "vllm_group_port"),
}
# What TRL looks at when it gets there.
CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_mode": ("colocate", "server"),
    "vllm_model_impl": ("vllm", "transformers"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
# TRL's types say otherwise.
ALSO: dict[str, Any] = {"scale_rewards": bool}
NEVER_NULL = ("num_generations", "max_completion_length")


def check_value(name: str, value: Any, hint: Any, choices: Any = None) -> Any:
    """A setting as it is used: a number with a fraction where its type (`hint`) is that, for a whole one of YAML."""
    said = f"`{name}` is {'null' if value is None else repr(value)}"
    if not fits(value, hint) and not fits(value, ALSO.get(name, hint)):
        yaml = " (YAML reads no, off, yes and on as false and true: put quotes around them.)"
        raise ValueError(f"{said}, but it must be {in_words(hint)}.{yaml if value in (True, False) else ''}")
    if isinstance(value, str) and name.endswith("_kwargs") and not value.startswith("{"):
        raise ValueError(f"{said}, but it must be a mapping.")
    if value == "" and name == "output_dir":
        raise ValueError(f"{said}, but a run needs a folder of its own.")
    if value is None and name in NEVER_NULL:
        raise ValueError(f"{said}, but it must be a number.")
    choices = CHOICES.get(name, choices)
    is_free = choices is None or fits(value, bool | None)
    if not is_free and not {*_listed(value)} <= {*choices, *map(str, choices)}:
        raise ValueError(f"{said}, but it must be one of {', '.join(repr(str(choice)) for choice in choices)}.")
    numbers = [number for number in _listed(value) if fits(number, float)]
    # NaN is in no interval.
    if not all(-INF < number < INF for number in numbers):
        raise ValueError(f"{said}, but it must be finite.")
    for (words, test), names in RANGES.items():
        if name in names and not all(map(test, numbers)):
            raise ValueError(f"{said}, but it must be {words}.")
    if name == "max_steps" and value != -1 and value < 1:
        raise ValueError(f"{said}, but it must be at least 1, or -1 for `num_train_epochs`.")
    parts = get_args(hint) or (hint,)
    return float(value) if float in parts and int not in parts and fits(value, int) else value


def check_together(settings: Mapping[str, Any]) -> None:
    """Raises `ValueError` for settings that together train nothing, or fail once a model is loaded."""
    if settings.get("max_steps") == -1 and not settings.get("num_train_epochs", 1) > 0:
        raise ValueError(
            f"`num_train_epochs` is {settings['num_train_epochs']}, so that nothing would be trained. Make it greater "
            "than 0, or set `max_steps`."
        )
    if not any(settings.get("reward_weights") or [1.0]):
        raise ValueError(
            f"`reward_weights` is {settings['reward_weights']}, so that there is nothing to train on. Give a reward "
            "another weight than 0."
        )
    if settings.get("eval_on_start") and settings.get("eval_strategy", "no") == "no":
        raise ValueError("`eval_on_start: true` needs rows to evaluate on: set `eval_strategy: steps`.")
    if settings.get("remove_unused_columns") and "num_generations" in settings:
        raise ValueError("`remove_unused_columns: true` takes away the columns that rewards read. Leave it out.")


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a type, as far as YAML has such values; the parser reads text by the type."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is None or hint is type(None):
        return value is None
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    if hint in (bool, str):
        return isinstance(value, hint)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return isinstance(value, hint | str)
    if (origin or hint) is list:
        part = (*get_args(hint), Any)[0]
        # One text stands for a list of one.
        return isinstance(value, str) and part is str or isinstance(value, list) and all(fits(v, part) for v in value)
    if (origin or hint) is dict or is_dataclass(hint):
        return isinstance(value, dict)
    return value is not None


def in_words(hint: Any) -> str:
    """A type as people say it."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(part) for part in get_args(hint)))
    if origin is Literal:
        return " or ".join(map(repr, get_args(hint)))
    if (origin or hint) is list:
        return f"a list, each entry {in_words((*get_args(hint), Any)[0])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " or ".join(repr(one.value) for one in hint)
    simple = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return simple.get(hint, "a mapping" if (origin or hint) is dict else "something else")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
