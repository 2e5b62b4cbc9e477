"""How much memory the machine has for a process, as the system says.

Sources: Linux's proc.rst (meminfo), cgroup-v2.rst, cgroup-v1/memory.rst.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pumice.errors import UserError

GIVEN = "PUMICE_MEMORY"


@dataclass(frozen=True)
class Memory:
    """In bytes."""

    total: int
    """Of the machine, or what its container may take at most."""
    available: int
    """Free now. Copies of files count as free: the kernel drops them when the room is asked for."""
    swap: int = 0
    """Free room on disk, to which pages that others do not use can go."""


def host(root: Path = Path("/")) -> Memory | None:
    """The memory of the CPU; None where the system does not say. `root` is where the system's files are.

    The environment variable PUMICE_MEMORY, in gigabytes, stands for what the system says. Raises UserError for one that
    is no amount.
    """
    given = os.environ.get(GIVEN)
    if given is not None:
        return _given(given)
    memory = _meminfo(root / "proc" / "meminfo") or _sysconf()
    if memory is None:
        return None
    for limit, free in _limits(root):
        if limit < memory.total:
            # Inside a limit there is hardly another whose pages could go to the disk.
            memory = Memory(limit, min(memory.available, free))
    return memory


def shown(count: int) -> str:
    """So many bytes, in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _given(text: str) -> Memory:
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1.0
    if not 0 <= gigabytes < math.inf:
        raise UserError(f"{GIVEN} is {text!r}", hint="give gigabytes, such as 16, or leave it out")
    return Memory(int(gigabytes * 1e9), int(gigabytes * 1e9))


def _meminfo(path: Path) -> Memory | None:
    sizes = {}
    for line in _lines(path):
        name, _, value = line.partition(":")
        number = value.removesuffix("kB").strip()
        if number.isdecimal():
            sizes[name] = int(number) * 1024
    if not {"MemTotal", "MemAvailable"} <= sizes.keys():
        return None
    return Memory(sizes["MemTotal"], sizes["MemAvailable"], sizes.get("SwapFree", 0))


def _sysconf() -> Memory | None:
    """Elsewhere than on Linux; macOS does not say how much of it is free."""
    if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        return None
    page, pages = os.sysconf("SC_PAGE_SIZE"), os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_AVPHYS_PAGES") if "SC_AVPHYS_PAGES" in os.sysconf_names else pages
    return Memory(page * pages, page * free)


@dataclass(frozen=True)
class _Files:
    """What a version of control groups calls its files; `cached` are the counts of pages that belong to files."""

    folder: str
    limit: str
    used: str
    cached: tuple[str, str]


_V1 = _Files(
    "sys/fs/cgroup/memory",
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_active_file", "total_inactive_file"),
)
_V2 = _Files("sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file"))


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Of each control group around this process: its limit, and how much of that is free."""
    for line in _lines(root / "proc" / "self" / "cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0":
            yield from _around(root, path, _V2)
        elif "memory" in controllers.split(","):
            yield from _around(root, path, _V1)


def _around(root: Path, path: str, files: _Files) -> Iterator[tuple[int, int]]:
    # In a container the path may be that of the outside, of which only the last group is seen, as the folder itself.
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts) + 1):
        group = (root / files.folder).joinpath(*parts[:count])
        limit, used = _number(group / files.limit), _number(group / files.used)
        if limit is None or used is None:
            continue
        counts = dict(line.split(" ", 1) for line in _lines(group / "memory.stat") if " " in line)
        cached = sum(int(counts[name]) for name in files.cached if counts.get(name, "").isdecimal())
        yield limit, max(0, limit - used + cached)


def _number(path: Path) -> int | None:
    """The number in a file; None for a word, or no such file."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdecimal() else None


def _lines(path: Path) -> list[str]:
    """Of a small text file; none where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
