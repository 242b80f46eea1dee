# SPDX-License-Identifier: Apache-2.0
"""Whether the weights of a run's checkpoints differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open


def unchanged(checkpoints: Sequence[Path]) -> str | None:
    """A sentence if the checkpoints of a run show that nothing was trained; `None` if they do not."""
    if len(checkpoints) >= 2 and _same_weights(checkpoints[0], checkpoints[-1]):
        return f"The weights of {checkpoints[0].name} and {checkpoints[-1].name} are equal to the bit"
    # As PEFT makes an adapter.
    last = _tensors(checkpoints[-1]) if checkpoints else {}
    matrices = [name for name in last if "lora_B" in name]
    if matrices and not any(_read(last, name).count_nonzero() for name in matrices):
        return f"The adapter in {checkpoints[-1].name} is as it was made: all its LoRA B matrices are zero"
    return None


def _same_weights(before: Path, after: Path) -> bool:
    """To the bit; reads until the first difference, adapters before what may be frozen, and embeddings last."""
    files, others = _tensors(before), _tensors(after)
    names = sorted(files, key=lambda name: ("lora" not in name, "embed" in name, name))
    return (
        bool(files) and files.keys() == others.keys() and all(_read(files, n).equal(_read(others, n)) for n in names)
    )


def _tensors(folder: Path) -> dict[str, Path]:
    """Files of the tensors in a folder, by their names."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found


def _read(files: dict[str, Path], name: str) -> Any:
    with safe_open(files[name], "pt") as opened:
        return opened.get_tensor(name)
