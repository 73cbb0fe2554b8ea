"""Garbage collection during imports."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import torch and Lightning without garbage collection; exempt their objects afterwards.

    Their half a million objects live until the program ends. Searching them for garbage takes a quarter of the time of
    the imports. Has no effect once torch is imported: a later job of a sweep leaves garbage.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # triton reports its objects as leaked if they outlive the interpreter
        gc.enable()
