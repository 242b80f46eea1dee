# SPDX-License-Identifier: Apache-2.0
"""Whether the weights of a run's checkpoints differ."""

from collections.abc import Sequence
from pathlib import Path


def same_weights(before: Path, after: Path) -> bool | None:
    """
    Whether two checkpoints have the same weights, to the bit. Reads until the first difference.

    Args:
        before (`Path`), after (`Path`):
            Folders with `*.safetensors`.

    Returns:
        `bool` or `None`: `None` if their tensors have other names.
    """
    from safetensors import safe_open

    files, others = _tensors(before), _tensors(after)
    if not files or files.keys() != others.keys():
        return None
    for name in sorted(files, key=_trained_first):
        with safe_open(files[name], "pt") as one, safe_open(others[name], "pt") as other:
            if not one.get_tensor(name).equal(other.get_tensor(name)):
                return False
    return True


def untrained_adapter(checkpoint: Path) -> bool:
    """Whether a LoRA adapter is as it was made: all its B matrices, which begin at zero, are zero."""
    from safetensors import safe_open

    matrices = {name: file for name, file in _tensors(checkpoint).items() if "lora_B" in name}
    for name, file in matrices.items():
        with safe_open(file, "pt") as opened:
            if opened.get_tensor(name).count_nonzero():
                return False
    return bool(matrices)


def _tensors(folder: Path) -> dict[str, Path]:
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found.update(dict.fromkeys(opened.keys(), file))
    return found


def _trained_first(name: str) -> tuple[bool, str]:
    """Adapters before what may be frozen, and embeddings last."""
    return "lora" not in name, f"{'embed' in name}{name}"


def unchanged(checkpoints: Sequence[Path]) -> str | None:
    """A sentence if the checkpoints of a run show that nothing was trained; `None` if they do not."""
    if len(checkpoints) >= 2 and same_weights(checkpoints[0], checkpoints[-1]):
        return f"The weights of {checkpoints[0].name} and {checkpoints[-1].name} are equal to the bit"
    if checkpoints and untrained_adapter(checkpoints[-1]):
        return f"The adapter in {checkpoints[-1].name} is as it was made: all its LoRA B matrices are zero"
    return None
