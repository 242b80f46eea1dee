# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl eval BENCHMARK`: from options to result files and terminal output."""

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

from markupsafe import Markup

from ..data.sources import STREAM, read_rows, text_only
from ..evaluation.benchmarks import BENCHMARKS, Benchmark
from ..evaluation.engine import Engine
from ..evaluation.examples_page import Example, examples_of, examples_page
from ..evaluation.items import Item
from ..evaluation.results import evaluate
from ..evaluation.results_page import benchmark_sections, report_page
from ..evaluation.run_folder import RunFolder, open_folder
from ..evaluation.scorers import (
    DEFAULT,
    base_names,
    check_names,
    expand_names,
    make_scorer,
    needs_model,
    score_items,
    served_names,
)
from ..evaluation.tables import LENGTH_NOTE, few_items, full_rows, markdown_page, terminal_rows
from ..frozen.names import load_processing_class, load_tokenizer, reads_images
from ..frozen.served import ServedModel
from ..rendering.policy import ProcessingClass
from ..reporting import counted, say, show_verdict, terminal, terminal_table, working
from ..runs.files import replace_text, write_json
from ..runs.processes import processes
from ..runs.record import now, versions
from ..runs.wandb_run import check_wandb, log_evaluation
from ..scoring.scorer import Placement
from .common import counted_items
from .models import LOADING, check_template, open_model


def run(args: argparse.Namespace) -> None:
    """Runs `endotrl eval BENCHMARK`."""
    check_run(args)
    benchmark, progress = BENCHMARKS[args.benchmark], not args.quiet and processes().is_main_process
    with working(f"Reading {args.data or benchmark.name}", progress):
        items = load_items(benchmark, args.data, args.limit)
    steps = items[0].steps is not None
    names = expand_names(args.scorers or DEFAULT, steps)
    placement, settings = open_model(args, f"{args.output}/settings.json")
    chat = benchmark.chat if args.chat is None else args.chat
    if isinstance(placement, ServedModel):
        names = served_names(names, args.scorers is not None, steps)
        if args.alpha != 1.0:
            raise ValueError("A server returns log-probabilities at temperature 1 only. Remove --alpha.")
    check_names(names, args.trust_remote_code)
    tokenizer = load_tokenizer(args.tokenizer or placement.config._name_or_path, args.trust_remote_code)
    processor = load_processor(items, names, placement, args)
    if tokenizer.chat_template is None and processor is None:
        chat = False
        check_template(args, tokenizer, [item.prompt for item in items])
    reading = {"alpha": args.alpha, "chat": chat, "max_response_tokens": args.max_response_tokens}
    settings = {"benchmark": benchmark.name, **settings, **reading}
    folder = open_folder(args.output, settings, args.overwrite)
    started = now()
    make_engine = partial(
        Engine,
        placement,
        processor or tokenizer,
        **reading,
        separator="\n\n" if benchmark.chat else "",
        max_tokens_per_batch=args.max_tokens_per_batch,
    )
    scorer = partial(make_scorer, **{name: getattr(args, name) for name in LOADING})
    records = score_items(items, names, folder, make_engine, scorer, progress=progress)
    if not processes().is_main_process:
        return
    with working("Intervals", progress):
        used = [records[key] for key in {item.key for item in items}]
        results = {
            "benchmark": benchmark.name,
            "data": args.data or (benchmark.hub.name if benchmark.hub else None),
            "num_items": len(items),
            "started": started,
            "cut": sum(record["cut"] for record in used),
            **evaluate(benchmark, items, names, records),
        }
        examples = examples_of(results, items)
        sections = benchmark_sections(results, items, examples, folder, tokenizer)
    about = f"How well rewards tell better responses from worse ones. {counted(len(items), 'item')}. {benchmark.paper}"
    publish(args, folder, settings, used, results, names, examples, about, sections)


def publish(
    args: argparse.Namespace,
    folder: RunFolder,
    settings: Mapping[str, Any],
    used: Sequence[Mapping[str, Any]],  # the records behind the results
    results: dict[str, Any],
    scorers: Sequence[str],
    examples: Sequence[Example],
    about: str,
    sections: Sequence[tuple[str, Markup | str]] = (),
) -> None:
    """Writes `results.json`, `results.md`, `report.html`, `examples.html`, W&B on request; prints the results."""
    tokens = sum(sum(record["tokens"]) for record in used)
    results = {**about_run(args, settings, used), "tokens": tokens, **results}
    names = ("report.html", "examples.html", "results.md", "results.json")
    paths = report, browser, table, path = [folder.folder / name for name in names]
    with working("Pages", not args.quiet):
        write_json(path, results)
        replace_text(table, markdown_page(results))
        replace_text(report, report_page(results, sections, about))
        title = f"Examples of {results['title']}: {results['model']}"
        replace_text(browser, examples_page(title, scorers, examples, results["verdict"]))
        if args.wandb is not None:
            log_evaluation(args.wandb, results, full_rows(results), [report, browser])
    if args.quiet:
        return
    console = terminal()
    show_verdict(console, results["verdict"])
    headers, rows, left_out = terminal_rows(results, console.width)
    items = counted_items(results["num_items"], results.get("num_distinct", results["num_items"]))
    console.print(terminal_table(headers, rows, f"{results['title']}, {items}, {results['model']}"))
    notes = [LENGTH_NOTE.partition(" length-controlled")[0]] if "bias" in headers else []
    notes += [f"Further columns in {table.name}: {', '.join(left_out)}."] if left_out else []
    notes += [few_items(results).strip(), *(f"- {statement}" for statement in results["statements"])]
    if len(results["differences"]) > 3:
        notes.append("About one in twenty comparisons shows a difference by chance alone.")
    for note in filter(None, notes):
        console.print(note)
    if results.get("cut"):
        say(f"Truncated at the token limit: {counted(results['cut'], 'response')}.")
    console.print("\n".join(map(str, paths)), soft_wrap=True)


def about_run(
    args: argparse.Namespace, settings: Mapping[str, Any], used: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Description of the run behind results, from their records."""
    return {
        "model": args.model,
        "model_version": settings["model_version"],
        "data": args.data,
        "settings": dict(settings),
        "versions": versions("torch", "transformers", "trl", "numpy"),
        "command": args.command_line,
        "updated": now(),
        "seconds": round(sum(record["seconds"] for record in used), 3),
    }


def load_items(benchmark: Benchmark, data: str | None, limit: int | None) -> list[Item]:
    """Loads the items of a benchmark, at most `limit` of each group."""
    rows = read_rows(data, benchmark.hub, benchmark.name)
    items = benchmark.read(rows if benchmark.reads_images else text_only(rows))
    if not items:
        raise ValueError(f"{data or benchmark.name} has no items.")
    counts: dict[str, count[int]] = defaultdict(lambda: count(1))
    return [item for item in items if limit is None or next(counts[item.group]) <= limit]


def load_processor(
    items: Sequence[Item], names: Sequence[str], placement: Placement | ServedModel, args: argparse.Namespace
) -> ProcessingClass | None:
    """Processor for the images of items; `None` if there are none. `ValueError` if a model would not see them."""
    first = next((item for item in items if item.images), None)
    if first is None:
        return None
    if blind := [name for name in base_names(names) if needs_model(name)]:
        raise ValueError(f"Item {first.id} has images, but {blind[0]} reads only text. Remove it from --scorers.")
    if isinstance(placement, ServedModel) or not reads_images(placement.config):
        reason = "gets only token ids" if isinstance(placement, ServedModel) else "reads only text"
        raise ValueError(f"Item {first.id} has images, but --model {args.model} {reason}. Use a local vision model.")
    return load_processing_class(placement.config, args.trust_remote_code, args.tokenizer)


def check_run(args: argparse.Namespace) -> None:
    """Raises `ValueError` if several processes would share what only one can use, or W&B cannot be logged to."""
    check_wandb(getattr(args, "wandb", None))
    if processes().num_processes == 1:
        return
    if args.data == STREAM:
        raise ValueError("Only one process can read standard input. Pass a file as --data.")
    if getattr(args, "backend", None) == "vllm":
        raise ValueError(
            "--backend vllm needs a single process. To use several devices, set tensor_parallel_size in --vllm-kwargs."
        )
