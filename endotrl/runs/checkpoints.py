# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: completeness markers, and deletion of old ones."""

import json
import logging
import os
import re
import shutil
from pathlib import Path

from .files import replace_text


logger = logging.getLogger(__name__)

# As in transformers, whose import takes seconds and is not needed to read a log.
PREFIX_CHECKPOINT_DIR = "checkpoint"
# Written into a checkpoint last: a list of its files.
COMPLETE_FILE = "complete.json"


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The last checkpoint that was written completely and has all its files; a warning names later ones."""
    for checkpoint in reversed(checkpoints(output_dir).values()):
        lack = what_is_missing(checkpoint)
        if lack is None:
            return checkpoint
        logger.warning("Skipping the checkpoint %s: %s.", checkpoint, lack)
    return None


def checkpoints(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """Checkpoints in a folder by step, in order."""
    steps = {
        int(match[1]): path
        for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    return dict(sorted(steps.items()))


def what_is_missing(checkpoint: Path) -> str | None:
    """Reason why a checkpoint is incomplete; `None` if it is complete."""
    marker = checkpoint / COMPLETE_FILE
    if not marker.is_file():
        return "it was not written completely"
    for name, size in json.loads(marker.read_text(encoding="utf-8"))["files"].items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return None


def mark_complete(checkpoint: Path, step: int, num_processes: int) -> None:
    """Marks a checkpoint as complete, once it is synced to disk and so survives a power failure."""
    files = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != COMPLETE_FILE):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[str(path.relative_to(checkpoint))] = path.stat().st_size
    marker = {"step": step, "num_processes": num_processes, "files": files}
    replace_text(checkpoint / COMPLETE_FILE, json.dumps(marker, indent=2))


def discard_later(output_dir: str | os.PathLike[str], step: int) -> None:
    """Removes the marks of checkpoints after the step at which training starts: they are of another run."""
    for later, checkpoint in checkpoints(output_dir).items():
        if later > step:
            (checkpoint / COMPLETE_FILE).unlink(missing_ok=True)


def delete_old(output_dir: str | os.PathLike[str], step: int, limit: int | None, best: str | None) -> None:
    """
    Deletes checkpoints before a step, so that `limit` of them remain (0 or `None`: all), including the last and the
    best one. An interrupted deletion leaves an incomplete checkpoint.
    """
    before = [path for earlier, path in checkpoints(output_dir).items() if earlier < step]
    old = [path for path in before if best is None or path != Path(best)]
    if limit:
        for checkpoint in old[: max(0, len(before) + 1 - limit)]:
            (checkpoint / COMPLETE_FILE).unlink(missing_ok=True)
            shutil.rmtree(checkpoint, ignore_errors=True)
