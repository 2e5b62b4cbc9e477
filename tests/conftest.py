"""What every test may use: the reference results, when they are at hand, and a small known picture."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from pumice import ops
from pumice.engine import passes

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which happens later

# What is installed on the machine at hand is no part of a test, nor of what a test starts.
NOWHERE = tempfile.TemporaryDirectory(prefix="pumice-tests-")
os.environ |= dict.fromkeys(("PUMICE_HOME", "OLLAMA_MODELS", "HF_HUB_CACHE"), str(Path(NOWHERE.name, "none")))

# Tiny networks: a second thread costs more than it brings, and the tests run in two processes. What they start too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

HERE = Path(__file__).resolve().parent
REFERENCE = HERE.parent.parent / "shared"

GOLDEN_MODELS = (
    "vicuna15-28",
    "vicuna15-56",
    "mistral15-42",
    "vicuna15-full",
    "vicuna16-28",
    "mistral16-28",
    "yi16-28",
    "vicuna16-56",
)
"""The tiny models whose results generate.json holds."""


def reference(name: str) -> Path:
    """A file or folder of the reference results beside the repository; the test is skipped where there is none."""
    path = REFERENCE / name
    if not path.exists():
        pytest.skip(f"the reference results are not here: {path}")
    return path


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one for each store of this test: `home`, `ollama` and `hub`, where they are made."""
    for variable, name in (("PUMICE_HOME", "home"), ("OLLAMA_MODELS", "ollama"), ("HF_HUB_CACHE", "hub")):
        monkeypatch.setenv(variable, str(tmp_path / name))
    return tmp_path


@pytest.fixture
def unrounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in blocks multiplied as the numbers that they stand for, activations and keys as they are: without the
    rounding that the CPU kernels make of activations, and llama.cpp too."""
    monkeypatch.setattr(ops, "_by_kernels", lambda x: False)
    monkeypatch.setattr(passes, "cache_type", lambda model: model.like.dtype)


WALKS = ("test_page.py", "test_page_served.py")
"""Their browser's driver keeps an event loop running in the thread of the tests, in which no other test could run one:
`test_walks.py` runs them in processes of their own."""
collect_ignore = [] if os.environ.get("PUMICE_WALKS") else list(WALKS)

LONGEST = (
    "test_cluster.py::test_a_cluster_of_two",
    "test_walks.py",
    "test_gpu.py::test_kernels_compile_for_gpus",
    "test_bench.py",
)
"""Begun first: begun last, one of them would run on alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each of two processes begins with some of the longest: the first gets the first half."""
    long = sorted((each for each in items if _rank(each) < len(LONGEST)), key=_rank)
    rest = [each for each in items if _rank(each) == len(LONGEST)]
    middle = max(0, len(items) // 2 - len(long[::2]))
    items[:] = [*long[::2], *rest[:middle], *long[1::2], *rest[middle:]]


def _rank(item: pytest.Item) -> int:
    return next((rank for rank, name in enumerate(LONGEST) if name in item.nodeid), len(LONGEST))
