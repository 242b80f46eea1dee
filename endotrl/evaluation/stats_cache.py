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


_FIELDS = ("token_ids", "chosen_logits", "entropies", "mean_logits", "log_probs_alone", "step_of_token")


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
            "positions": _join([response.stats.positions for response in flat], np.int32),
            "soft_values": _join([response.stats.soft_values for response in flat], np.float32),
        }
        for name in _FIELDS:
            columns = [_field(response, name) for response in flat]
            if all(column is not None for column in columns):
                kind = np.int32 if name in ("token_ids", "step_of_token") else np.float32
                arrays[name] = _join([column for column in columns if column is not None], kind)
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
    tokens, values, response = 0, 0, 0
    result: dict[str, list[ScoredResponse]] = {}
    for key, count in zip(arrays["keys"].tolist(), arrays["num_responses"].tolist(), strict=True):
        row = []
        for _ in range(count):
            length = int(arrays["num_tokens"][response])
            piece = {
                name: torch.from_numpy(arrays[name][tokens : tokens + length]) for name in (*_FIELDS, "positions")
                if name in arrays
            }  # fmt: skip
            stats = TokenStats(
                token_ids=piece["token_ids"].long(),
                positions=piece["positions"].long(),
                chosen_logits=piece["chosen_logits"],
                soft_values=torch.from_numpy(arrays["soft_values"][values : values + length + 1]),
                entropies=piece.get("entropies"),
                finished=bool(arrays["finished"][response]),
                alpha=float(arrays["alpha"]),
                num_completion_tokens=int(arrays["num_completion_tokens"][response]),
                mean_logits=piece.get("mean_logits"),
            )
            steps = piece.get("step_of_token")
            row.append(
                ScoredResponse(
                    stats,
                    piece.get("log_probs_alone"),
                    None if steps is None else steps.long(),
                    bool(arrays["cut"][response]),
                )
            )
            tokens, values, response = tokens + length, values + length + 1, response + 1
        result[key] = row
    return result


def _field(response: ScoredResponse, name: str) -> Tensor | None:
    stats = response.stats
    return {
        "token_ids": stats.token_ids,
        "chosen_logits": stats.chosen_logits,
        "entropies": stats.entropies,
        "mean_logits": stats.mean_logits,
        "log_probs_alone": response.log_probs_alone,
        "step_of_token": response.step_of_token,
    }[name]


def _join(tensors: Sequence[Tensor], kind: type) -> np.ndarray:
    return torch.cat(list(tensors)).numpy().astype(kind)
