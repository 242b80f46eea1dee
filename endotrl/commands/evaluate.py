# SPDX-License-Identifier: Apache-2.0
"""The command `endotrl eval BENCHMARK`: from its options to files and the terminal."""

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState

from ..data.sources import STREAM, read_rows, text_only
from ..evaluation.benchmarks import BENCHMARKS, Benchmark
from ..evaluation.engine import Engine
from ..evaluation.items import Item
from ..evaluation.results import evaluate
from ..evaluation.results_page import report_page
from ..evaluation.run_folder import RunFolder, open_folder
from ..evaluation.runner import score_items
from ..evaluation.scorer_names import DEFAULT, base_names, check_name, expand_names, make_scorer, served_names
from ..evaluation.tables import few_items, markdown_page, terminal_rows
from ..frozen.names import load_tokenizer, resolve_model
from ..frozen.own_copy import resolve_dtype
from ..frozen.placement import place
from ..frozen.served import ServedModel, is_url
from ..reporting import say, terminal_table
from ..runs.files import write_json
from ..runs.processes import processes
from ..runs.record import now, versions
from ..score_file.output_files import model_digest
from ..scoring.scorer import Placement
from .common import choose_dtype


def run_benchmark(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Runs `endotrl eval BENCHMARK`; returns what `results.json` holds, in the main process."""
    check_stream(args.data)
    benchmark = BENCHMARKS[args.benchmark]
    items = load_items(benchmark, args.data, args.limit, {key: getattr(args, key) for key in benchmark.options})
    names = expand_names(args.scorers or DEFAULT, steps=items[0].steps is not None)
    output = args.output or f"eval-{benchmark.name}"
    choose_dtype(args, f"{output}/settings.json")
    placement, settings = open_model(args)
    chat = benchmark.chat if args.chat is None else args.chat
    settings = {
        "benchmark": benchmark.name,
        **settings,
        "alpha": args.alpha,
        "chat": chat,
        "max_response_tokens": args.max_response_tokens,
        "judge_reasoning_tokens": args.judge_reasoning,
    }
    vocab_size = placement.config.get_text_config().vocab_size
    if isinstance(placement, ServedModel):
        names = served_names(names, args.scorers is not None, items[0].steps is not None, vocab_size)
        if args.alpha != 1.0 or args.judge_reasoning:
            raise ValueError(
                "A server gives log-probabilities of given tokens at temperature 1: no other --alpha can be had from "
                "it, and no --judge-reasoning, which is generated."
            )
    for name in base_names(names):
        check_name(name, vocab_size, args.trust_remote_code)
    tokenizer = load_tokenizer(args.tokenizer or placement.config._name_or_path, args.trust_remote_code)
    if tokenizer.chat_template is None:
        settings["chat"] = chat = False
        if any(not isinstance(item.prompt, str) for item in items):
            raise ValueError(f"{args.data} has conversations, and the tokenizer of {args.model} has no chat template.")
    folder = open_folder(output, settings, args.overwrite)
    started = now()

    def make_engine() -> Engine:
        return Engine(
            placement,
            tokenizer,
            chat=chat,
            separator="\n\n" if benchmark.chat else "",
            alpha=args.alpha,
            max_response_tokens=args.max_response_tokens,
            max_tokens_per_batch=args.max_tokens_per_batch,
        )

    records = score_items(
        items,
        names,
        folder,
        vocab_size,
        make_engine,
        lambda name, engine: make_scorer(
            name, engine, args.judge_reasoning, args.dtype, args.device, args.trust_remote_code
        ),
        keep_stats=not args.no_token_stats,
        progress=not args.quiet and processes().is_main_process,
    )
    if not processes().is_main_process:
        return {}
    keys = {item.key for item in items}
    results = {
        "benchmark": benchmark.name,
        "model": args.model,
        "model_version": settings["model_version"],
        "data": args.data or (benchmark.hub.name if benchmark.hub else None),
        "settings": settings,
        "versions": versions("torch", "transformers", "trl", "numpy"),
        "command": command,
        "started": started,
        "updated": now(),
        "seconds": round(sum(records[key]["seconds"] for key in keys), 3),
        "tokens": sum(sum(records[key]["tokens"]) for key in keys),
        "num_items": len(items),
        "cut": sum(records[key]["cut"] for key in keys),
        **evaluate(benchmark, items, names, records),
    }
    write_json(folder.results_path, results)
    folder.table_path.write_text(markdown_page(results), encoding="utf-8")
    folder.report_path.write_text(report_page(results, items, folder.stats, tokenizer, vocab_size), encoding="utf-8")
    if not args.quiet:
        show(results, folder)
    return results


def load_items(benchmark: Benchmark, data: str | None, limit: int | None, options: Mapping[str, Any]) -> list[Item]:
    """Items of a benchmark, at most `limit` of each group."""
    items = benchmark.read(text_only(read_rows(data, benchmark.hub, benchmark.name)), **options)
    if not items:
        raise ValueError(f"{data or benchmark.name} has no items.")
    counts: dict[str, int] = {}
    kept = []
    for item in items:
        counts[item.group] = counts.get(item.group, 0) + 1
        if limit is None or counts[item.group] <= limit:
            kept.append(item)
    return kept


def check_stream(data: str | None) -> None:
    """Raises `ValueError` if several processes would share standard input."""
    if data == STREAM and processes().num_processes > 1:
        raise ValueError("Standard input belongs to one process. With several, name a file.")


def check_processes(args: argparse.Namespace) -> None:
    """Raises `ValueError` if several processes would share what is for one."""
    check_stream(args.data)
    if args.backend == "vllm" and processes().num_processes > 1:
        raise ValueError(
            "vLLM spreads over devices by itself. Start one process, and set tensor_parallel_size in --vllm-kwargs."
        )


def open_answering_model(args: argparse.Namespace, output: str) -> tuple[Placement, dict[str, Any]]:
    """[`open_model`] for a command whose model answers into a folder. Raises `ValueError` if it is on a server."""
    if is_url(args.model):
        raise ValueError(
            f"--model {args.model} is to answer, which a model on a server does not do here. Name a path."
        )
    choose_dtype(args, f"{output}/settings.json")
    placement, settings = open_model(args)
    assert not isinstance(placement, ServedModel)
    return placement, settings


def open_model(args: argparse.Namespace) -> tuple[Placement | ServedModel, dict[str, Any]]:
    """The frozen model, not loaded yet (but connected to, if it is served), and the settings that tell which it is."""
    name = resolve_model(args.model)
    if args.device is not None:
        try:
            torch.empty(0, device=args.device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {args.device} cannot be used: {str(error).splitlines()[0]}") from error
    placement = place(name, args.dtype, args.device, args.trust_remote_code, False, args.model_init_kwargs)
    assert placement is not None
    if isinstance(placement, ServedModel):
        placement.connect(load_tokenizer(args.tokenizer or placement.tokenizer_name, args.trust_remote_code))
        return placement, {"model": args.model, "model_version": placement.version}
    dtype = resolve_dtype(args.dtype, PartialState().device if args.device is None else torch.device(args.device))
    return placement, {
        "model": args.model,
        "model_version": model_digest(name) or placement.config._commit_hash,
        "dtype": str(dtype).removeprefix("torch."),
        **({"model_init_kwargs": args.model_init_kwargs} if args.model_init_kwargs else {}),
    }


def show(results: Mapping[str, Any], folder: RunFolder) -> None:
    """The table and what it says, on the terminal."""
    from rich.console import Console

    console = Console(highlight=False)
    title = f"{results['title']}, {results['num_items']} items, {results['model']}"
    console.print()
    console.print(terminal_table(*terminal_rows(results), title, fold=True))
    if results["length"]:
        console.print(
            "bias: accuracy where the better response is longer minus where it is shorter; 0 is balanced.",
            soft_wrap=False,
        )
    if few := few_items(results):
        console.print(f"95% intervals:{few}")
    for statement in results["statements"]:
        console.print(f"- {statement}", markup=False)
    if len(results["statements"]) > 3:
        console.print("Of many comparisons, one in twenty looks like a difference by chance alone.")
    if results["cut"]:
        say(f"{results['cut']} responses were cut at the limit of tokens.")
    for path in (folder.report_path, folder.table_path, folder.results_path):
        console.print(str(path), markup=False, soft_wrap=True)
