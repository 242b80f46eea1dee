# SPDX-License-Identifier: Apache-2.0
"""
Speed and memory of the scoring pass, against what a user of TRL has instead.

    python -m benchmarks.scoring                            # about 10 minutes on 2 CPU cores
    python -m benchmarks.scoring --device cuda --rounds 20
    python -m benchmarks.scoring --quick                    # shows in seconds that everything runs
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.flops import ModelShape, padded_work, useful_work
from benchmarks.measure import add_common_options, alternate, describe_run, in_fresh_process, matmul_peak, spread
from benchmarks.memory import peak_of_method, peak_of_scorer
from benchmarks.methods import METHODS, Batches, Endotrl, Method, PaddedLogits, exact_log_probs
from benchmarks.scoring_page import write_page
from benchmarks.workloads import TokenSource, Workload, make_workloads, rm_bench_workload
from endotrl.frozen.names import resolve_model
from endotrl.rendering.renderer import Rendered
from endotrl.reporting import quiet_libraries, terminal_table


# Error of a log-probability in float32 above which the engine is wrong, in nats.
TOLERANCE = 1e-3
# Figure, and what it is called.
ACCURACY = (
    ("token_mean", "mean error of a token"),
    ("token_rms", "root mean square error of a token"),
    ("token_max", "largest error of a token"),
    ("reward_mean", "mean error of a reward"),
    ("reward_rms", "root mean square error of a reward"),
    ("reward_max", "largest error of a reward"),
)


def main() -> None:
    """Runs the benchmark and writes its JSON, page and plots."""
    args = make_parser().parse_args()
    for option in ("rounds", "eval_prompts", "accuracy_seeds"):
        if getattr(args, option) < 1:
            raise SystemExit(f"--{option.replace('_', '-')} is {getattr(args, option)}, but must be at least 1.")
    quiet_libraries()
    console = Console(width=min(80, Console().width))
    path = resolve_model(args.model)
    dtype = getattr(torch, args.dtype)
    source = TokenSource.of_texts(path, args.seed)
    eval_prompts = 2 if args.quick else args.eval_prompts
    workloads = make_workloads(source, args.quick, eval_prompts)
    if args.rm_bench:
        workloads[1] = rm_bench_workload(args.rm_bench, path, args.seed, eval_prompts)
    results: dict[str, Any] = {
        "run": describe_run("benchmarks.scoring", args.device),
        "settings": {
            "model": "SmolLM2-135M-Instruct" if args.model == "quickstart" else args.model,
            "dtype": args.dtype,
            "device": args.device,
            "rounds": args.rounds,
            "seed": args.seed,
            "quick": args.quick,
        },
    }
    # A reward's error is mostly what all its tokens share: a few rewards say nothing.
    batches = [batch for workload in workloads for batch in workload.batches]
    for seed in range(args.seed + 1, args.seed + args.accuracy_seeds):
        for workload in make_workloads(TokenSource.of_texts(path, seed), args.quick, eval_prompts):
            batches += workload.batches
    results["accuracy"] = accuracy(batches, path, dtype, args.device)
    console.print(accuracy_table(results["accuracy"]))
    size = 128 if args.quick else 2048
    peaks = [matmul_peak(dtype, args.device, size)]
    results["workloads"] = time_workloads(workloads, path, dtype, args.device, args.rounds)
    peaks.append(matmul_peak(dtype, args.device, size))
    results["matmul_size"], results["matmul_peak"] = size, max(peaks)
    for workload in workloads:
        entry = results["workloads"][workload.name]
        seconds = entry["methods"]["endotrl"]["seconds"]["median"]
        entry["share_of_peak"] = entry["useful_flops"] / seconds / results["matmul_peak"]
        measure_memory(workload, entry, path, dtype, args.device)
        console.print(workload_table(workload, entry))
    sweep_rounds = 1 if args.quick else 2
    results["sweeps"] = run_sweeps(source, path, dtype, args.device, sweep_rounds, args.quick)
    for name, points in results["sweeps"].items():
        console.print(sweep_table(name, points))
    if args.scale:
        results["scale"] = check_scale(source, path, dtype, args.device, args.quick)
        console.print(scale_table(results["scale"]))
    results["targets"] = check_targets(results)
    console.print(
        terminal_table(
            ["target", "wanted", "measured", "reached"],
            [[t["name"], t["wanted"], t["measured"], "yes" if t["reached"] else "no"] for t in results["targets"]],
            title="Targets",
        )
    )
    page = write_page(results, args.output)
    console.print(f"Written: {page}, {page.with_suffix('.json')}", markup=False, highlight=False, soft_wrap=True)


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scoring", description=__doc__.strip().splitlines()[0])
    add_common_options(parser)
    parser.add_argument("--rm-bench", type=Path, metavar="PATH", help="file of RM-Bench for the workload 'eval'")
    parser.add_argument("--eval-prompts", type=int, default=4, help="prompts of the workload 'eval' (default: 4)")
    parser.add_argument(
        "--accuracy-seeds", type=int, default=5, help="draws of all workloads whose errors are measured (default: 5)"
    )
    parser.add_argument("--scale", action="store_true", help="also score 20,000 completions, and one of 8,000 tokens")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds (default: 5)")
    return parser


def accuracy(batches: Batches, path: str, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """
    Errors, in nats, of every method's log-probabilities and rewards against float32.

    Raises:
        `RuntimeError`: If endotrl errs in float32 by more than rounding.
    """
    rows = [row for batch in batches for row in batch]
    truth = exact_log_probs(path, dtype, device, rows)
    errors = {}
    for name, method in METHODS.items():
        if name == "reward_model":
            continue
        found = method(path, dtype, device)(batches)
        differences = [a.double() - b.double() for a, b in zip(found, truth, strict=True)]
        tokens, rewards = torch.cat(differences), torch.stack([d.sum() for d in differences])
        errors[name] = {
            f"{kind}_{pool}": value.item()
            for kind, values in (("token", tokens), ("reward", rewards))
            for pool, value in (
                ("mean", values.abs().mean()),
                ("rms", values.square().mean().sqrt()),
                ("max", values.abs().max()),
            )
        }
        if dtype == torch.float32 and name.startswith("endotrl") and tokens.abs().max() > TOLERANCE:
            raise RuntimeError(
                f"{name} differs from the float32 reference by {tokens.abs().max():.2g} nats; at most {TOLERANCE} is "
                "rounding. Its speed means nothing."
            )
    return {"rewards": len(rows), "tokens": sum(map(len, truth)), "errors": errors}


def time_workloads(
    workloads: list[Workload], path: str, dtype: torch.dtype, device: str, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds of every method on every workload, and what the work was."""
    methods = {name: method(path, dtype, device) for name, method in METHODS.items()}
    shape = ModelShape.of(methods["padded_logits"].model)  # type: ignore[attr-defined]
    results = {}
    for workload in workloads:
        times = alternate(
            {name: partial(method, workload.batches) for name, method in methods.items()},
            rounds,
            device,
            workload.name,
        )
        useful, padded = useful_work(workload.rows), padded_work(workload.batches)
        results[workload.name] = {
            "description": workload.description,
            "useful_tokens": useful.tokens,
            "padded_tokens": padded.tokens,
            "scored_tokens": useful.positions,
            "useful_flops": useful.flops(shape),
            "padded_flops": padded.flops(shape),
            "methods": {name: timing(times, name) for name in METHODS},
        }
    return results


def timing(times: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Seconds of a method, and its ratio to endotrl's, round by round."""
    return {"seconds": spread(times[name]), "ratio": ratio(times, name), "rounds": times[name]}


def ratio(times: dict[str, list[float]], name: str) -> dict[str, float]:
    """How many times as long as endotrl a method takes."""
    return spread([a / b for a, b in zip(times[name], times["endotrl"], strict=True)])


def measure_memory(workload: Workload, entry: dict[str, Any], path: str, dtype: torch.dtype, device: str) -> None:
    """Adds every method's peak of memory to its entry."""
    for name in METHODS:
        extra, how = in_fresh_process(peak_of_method, name, path, dtype, device, workload.batches)
        entry["methods"][name]["peak_extra_bytes"] = extra
        entry["memory_measured_by"] = how


def run_sweeps(
    source: TokenSource, path: str, dtype: torch.dtype, device: str, rounds: int, quick: bool
) -> dict[str, list[dict[str, Any]]]:
    """endotrl and (a) over completions per prompt, prompt length and vocabulary size."""
    length = 8 if quick else 64
    counts = (1, 2) if quick else (1, 2, 4, 8, 16, 32)
    prompt_lengths = (16, 32) if quick else (32, 64, 128, 256, 512, 1024)
    vocab_sizes = (512, 1024) if quick else tuple(2**k for k in range(13, 19))
    prompt, group = prompt_lengths[0] if quick else 256, 2 if quick else 8

    methods = {"endotrl": Endotrl(path, dtype, device), "padded_logits": PaddedLogits(path, dtype, device)}
    point = partial(sweep_point, methods, rounds, device)
    sweeps = {
        "completions per prompt": [point(n, source.group(prompt, [length] * n), f"{n} completions") for n in counts],
        "prompt tokens": [point(n, source.group(n, [length] * group), f"prompt of {n}") for n in prompt_lengths],
        "vocabulary": [],
    }
    for vocab_size in vocab_sizes:
        rows = TokenSource.of_vocabulary(vocab_size, source.random.randrange(2**31)).group(length, [length] * group)
        with tempfile.TemporaryDirectory() as folder:
            save_random_model(folder, vocab_size)
            methods = {"endotrl": Endotrl(folder, dtype, device), "padded_logits": PaddedLogits(folder, dtype, device)}
            title = f"vocabulary of {vocab_size}"
            sweeps["vocabulary"].append(sweep_point(methods, rounds, device, vocab_size, rows, title))
    return sweeps


def sweep_point(
    methods: dict[str, Method], rounds: int, device: str, x: int, rows: list[Rendered], title: str
) -> dict[str, Any]:
    """Times the methods on one batch, at the place `x` of a sweep."""
    times = alternate({name: partial(method, [rows]) for name, method in methods.items()}, rounds, device, title)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {"x": x, "seconds": seconds, "ratio": ratio(times, "padded_logits")}


def save_random_model(folder: str, vocab_size: int) -> None:
    """A backbone so small that the head is nearly all of the work."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def check_scale(source: TokenSource, path: str, dtype: torch.dtype, device: str, quick: bool) -> dict[str, Any]:
    """
    Memory of many short completions in one call (random model, vocabulary of 8,192) and of one of 8k tokens (the
    model).
    """
    counts, long_tokens = ((40, 80), 64) if quick else ((2000, 20000), 8128)
    config = AutoConfig.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        save_random_model(folder, vocab_size=8192)
        tokens = TokenSource.of_vocabulary(8192, source.random.randrange(2**31))
        rows = [
            row
            for _ in range(counts[-1] // 8)
            for row in tokens.group(16, [tokens.random.randint(5, 40) for _ in range(8)])
        ]
        many = []
        for count in counts:
            extra, result = in_fresh_process(peak_of_scorer, folder, dtype, device, rows[:count])
            many.append({"completions": count, "peak_extra_bytes": extra, "result_bytes": result})
    extra, _ = in_fresh_process(peak_of_scorer, path, dtype, device, source.group(64, [long_tokens]))
    return {
        "many": many,
        "long": {
            "tokens": long_tokens,
            "peak_extra_bytes": extra,
            "full_logits_bytes": (64 + long_tokens) * config.vocab_size * 4,
        },
    }


def check_targets(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that this project wants to reach, beside those of this run."""
    group, evaluation, long = (results["workloads"][name] for name in ("group", "eval", "long"))

    def speed(name: str, entry: dict[str, Any], rival: str, wanted: float) -> dict[str, Any]:
        found = entry["methods"][rival]["ratio"]["median"]
        label = METHODS[rival].label[:3]
        return {
            "name": f"{name}: times as fast as {label}",
            "wanted": f">= {wanted}",
            "measured": f"{found:.2f}",
            "reached": found >= wanted,
        }

    memory = {name: group["methods"][name]["peak_extra_bytes"] for name in ("endotrl", "padded_logits")}
    part = memory["endotrl"] / max(1, memory["padded_logits"])
    targets = [
        speed("group", group, "padded_logits", 3.5),
        speed("group", group, "fused_head", 3.0),
        speed("group", group, "reward_model", 2.5),
        speed("eval", evaluation, "padded_logits", 2.0),
        speed("long", long, "fused_head", 1.0),
        {
            "name": "group: extra memory, of (a)'s",
            "wanted": "< 10%",
            "measured": f"{part:.1%}",
            "reached": part < 0.1,
        },
    ]
    for name, entry in results["workloads"].items():
        share = entry["share_of_peak"]
        targets.append(
            {
                "name": f"{name}: useful FLOP/s, of the matmul peak",
                "wanted": ">= 60%",
                "measured": f"{share:.1%}",
                "reached": share >= 0.6,
            }
        )
    for key, label in ACCURACY:
        ours, naive = (results["accuracy"]["errors"][name][key] for name in ("endotrl", "padded_logits"))
        limit, wanted = naive, f"<= {naive:.4f} (a)"
        if results["settings"]["dtype"] == "float32":
            limit, wanted = TOLERANCE, f"<= {TOLERANCE}"
        targets.append(
            {"name": f"{label}, nats", "wanted": wanted, "measured": f"{ours:.2g}", "reached": ours <= limit}
        )
    return targets


def accuracy_table(accuracy: dict[str, Any]) -> Any:
    """Errors against float32."""
    return terminal_table(
        ["token", "RMS", "max", "reward", "RMS", "max", "method"],
        [
            [*(f"{value:.4f}" for value in errors.values()), METHODS[name].label]
            for name, errors in accuracy["errors"].items()
        ],
        title=f"Errors of {accuracy['rewards']} rewards against float32, nats",
    )


def workload_table(workload: Workload, entry: dict[str, Any]) -> Any:
    """Speed and memory of every method on a workload."""
    return terminal_table(
        ["seconds", "ratio", "min..max", "MB", "method"],
        [
            [
                f"{m['seconds']['median']:.3f}",
                f"{m['ratio']['median']:.2f}",
                f"{m['ratio']['min']:.2f}..{m['ratio']['max']:.2f}",
                f"{m['peak_extra_bytes'] / 1e6:,.0f}",
                METHODS[name].label,
            ]
            for name, m in entry["methods"].items()
        ],
        title=f"{workload.name}: {workload.description}",
    )


def sweep_table(name: str, points: list[dict[str, Any]]) -> Any:
    """endotrl and (a) along one axis."""
    return terminal_table(
        [name, "endotrl, s", "(a), s", "ratio"],
        [
            [
                f"{p['x']:,}",
                f"{p['seconds']['endotrl']:.3f}",
                f"{p['seconds']['padded_logits']:.3f}",
                f"{p['ratio']['median']:.2f}",
            ]
            for p in points
        ],
    )


def scale_table(scale: dict[str, Any]) -> Any:
    """Memory of large calls."""
    long = scale["long"]
    return terminal_table(
        ["extra MB", "of these, results MB", "call"],
        [
            *(
                [
                    f"{m['peak_extra_bytes'] / 1e6:,.1f}",
                    f"{m['result_bytes'] / 1e6:,.1f}",
                    f"{m['completions']:,} completions",
                ]
                for m in scale["many"]
            ),
            [
                f"{long['peak_extra_bytes'] / 1e6:,.1f}",
                "",
                f"one of {long['tokens']:,} tokens; its logits: {long['full_logits_bytes'] / 1e6:,.0f} MB",
            ],
        ],
        title="Scale",
    )


if __name__ == "__main__":
    main()
