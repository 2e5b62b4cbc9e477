"""Memory that the C library has taken and nobody uses."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress

TIDY_S = 5.0
M_ARENA_MAX = -8
"""The number of malloc.h."""


class Heap:
    """Keeps what the process takes near what it uses. The GNU C library lets each thread allocate in a place of its
    own, and keeps there what was freed: where many threads compute in turn, each place grows to the largest pass and
    falls to pieces. No further place is made from now on, if there are at most eight, unless the environment says
    otherwise; and what is free goes back to the system now and then. Other libraries are left alone."""

    def __init__(self) -> None:
        self._trim: Callable[[int], int] | None = None
        told = "MALLOC_ARENA_MAX" in os.environ or "arena_max" in os.environ.get("GLIBC_TUNABLES", "")
        if sys.platform == "linux":
            with suppress(AttributeError):  # musl has none
                library = ctypes.CDLL(None)
                self._trim = library.malloc_trim
                if not told:
                    library.mallopt(M_ARENA_MAX, 1)
        self._tidied_s = time.monotonic()

    def tidy(self) -> None:
        """At most each few seconds; it takes about as long as reading the free memory."""
        now = time.monotonic()
        if self._trim is not None and now - self._tidied_s > TIDY_S:
            self._trim(0)
            self._tidied_s = now
