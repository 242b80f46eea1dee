# SPDX-License-Identifier: Apache-2.0
"""Statistics of completions logged by TRL as Parquet (`log_completions=True`), with the monitor's names."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from ...rendering.messages import texts_of
from ..batch_statistics import ValuesSeen, distinct_completions, group_correlation, repetition


MAX_FILES = 64  # files to read, one per step: evenly spread over the run, and the last one


def completion_entries(paths: Sequence[Path]) -> list[dict[str, float]]:
    """
    One log entry per file of completions, in order of steps, with the names that [`CollapseMonitor`] and TRL use in
    their logs, counting words instead of tokens; and `words`, their mean number. Raises `ValueError` if a file is not
    one of TRL's tables of completions.

    The trained reward is the column that the advantage follows most closely within groups; its mean is `reward`.
    """
    stride = math.ceil(len(paths) / MAX_FILES)
    entries, seen = [], ValuesSeen()
    for path in reversed(paths[::-1][::stride]):
        try:
            columns = pq.read_table(path).to_pydict()
        except (OSError, ValueError) as error:
            if path == paths[-1]:  # still being written
                continue
            raise ValueError(f"{path} is not a Parquet file, or is damaged: {error}") from error
        missing = {"step", "prompt", "completion"} - columns.keys()
        if missing or not columns["step"]:
            lack = f"the columns {', '.join(sorted(missing))} are missing" if missing else "it has no rows"
            raise ValueError(f"{path} is not one of TRL's tables of completions: {lack}.")
        entry = _entry(columns, seen)
        entry["collapse/reward_is_verdict"] = float(seen.is_verdict)
        entries.append(entry)
    return entries


def _entry(columns: dict[str, list[Any]], seen: ValuesSeen) -> dict[str, float]:
    written = columns["completion"]  # TRL writes text, or messages
    texts = [c if isinstance(c, str) else "\n".join(t for m in c or [] for t in texts_of(m)) for c in written]
    words = [text.split() for text in texts]
    repeated = [value for value in map(repetition, words) if value is not None]
    rewards = {
        name: torch.tensor([math.nan if value is None else float(value) for value in values])
        for name, values in columns.items()
        if name not in ("step", "advantage")
        and all(value is None or isinstance(value, int | float) for value in values)
    }
    entry = {
        "step": float(columns["step"][-1]),
        "words": sum(map(len, words)) / len(words),
        "collapse/repetition": sum(repeated) / max(len(repeated), 1),
        **{f"rewards/{name}/mean": values.nanmean().item() for name, values in rewards.items()},
    }
    sizes = [len(list(group)) for _, group in itertools.groupby(map(str, columns["prompt"]))]
    size = min(sizes)
    if size < 2 or any(other % size for other in sizes):  # no groups
        return entry
    hashes = torch.tensor([hash(" ".join(w)) for w in words])
    entry["collapse/distinct_completions"] = distinct_completions(hashes, size)
    followed = dict.fromkeys(rewards, 1.0)
    if "advantage" in columns:
        advantage = torch.tensor(columns["advantage"], dtype=torch.float64)
        entry["frac_reward_zero_std"] = (advantage.view(-1, size) == 0).all(dim=1).double().mean().item()
        agreements = {name: group_correlation(values, advantage, size) for name, values in rewards.items()}
        followed = {name: 0.0 if found is None else found.rho for name, found in agreements.items()}
    if not rewards:  # as of TRL's DistillationTrainer
        return entry
    trained = rewards[max(followed, key=lambda name: followed[name])]
    entry["reward"] = trained.nanmean().item()
    seen.add([(i // size, completion) for i, completion in enumerate(hashes.tolist())], trained.tolist())
    correlation = group_correlation(trained, torch.tensor([float(len(w)) for w in words]), size)
    if correlation is not None:
        entry["collapse/length_correlation"] = correlation.rho
    return entry
