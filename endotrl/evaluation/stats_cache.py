# SPDX-License-Identifier: Apache-2.0
"""Token statistics on disk, so that other forms of the reward can be tried without the model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..runs.files import replacing
from ..scoring.token_stats import TokenStats
from .engine import ScoredResponse
from .items import Item


_OF_STATS = ("token_ids", "chosen_logits", "entropies", "mean_logits")
_OF_RESPONSE = ("log_probs_alone", "step_of_token")


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
        self._place: dict[str, tuple[Path, int]] = {}
        self._open: tuple[Path, dict[str, list[ScoredResponse]]] | None = None
        for path in sorted(self.folder.glob("*.npz")):
            with np.load(path) as arrays:
                for number, key in enumerate(arrays["keys"].tolist()):
                    self._place[key] = (path, number)

    def __contains__(self, key: str) -> bool:
        return key in self._place

    def save(self, items: Sequence[Item], scored: Sequence[Sequence[ScoredResponse]]) -> None:
        """Writes a block, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flat = [response for row in scored for response in row]
        arrays = {
            "keys": np.array([item.key for item in items]),
            "num_responses": np.array([len(row) for row in scored]),
            "num_tokens": np.array([response.num_tokens for response in flat]),
            "num_completion_tokens": np.array([response.stats.num_completion_tokens for response in flat]),
            "finished": np.array([response.stats.finished for response in flat]),
            "cut": np.array([response.cut for response in flat]),
            "alpha": np.array(flat[0].stats.alpha),
            "vocab_size": np.array(flat[0].stats.vocab_size, np.int64),
            "has_logits": np.array(flat[0].stats.has_logits),
            "positions": _join([response.stats.positions for response in flat], np.int32),
            "soft_values": _join([response.stats.soft_values for response in flat], np.float32),
        }
        for name in (*_OF_STATS, *_OF_RESPONSE):
            columns = [getattr(response.stats if name in _OF_STATS else response, name) for response in flat]
            if all(column is not None for column in columns):
                kind = np.int32 if name in ("token_ids", "step_of_token") else np.float32
                arrays[name] = _join(columns, kind)
        numbers = [int(path.stem) for path in self.folder.glob("*.npz")]
        free = max(numbers, default=-1) + 1
        free += (self._process - free) % self._num_processes
        path = self.folder / f"{free:06d}.npz"
        with replacing(path) as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        for number, item in enumerate(items):
            self._place[item.key] = (path, number)

    def load(self, key: str) -> list[ScoredResponse]:
        """The responses of an item. Blocks are read once if items come in the order in which they were saved."""
        path, _ = self._place[key]
        if self._open is None or self._open[0] != path:
            self._open = (path, _read_block(path))
        return self._open[1][key]


def _read_block(path: Path) -> dict[str, list[ScoredResponse]]:
    with np.load(path) as file:  # refuses pickles
        arrays = {name: file[name] for name in file.files}
    ends = np.cumsum(arrays["num_tokens"])
    parts = {name: _split(arrays[name], ends) for name in (*_OF_STATS, *_OF_RESPONSE, "positions") if name in arrays}
    soft_values = _split(arrays["soft_values"], ends + np.arange(1, len(ends) + 1))  # one more of each

    def response(i: int) -> ScoredResponse:
        piece = {name: tensors[i] for name, tensors in parts.items()}
        stats = TokenStats(
            token_ids=piece["token_ids"].long(),
            positions=piece["positions"].long(),
            chosen_logits=piece["chosen_logits"],
            soft_values=soft_values[i],
            entropies=piece.get("entropies"),
            finished=bool(arrays["finished"][i]),
            alpha=float(arrays["alpha"]),
            num_completion_tokens=int(arrays["num_completion_tokens"][i]),
            mean_logits=piece.get("mean_logits"),
            vocab_size=int(arrays["vocab_size"]) if "vocab_size" in arrays else None,  # which older files do not say
            has_logits=bool(arrays.get("has_logits", True)),
        )
        steps = piece.get("step_of_token")
        steps = None if steps is None else steps.long()
        return ScoredResponse(stats, piece.get("log_probs_alone"), steps, bool(arrays["cut"][i]))

    numbers = iter(range(len(ends)))
    counts = zip(arrays["keys"].tolist(), arrays["num_responses"].tolist(), strict=True)
    return {key: [response(next(numbers)) for _ in range(count)] for key, count in counts}


def _split(values: np.ndarray, ends: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(part) for part in np.split(values, ends[:-1])]


def _join(tensors: Sequence[Tensor], kind: type) -> np.ndarray:
    return torch.cat(list(tensors)).numpy().astype(kind)
