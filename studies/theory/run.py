# SPDX-License-Identifier: Apache-2.0
"""All experiments in a row, and what is written of them."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tqdm.auto import tqdm

from benchmarks.measure import write_figures
from endotrl.reporting import terminal_table
from endotrl.runs.record import machine, versions

from . import experiments
from .report import exponent_rows, write_page, write_plots


WIDTH = 80
# Families whose seeds differ much.
MANY_SEEDS = ("learned cliff", "random MDP", "random MDP, worst")


def run_theory(output_dir: str | os.PathLike[str] = "theory-output", num_seeds: int = 20) -> dict[str, Any]:
    """
    Runs every experiment and writes `theory.json.gz`, the page `theory.md` and its plots.

    Args:
        output_dir (`str`, *optional*, defaults to `"theory-output"`):
            Folder to write. Files of an earlier run in it are replaced.
        num_seeds (`int`, *optional*, defaults to `20`):
            Seeds 0, 1, ... of every experiment; the learned cliff and the random MDPs take twice as many.

    Returns:
        `dict[str, Any]`: the content of `theory.json.gz`.
    """
    output = Path(output_dir)
    output.mkdir(parents=True, exist_ok=True)
    console = Console(width=min(WIDTH, Console().width))
    started = time.perf_counter()
    threads = torch.get_num_threads()
    # Tables are small: more threads would wait for each other, on a busy machine most of the time.
    torch.set_num_threads(1)
    try:
        results = measure(num_seeds)
    finally:
        torch.set_num_threads(threads)
    results["environment"] = {
        **versions("torch"),
        "machine": f"{machine()}, 1 thread",
        "seeds": num_seeds,
        "seconds": round(time.perf_counter() - started, 1),
    }
    figures = write_figures(output / "theory.json.gz", results)
    write_plots(results, output)
    page = write_page(results, output)
    headers, rows = exponent_rows(results)
    # Without the column of errors, to fit 80 columns.
    headers, rows = [headers[0], *headers[2:]], [[row[0], *row[2:]] for row in rows]
    console.print(terminal_table(headers, rows, title="Loss of true return grows as horizon ** exponent"))
    console.print(f"Page: {page}; figures: {figures}.", markup=False, highlight=False, soft_wrap=True)
    return results


def measure(num_seeds: int) -> dict[str, Any]:
    """Every experiment of [`studies.theory.experiments`], with a progress bar."""
    seeds, few = range(num_seeds), range(min(num_seeds, 5))
    pairs = ((1.0, 1.0), (1.0, 0.3), (0.5, 0.5), (0.5, 0.1))
    with tqdm(total=len(experiments.FAMILIES) + 5 + len(pairs), unit=" experiments") as bar:

        def done(result: Any) -> Any:
            bar.update()
            return result

        growth = []
        for name in experiments.FAMILIES:
            bar.set_description(f"growth: {name}")
            growth.append(done(experiments.growth(name, range(2 * num_seeds) if name in MANY_SEEDS else seeds)))
        bar.set_description("growth in epsilon")
        growth_in_epsilon = done(experiments.growth_in_epsilon(seeds))
        bar.set_description("penalty")
        beta_path = done(experiments.beta_path(seeds))
        bar.set_description("preferences")
        preferences = done(experiments.preference_total_variation(few))
        bar.set_description("inverse RL")
        inverse_rl = done(experiments.inverse_rl_is_next_token_prediction(few))
        bar.set_description("rounds")
        rounds = done(experiments.rounds())
        bar.set_description("gradient ascent")
        power = [done(curve) for curve in experiments.power_by_gradient(pairs)]
    return {
        "growth": growth,
        "growth_in_epsilon": growth_in_epsilon,
        "beta_path": beta_path,
        "preferences": preferences,
        "inverse_rl": inverse_rl,
        "power": power,
        "rounds": rounds,
    }
