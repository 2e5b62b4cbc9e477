"""The C library's memory: threads that compute in turn share one place for it, unless somebody said otherwise."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

THREADS = 6
CODE = """
import ctypes, sys, threading
from pumice.ops.heap import Heap

heap = Heap()
barrier = threading.Barrier({threads})

def work():
    barrier.wait()
    held = bytearray(100_000)
    barrier.wait()

threads = [threading.Thread(target=work) for _ in range({threads})]
for each in threads:
    each.start()
for each in threads:
    each.join()
library = ctypes.CDLL(None)
library.fopen.restype = ctypes.c_void_p
file = ctypes.c_void_p(library.fopen(sys.argv[1].encode(), b"w"))
library.malloc_info(0, file)
library.fclose(file)
heap.tidy()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not the GNU C library")
@pytest.mark.parametrize("setting", [None, "8"])
def test_threads_share_one_arena(setting: str | None, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    if setting is not None:
        environment["MALLOC_ARENA_MAX"] = setting
    told = tmp_path / "malloc.xml"
    subprocess.run([sys.executable, "-c", CODE.format(threads=THREADS), str(told)], env=environment, check=True)
    arenas = len(re.findall("<heap nr=", told.read_text()))
    assert arenas == 1 if setting is None else arenas > 1
