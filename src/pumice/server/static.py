"""The page's files, read once at start and answered from memory; and what `/` says to whom."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import FastAPI, Request, Response

RUNNING = "Ollama is running"
"""What Ollama's clients look for at `/`."""

POLICY = "; ".join(
    (
        *("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:"),
        *("connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
    )
)
"""The page runs its own files only and talks to its own server only, whatever a model writes into it."""

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


@dataclass(frozen=True)
class Held:
    """A file of the page as it is answered."""

    content: bytes
    media_type: str
    etag: str


def read_page() -> dict[str, Held]:
    """The files of the page by name. What lies in the folder at start is the whole list: no request names a path."""
    held = {}
    for entry in files("pumice.server").joinpath("page").iterdir():
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in TYPES:
            content = entry.read_bytes()
            held[entry.name] = Held(content, TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
    return held


def add_page(app: FastAPI) -> None:
    """Let `app` answer GET and HEAD of `/` and of `/page/<file>`.

    `/` is the page for who accepts text/html, and Ollama's sign of life for everyone else.
    """
    page = read_page()

    def file(name: str, request: Request) -> Response:
        held = page.get(name)
        if held is None:
            return Response("404 page not found", 404, media_type="text/plain")
        headers = {
            "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-cache",  # kept, and asked about by its tag each time
            "ETag": held.etag,
            "Vary": "Accept",
        }
        if _known(request.headers.get("if-none-match", ""), held.etag):
            return Response(status_code=304, headers=headers)
        return Response(held.content, headers=headers | {"Content-Type": held.media_type})

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    def root(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", "").lower():
            return file("index.html", request)
        return Response(RUNNING, headers={"Vary": "Accept"}, media_type="text/plain")

    @app.api_route("/page/{name}", methods=["GET", "HEAD"], include_in_schema=False)
    def one(name: str, request: Request) -> Response:
        return file(name, request)


def _known(tags: str, etag: str) -> bool:
    """Whether If-None-Match names this tag; a tag that a proxy made weak counts (RFC 9110, 13.1.2)."""
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in tags.split(","))
