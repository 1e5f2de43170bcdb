"""Locks for what threads share.

torch's global random generator, its number of threads and its default type, and Pyro's parameter
store belong to the whole process. Fits change them for a while and put them back, so that one fit
runs at a time; another thread's fit waits. Predictions use none of them, apart from those of a Pyro
model, and go on beside a fit. Predictions of one estimator take turns: PyTorch evaluates a network
under other weights by putting these into the network itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

_lock = threading.RLock()
_guard = threading.Lock()
_locks: WeakKeyDictionary[object, threading.RLock] = WeakKeyDictionary()


@contextmanager
def process_state() -> Iterator[None]:
    """Be the only thread inside; the same thread may enter again."""
    with _lock:
        yield


@contextmanager
def turns(owner: object) -> Iterator[None]:
    """Be the only thread inside for this object."""
    with _guard:
        lock = _locks.setdefault(owner, threading.RLock())
    with lock:
        yield


def _renew() -> None:
    # A thread that held a lock at a fork is not there in the child to give it back.
    global _lock, _guard, _locks
    _lock, _guard, _locks = threading.RLock(), threading.Lock(), WeakKeyDictionary()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
