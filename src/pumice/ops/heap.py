"""Memory that the C library has taken and nobody uses."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from contextlib import suppress

TIDY_S = 5.0


class Heap:
    """Gives free memory back to the system now and then. The GNU C library keeps what a thread has freed for that
    thread: where many threads compute in turn, each holds as much as its largest pass took. Other libraries are left
    alone."""

    def __init__(self) -> None:
        self._trim: Callable[[int], int] | None = None
        if sys.platform == "linux":
            with suppress(AttributeError):  # musl has none
                self._trim = ctypes.CDLL(None).malloc_trim
        self._tidied_s = time.monotonic()

    def tidy(self) -> None:
        """At most each few seconds; it takes about as long as reading the free memory."""
        now = time.monotonic()
        if self._trim is not None and now - self._tidied_s > TIDY_S:
            self._trim(0)
            self._tidied_s = now
