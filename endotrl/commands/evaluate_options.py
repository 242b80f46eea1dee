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
    fraction,
    json_object,
    positive_number,
    temperature,
)


BENCHMARK_HELP = {
    "rm-bench": "3 right and 3 wrong answers in three styles, substance against style (RM-Bench)",
    "reward-bench": "chosen and rejected responses in four sections (RewardBench)",
    "reward-bench-2": "the best of four responses, and ties (RewardBench 2)",
    "process-bench": "the first wrong step of a solution (ProcessBench)",
    "prm-bench": "right and wrong steps of a solution (PRMBench)",
    "dsp": "answers for four domains, with one criterion per domain (DSP)",
    "judge-bench": "hard pairs of right and wrong answers (JudgeBench)",
    "llmbar": "outputs that follow an instruction or only look good (LLMBar)",
    "preference": "any preference dataset in TRL's formats",
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
        help="measure how good a reward is, or how training changed a model",
        description="Evaluates rewards on benchmarks, and models on questions before and after training.",
    )
    kinds = parser.add_subparsers(dest="benchmark", metavar="WHAT", required=True)
    for name in BENCHMARK_HELP:
        _add_benchmark(kinds, name)
    parser = add_command(
        kinds,
        "compare",
        "evaluate_compare:run",
        help="compare runs (models) by paired differences, with intervals",
        description="Compares runs of the same benchmark, for example with different models, on the items that they "
        "have in common: B, C, ... minus the first run, A, with paired 95% bootstrap intervals.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folders or results.json files of at least two runs")
    parser.add_argument("--markdown", metavar="F", help="Markdown file to write the table to")
    parser = add_command(
        kinds,
        "generation",
        "evaluate_answers:run_generation",
        help="measure the accuracy of a model's answers: greedy, sampled, pass@k",
        description="Lets a model answer maths questions and grades its answers with math-verify: greedy, pass@1 and "
        "pass@k (unbiased estimator). Compare runs before and after training with `endotrl eval compare`.",
    )
    _add_answers(parser, "eval-generation")
    parser.add_argument("--k", **COUNT | {"metavar": "K"}, nargs="+", default=[1], help="values of k for pass@k")
    parser = add_command(
        kinds,
        "best-of-n",
        "evaluate_answers:run_best_of_n",
        help="choose among N answers by reward, by majority vote, or at random",
        description="Samples N answers to each maths question and chooses one by each scorer, by majority vote, and "
        "at random. The best possible choice is shown for comparison.",
    )
    _add_answers(parser, "eval-best-of-n")
    default = " ".join(BEST_OF_N_SCORERS)
    parser.add_argument("--scorers", metavar="NAME", nargs="+", help=f"scorers to choose by (default: {default})")
    parser.add_argument("--reward-model", metavar="M", help="model to choose by (default: the answering model)")


def add_forecast(commands: Any) -> None:
    """Adds `forecast` to the command-line parser."""
    parser = add_command(
        commands,
        "forecast",
        "forecast:run",
        help="forecast what RL on the endogenous reward will do to a model",
        description="Estimates from samples of the frozen model where RL on its endogenous reward converges for each "
        "KL penalty beta: accuracy (if the data has answers), length, agreement and KL, compared with alternatives "
        "that need no training. Run the same command again to resume an interrupted run. Other betas or another "
        "trainer need no new samples.",
    )
    add = parser.add_argument
    _add_model(parser)
    _add_questions(parser, f"questions, with or without answers: {DATA_HELP}")
    _add_generation(parser, 256, "")
    add("--samples", **COUNT, default=16, help="samples per question")
    temperatures = "sampling temperatures; half of the samples are drawn at 1"
    add("--temperatures", metavar="T", nargs="+", type=temperature, default=[*TEMPERATURES], help=temperatures)
    add("--seed", type=int, default=0, help="sampling seed")
    add(
        "--grader",
        metavar="NAME",
        default="math",
        help="how to grade answers: math, text (without math-verify), exact (the completion is the answer), or "
        "FILE.py:FUNCTION, a function of a completion and an answer",
    )
    add("--betas", metavar="BETA", type=positive_number, nargs="+", default=[*BETAS], help="KL penalties")
    add("--trainer", choices=get_args(Trainer), default="grpo", help="trainer to forecast")
    add("--num-generations", **COUNT | {"metavar": "G"}, default=8, help="completions per group in training")
    add(
        "--scale-rewards",
        choices=get_args(ScaleRewards),
        default="none",
        help="as in TRL's GRPOConfig, whose default is group: dividing rewards by their standard deviation changes "
        "what beta means",
    )
    add("--suggest-beta", action="store_true", help="print only the beta to use")
    add(
        "--power-sampling",
        **COUNT | {"metavar": "STEPS"},
        help="also sample from the power distribution of the suggested (or smallest) beta without training, with this "
        "many Metropolis-Hastings steps",
    )
    _add_output(parser, "forecast", "forecast.json and report.html")
    settings = parser.add_argument_group("reward", "Parameters of `endotrl.EndogenousReward`.")
    add_reward_settings(settings, *REWARD)


def _add_benchmark(kinds: Any, name: str) -> None:
    parser = add_command(
        kinds,
        name,
        "evaluate:run",
        help=BENCHMARK_HELP[name],
        description=f"Evaluates rewards on {name}: {BENCHMARK_HELP[name]}. All forms of the reward share one forward "
        "pass. Run the same command again to resume an interrupted run, or with more --scorers or a larger --limit to "
        "score only what is missing.",
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
        help="scorers to compare, each with the first: forms TOKEN.AGGREGATE such as bellman.sum, "
        "log_prob.discounted=0.95, centered.mean; residual:FORM, style_residual:FORM; self_certainty, "
        "negative_entropy, mean_log_prob, relative_perplexity; judge_pairwise, judge_pointwise, judge_verifier; "
        "reward_model:PATH; length, random; or the sets single-pass, two-pass, judges, controls (default: single-pass "
        "controls)",
    )
    _add_output(parser, f"eval-{name}")
    add_reward_settings(parser, "alpha")
    chat = "no: it is continued, as in TRL" if name == "preference" else "yes, if the model has a chat template"
    add("--chat", **YES_NO, help=f"whether a text prompt is a user message (default: {chat})")
    add("--max-response-tokens", **COUNT, help="truncate responses to N tokens")


def _add_answers(parser: Parser, output: str) -> None:
    add = parser.add_argument
    _add_model(parser)
    _add_questions(parser, f"questions and answers: {DATA_HELP}")
    add("--samples", **COUNT, default=4, help="sampled answers per question and seed")
    add("--seeds", metavar="SEED", type=int, nargs="+", default=[0], help="sampling seeds")
    add("--temperature", type=temperature, default=1.0, help="sampling temperature")
    add("--top-p", type=fraction, default=1.0, help="probability mass to keep in nucleus sampling")
    _add_generation(parser, 512, "Please reason step by step, and put your final answer within \\boxed{}.")
    _add_output(parser, output)


def _add_model(parser: Parser) -> None:
    add_model(parser, "model")
    add_reward_settings(parser, "dtype", "device", "trust_remote_code", "max_tokens_per_batch", "model_init_kwargs")


def _add_output(parser: Parser, default: str, files: str = "") -> None:
    add = parser.add_argument
    if not files:
        files = "results.json, results.md, report.html and examples.html"
        add("--wandb", metavar="PROJECT", help="W&B project to log figures, table and pages to")
    add("--output", metavar="DIR", default=default, help=f"folder for {files}")
    add("--overwrite", action="store_true", help="start over if the folder contains a run")
    add("--quiet", action="store_true", help="show only errors, no progress or tables")


def _add_questions(parser: Parser, data: str) -> None:
    add, first = parser.add_argument, "key of the {} (default: the first of {})".format
    add("--data", metavar="FILE", required=True, help=data)
    add("--question", metavar="KEY", help=first("question", "question, problem, input, prompt"))
    add("--answer", metavar="KEY", help=first("answer", "answer, answers, final_answer, target, solution"))
    add("--limit", **COUNT, help="only the first N questions")


def _add_generation(parser: Parser, max_new_tokens: int, instruction: str) -> None:
    add = parser.add_argument
    add("--max-new-tokens", **COUNT, default=max_new_tokens, help="maximum number of tokens per answer")
    add("--instruction", metavar="TEXT", default=instruction, help="text to append to each question; may be empty")
    add("--chat", **YES_NO, help="whether to use the chat template (default: yes, if the model has one)")
    add("--backend", choices=("transformers", "vllm"), default="transformers", help="generation backend")
    more = "further arguments for vLLM's `LLM`, such as " + '{"gpu_memory_utilization": 0.5, "max_model_len": 4096}'
    add("--vllm-kwargs", metavar="JSON", type=json_object, help=more)
