"""Walks of the page through the real server, with the bundled models: those of test_page.py that need no fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from served import served
from test_page import needs_chromium

WALKS = ("first_visit", "dropped_and_pasted", "two_models", "what_the_model_sees", "reload_keeps_history")


@needs_chromium
def test_walks_through_the_server() -> None:
    with served() as base:
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", "--numprocesses", "0", "-p", "no:cacheprovider"),
                *("-k", " or ".join(WALKS), str(Path(__file__).with_name("test_page.py"))),
            ],
            env={**os.environ, "PUMICE_PAGE_URL": base},
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{len(WALKS)} passed" in done.stdout
