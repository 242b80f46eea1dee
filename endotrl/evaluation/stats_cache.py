# SPDX-License-Identifier: Apache-2.0
"""Token statistics on disk, so that other forms of the reward can be tried without the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runs.files import replacing
from ..scoring.token_stats import TokenStats
from .engine import ScoredResponse
from .items import Item


_OF_STATS = ("positions", "soft_values", "token_ids", "chosen_logits", "entropies", "mean_logits")
_OF_RESPONSE = ("log_probs_alone", "step_of_token")
_WHOLE = ("positions", "token_ids", "step_of_token")  # numbers


class StatsCache:
    """
    Token statistics in a folder: a compressed `.npz` file for each block of items, of plain arrays only. The number of
    a file, modulo `num_processes`, is that of the process that wrote it.
    """

    def __init__(self, folder: Path, process: int = 0, num_processes: int = 1) -> None:
        self.folder, self._process, self._num_processes = folder, process, num_processes
        self.find()

    def find(self) -> None:
        """Finds what is in the folder now."""
        self._place: dict[str, Path] = {}
        self._open: tuple[Path, dict[str, list[ScoredResponse]]] | None = None
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path) as arrays:
                self._place |= dict.fromkeys(arrays["keys"].tolist(), path)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def save(self, items: Sequence[Item], scored: Sequence[Sequence[ScoredResponse]]) -> None:
        """Writes a block, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flat = [response for row in scored for response in row]
        stats = [response.stats for response in flat]
        arrays = {
            "keys": np.array([item.key for item in items]),
            "num_responses": np.array([len(row) for row in scored]),
            "num_tokens": np.array([response.num_tokens for response in flat]),
            "num_completion_tokens": np.array([one.num_completion_tokens for one in stats]),
            "finished": np.array([one.finished for one in stats]),
            "cut": np.array([response.cut for response in flat]),
            "alpha": np.array(stats[0].alpha),
            "vocab_size": np.array(stats[0].vocab_size, np.int64),
            "has_logits": np.array(stats[0].has_logits),
        }
        for name in (*_OF_STATS, *_OF_RESPONSE):
            columns = [getattr(one, name) for one in (stats if name in _OF_STATS else flat)]
            if all(column is not None for column in columns):
                arrays[name] = torch.cat(columns).numpy().astype(np.int32 if name in _WHOLE else np.float32)
        numbers = [int(path.stem) for path in self.folder.glob("*.npz")]
        free = max(numbers, default=-1) + 1
        free += (self._process - free) % self._num_processes
        path = self.folder / f"{free:06d}.npz"
        with replacing(path) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        self._place |= dict.fromkeys(arrays["keys"].tolist(), path)

    def load(self, key: str) -> list[ScoredResponse]:
        """The responses of an item. Blocks are read once if items come in the order in which they were saved."""
        path = self._place[key]
        if self._open is None or self._open[0] != path:
            self._open = (path, _read_block(path))
        return self._open[1][key]


def _read_block(path: Path) -> dict[str, list[ScoredResponse]]:
    with np.load(path) as file:  # refuses pickles
        arrays = {name: file[name] for name in file.files}
    ends = np.cumsum(arrays["num_tokens"])
    parts: dict[str, list[Tensor]] = {}
    for name in (*_OF_STATS, *_OF_RESPONSE):
        if name in arrays:
            # Of the soft values, there is one more in each response.
            places = ends + np.arange(1, len(ends) + 1) if name == "soft_values" else ends
            values = torch.from_numpy(arrays[name])
            parts[name] = list((values.long() if name in _WHOLE else values).tensor_split(places[:-1].tolist()))

    def response(i: int) -> ScoredResponse:
        columns: dict[str, Any] = {name: tensors[i] for name, tensors in parts.items()}
        stats = TokenStats(
            **{name: columns.pop(name, None) for name in _OF_STATS},
            finished=bool(arrays["finished"][i]),
            alpha=float(arrays["alpha"]),
            num_completion_tokens=int(arrays["num_completion_tokens"][i]),
            vocab_size=int(arrays["vocab_size"]) if "vocab_size" in arrays else None,  # which older files do not say
            has_logits=bool(arrays.get("has_logits", True)),
        )
        return ScoredResponse(stats, **columns, cut=bool(arrays["cut"][i]))

    numbers = iter(range(len(ends)))
    counts = zip(arrays["keys"].tolist(), arrays["num_responses"].tolist(), strict=True)
    return {key: [response(next(numbers)) for _ in range(count)] for key, count in counts}
