# SPDX-License-Identifier: Apache-2.0
"""What the scripts in `recipes/` are made of, for scripts of your own."""

from .arguments import RecipeArguments, RewardArguments, make_parser
from .data import load_preferences, load_prompts
from .pipeline import Job, prepare, resolve_model, run, share_frozen_weights, train
from .reward_functions import make_reward_funcs
from .script import launch
from .sentence_reward import launch_sentence_reward, make_sentence_reward_parser


__all__ = [
    "Job",
    "RecipeArguments",
    "RewardArguments",
    "launch",
    "launch_sentence_reward",
    "load_preferences",
    "load_prompts",
    "make_parser",
    "make_reward_funcs",
    "make_sentence_reward_parser",
    "prepare",
    "resolve_model",
    "run",
    "share_frozen_weights",
    "train",
]
