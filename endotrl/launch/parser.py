# SPDX-License-Identifier: Apache-2.0
"""Strict parser for a recipe's command line and YAML file."""

import sys
from argparse import Action, ArgumentError, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any, NoReturn, get_args, get_type_hints

import yaml
from trl import TrlParser

from ..checks import check_choice, did_you_mean
from ..reporting import ignore_upstream_warnings
from ..shipped import local_path


ALL_SETTINGS = "Run the recipe's script with `--help` to list all settings."
# Values that TRL and transformers accept, but then train with silently, or fail on once a model is loaded: by range,
# in words and as a test. `null` is left to the type.
RANGES: dict[tuple[str, Callable[[float], bool]], tuple[str, ...]] = {
    ("at least 1", lambda n: n >= 1): (
        *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        *("num_generations", "num_generations_eval", "generation_batch_size", "steps_per_generation"),
        *("num_iterations", "max_completion_length", "max_length", "ref_model_sync_steps", "lora_r"),
    ),
    ("greater than 0", lambda n: n > 0): (
        *("learning_rate", "temperature", "repetition_penalty", "logging_steps", "eval_steps", "save_steps"),
        *("lora_alpha", "delta", "sapo_temperature_neg", "sapo_temperature_pos"),
    ),
    ("at least 0", lambda n: n >= 0): (
        *("beta", "epsilon", "epsilon_high", "weight_decay", "max_grad_norm", "warmup_steps", "top_k"),
        *("heat_map_steps", "center_rewards_coefficient", "router_aux_loss_coef", "neftune_noise_alpha"),
        *("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"),
        *("vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_cap"),
    ),
    ("greater than 0 and at most 1", lambda n: 0 < n <= 1): ("top_p", "top_entropy_quantile"),
    ("at least 0 and at most 1", lambda n: 0 <= n <= 1): ("min_p", "ref_model_mixup_alpha", "label_smoothing_factor"),
    ("at least 0 and less than 1", lambda n: 0 <= n < 1): ("lora_dropout",),
}
# Checked by TRL only in the first step.
CHOICES: dict[str, tuple[str, ...]] = {
    "loss_type": ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
NEVER_NULL = ("num_generations", "max_completion_length")


class RecipeParser(TrlParser):
    """
    TRL's parser for a command line and a YAML file (`--config`), of which the command line takes precedence; unknown
    settings, abbreviations, and values of another type or out of range are errors, each a `ValueError` of one line.
    `settle` is called with all settings, to modify them.
    """

    def __init__(self, dataclasses: Sequence[type]) -> None:
        super().__init__(dataclasses, allow_abbrev=False)
        self.settle: Callable[[Namespace], None] | None = None
        self._hints = {name: hint for one in dataclasses for name, hint in get_type_hints(one).items()}

    def parse_args_and_config(self, args: Iterable[str] | None = None, **kwargs: Any) -> tuple[Any, ...]:
        """Returns one instance per class of settings."""
        ignore_upstream_warnings()
        words = list(sys.argv[1:] if args is None else args)
        if words[-1:] == ["--config"]:
            raise ValueError("`--config` must be followed by the path of the recipe's YAML file.")
        if "--config" in words:
            file = words.index("--config") + 1
            words[file] = local_path(words[file])
        try:
            *parsed, unknown = super().parse_args_and_config(words, return_remaining_strings=True)
        except yaml.YAMLError as error:
            raise ValueError(f"The `--config` file is not valid YAML: {' '.join(str(error).split())}.") from error
        except (ValueError, OSError, ImportError):
            raise
        except Exception as error:  # if a class of settings computes with a value before it checks it
            raise ValueError(f"The settings cannot be combined: {type(error).__name__}: {error}.") from error
        if unknown:
            raise ValueError(self._unknown(unknown))
        return tuple(parsed)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Sets defaults from the file, each value parsed as on the command line."""
        actions = {action.dest: action for action in reversed(self._actions)}  # before `--no_...` of the same name
        read = {name: self._read(actions[name], value) for name, value in settings.items() if name in actions}
        return super().set_defaults_with_config(**{**settings, **read})

    def _read(self, action: Action, value: Any) -> Any:
        if value is None and (type(None) not in get_args(self._hints.get(action.dest)) or action.dest in NEVER_NULL):
            raise ValueError(f"`{action.dest}` must not be null. Set a value, or remove it to use the default.")
        if value is None or isinstance(value, dict) or (action.type is str and isinstance(value, bool)):
            return value
        if isinstance(value, list) or action.nargs == "+":
            if action.nargs != "+" and action.type is not str:
                raise ValueError(f"`{action.dest}` must be a single value, got {value!r}.")
            parts = value if isinstance(value, list) else [value]
            return [part if isinstance(part, dict) else self._read_one(action, part) for part in parts]
        return self._read_one(action, value)

    def _read_one(self, action: Action, value: Any) -> Any:
        try:
            read = self._get_value(action, str(value))
            self._check_value(action, read)
            return read
        except ArgumentError as error:
            hint = " (YAML reads unquoted no, off, yes and on as booleans: quote the value)"
            self.error(f"{error}{hint if isinstance(value, bool) else ''}")

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Validates values before anything computes with them."""
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        check_values(vars(namespace))
        if self.settle is not None:
            self.settle(namespace)
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        """Raises `ValueError`, rather than printing the usage and exiting the process."""
        raise ValueError(f"{message}. {ALL_SETTINGS}")

    def _unknown(self, words: Sequence[str]) -> str:
        hints: dict[str, str] = {}
        if any(dataclass.__name__ == "PPOConfig" for dataclass in self.dataclass_types):
            from ..trainers.ppo_config import FORMER_OPTIONS  # needs a newer TRL than other recipes

            hints = {name: f" (an option of TRL's own PPO: now {new})" for name, new in FORMER_OPTIONS.items()}
        known = [action.dest for action in self._actions]
        names = [word.removeprefix("--").split("=")[0] for word in words if word.startswith("--")]
        unknown = [name + hints.get(name, did_you_mean(name, known)) for name in names]
        return f"Unknown setting: {', '.join(unknown or words)}. {ALL_SETTINGS}"


def check_values(settings: Mapping[str, Any]) -> None:
    """Raises `ValueError` for settings that train nothing, or fail once a model is loaded."""
    for (words, test), names in RANGES.items():
        for name in names:
            value = settings.get(name)
            if isinstance(value, int | float) and not (isfinite(value) and test(value)):
                raise ValueError(f"`{name}` must be {words if isfinite(value) else 'finite'}, got {value}.")
    for name, choices in CHOICES.items():
        if isinstance(value := settings.get(name), str):  # TRL accepts true and false as well, for `scale_rewards`
            check_choice(name, value, choices)
    for name, value in settings.items():
        if name.endswith("_kwargs") and isinstance(value, str | list) and value[:1] != "{":
            raise ValueError(f"`{name}` must be a mapping, got {value!r}.")
    if settings["output_dir"] == "":
        raise ValueError("`output_dir` must not be empty.")
    max_steps, num_epochs = settings["max_steps"], settings["num_train_epochs"]
    if max_steps != -1 and max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, or -1 to use `num_train_epochs`, got {max_steps}.")
    if max_steps == -1 and not num_epochs > 0:
        raise ValueError(f"`num_train_epochs` must be greater than 0 unless `max_steps` is set, got {num_epochs}.")
    if not any(settings.get("reward_weights") or [1.0]):
        weights = settings["reward_weights"]
        raise ValueError(f"`reward_weights` must have a weight other than 0, got {weights}: nothing would be trained.")
    if settings["eval_on_start"] and settings["eval_strategy"] == "no":
        raise ValueError("`eval_on_start: true` requires an evaluation dataset. Set `eval_strategy: steps`.")
    if settings["remove_unused_columns"] and "num_generations" in settings:
        raise ValueError("`remove_unused_columns: true` drops the columns that reward functions read. Remove it.")
