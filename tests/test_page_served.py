"""Walks of the page through the real server, with the bundled models: those of test_page.py that need no fault."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import pumice
import tiny
from pumice import store
from pumice.creating import Recipe, create
from pumice.server.settings import Settings
from pumice.store import Name, transfer
from pumice.store.link import Reach
from served import served
from test_page import (
    PATIENCE_MS,
    Visit,
    browser,
    expect,
    needs_chromium,
    test_first_visit,
    test_pictures_are_dropped_and_pasted_and_asked_about,
    test_reload_keeps_history,
    test_two_models_are_asked_the_same,
    test_what_the_model_sees,
    visit,
)
from test_push import host

__all__ = [
    "browser", "host", "test_first_visit", "test_pictures_are_dropped_and_pasted_and_asked_about",
    "test_reload_keeps_history", "test_two_models_are_asked_the_same", "test_what_the_model_sees", "visit",
]  # fmt: skip

pytestmark = needs_chromium


@pytest.fixture
def base_url() -> Iterator[str]:
    """What the walks visit here instead of their stub."""
    with served() as base:
        yield base


def test_a_key_is_asked_for(browser: Any) -> None:
    with served(Settings(port=0, keys=("right",))) as base:
        there = Visit(browser, base)
        there.page.goto(base)
        dialog = there.page.get_by_role("dialog", name="This server asks for a key")
        for key in ("wrong", "right"):
            dialog.get_by_label("API key").fill(key)
            there.page.keyboard.press("Enter")
            if key == "wrong":
                expect(dialog.get_by_role("alert")).to_be_visible(timeout=PATIENCE_MS)
        expect(dialog).to_be_hidden(timeout=PATIENCE_MS)
        expect(there.page.get_by_label("Model", exact=True)).not_to_have_value("", timeout=PATIENCE_MS)
        there.ask("Hi")
        expect(there.page.locator(".answer .timings")).to_have_count(1, timeout=PATIENCE_MS)
        there.context.close()


def test_the_server_goes_and_comes_back(browser: Any) -> None:
    with served() as base:
        port = int(base.rpartition(":")[2])
        there = Visit(browser, base).open()
        there.ask("Hi")
        expect(there.page.locator(".answer .timings")).to_have_count(1, timeout=PATIENCE_MS)
    there.ask("Hello?")
    banner = there.page.get_by_role("alert").filter(has_text="The server does not answer")
    expect(banner).to_be_visible(timeout=PATIENCE_MS)
    with served(Settings(port=port)):
        expect(banner).to_be_hidden(timeout=2 * PATIENCE_MS)
        there.ask("And now?")
        expect(there.page.locator(".answer .timings")).to_have_count(2, timeout=PATIENCE_MS)
        there.context.close()


def test_an_answer_is_stopped_and_the_engine_with_it(browser: Any) -> None:
    """One that would go on for a thousand tokens."""
    with served() as base:
        there = Visit(browser, base).open()
        there.page.get_by_role("button", name="Settings").click()
        dialog = there.page.get_by_role("dialog", name="Settings")
        dialog.get_by_label("JSON by a schema").check()
        dialog.get_by_label("JSON schema").fill('{"type": "array", "items": {"type": "integer"}, "minItems": 500}')
        dialog.get_by_role("button", name="Done").click()
        there.ask("Count.")
        expect(there.page.locator(".answer .text")).to_contain_text("[", timeout=PATIENCE_MS)
        there.page.get_by_role("button", name="Stop").click()
        expect(there.page.locator(".answer")).to_contain_text("Stopped.", timeout=PATIENCE_MS)
        there.context.close()
        ends_s = time.monotonic() + PATIENCE_MS / 1000
        while not re.search(r"num_requests_running\{[^}]*\} 0\.0", httpx2.get(f"{base}/metrics").text):
            assert time.monotonic() < ends_s, "the engine goes on with what nobody reads"
            time.sleep(0.05)


def test_a_model_is_pulled_from_a_registry(browser: Any, host: str, places: Path, tmp_path: Path) -> None:
    """Made here, pushed to a real registry, removed, pulled by the page, and asked."""
    pumice.convert(tiny.hf_folder(tmp_path / "hf", family="1.5", seed=5), tmp_path / "lm.gguf")
    files = {name: tmp_path / name for name in ("lm.gguf", "mmproj-lm.gguf")}
    name, own = Name.parse(f"{host}/me/tiny:v1"), store.own_store()
    for _ in create(name, Recipe(files=files, template="{{ .Prompt }}"), own):
        pass
    stored = own.find(name)
    assert stored is not None
    for _ in transfer.push(stored, name, Reach(plain=True, inner=True)):
        pass
    own.remove(name)
    with served() as base:
        there = Visit(browser, base).open()
        there.page.get_by_role("button", name="Models", exact=True).click()
        dialog = there.page.get_by_role("dialog", name="Models")
        dialog.get_by_label("Pull a model").fill(str(name))
        dialog.get_by_role("button", name="Pull").click()
        expect(dialog.get_by_role("alert")).to_be_visible(timeout=PATIENCE_MS)  # not unless it is allowed
        dialog.get_by_label("from a registry of this network").check()
        dialog.get_by_role("button", name="Pull").click()
        expect(dialog.get_by_role("status")).to_have_text(f"{name} is here.", timeout=2 * PATIENCE_MS)
        there.page.keyboard.press("Escape")
        there.ask("Hi")
        expect(there.page.locator(".answer .timings")).to_have_count(1, timeout=2 * PATIENCE_MS)
        there.context.close()
    pulled = own.find(name)
    assert pulled is not None
    assert pulled.digest == stored.digest
    assert (places / "home").exists()
