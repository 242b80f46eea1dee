# SPDX-License-Identifier: Apache-2.0
"""The commands `endotrl eval generation` and `endotrl eval best-of-n`."""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from tqdm.auto import tqdm

from ..evaluation.engine import Engine
from ..evaluation.examples_page import answer_example
from ..evaluation.generation import (
    Generator,
    Sample,
    Sampler,
    VLLMEngine,
    VLLMSampler,
    accuracy_of_choice,
    majority_scores,
    pass_at_k,
    prompt_rows,
)
from ..evaluation.intervals import Unit
from ..evaluation.items import Item
from ..evaluation.questions import Question, read_questions
from ..evaluation.results import CEILING, MAJORITY, plain_means, summarize
from ..evaluation.run_folder import RunFolder, in_blocks, open_folder
from ..evaluation.scorer_names import base_names, check_name, make_scorer, served_names
from ..evaluation.tables import few_items, interval, value
from ..frozen.names import load_tokenizer
from ..frozen.served import ServedModel, is_url
from ..grading import VERSION, is_right, require_math_verify, same_answer
from ..rendering.messages import Prompt
from ..reporting import number, table
from ..runs.processes import processes
from ..runs.wandb_run import check_wandb
from .evaluate import check_processes, header, open_answering_model, open_model, show, write_results


Answers = Mapping[tuple[str, str], Mapping[str, Any]]  # by key of the question and seed
Scores = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]  # and by scorer
GREEDY = "greedy"
BEST_OF_N_SCORERS = ("bellman.sum", "log_prob.mean", "bellman.discounted=0.95", "centered.sum", "self_certainty")
SHOWN_ANSWERS, SHOWN_CHOICES = 12, 8
MANY_CUT = 0.1  # fraction of samples that the verdict mentions


def run_generation(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Runs `endotrl eval generation`; returns what `results.json` holds, in the main process."""
    check_processes(args)
    for k in args.k:
        pass_at_k(args.samples, 0, k)  # raises now if there are too few samples
    require_math_verify()
    questions = read_questions(args.data, args.question, args.answer, args.limit, labelled=True)
    folder, engine, settings = _open(args, "eval-generation")
    answers = _answers(args, questions, folder, engine, greedy=not args.no_greedy)
    if not processes().is_main_process:
        return {}
    units = []
    for question in questions:
        rows = [answers[question.key, str(seed)] for seed in args.seeds]
        values = {GREEDY: float(answers[question.key, GREEDY]["right"][0])} if not args.no_greedy else {}
        for k in sorted({1, *args.k}):
            values[f"pass@{k}"] = float(np.mean([pass_at_k(args.samples, sum(row["right"]), k) for row in rows]))
        values["tokens"] = float(np.mean([count for row in rows for count in row["tokens"]]))
        values["cut off"] = float(np.mean([not end for row in rows for end in row["finished"]]))
        units.append(Unit(question.key, "questions", values))
    headline = [name for name in units[0].values if name not in ("tokens", "cut off")]
    tie_rule = (
        "An answer is right if `endotrl.grading` says so, with math-verify. pass@k is the unbiased estimate from "
        f"{args.samples} samples, the mean of {len(args.seeds)} seeds."
    )
    by_seed = {
        str(seed): float(np.mean([np.mean(answers[question.key, str(seed)]["right"]) for question in questions]))
        for seed in args.seeds
    }
    results = _results(args, command, "generation", "Answers", tie_rule, settings, {"answers": units}, headline)
    results["pass@1 by seed"] = by_seed
    told = [
        f"{metric} {number(value(results, 'answers', metric))} ({interval(results, 'answers', metric)})"
        for metric in headline
    ]
    results["verdict"] = f"Right answers to {len(questions)} questions: {', '.join(told)}.{few_items(results)}"
    return _finish(args, results, folder, questions, answers, _shown_answers(args, questions, answers), {})


def run_best_of_n(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Runs `endotrl eval best-of-n`; returns what `results.json` holds, in the main process."""
    check_processes(args)
    require_math_verify()
    questions = read_questions(args.data, args.question, args.answer, args.limit, labelled=True)
    names = base_names(args.scorers or BEST_OF_N_SCORERS)
    folder, engine, settings = _open(args, "eval-best-of-n")
    judge = engine
    if args.reward_model is not None:
        # What says how to load the model that answers is not for a server.
        elsewhere = {"dtype": "auto", "device": None, "model_init_kwargs": None} if is_url(args.reward_model) else {}
        placement, _ = open_model(argparse.Namespace(**{**vars(args), "model": args.reward_model, **elsewhere}))
        tokenizer = load_tokenizer(placement.config._name_or_path, args.trust_remote_code)
        judge = Engine(placement, tokenizer, engine.chat, max_tokens_per_batch=args.max_tokens_per_batch)
        if isinstance(placement, ServedModel):
            names = served_names(names, args.scorers is not None, False)
    for name in names:
        check_name(name, args.trust_remote_code)
    answers = _answers(args, questions, folder, engine, greedy=False)
    if not processes().is_main_process:
        return {}
    scorers = [
        make_scorer(name, judge, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code)
        for name in names
    ]
    units: dict[str, list[Unit]] = {name: [] for name in [*names, MAJORITY, "random", CEILING]}
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    for question in tqdm(questions, desc="Choosing", unit=" questions", disable=args.quiet):
        for seed in map(str, args.seeds):
            row = answers[question.key, seed]
            item = Item(
                question.id,
                "questions",
                _prompt(question, args, engine),
                tuple(row["texts"]),
                response_ids=tuple(tuple(ids) for ids in row["token_ids"]),
            )
            scored = judge.score([item], alone=any(scorer.needs_alone for scorer in scorers))[0]
            found = {scorer.name: scorer.score(item, scored) for scorer in scorers}
            found[MAJORITY] = majority_scores(same_answer(row["texts"], math=True))
            scores[question.key, seed] = found
            chosen = {name: accuracy_of_choice(values, row["right"]) for name, values in found.items()}
            chosen |= {"random": float(np.mean(row["right"])), CEILING: float(any(row["right"]))}
            for name, accuracy in chosen.items():
                units[name].append(Unit(question.key, "questions", {"accuracy": accuracy}))
    tie_rule = (
        "All choose among the same samples. Of samples with equal scores one is drawn: accuracy is its expectation. "
        "Random is the mean of all samples, best possible whether one is right."
    )
    title = f"Best of {args.samples}"
    results = _results(args, command, "best-of-n", title, tie_rule, settings, units, ["accuracy"])
    hopeless = sum(unit.values["accuracy"] == 0 for unit in units[CEILING])
    results["verdict"] += (
        f" For {hopeless} of {len(units[CEILING])} questions no sample is right: there, every choice is wrong."
        if hopeless
        else ""
    )
    results["choices"] = [
        {"key": key, "seed": seed, "right": answers[key, seed]["right"], "scores": found}
        for (key, seed), found in scores.items()
    ]
    return _finish(args, results, folder, questions, answers, _choices(args, questions, answers, scores), scores)


def _choices(
    args: argparse.Namespace, questions: Sequence[Question], answers: Answers, scores: Scores
) -> tuple[str, Markup]:
    """What each scorer chose, of questions in which that made a difference."""
    rows: list[list[object]] = []
    seed, differing = str(args.seeds[0]), 0
    for question in questions:
        row, found = answers[question.key, seed], scores[question.key, seed]
        best = {name: values.index(max(values)) for name, values in found.items()}
        if len({row["right"][i] for i in best.values()}) == 1:
            continue
        differing += 1
        if differing > SHOWN_CHOICES:
            continue
        by_sample: dict[int, list[str]] = {}
        for name, i in best.items():
            by_sample.setdefault(i, []).append(name)
        for i, names in by_sample.items():
            first = not rows or rows[-1][0] != str(question.prompt)
            rows.append([str(question.prompt) if first else "", ", ".join(names), _marked(row, i), question.answer])
    if not rows:
        text = "Whatever chooses, the same questions get a right answer: on no question do the choices differ in that."
        return "What each scorer chose", Markup("<p>{}</p>").format(text)
    caption = (
        f"{min(differing, SHOWN_CHOICES)} of the {differing} questions in which choosing made a difference; all are "
        "in examples.html. ✓ is right, ✗ wrong."
    )
    return "What each scorer chose", table(["question", "chosen by", "answer", "right answer"], rows, caption=caption)


def _marked(row: Mapping[str, Any], i: int) -> str:
    return f"{'✓' if row['right'][i] else '✗'} {row['texts'][i]}"


def _shown_answers(args: argparse.Namespace, questions: Sequence[Question], answers: Answers) -> tuple[str, Markup]:
    step = max(1, len(questions) // SHOWN_ANSWERS)
    rows = [
        [str(question.prompt), question.answer, _marked(answers[question.key, str(args.seeds[0])], 0)]
        for question in questions[::step][:SHOWN_ANSWERS]
    ]
    which = f"one in {step} questions, chosen by position alone" if step > 1 else "each question"
    caption = f"The first sample for {which}. ✓ is right, ✗ wrong."
    return "Answers", table(["question", "right answer", "answer"], rows, caption=caption)


def _open(args: argparse.Namespace, default: str) -> tuple[RunFolder, Engine, dict[str, Any]]:
    check_wandb(args.wandb)
    placement, settings = open_answering_model(args, args.output or default)
    tokenizer = load_tokenizer(placement.config._name_or_path, args.trust_remote_code)
    chat = tokenizer.chat_template is not None if args.chat is None else args.chat
    if chat and tokenizer.chat_template is None:
        raise ValueError(f"--chat was given, but the tokenizer of {args.model} has no chat template.")
    settings |= {
        "chat": chat,
        "instruction": args.instruction,
        "grader": VERSION,
        "samples": args.samples,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "backend": args.backend,
    }
    folder = open_folder(args.output or default, settings, args.overwrite)
    return folder, Engine(placement, tokenizer, chat, max_tokens_per_batch=args.max_tokens_per_batch), settings


def _prompt(question: Question, args: argparse.Namespace, engine: Engine) -> Prompt:
    text = f"{question.prompt}\n{args.instruction}".rstrip()
    return [{"role": "user", "content": text}] if engine.chat else f"{text}\n\n"


def _answers(
    args: argparse.Namespace, questions: Sequence[Question], folder: RunFolder, engine: Engine, greedy: bool
) -> dict[tuple[str, str], dict[str, Any]]:
    """Answers with their grades, by key of the question and seed; what an earlier run has is kept."""
    # Now, not when the run comes to the longest question.
    prompt_rows(engine, [_prompt(q, args, engine) for q in questions], args.max_new_tokens)
    state, answers = processes(), folder.read_answers()
    state.wait_for_everyone()  # who is ahead writes nothing that others have yet to see missing
    passes = [(GREEDY, 1, 0.0)] if greedy else []
    passes += [(str(seed), args.samples, args.temperature) for seed in args.seeds]
    settings = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code, **(args.vllm_kwargs or {})}
    with VLLMEngine(engine.placement.config._name_or_path, **settings) as vllm:
        for name, count, temperature in passes:
            todo = list({q.key: q for q in questions if (q.key, name) not in answers}.values())
            generator = _sampler(args, engine, vllm, temperature)
            answer = partial(_block, args, engine, generator, name, count)
            made = in_blocks(todo, folder, answer, f"Answering ({name})", not args.quiet)
            answers |= {(record["key"], name): record for record in made}
    if state.num_processes > 1:
        state.wait_for_everyone()
        return folder.read_answers()
    return answers


def _block(
    args: argparse.Namespace, engine: Engine, generator: Generator, name: str, count: int, block: Sequence[Question]
) -> list[dict[str, Any]]:
    # What a block draws depends on its seed and its first question, not on what was done before it.
    seed = 0 if name == GREEDY else int(name) * 2**32 + int(block[0].key[:8], 16)
    samples = generator([_prompt(q, args, engine) for q in block], count, seed % 2**63)
    return [_record(q, name, row) for q, row in zip(block, samples, strict=True)]


def _record(question: Question, name: str, samples: Sequence[Sample]) -> dict[str, Any]:
    texts = [sample.text for sample in samples]
    return {
        "key": question.key,
        "id": question.id,
        "seed": name,
        "texts": texts,
        "token_ids": [list(sample.token_ids) for sample in samples],
        "finished": [sample.finished for sample in samples],
        "right": [is_right(text, [question.answer], math=True) for text in texts],
        "tokens": [len(sample.token_ids) for sample in samples],
    }


def _sampler(args: argparse.Namespace, engine: Engine, vllm: VLLMEngine, temperature: float) -> Generator:
    if args.backend == "vllm":
        return VLLMSampler(engine, vllm, args.max_new_tokens, temperature, args.top_p)
    return Sampler(engine, args.max_new_tokens, temperature, args.top_p)


def _results(
    args: argparse.Namespace,
    command: str,
    name: str,
    title: str,
    tie_rule: str,
    settings: Mapping[str, Any],
    units: Mapping[str, list[Unit]],
    headline: list[str],
) -> dict[str, Any]:
    return {
        "benchmark": name,
        "title": title,
        "headline": headline,
        "tie_rule": tie_rule,
        "settings": {**settings, "seeds": args.seeds},
        "command": command,
        "length": {},
        **summarize(units, plain_means, headline[0]),
    }


def _finish(
    args: argparse.Namespace,
    results: dict[str, Any],
    folder: RunFolder,
    questions: Sequence[Question],
    answers: Answers,
    section: tuple[str, Markup],
    scores: Scores,
) -> dict[str, Any]:
    """Writes and shows the results."""
    keys = {question.key for question in questions}
    used = [answer for (key, _), answer in answers.items() if key in keys]
    results = {**header(args, results["command"], results["settings"], used, len(questions)), **results}
    examples = [
        answer_example(question, f"seed {seed}", answers[question.key, seed], scores.get((question.key, seed), {}))
        for question in questions
        for seed in map(str, args.seeds)
    ]
    about = f"{len(questions)} questions of {args.data}, {results['tokens']:,} tokens generated."
    ends = [end for q in questions for seed in map(str, args.seeds) for end in answers[q.key, seed]["finished"]]
    if (cut := 1 - sum(ends) / len(ends)) > MANY_CUT:
        results["verdict"] += f" {cut:.0%} of the samples were cut off at {args.max_new_tokens} tokens."
    names = list(next(iter(scores.values()))) if scores else list(results["metrics"])
    write_results(args, results, folder, [section], names, examples, about)
    show(args, results, folder)
    return results
