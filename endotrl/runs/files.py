# SPDX-License-Identifier: Apache-2.0
"""Atomic file writes and inter-process locks."""

import errno
import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock, FileLock, Timeout


# Error codes of a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def lock(path: Path, message: str) -> BaseFileLock:
    """
    Locks a file until the lock is released or deleted, or the process ends. Forked workers do not hold it. If it is
    locked already, raises `ValueError` with the message. On a file system without locks, it has no effect.
    """
    held = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        path.open("ab").close()  # raises if the file cannot exist, which `FileLock` takes for another's lock
        try:
            held.acquire()
        except Timeout:
            gc.collect()  # an earlier run of this process may hold it until its objects are collected
            held.acquire()
    except Timeout as error:
        raise ValueError(message) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return held


def lock_folder(folder: Path, setting: str) -> BaseFileLock:
    """Creates a folder, and locks it for one run: see [`lock`]. `setting` is the option by which users choose it."""
    folder.mkdir(parents=True, exist_ok=True)
    busy = f"Another run is writing to {folder}. Wait until it has finished, or choose another {setting}."
    return lock(folder / ".run.lock", busy)


@contextmanager
def only_run_on(path: str | Path, source: str | Path = "-") -> Iterator[None]:
    """Context that only one run can enter with this output file; `-` is a stream. It must not be the `source`."""
    path, source = Path(path), Path(source)
    if str(path) == "-":
        yield
        return
    if path.exists() and source.exists() and path.samefile(source):
        raise ValueError(f"The output would overwrite the input {source}. Choose another output.")
    if not path.parent.is_dir():
        raise ValueError(f"The folder of the output, {path.parent}, does not exist. Create it first.")
    lock_path = Path(f"{path}.lock")
    try:
        if path.exists():
            path.open("ab").close()
        held = lock(lock_path, f"Another run is writing {path}. Wait until it has finished, or choose another output.")
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error
    try:
        yield
    finally:
        if held.is_locked:  # otherwise another run may hold it, on a file system without locks
            lock_path.unlink(missing_ok=True)
        held.release()


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that atomically replaces `path`: after a crash there is the old or the new one, never a part."""
    temporary = Path(f"{path}.tmp")
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def replace_text(path: Path, text: str) -> None:
    """Writes text atomically: see [`replacing`]."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically: see [`replacing`]."""
    replace_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def new_folder(target: Path, marker: str) -> Iterator[Path]:
    """Yields a folder to fill, which then becomes `target`, unless another process has made it, with a `marker`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield aside
        aside.chmod(0o755)  # `mkdtemp` denies access to others
        try:
            aside.replace(target)
        except OSError:
            if not (target / marker).exists():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
