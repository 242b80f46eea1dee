# SPDX-License-Identifier: Apache-2.0
"""Clock, memory and machine."""

import argparse
import gc
import gzip
import json
import os
import platform
import re
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm.auto import tqdm

from endotrl.reporting import counted
from endotrl.runs.files import replacing
from endotrl.runs.record import versions


PACKAGES = ("torch", "transformers", "trl")


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options that benchmarks of speed have."""
    parser.add_argument(
        "--model", default="quickstart", help="checkpoint (default: quickstart, SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="default: bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--seed", type=int, default=0, help="seed of what is scored (default: 0)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, whose figures mean nothing")
    parser.add_argument(
        "--output", type=Path, default=Path("docs"), help="folder of results/ and images/ (default: docs)"
    )


def describe_run(module: str, device: str, arguments: str | None = None) -> dict[str, Any]:
    """
    Command, date, machine and versions, for the head of a page. `arguments` are shown in place of those given: the
    ones that make the whole page, whatever part of it was made now, without folders of this machine.
    """
    given = shlex.join(sys.argv[1:]) if arguments is None else arguments
    return {
        "command": f"python -m {module} {given}".strip(),
        "date": date.today().isoformat(),
        "processor": _processor(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        **versions(*PACKAGES),
    }


def machine_line(run: Mapping[str, Any]) -> str:
    """[`describe_run`] as a sentence of Markdown."""
    versions = ", ".join(f"{package} {run[package]}" for package in PACKAGES)
    return (
        f"Command: `{run['command']}`. Date: {run['date']}. Machine: {run['processor']}, {run['cores']} cores, "
        f"{counted(run['threads'], 'thread')}, {run['system']}; {versions}, Python {run['python']}."
    )


def markdown_table(headers: list[str], rows: list[list[str]]) -> str:
    """A table of Markdown; the first column is aligned left, all others right."""
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_figures(path: Path, figures: Any) -> Path:
    """
    Writes all figures behind a page as gzipped JSON, whole or not at all.

    Args:
        path (`Path`):
            File whose name ends in `.json.gz`. The same figures give the same bytes.
    """
    with replacing(path) as file:
        file.write(gzip.compress(json.dumps(figures, ensure_ascii=False).encode(), mtime=0))
    return path


def read_figures(path: Path) -> Any:
    """What [`write_figures`] wrote."""
    return json.loads(gzip.decompress(path.read_bytes()))


def synchronize(device: str) -> None:
    """Waits for the device to finish."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def alternate(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: str, title: str, warm: bool = False
) -> dict[str, list[float]]:
    """
    Seconds of each run in each round. In every round each runs once, beginning with another one each time, so that
    what else happens on the machine hits all alike; a first round is not counted, unless all are `warm` already.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    first = 1 if warm else 0
    with tqdm(total=(rounds + 1 - first) * len(runs), desc=title, unit=" passes") as bar:
        for round_ in range(first, rounds + 1):
            shift = round_ % len(names)
            for name in names[shift:] + names[:shift]:
                synchronize(device)
                started = time.perf_counter()
                runs[name]()
                synchronize(device)
                if round_ > 0:
                    seconds[name].append(time.perf_counter() - started)
                bar.update()
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def matmul_peak(dtype: torch.dtype, device: str, size: int = 2048, repeats: int = 10) -> float:
    """FLOP/s of the fastest of several products of two square matrices."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    times = alternate({"matmul": lambda: a @ b}, repeats, device, f"matmul {size}")["matmul"]
    return 2 * size**3 / min(times)


def memory_bandwidth(device: str, size: int = 2**28, repeats: int = 5) -> float:
    """Bytes per second, read and written, of the fastest of several copies of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = alternate({"copy": lambda: target.copy_(source)}, repeats, device, f"copy {size:,} bytes")["copy"]
    return 2 * size / min(times)


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """
    Calls a function in a process of its own, which has imported the libraries and done nothing else: what earlier
    measurements left in the allocator does not count.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.memory"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


class Peak:
    """
    Highest memory use inside a `with` block, above what was in use when it began.

    Attributes:
        extra (`int`):
            Bytes, after the block. On CUDA, of the allocator; elsewhere, resident memory of the process.
        method (`str`):
            How it was measured.
    """

    extra = 0
    method = ""


@contextmanager
def peak_memory(device: str) -> Iterator[Peak]:
    """Measures the highest memory use inside."""
    peak = Peak()
    gc.collect()
    if torch.device(device).type == "cuda":
        peak.method = "torch.cuda.max_memory_allocated"
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.extra = torch.cuda.max_memory_allocated(device) - before
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark (proc(5))
    except OSError:
        peak.method = "resident memory, sampled every 2 ms"
        yield from _sampled(peak)
        return
    peak.method = "the kernel's high-water mark (VmHWM)"
    before = _status_bytes("VmRSS")
    yield peak
    peak.extra = _status_bytes("VmHWM") - before


def _sampled(peak: Peak) -> Iterator[Peak]:
    process, done = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
    peak.extra = max(highest, process.memory_info().rss) - before


def _status_bytes(key: str) -> int:
    (kilobytes,) = re.findall(rf"^{key}:\s*(\d+) kB", Path("/proc/self/status").read_text(), flags=re.MULTILINE)
    return int(kilobytes) * 1024


def _processor(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), flags=re.MULTILINE) if info.exists() else []
    return names[0] if names else platform.processor()
