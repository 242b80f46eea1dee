# SPDX-License-Identifier: Apache-2.0
"""Options of `endotrl forecast`. Imports nothing heavy, so that `endotrl --help` answers at once."""

from typing import Any

from .common import COUNT, add_command, add_reward_settings, positive_number
from .evaluate_options import add_generation, add_model, add_output, add_questions


# Settings that the reward of a completion depends on.
REWARD = ("alpha", "gamma", "token_reward", "aggregate", "discount", "truncation", "criterion", "correction")


def add_forecast(commands: Any) -> None:
    """Adds `forecast` to the parser of the command line."""
    parser = add_command(
        commands,
        "forecast",
        "forecast:run",
        help="say what RL on the endogenous reward will do to a model, before it is run",
        description="Estimates, from samples of the frozen model, what RL on its endogenous reward ends with at each "
        "KL penalty beta: accuracy, length, agreement, KL; next to what costs no training. Without answers in the "
        "data, all but accuracy. The same command goes on where an earlier run was cut off; other betas or another "
        "trainer need no new samples.",
    )
    add = parser.add_argument
    add_model(parser)
    add_questions(
        parser,
        "questions, with or without answers: file (.json, .jsonl, both also .gz, .parquet), folder, or "
        "OWNER/NAME[:SPLIT] on the hub",
    )
    add_generation(parser, 256, "")
    numbers: dict[str, Any] = {"type": positive_number, "nargs": "+"}
    add("--samples", **COUNT, default=16, help="samples of each question")
    add(
        "--temperatures",
        metavar="T",
        **numbers,
        default=[1.0, 0.7, 0.5],
        help="temperatures of the samples; half of the samples are at 1",
    )
    add("--seed", type=int, default=0, help="seed of the sampling")
    add(
        "--grader",
        metavar="NAME",
        default="math",
        help="what says whether an answer is right: math, text (without math-verify), exact (the completion is the "
        "answer), or FILE.py:FUNCTION of a completion and an answer",
    )
    add("--betas", metavar="BETA", **numbers, default=[2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01], help="KL penalties")
    add("--trainer", choices=("rloo", "grpo", "dense_grpo", "ppo"), default="grpo", help="what would train")
    add("--num-generations", **COUNT | {"metavar": "G"}, default=8, help="completions of a group in training")
    add(
        "--scale-rewards",
        choices=("group", "batch", "none"),
        default="none",
        help="as in TRL's GRPOConfig, whose default is group: rewards are divided by their spread, and beta means "
        "another thing",
    )
    add("--suggest-beta", action="store_true", help="write only the beta to use to standard output")
    add(
        "--power-sampling",
        **COUNT | {"metavar": "STEPS"},
        help="also sample from the power distribution of the smallest beta without training, by so many "
        "Metropolis-Hastings steps",
    )
    add_output(parser, "forecast", "forecast.json and report.html")
    settings = parser.add_argument_group("reward", "As the parameters of `endotrl.EndogenousReward`.")
    add_reward_settings(settings, *REWARD)
