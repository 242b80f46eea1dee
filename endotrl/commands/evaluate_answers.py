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
from ..evaluation.generation import Sampler, accuracy_of_choice, majority_scores, pass_at_k, prompt_rows, seed_of
from ..evaluation.intervals import Unit
from ..evaluation.items import Item
from ..evaluation.questions import Question, read_questions
from ..evaluation.results import CEILING, MAJORITY, plain_means, summarize
from ..evaluation.run_folder import in_blocks, open_folder
from ..evaluation.scorers import base_names, check_names, make_scorer, served_names
from ..evaluation.tables import few_items, interval, value
from ..frozen.names import load_tokenizer
from ..frozen.served import ServedModel, is_url
from ..grading import VERSION, accepted_answers, is_right, require_math_verify, same_answer
from ..rendering.messages import Prompt
from ..reporting import counted, number, paragraph, table
from ..runs.processes import processes
from .common import counted_items
from .evaluate import check_run, publish
from .evaluate_options import BEST_OF_N_SCORERS
from .models import LOADING, open_answering_model, open_model, open_vllm


SHOWN_CHOICES = 8
Scores = Mapping[tuple[str, str], Mapping[str, Sequence[float]]]  # by question key and seed, then by scorer
GREEDY = "greedy"
SAMPLING = ("samples", "temperature", "top_p", "max_new_tokens", "backend")
MANY_CUT = 0.1  # fraction of truncated samples from which on the verdict mentions them


class AnswerRun:
    """Questions, the answering model, and its graded answers in a folder."""

    def __init__(self, args: argparse.Namespace) -> None:
        check_run(args)
        require_math_verify()
        self.args, self.seeds = args, [str(seed) for seed in args.seeds]
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds must differ, got {' '.join(self.seeds)}: equal seeds give the same answers.")
        self.questions = read_questions(args.data, args.question, args.answer, args.limit, labelled=True)
        self.engine, settings = open_answering_model(args)
        self.settings = {**settings, "grader": VERSION, **{name: getattr(args, name) for name in SAMPLING}}
        self.folder = open_folder(args.output, self.settings, args.overwrite)
        self.answers: dict[tuple[str, str], dict[str, Any]] = {}  # by question key and seed

    def prompt(self, question: Question) -> Prompt:
        """Prompt of a question."""
        text = f"{question.prompt}\n{self.args.instruction}".rstrip()
        return [{"role": "user", "content": text}] if self.engine.chat else f"{text}\n\n"

    def answer(self, greedy: bool) -> None:
        """Generates answers to all questions; those of an earlier run are kept."""
        args, engine = self.args, self.engine
        # Checked now, rather than when the run reaches the longest question.
        prompt_rows(engine, [self.prompt(q) for q in self.questions], args.max_new_tokens)
        answers = self.folder.read_answers()
        passes = [(GREEDY, 1, 0.0)] if greedy else []
        passes += [(seed, args.samples, args.temperature) for seed in self.seeds]
        with open_vllm(args, engine) as vllm:
            for name, count, temperature in passes:
                sampler = Sampler(engine, args.max_new_tokens, temperature, args.top_p, vllm)
                answer = partial(self._answer, sampler, name, count)
                known = {key for key, seed in answers if seed == name}
                path, title = self.folder.answers_path, f"Answering ({name})"
                in_blocks(self.questions, known, path, answer, title, not args.quiet)
        self.answers = self.folder.read_answers()

    def _answer(self, sampler: Sampler, name: str, count: int, block: Sequence[Question]) -> list[dict[str, Any]]:
        # A block's samples depend on its seed and its first question, not on the blocks before it.
        samples = sampler([self.prompt(q) for q in block], count, seed_of(name, block[0].key))
        return [
            {
                "key": question.key,
                "id": question.id,
                "seed": name,
                "texts": [sample.text for sample in row],
                "token_ids": [list(sample.token_ids) for sample in row],
                "finished": [sample.finished for sample in row],
                "right": [is_right(sample.text, accepted_answers(question.answer), math=True) for sample in row],
                "tokens": [len(sample.token_ids) for sample in row],
            }
            for question, row in zip(block, samples, strict=True)
        ]

    def publish(self, results: dict[str, Any], scores: Scores, sections: Sequence[tuple[str, Markup]] = ()) -> None:
        """Writes and prints the results, with the `scores` by which scorers choose."""
        keys = {question.key for question in self.questions}
        used = [answer for (key, _), answer in self.answers.items() if key in keys]
        sampled = [(question, seed) for question in self.questions for seed in self.seeds]
        examples = [
            answer_example(q, f"seed {seed}", self.answers[q.key, seed], scores.get((q.key, seed), {}))
            for q, seed in sampled
        ]
        cut = float(np.mean([not end for q, seed in sampled for end in self.answers[q.key, seed]["finished"]]))
        if cut > MANY_CUT:
            results["verdict"] += f" {cut:.0%} of the samples were truncated at {self.args.max_new_tokens} tokens."
        about = f"{counted(len(self.questions), 'question')} of {self.args.data}."
        settings = {**self.settings, "seeds": self.args.seeds}
        results = {"num_items": len(self.questions), "num_distinct": len(keys), "length": {}, **results}
        names = list(next(iter(scores.values()))) if scores else list(results["metrics"])
        publish(self.args, self.folder, settings, used, results, names, examples, about, sections)


def run_generation(args: argparse.Namespace) -> None:
    """Runs `endotrl eval generation`."""
    for k in args.k:
        pass_at_k(args.samples, 0, k)  # raises now if there are too few samples
    run = AnswerRun(args)
    run.answer(greedy=True)
    if not processes().is_main_process:
        return
    units = []
    for question in run.questions:
        rows = [run.answers[question.key, seed] for seed in run.seeds]
        values = {GREEDY: float(run.answers[question.key, GREEDY]["right"][0])}
        for k in sorted({1, *args.k}):
            values[f"pass@{k}"] = float(np.mean([pass_at_k(args.samples, sum(row["right"]), k) for row in rows]))
        headline = list(values)
        values["tokens"] = float(np.mean([count for row in rows for count in row["tokens"]]))
        values["cut off"] = float(np.mean([not end for row in rows for end in row["finished"]]))
        units.append(Unit(question.key, "questions", values))
    results: dict[str, Any] = {"benchmark": "generation", "title": "Answers", "headline": headline}
    results |= summarize({"answers": units}, plain_means, GREEDY)
    results["tie_rule"] = (
        "Answers are graded by `endotrl.grading` with math-verify. pass@k is the unbiased estimate from "
        f"{counted(args.samples, 'sample')}, averaged over {counted(len(args.seeds), 'seed')}."
    )
    results["pass@1 by seed"] = {
        seed: float(np.mean([np.mean(run.answers[question.key, seed]["right"]) for question in run.questions]))
        for seed in run.seeds
    }
    told = [
        f"{metric} {number(value(results, 'answers', metric))} ({interval(results, 'answers', metric)})"
        for metric in headline
    ]
    asked = counted_items(len(run.questions), len({question.key for question in run.questions}), "question")
    results["verdict"] = f"Right answers to {asked}: {', '.join(told)}.{few_items(results)}"
    run.publish(results, {})


def run_best_of_n(args: argparse.Namespace) -> None:
    """Runs `endotrl eval best-of-n`."""
    run = AnswerRun(args)
    names, judge = base_names(args.scorers or BEST_OF_N_SCORERS), run.engine
    if args.reward_model is not None:
        # Options for loading the answering model do not apply to a server.
        elsewhere = {"dtype": "auto", "device": None, "model_init_kwargs": None} if is_url(args.reward_model) else {}
        placement, _ = open_model(argparse.Namespace(**{**vars(args), "model": args.reward_model, **elsewhere}))
        tokenizer = load_tokenizer(placement.config._name_or_path, args.trust_remote_code)
        judge = Engine(placement, tokenizer, run.engine.chat, max_tokens_per_batch=args.max_tokens_per_batch)
        if isinstance(placement, ServedModel):
            names = served_names(names, args.scorers is not None, False)
    check_names(names, args.trust_remote_code)
    run.answer(greedy=False)
    if not processes().is_main_process:
        return
    scorers = [make_scorer(name, judge, **{key: getattr(args, key) for key in LOADING}) for name in names]
    units: dict[str, list[Unit]] = {name: [] for name in [*names, MAJORITY, "random", CEILING]}
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    for question in tqdm(run.questions, desc="Choosing", unit=" questions", disable=args.quiet):
        for seed in run.seeds:
            row = run.answers[question.key, seed]
            ids = tuple(map(tuple, row["token_ids"]))
            item = Item(question.id, "questions", run.prompt(question), tuple(row["texts"]), response_ids=ids)
            scored = judge.score([item], alone=any(scorer.needs_alone for scorer in scorers))[0]
            found = {scorer.name: scorer.score(item, scored) for scorer in scorers}
            found[MAJORITY] = majority_scores(same_answer(row["texts"], math=True))
            scores[question.key, seed] = found
            chosen = {name: accuracy_of_choice(values, row["right"]) for name, values in found.items()}
            chosen |= {"random": float(np.mean(row["right"])), CEILING: float(any(row["right"]))}
            for name, accuracy in chosen.items():
                units[name].append(Unit(question.key, "questions", {"accuracy": accuracy}))
    results: dict[str, Any] = {"benchmark": "best-of-n", "title": f"Best of {args.samples}", "headline": ["accuracy"]}
    results |= summarize(units, plain_means)
    results["tie_rule"] = (
        "All scorers choose among the same samples. Ties are broken at random: accuracy is the expected value. Random "
        "is the mean of all samples; best possible is whether any sample is right."
    )
    hopeful = {unit.cluster for unit in units[CEILING] if unit.values["accuracy"]}
    if hopeless := sum(question.key not in hopeful for question in run.questions):
        none = f"{counted(hopeless, 'question')} of {len(run.questions)}"
        results["verdict"] += f" No sample is right for {none}, so every choice is wrong there."
    results["choices"] = [
        {"key": key, "seed": seed, "right": run.answers[key, seed]["right"], "scores": found}
        for (key, seed), found in scores.items()
    ]
    run.publish(results, scores, [_choices(run, scores)])


def _choices(run: AnswerRun, scores: Scores) -> tuple[str, Markup]:
    """Table of each scorer's choices, for questions in which they differ in correctness."""
    title, rows, differing = "What each scorer chose", [], 0
    for question in run.questions:
        row, found = run.answers[question.key, run.seeds[0]], scores[question.key, run.seeds[0]]
        chosen_by: dict[int, list[str]] = {}
        for name, values in found.items():
            chosen_by.setdefault(list(values).index(max(values)), []).append(name)
        if len({row["right"][i] for i in chosen_by}) == 1:
            continue
        differing += 1
        asked = str(question.prompt)
        for i, names in chosen_by.items() if differing <= SHOWN_CHOICES else ():
            answer = f"{'✓' if row['right'][i] else '✗'} {row['texts'][i]}"
            rows.append([asked, ", ".join(names), answer, " or ".join(accepted_answers(question.answer))])
            asked = ""
    if not rows:
        text = "All scorers get the same questions right: for no question do their choices differ in correctness."
        return title, paragraph(text)
    caption = (
        f"Questions for which the choices differ in correctness ({min(differing, SHOWN_CHOICES)} of {differing}; all "
        "are in examples.html). ✓ right, ✗ wrong."
    )
    return title, table(["question", "chosen by", "answer", "right answer"], rows, caption=caption)
