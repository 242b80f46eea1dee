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
from ..evaluation.intervals import Unit, difference_in_words, differences, estimates, resampling_weights
from ..evaluation.items import Item
from ..evaluation.questions import Question, read_questions
from ..evaluation.results import estimates_to_json, plain_means
from ..evaluation.run_folder import RunFolder, in_blocks, open_folder
from ..evaluation.scorer_names import base_names, check_name, make_scorer, served_names
from ..evaluation.tables import interval, markdown_page, value
from ..frozen.names import load_tokenizer
from ..frozen.served import ServedModel, is_url
from ..grading import VERSION, is_right, require_math_verify, same_answer
from ..rendering.messages import Prompt
from ..reporting import number, page, table, terminal_table
from ..runs.files import write_json
from ..runs.processes import processes
from ..runs.record import now, versions
from .evaluate import check_processes, open_answering_model, open_model


GREEDY = "greedy"
BEST_OF_N_SCORERS = ("bellman.sum", "log_prob.mean", "bellman.discounted=0.95", "centered.sum", "self_certainty")
SHOWN_ANSWERS = 12


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
    by_seed = {
        str(seed): float(np.mean([np.mean(answers[question.key, str(seed)]["right"]) for question in questions]))
        for seed in args.seeds
    }
    headline = [name for name in units[0].values if name not in ("tokens", "cut off")]
    results = _results(
        args, command, "generation", "Answers", questions, settings, answers, {"answers": units}, headline
    )
    results["pass@1 by seed"] = by_seed
    results["tie_rule"] = (
        "An answer is right if `endotrl.grading` says so, with math-verify. pass@k is the unbiased estimate from "
        f"{args.samples} samples, the mean of {len(args.seeds)} seeds."
    )
    _write(results, folder, questions, answers, args)
    return results


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
            names = served_names(names, args.scorers is not None, False, judge.renderer.vocab_size)
    for name in names:
        check_name(name, judge.renderer.vocab_size, args.trust_remote_code)
    answers = _answers(args, questions, folder, engine, greedy=False)
    if not processes().is_main_process:
        return {}
    scorers = [
        make_scorer(name, judge, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code)
        for name in names
    ]
    units: dict[str, list[Unit]] = {name: [] for name in [*names, "majority", "random", "best possible"]}
    for question in tqdm(questions, desc="Choosing", unit=" questions", disable=args.quiet):
        for seed in args.seeds:
            row = answers[question.key, str(seed)]
            item = Item(
                question.id,
                "questions",
                _prompt(question, args, engine),
                tuple(row["texts"]),
                response_ids=tuple(tuple(ids) for ids in row["token_ids"]),
            )
            scored = judge.score([item], alone=any(scorer.needs_alone for scorer in scorers))[0]
            chosen = {scorer.name: accuracy_of_choice(scorer.score(item, scored), row["right"]) for scorer in scorers}
            chosen["majority"] = accuracy_of_choice(
                majority_scores(same_answer(row["texts"], math=True)), row["right"]
            )
            chosen["random"] = float(np.mean(row["right"]))
            chosen["best possible"] = float(any(row["right"]))
            for name, accuracy in chosen.items():
                units[name].append(Unit(question.key, "questions", {"accuracy": accuracy}))
    title = f"Best of {args.samples}"
    results = _results(args, command, "best-of-n", title, questions, settings, answers, units, ["accuracy"])
    results["tie_rule"] = (
        "All choose among the same samples. Of samples with equal scores one is drawn: accuracy is its expectation. "
        "Random is the mean of all samples, best possible whether one is right."
    )
    _write(results, folder, questions, answers, args)
    return results


def _open(args: argparse.Namespace, default: str) -> tuple[RunFolder, Engine, dict[str, Any]]:
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
    questions: Sequence[Question],
    settings: Mapping[str, Any],
    answers: Mapping[tuple[str, str], Mapping[str, Any]],
    units: Mapping[str, list[Unit]],
    headline: list[str],
) -> dict[str, Any]:
    first = next(iter(units))
    weights = resampling_weights(units[first])
    gaps = {n: differences(units[first], rows, plain_means, weights) for n, rows in units.items() if n != first}
    num_clusters = len({unit.cluster for unit in units[first]})
    used = [answer for (key, _), answer in answers.items() if key in {question.key for question in questions}]
    return {
        "benchmark": name,
        "title": title,
        "headline": headline,
        "main_metric": headline[0],
        "tie_rule": "",
        "model": args.model,
        "model_version": settings["model_version"],
        "data": args.data,
        "settings": {**settings, "seeds": args.seeds},
        "versions": versions("torch", "transformers", "trl", "numpy"),
        "command": command,
        "updated": now(),
        "seconds": round(sum(answer["seconds"] for answer in used), 3),
        "tokens": sum(sum(answer["tokens"]) for answer in used),
        "num_items": len(questions),
        "metrics": {n: estimates_to_json(estimates(rows, plain_means, weights)) for n, rows in units.items()},
        "differences": {n: estimates_to_json(gap) for n, gap in gaps.items()},
        "statements": [difference_in_words(first, n, gap[headline[0]], num_clusters) for n, gap in gaps.items()],
        "length": {},
        "units": [
            {"cluster": unit.cluster, "group": unit.group, "values": {n: rows[i].values for n, rows in units.items()}}
            for i, unit in enumerate(units[first])
        ],
    }


def _write(
    results: dict[str, Any],
    folder: RunFolder,
    questions: Sequence[Question],
    answers: Mapping[tuple[str, str], Mapping[str, Any]],
    args: argparse.Namespace,
) -> None:
    write_json(folder.results_path, results)
    folder.table_path.write_text(markdown_page(results), encoding="utf-8")
    names = list(results["metrics"])
    metrics = list(next(iter(results["metrics"].values())))
    rows = [[n, m, value(results, n, m), interval(results, n, m)] for n in names for m in metrics]
    shown = []
    step = max(1, len(questions) // SHOWN_ANSWERS)
    for question in questions[::step][:SHOWN_ANSWERS]:
        row = answers[question.key, str(args.seeds[0])]
        mark = "✓" if row["right"][0] else "✗"
        shown.append([question.prompt, question.answer, f"{mark} {row['texts'][0]}"])
    sections: list[tuple[str, Markup | str]] = [
        ("Results", table(["answers", "metric", "value", "95% interval"], rows, caption=results["tie_rule"])),
    ]
    if results["statements"]:
        lines = Markup("").join(Markup("<li>{}</li>").format(line) for line in results["statements"])
        sections.append(("Differences", Markup("<ul>{}</ul>").format(lines)))
    which = f"one in {step} questions, chosen by position alone" if step > 1 else "each question"
    caption = f"The first sample for {which}. ✓ is right, ✗ wrong."
    sections.append(("Answers", table(["question", "right answer", "answer"], shown, caption=caption)))
    settings = [[key, None if v is None else str(v)] for key, v in results["settings"].items()]
    sections.append(("Settings", table(["setting", "value"], settings)))
    html = page(
        f"{results['title']}: {results['model']}",
        sections,
        lead=f"{results['num_items']} questions of {results['data']}, {results['tokens']:,} tokens generated.",
        footer=" · ".join([*[f"{k} {v}" for k, v in results["versions"].items()], results["command"]]),
    )
    folder.report_path.write_text(html, encoding="utf-8")
    if not args.quiet:
        _show(results, folder, rows)


def _show(results: Mapping[str, Any], folder: RunFolder, rows: Sequence[Sequence[Any]]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.print()
    cells = [[number(v, 1 if m == "tokens" else 3), i, m, n] for n, m, v, i in rows]
    title = f"{results['title']}: {results['num_items']} questions, {results['model']}"
    console.print(terminal_table(["value", "95% interval", "metric", "of"], cells, title, fold=True))
    for statement in results["statements"]:
        console.print(f"- {statement}", markup=False)
    for path in (folder.report_path, folder.table_path, folder.results_path):
        console.print(str(path), markup=False, soft_wrap=True)
