# SPDX-License-Identifier: Apache-2.0
"""Training recipes, for custom scripts. `accelerate launch -m endotrl.launch.grpo` (`ppo`, ...) launches one."""

from .arguments import RecipeArguments, RewardArguments, RunArguments, make_parser
from .data import load_preferences, load_prompts
from .pipeline import Job, launch, prepare, prepare_reward_model, run
from .reward_functions import make_reward_funcs


__all__ = [
    "Job",
    "RecipeArguments",
    "RewardArguments",
    "RunArguments",
    "launch",
    "load_preferences",
    "load_prompts",
    "make_parser",
    "make_reward_funcs",
    "prepare",
    "prepare_reward_model",
    "run",
]
