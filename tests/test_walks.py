"""The page in a browser: each file of walks in a process of its own (`PUMICE_WALKS=1 pytest tests/test_page.py` by
hand)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import WALKS
from test_page import CHROMIUM, needs_chromium  # without playwright all of this is skipped


@pytest.mark.parametrize("file", WALKS)
def test_walks(file: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--numprocesses", "0", str(Path(__file__).with_name(file))],
        env={**os.environ, "PUMICE_WALKS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    if CHROMIUM is None:
        pytest.skip(needs_chromium.kwargs["reason"])
