# SPDX-License-Identifier: Apache-2.0
"""
One thread at a time through a model whose state a pass changes: evaluation mode, adapters, attention, recorded passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock, RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch


# Beside the models and not in them, so that these can be pickled and copied, and two rewards that hold one model wait
# for each other.
_locks: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
_guard = Lock()
_stance = Lock()
_eager_passes = 0
_leave_eager: Any = None


@contextmanager
def exclusive(owner: Any) -> Iterator[None]:
    """Inside, other threads that ask for the same object (a model instance, or who loads one) wait."""
    with _guard:
        lock = _locks.setdefault(owner, RLock())
    with lock:
        yield


@contextmanager
def uncompiled() -> Iterator[None]:
    """
    Inside, what `torch.compile` has wrapped runs as it is written: packed rows are no input that it was compiled for,
    and each of their lengths would compile it again.
    """
    global _eager_passes, _leave_eager
    # One setting for all threads: the first sets it, the last one sets it back.
    with _guard:
        if _eager_passes == 0:
            _leave_eager = torch.compiler.set_stance("force_eager")
            _leave_eager.__enter__()
        _eager_passes += 1
    try:
        yield
    finally:
        with _guard:
            _eager_passes -= 1
            if _eager_passes == 0:
                _leave_eager.__exit__(None, None, None)


@contextmanager
def compiled() -> Iterator[None]:
    """Inside, what `torch.compile` has wrapped is compiled, also within [`uncompiled`]."""
    with _stance, torch.compiler.set_stance("default"):
        yield
