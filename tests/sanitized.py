"""The kernels under the address and undefined-behaviour sanitizers: `make asan`, or `python tests/sanitized.py TEST …`.

Builds the library with them into build/asan (which needs CMake and GCC), and runs with it what tests the kernels: every
operation and format, on each instruction set that this CPU has.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "asan"
TESTS = ("tests/test_cpu.py", "tests/test_packing.py", "tests/test_sizes.py")
INSIDE = """
import sys, pytest, pumice.ops
pumice.ops.__path__.insert(0, sys.argv[1])
from pumice.ops import library
assert str(library.built()).startswith(sys.argv[1]), f"{library.built()} would run instead"
sys.exit(pytest.main(sys.argv[2:]))
"""
"""The sanitized library stands before the installed one."""


def build() -> None:
    settings = ["-DPUMICE_SANITIZE=ON", "-DCMAKE_CXX_COMPILER=g++"]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(FOLDER), *settings], check=True)
    subprocess.run(["cmake", "--build", str(FOLDER)], check=True)


def test(tests: list[str]) -> int:
    # Python was built without sanitizers, so theirs comes first; and C++'s library, or they miss its exceptions.
    names = ("libasan.so", "libstdc++.so")
    first = [subprocess.check_output(["g++", f"-print-file-name={name}"], text=True).strip() for name in names]
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(first),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself ends without giving back all its memory
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    # One process, whose output is shown as it comes: what a sanitizer says stands on stderr.
    command = [sys.executable, "-c", INSIDE, str(FOLDER), "--numprocesses=0", "--capture=no", *tests]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    build()
    sys.exit(test(sys.argv[1:] or list(TESTS)))
