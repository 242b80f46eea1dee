# SPDX-License-Identifier: Apache-2.0
"""Reward functions of a recipe, created and validated before any model is loaded."""

import importlib
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from accelerate.logging import get_logger
from trl import GRPOConfig, ModelConfig

from ..rewards import AccuracyReward, EndogenousReward, FormatReward, LengthReward, RandomReward, SentenceReward
from ..trainers.setting_checks import check_token_rewards
from .arguments import RecipeArguments, RewardArguments
from .data import Data, column_names


logger = get_logger(__name__)

ANSWER_COLUMNS = ("solution", "answer", "answers")


def make_reward_funcs(
    script_args: RecipeArguments,
    training_args: GRPOConfig,
    reward_args: RewardArguments,
    model_args: ModelConfig,
    dataset: Data,
) -> list[Callable[..., Any]]:
    """The rewards named by `reward` and, last, the accuracy, with weight 0. No model weights are loaded yet."""
    weights = training_args.reward_weights or [1.0] * len(reward_args.reward)
    if len(weights) != len(reward_args.reward):
        raise ValueError(
            f"`reward_weights` must have one weight for each of the {len(reward_args.reward)} rewards "
            f"({', '.join(reward_args.reward)}), got {len(weights)}. (The logged accuracy gets its weight of 0 "
            "automatically.)"
        )
    monitors = _make_accuracy(script_args, dataset)
    skips = reward_args.reward_truncation == "skip" and "endogenous" in reward_args.reward
    is_summed = training_args.multi_objective_aggregation != "normalize_then_sum"
    if skips and is_summed and len(weights) + len(monitors) > 1:
        raise ValueError(
            '`reward_truncation="skip"` gives truncated completions no reward, but next to another reward function '
            "(including the accuracy), TRL counts a missing reward as 0, which is a high one. Set "
            '`reward_truncation="terminal"`, or set `accuracy: none` and use no other reward, or (except with PPO) '
            'set `multi_objective_aggregation="normalize_then_sum"`.'
        )
    rewards = [_make(name, training_args, reward_args, model_args) for name in reward_args.reward]
    if getattr(training_args, "credit", "token") != "outcome":
        check_token_rewards(rewards)
    training_args.reward_weights = [*weights, *(0.0 for _ in monitors)]
    return [*rewards, *monitors]


def _make(
    name: str, training_args: GRPOConfig, reward_args: RewardArguments, model_args: ModelConfig
) -> Callable[..., Any]:
    loading = {name: vars(training_args)[name] for name in ("trust_remote_code", "chat_template_kwargs")}
    settings = reward_args.endogenous_settings
    if name == "endogenous":
        return EndogenousReward(reward_args.reward_model or model_args.model_name_or_path, **settings, **loading)
    if name == "sentence":
        settings = {name: settings[name] for name in ("max_tokens_per_batch", "dtype", "overlong_prompt")}
        return SentenceReward(reward_args.reward_sentence_model, **settings, **loading)
    if name == "random":
        return RandomReward(training_args.seed + training_args.process_index)
    if name == "length":
        return LengthReward()
    if name == "format":
        return FormatReward(reward_args.reward_pattern)
    if os.getcwd() not in sys.path:  # like TRL's own scripts
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"Cannot import the reward function {name!r}: {error}.") from error
    if isinstance(function, type) or not callable(function):
        raise ValueError(f"The reward {name!r} must be a function or a callable instance, got {function!r}.")
    return function


def _make_accuracy(script_args: RecipeArguments, dataset: Data) -> list[AccuracyReward]:
    """The accuracy reward by settings and columns, or none."""
    columns = column_names(dataset)
    column = script_args.answer_column or next((name for name in ANSWER_COLUMNS if name in columns), None)
    if script_args.accuracy == "none" or (script_args.accuracy == "auto" and column is None):
        return []
    if column not in columns:
        raise ValueError(
            f"The dataset has no answer column {column or ' or '.join(ANSWER_COLUMNS)}, only {', '.join(columns)}. "
            "Set `answer_column` to one of them, or set `accuracy: none`."
        )
    guessed = script_args.accuracy == "auto"
    math = column in ("solution", "answer") if guessed else script_args.accuracy == "math"
    if guessed and math and find_spec("math_verify") is None:
        logger.warning(
            "math-verify is not installed, so the logged accuracy compares answers that are not numbers as text. "
            "Run `pip install 'endotrl[eval]'`, or set `accuracy: match` to silence this warning."
        )
        math = False
    return [AccuracyReward(column, math)]
