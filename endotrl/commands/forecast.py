# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl forecast`."""

import argparse
import sys
from contextlib import ExitStack
from typing import Any

from ..data.sources import Reader
from ..evaluation.generation import Sampler, loaded_placement
from ..evaluation.questions import read_questions
from ..evaluation.run_folder import open_folder
from ..forecasting.collect import Grader, collect, unit_of
from ..forecasting.forecast import Forecast, from_records
from ..forecasting.page import alternative_rows, report
from ..forecasting.policies import Objective
from ..forecasting.sampling import Mixture, MixtureSampler, ServedMixtureSampler, power_samples
from ..forecasting.summary import METRICS, MIN_ESS
from ..grading import VERSION
from ..reporting import show_verdict, terminal, terminal_table
from ..rewards.endogenous import EndogenousReward
from ..rewards.settings import SETTINGS
from ..runs.files import replace_text, write_json
from ..runs.processes import processes
from .common import counted_items
from .evaluate import about_run, check_run
from .evaluate_options import REWARD
from .models import check_template, open_answering_model, open_vllm


def run(args: argparse.Namespace) -> None:
    """Runs `endotrl forecast`."""
    check_run(args)
    Reader(args.data)  # raises if there is nothing of that name
    objective = Objective(args.trainer, args.num_generations, args.scale_rewards)
    mixture, grader = Mixture.of(args.samples, args.temperatures), Grader(args.grader)
    engine, settings = open_answering_model(args)
    questions = read_questions(args.data, args.question, args.answer, args.limit, args.instruction, engine.chat)
    check_template(args, engine.tokenizer, [question.prompt for question in questions])
    reward_settings = {name: getattr(args, name) for name in REWARD}
    sampling = {name: getattr(args, name) for name in ("samples", "temperatures", "max_new_tokens", "backend", "seed")}
    settings |= {"grader": args.grader, "grader_version": VERSION, **sampling, **reward_settings}
    is_default = all(value == SETTINGS[name].default for name, value in reward_settings.items())
    if args.power_sampling is not None and not is_default:
        raise ValueError("--power-sampling needs the endogenous reward's default settings. Leave out all others.")
    folder = open_folder(args.output, settings, args.overwrite)
    with ExitStack() as stack:
        reward = None
        if not is_default:
            model = stack.enter_context(loaded_placement(engine).active())
            batch = args.max_tokens_per_batch
            reward = EndogenousReward(model, engine.tokenizer, max_tokens_per_batch=batch, **reward_settings)
        sampler: Any = MixtureSampler(engine, args.max_new_tokens, mixture.recorded)
        if (vllm := stack.enter_context(open_vllm(args, engine))) is not None:
            sampler = ServedMixtureSampler(
                engine, lambda t: Sampler(engine, args.max_new_tokens, t, vllm=vllm), mixture.recorded
            )
        rest = args.max_new_tokens, reward, folder, args.seed, not args.quiet
        records = collect(questions, engine, sampler, mixture, grader, *rest)
    if not processes().is_main_process:
        return
    result = from_records(records, mixture, objective, args.betas)
    if args.power_sampling is not None:
        beta = result.suggested_beta or min(args.betas)
        walk = args.max_new_tokens, 1.0 + 1.0 / beta, args.power_sampling, args.seed, not args.quiet
        chosen = power_samples(engine, [question.prompt for question in questions], *walk)
        units = [unit_of(q, sample, grader) for q, sample in zip(questions, chosen, strict=True)]
        result = from_records(records, mixture, objective, args.betas, {"power_sampling": units})
        result.details["power_sampling_beta"] = beta
    path = folder.folder / "forecast.json"
    write_json(path, {**result.to_dict(), **about_run(args, settings, records)})
    asked = counted_items(len(records), len({record["key"] for record in records}), "question")
    title = f"Forecast: {objective.words}, {asked}, {args.model}"
    replace_text(folder.report_path, report(result, title, settings, args.command_line))
    if args.suggest_beta:
        sys.stdout.write("none\n" if result.suggested_beta is None else f"{result.suggested_beta:g}\n")
    elif not args.quiet:
        _show(result, title, [path, folder.report_path])


def _show(result: Forecast, title: str, paths: list[Any]) -> None:
    console = terminal()
    show_verdict(console, result.verdict)
    short = {"truncated": "cut off", "agreement": "agree"}
    shown = [metric for metric in METRICS if metric != "reward"]  # 80 columns
    metrics = [short.get(metric, metric) for metric in shown]
    rows = [[*(row[metric] for metric in shown), row["ess"], f"{row['beta']:g}"] for row in result.betas]
    console.print(terminal_table([*metrics, "ess", "beta"], rows, title, decimals=2))
    console.print(
        f"ess: effective samples, too few below {MIN_ESS:g}. agree: with the model's majority answer. "
        "distinct: answers per group. kl: nats per completion (TRL logs it per token).\n",
        style="dim",
    )
    rows = [[*values[: len(shown)], name] for name, *values in alternative_rows(result)]
    console.print(terminal_table([*metrics, "without training"], rows, decimals=2))
    console.print("\n".join(map(str, paths)), soft_wrap=True)
