"""The OpenAPI document names the fields of requests that are read, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import httpx2
import pytest

from pumice.server.settings import Settings
from pumice.server.wire import Fields
from served import served

WRONG = 5
"""For the field that is read last: the request is refused there, and no model asked."""
OLLAMA = {
    "name": "pebble", "_debug_render_only": True,
    "messages": [{"role": "user", "content": "x"}], "prompt": "x",
}  # fmt: skip
OPENAI = {"model": "pebble", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}], "prompt": "x"}
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {}}}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": WRONG}]}
REQUESTS: dict[str, list[dict[str, Any]]] = {
    "/api/generate": [OLLAMA, {**OLLAMA, "raw": True}],
    "/api/chat": [OLLAMA],
    "/api/embed": [{"name": "nope"}],
    "/api/embeddings": [{"name": "nope"}],
    "/api/show": [{"name": "pebble"}],
    "/api/copy": [{"source": "nope", "destination": "mine"}],
    "/api/delete": [{"name": "nope"}],
    "/api/pull": [{"name": "pebble"}],
    "/api/push": [{"name": "pebble"}],
    "/api/create": [{"name": "mine"}],
    "/pumice/see": [{"name": "nope"}],
    "/v1/chat/completions": [
        {**OPENAI, "tools": WRONG},
        {**OPENAI, "messages": [IMAGE]},
        {**OPENAI, "response_format": SCHEMA, "tools": WRONG},
        {**OPENAI, "response_format": {"type": "json_object"}, "tools": WRONG},
    ],
    "/v1/completions": [
        {**OPENAI, "suffix": WRONG},
        {**OPENAI, "response_format": SCHEMA, "suffix": WRONG},
        {**OPENAI, "response_format": {"type": "json_object"}, "suffix": WRONG},
    ],
    "/v1/embeddings": [{"name": "nope", "input": "x"}],
}
REFUSED = {"CreateRequest.adapters"}
"""What is read to be refused, whatever it says."""


class Noted(dict[str, Any]):
    """A request's fields, which note what they are asked for."""

    def __init__(self, values: Mapping[str, Any], struct: str, read: set[str]) -> None:
        super().__init__(values)
        self._struct, self._read = struct, read

    def get(self, name: str, default: Any = None) -> Any:
        self._read.add(f"{self._struct}.{name}")
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self._read.add(f"{self._struct}.{name}")
        return super().__contains__(name)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The names that were asked for, each behind the name of its object."""
    found = set[str]()
    begin = Fields.__init__

    def noting(self: Fields, values: Mapping[str, Any], struct: str) -> None:
        begin(self, values, struct)
        self.values = Noted(self.values, struct, found)

    monkeypatch.setattr(Fields, "__init__", noting)
    return found


def named(schema: Any) -> Iterator[str]:
    """The same names, out of a schema, whose objects that are read field by field have titles."""
    if isinstance(schema, dict) and isinstance(schema.get("title"), str):
        yield from (f"{schema['title']}.{name}" for name in schema["properties"])
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from named(each)


def test_the_document_names_what_is_read(read: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for work in ("store.pulling.pull", "store.pulling.push", "creating.create"):
        monkeypatch.setattr(f"pumice.{work}", lambda *_: iter(()))
    with served(Settings(port=0)) as base:
        seen = set()
        for path, verbs in httpx2.get(base + "/openapi.json").json()["paths"].items():
            for verb, route in verbs.items():
                contents = route.get("requestBody", {}).get("content", {})
                if "application/json" in contents:
                    read.clear()
                    for body in REQUESTS[path]:
                        assert httpx2.request(verb, base + path, json=body, timeout=120).status_code < 500
                    assert read - REFUSED == set(named(contents["application/json"]["schema"])), path
                    seen.add(path)
    assert seen == REQUESTS.keys()
