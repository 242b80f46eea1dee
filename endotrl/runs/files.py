# SPDX-License-Identifier: Apache-2.0
"""Files that a run leaves behind whole, and that no other run writes at the same time."""

import errno
import os
import sys
from pathlib import Path
from typing import IO, Any


if sys.platform != "win32":
    import fcntl

# What a file system without locks says.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


def lock(file: IO[Any], message: str) -> None:
    """
    Keeps other runs from a file until it is closed, or the process has ended, however it ends. On Windows and on file systems
    without locks nothing is kept from anyone.

    Args:
        file (`IO`):
            The file, open for writing.
        message (`str`):
            What to say if another process has it.

    Raises:
        `ValueError`: If another process has it.
    """
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(message) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def replace_text(path: Path, text: str) -> None:
    """Writes a file in one step: after a crash there is the old one or the new one, never half of one."""
    temporary = Path(f"{path}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
