# SPDX-License-Identifier: Apache-2.0
"""What is called in a process of its own to see how much memory it takes."""

import torch

from benchmarks.measure import peak_memory
from benchmarks.methods import METHODS, Batches
from endotrl.frozen.own_copy import OwnCopy
from endotrl.rendering.renderer import Rendered
from endotrl.reporting import quiet_libraries
from endotrl.scoring.scorer import FrozenScorer


def peak_of_method(name: str, path: str, dtype: torch.dtype, device: str, batches: Batches) -> tuple[int, str]:
    """Bytes that scoring the workload takes on top of the loaded model, and how they were measured."""
    quiet_libraries()
    method = METHODS[name](path, dtype, device)
    method([[_probe()]])
    with peak_memory(device) as peak:
        method(batches)
    return peak.extra, peak.method


def peak_of_scorer(path: str, dtype: torch.dtype, device: str, rows: list[Rendered]) -> tuple[int, int]:
    """
    Bytes that scoring all rows in one call takes on top of the loaded model, and those of the tensors of its result.
    """
    quiet_libraries()
    scorer = FrozenScorer(OwnCopy(path, dtype, device))
    scorer([_probe()], entropy=False)
    with peak_memory(device) as peak:
        results = scorer(rows, entropy=False, progress=True)
    tensors = [t for s in results for t in (s.token_ids, s.positions, s.chosen_logits, s.soft_values)]
    return peak.extra, sum(t.nbytes for t in tensors)


def _probe() -> Rendered:
    return Rendered([1, 2, 3, 4], [5, 6, 7, 8], [0, 1, 2, 3], finished=True)
