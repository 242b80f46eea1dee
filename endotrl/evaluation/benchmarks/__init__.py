# SPDX-License-Identifier: Apache-2.0
"""Reward model benchmarks, one module each: row format, correctness, metrics."""

from . import dsp, judge_bench, llmbar, preference, prm_bench, process_bench, reward_bench, reward_bench_2, rm_bench
from .benchmark import Benchmark


_MODULES = (rm_bench, reward_bench, reward_bench_2, process_bench, prm_bench, dsp, judge_bench, llmbar, preference)
BENCHMARKS: dict[str, Benchmark] = {module.BENCHMARK.name: module.BENCHMARK for module in _MODULES}

__all__ = ["BENCHMARKS", "Benchmark"]
