# SPDX-License-Identifier: Apache-2.0
"""Options of `endotrl eval` and `endotrl forecast`. Imports nothing heavy, so that `--help` is instant."""

import argparse
from typing import Any, get_args

from ..forecasting import BETAS, TEMPERATURES, ScaleRewards, Trainer
from .common import (
    COUNT,
    DATA_HELP,
    Parser,
    add_command,
    add_model,
    add_reward_settings,
    json_object,
    positive_number,
    share,
    temperature,
)


BENCHMARK_HELP = {
    "rm-bench": "substance against style: 3 right and 3 wrong answers in three styles (RM-Bench)",
    "reward-bench": "chosen against rejected in four sections (RewardBench)",
    "reward-bench-2": "the best of four, and Ties (RewardBench 2)",
    "process-bench": "the first wrong step of a solution (ProcessBench)",
    "prm-bench": "right and wrong steps of a solution (PRMBench)",
    "dsp": "answers for four domains, under a criterion for each (DSP)",
    "judge-bench": "hard pairs of right and wrong answers (JudgeBench)",
    "llmbar": "outputs that follow an instruction or only look good (LLMBar)",
    "preference": "any preference dataset of TRL's formats",
}
NEEDS_DATA = ("dsp", "preference")
BEST_OF_N_SCORERS = ("bellman.sum", "log_prob.mean", "bellman.discounted=0.95", "centered.sum", "self_certainty")
YES_NO: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
# Settings that determine the reward of a completion.
REWARD = ("alpha", "gamma", "token_reward", "aggregate", "discount", "truncation", "criterion", "correction")


def add_eval(commands: Any) -> None:
    """Adds `eval` with its sub-commands to the command-line parser."""
    parser = commands.add_parser(
        "eval",
        help="measure how good a reward is, or what training on it did",
        description="Measures rewards on benchmarks, and answers of models to questions, before and after training.",
    )
    kinds = parser.add_subparsers(dest="benchmark", metavar="WHAT", required=True)
    for name in BENCHMARK_HELP:
        _add_benchmark(kinds, name)
    parser = add_command(
        kinds,
        "compare",
        "evaluate_compare:run",
        help="paired differences of runs (models), with intervals",
        description="Compares runs of one benchmark, such as those of several models, on the items that all have: B, "
        "C, ... minus the first, A, with paired bootstrap intervals (95%).",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders or results.json of two runs or more")
    parser.add_argument("--markdown", metavar="F", help="file to write the table to, in Markdown")
    parser = add_command(
        kinds,
        "generation",
        "evaluate_answers:run_generation",
        help="accuracy of a model's answers: greedy, sampled, pass@k",
        description="Has a model answer maths questions and grades the answers (with math-verify): greedy, pass@1 and "
        "pass@k (unbiased estimator). `endotrl eval compare` compares before and after training.",
    )
    _add_answers(parser, "eval-generation")
    parser.add_argument("--k", **COUNT | {"metavar": "K"}, nargs="+", default=[1], help="values of k in pass@k")
    parser = add_command(
        kinds,
        "best-of-n",
        "evaluate_answers:run_best_of_n",
        help="choose among N answers by the reward, and by majority, at random, by mean log-prob",
        description="Samples N answers to each maths question and chooses one: by each scorer, by majority vote, at "
        "random; next to the mean of all and the best possible.",
    )
    _add_answers(parser, "eval-best-of-n")
    default = " ".join(BEST_OF_N_SCORERS)
    parser.add_argument("--scorers", metavar="NAME", nargs="+", help=f"scorers that choose (default: {default})")
    parser.add_argument("--reward-model", metavar="M", help="model whose reward chooses (default: that which answers)")


def add_forecast(commands: Any) -> None:
    """Adds `forecast` to the command-line parser."""
    parser = add_command(
        commands,
        "forecast",
        "forecast:run",
        help="forecast what RL on the endogenous reward will do to a model",
        description="Estimates, from samples of the frozen model, what RL on its endogenous reward ends with at each "
        "KL penalty beta: accuracy, length, agreement, KL; next to what costs no training. Without answers in the "
        "data, all but accuracy. The same command goes on where an earlier run was cut off; other betas or another "
        "trainer need no new samples.",
    )
    add = parser.add_argument
    _add_model(parser)
    _add_questions(parser, f"questions, with or without answers: {DATA_HELP}")
    _add_generation(parser, 256, "")
    several: dict[str, Any] = {"type": positive_number, "nargs": "+"}
    add("--samples", **COUNT, default=16, help="samples per question")
    temperatures = "temperatures of the samples; half of the samples are at 1"
    add("--temperatures", metavar="T", nargs="+", type=temperature, default=[*TEMPERATURES], help=temperatures)
    add("--seed", type=int, default=0, help="seed of the sampling")
    add(
        "--grader",
        metavar="NAME",
        default="math",
        help="how answers are graded: math, text (without math-verify), exact (the completion is the answer), or "
        "FILE.py:FUNCTION of a completion and an answer",
    )
    add("--betas", metavar="BETA", **several, default=[*BETAS], help="KL penalties")
    add("--trainer", choices=get_args(Trainer), default="grpo", help="trainer to forecast")
    add("--num-generations", **COUNT | {"metavar": "G"}, default=8, help="completions per group in training")
    add(
        "--scale-rewards",
        choices=get_args(ScaleRewards),
        default="none",
        help="as in TRL's GRPOConfig, whose default is group: rewards are divided by their spread, which changes what "
        "beta means",
    )
    add("--suggest-beta", action="store_true", help="write only the beta to use to standard output")
    add(
        "--power-sampling",
        **COUNT | {"metavar": "STEPS"},
        help="also sample from the power distribution of the smallest beta without training, by this many "
        "Metropolis-Hastings steps",
    )
    _add_output(parser, "forecast", "forecast.json and report.html")
    settings = parser.add_argument_group("reward", "As the parameters of `endotrl.EndogenousReward`.")
    add_reward_settings(settings, *REWARD)


def _add_benchmark(kinds: Any, name: str) -> None:
    parser = add_command(
        kinds,
        name,
        "evaluate:run",
        help=BENCHMARK_HELP[name],
        description=f"Evaluates rewards on {name}: {BENCHMARK_HELP[name]}. All forms of the reward come from one "
        "forward pass. The same command goes on where an earlier run was cut off; with more --scorers or a larger "
        "--limit, only what is missing is scored.",
    )
    add, needed = parser.add_argument, name in NEEDS_DATA
    _add_model(parser)
    default = "" if needed else " (default: the benchmark's dataset on the Hugging Face hub)"
    add("--data", metavar="PATH", required=needed, help=DATA_HELP + default)
    add("--limit", **COUNT, help="only the first N items of each group (domain, subset)")
    add(
        "--scorers",
        metavar="NAME",
        nargs="+",
        help="what to compare; differences are to the first: forms TOKEN.AGGREGATE such as bellman.sum, "
        "log_prob.discounted=0.95, centered.mean; residual:FORM, style_residual:FORM; self_certainty, "
        "negative_entropy, mean_log_prob, relative_perplexity; judge_pairwise, judge_pointwise, judge_verifier; "
        "reward_model:PATH; length, random; or sets: single-pass, two-pass, judges, controls (default: single-pass "
        "controls)",
    )
    _add_output(parser, f"eval-{name}")
    add_reward_settings(parser, "alpha")
    chat = "no, it is continued, as in TRL" if name == "preference" else "yes, if the model has a chat template"
    add("--chat", **YES_NO, help=f"whether a prompt given as text is the message of a user (default: {chat})")
    add("--max-response-tokens", **COUNT, help="cut responses at N tokens")


def _add_answers(parser: Parser, output: str) -> None:
    add = parser.add_argument
    _add_model(parser)
    _add_questions(parser, f"questions and answers: {DATA_HELP}")
    add("--samples", **COUNT, default=4, help="sampled answers per question and seed")
    add("--seeds", metavar="SEED", type=int, nargs="+", default=[0], help="seeds of the sampling")
    add("--temperature", type=temperature, default=1.0, help="temperature of the sampling")
    add("--top-p", type=share, default=1.0, help="nucleus sampling: probability mass that is kept")
    _add_generation(parser, 512, "Please reason step by step, and put your final answer within \\boxed{}.")
    _add_output(parser, output)


def _add_model(parser: Parser) -> None:
    add_model(parser, "model")
    add_reward_settings(parser, "dtype", "device", "trust_remote_code", "max_tokens_per_batch", "model_init_kwargs")


def _add_output(parser: Parser, default: str, files: str = "") -> None:
    add = parser.add_argument
    if not files:
        files = "results.json, results.md, report.html and examples.html"
        add("--wandb", metavar="PROJECT", help="W&B project to which figures, table and pages go as a run, too")
    add("--output", metavar="DIR", default=default, help=f"folder for {files}")
    add("--overwrite", action="store_true", help="start anew if the folder holds a run")
    add("--quiet", action="store_true", help="show neither progress nor table; errors only")


def _add_questions(parser: Parser, data: str) -> None:
    add, first = parser.add_argument, "key of the {} (default: the first of {})".format
    add("--data", metavar="FILE", required=True, help=data)
    add("--question", metavar="KEY", help=first("question", "question, problem, input, prompt"))
    add("--answer", metavar="KEY", help=first("answer", "answer, target, solution, final_answer"))
    add("--limit", **COUNT, help="only the first N questions")


def _add_generation(parser: Parser, max_new_tokens: int, instruction: str) -> None:
    add = parser.add_argument
    add("--max-new-tokens", **COUNT, default=max_new_tokens, help="longest answer, in tokens")
    add("--instruction", metavar="TEXT", default=instruction, help="what is added to each question; empty for nothing")
    add("--chat", **YES_NO, help="whether to ask in the chat template (default: yes, if the model has one)")
    add("--backend", choices=("transformers", "vllm"), default="transformers", help="engine that generates")
    more = "further arguments of vLLM's `LLM`, such as " + '{"gpu_memory_utilization": 0.5, "max_model_len": 4096}'
    add("--vllm-kwargs", metavar="JSON", type=json_object, help=more)
