# SPDX-License-Identifier: Apache-2.0
"""
What bounds a scoring pass on a CPU: the products of the model's own shapes, attention, and elementwise operations, as
they are and fused by `torch.compile`, beside the matmul peak and the memory's bandwidth.

    python -m benchmarks.cpu_roofline                  # 2 minutes, most of which is compilation
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from benchmarks.flops import ModelShape, Work
from benchmarks.measure import alternate, matmul_peak, memory_bandwidth
from endotrl.frozen.names import resolve_model
from endotrl.reporting import quiet_libraries, terminal_table


def main() -> None:
    """Measures and prints."""
    args = make_parser().parse_args()
    quiet_libraries()
    model = AutoModelForCausalLM.from_pretrained(resolve_model(args.model), dtype=getattr(torch, args.dtype)).eval()
    config = model.config
    # A causal row takes the model's own attention: what is asked is everything else.
    ids = torch.arange(args.tokens)[None] * 7919 % config.vocab_size
    runs: dict[str, Callable[[], object]] = {
        "as transformers writes it": partial(model.model, ids, use_cache=False),
        "products and attention": partial(products, model, args.tokens, attention=True),
        "products": partial(products, model, args.tokens, attention=False),
    }
    with torch.inference_mode():
        operations = self_seconds(runs["as transformers writes it"])
        if not args.no_compile:
            compiled = AutoModelForCausalLM.from_pretrained(resolve_model(args.model), dtype=model.dtype).eval()
            for layer in compiled.model.layers:
                layer.compile(dynamic=False)
            runs["decoder layers compiled"] = partial(compiled.model, ids, use_cache=False)
        seconds = {
            name: min(times) for name, times in alternate(runs, args.rounds, "cpu", "passes of the backbone").items()
        }
        peak = matmul_peak(model.dtype, "cpu")
        bandwidth, cached = memory_bandwidth("cpu"), memory_bandwidth("cpu", size=2**19)
    work = Work(args.tokens, args.tokens * (args.tokens + 1) // 2, 0)
    flops = work.flops(ModelShape.of(model))
    least = config.num_hidden_layers * args.tokens * model.dtype.itemsize * elementwise(config)
    bound = flops / peak + least / bandwidth
    console = Console(width=80)
    console.print(
        terminal_table(
            ["ms", "of peak", "pass"],
            [
                [f"{1e3 * value:.1f}", f"{flops / value / peak:.0%}", name]
                for name, value in [*seconds.items(), ("products at the peak, elementwise from memory once", bound)]
            ],
            title=f"{args.tokens} tokens, {args.dtype}, {torch.get_num_threads()} threads",
        )
    )
    console.print(
        f"Matmul peak {peak / 1e9:,.0f} GFLOP/s; memory {bandwidth / 1e9:.1f} GB/s, in the cache {cached / 1e9:.1f} "
        f"GB/s; elementwise operations move at least {least / 1e6:,.0f} MB ({1e3 * least / bandwidth:.1f} ms)."
    )
    total = sum(operations.values())
    console.print(
        terminal_table(
            ["share", "ms", "operation"],
            [
                [f"{value / total:.0%}", f"{1e3 * value:.1f}", name]
                for name, value in sorted(operations.items(), key=lambda entry: -entry[1])[:14]
            ],
            title="Where the time of the pass goes",
        )
    )


def make_parser() -> argparse.ArgumentParser:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_roofline", description=__doc__.strip().splitlines()[0]
    )
    parser.add_argument("--model", default="quickstart", help="checkpoint (default: quickstart)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="default: bfloat16")
    parser.add_argument("--tokens", type=int, default=1104, help="length of the row (default: 1104)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the fastest counts (default: 5)")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    return parser


def elementwise(config: PretrainedConfig) -> int:
    """
    Numbers that the elementwise operations of a layer read and write per token if each ran once, in one go: two norms
    (read, write), two residual sums (two reads, a write), rotary (queries and keys, read and written), activation and
    product of the MLP (two reads, a write). As transformers writes them, each is several operations.
    """
    heads = config.num_attention_heads + config.num_key_value_heads
    head_dim = config.hidden_size // config.num_attention_heads
    return (2 * 2 + 2 * 3) * config.hidden_size + 2 * heads * head_dim + 3 * config.intermediate_size


def products(model: PreTrainedModel, num_tokens: int, attention: bool) -> None:
    """The matrix products of a pass of the backbone, and its attention, with nothing between them."""
    config = model.config
    inputs: dict[int, Tensor] = {}
    heads, head_dim = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    query, key = (
        torch.ones(1, n, num_tokens, head_dim, dtype=model.dtype) for n in (heads, config.num_key_value_heads)
    )
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                width = module.in_features
                if width not in inputs:
                    inputs[width] = torch.ones(num_tokens, width, dtype=model.dtype)
                linear(inputs[width], module.weight)
        if attention:
            scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)


def self_seconds(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of each operation by itself in one pass, after another one."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}


if __name__ == "__main__":
    main()
