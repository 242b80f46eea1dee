# SPDX-License-Identifier: Apache-2.0
"""What the scripts in `recipes/` are made of, for scripts of your own."""

from .arguments import RecipeArguments, RewardArguments, make_parser
from .launch import launch
from .prompts import load_prompts
from .rewards import make_reward_funcs
from .training import Job, prepare, resolve_model, run, share_frozen_weights, train


__all__ = [
    "Job",
    "RecipeArguments",
    "RewardArguments",
    "launch",
    "load_prompts",
    "make_parser",
    "make_reward_funcs",
    "prepare",
    "resolve_model",
    "run",
    "share_frozen_weights",
    "train",
]
