"""A registry of models, as Ollama and the Docker tools speak to one: manifests and blobs of one repository, to be had
and to be given. Facts: the OCI distribution specification, and the media types of Ollama's client."""

from __future__ import annotations

import base64
import json
import netrc
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Self
from urllib.parse import urlencode, urlsplit

from pumice.errors import UserError, shortened
from pumice.store.link import Answer, Link, Reach, Target, Unreachable, same_origin
from pumice.store.manifest import MANIFEST_TYPE, MAX_MANIFEST_BYTES, Layer, Manifest
from pumice.store.names import Name

MOST_ANSWER_BYTES = 64 * 1024
"""Of a token or an error text."""
CHUNK_BYTES = 16 * 2**20
"""Of a blob that is sent, in one request: what a connection that breaks costs."""
UPLOAD_TRIES = 6
LOGIN_HINT = "put `machine HOST login USER password PASSWORD` into ~/.netrc, or ask for a model that all may have"
_TOKEN = re.compile(r"[!-~]{1,16384}")


class Missing(UserError):
    """The registry has no model of this name, or none for who asks."""


class Registry:
    """One repository of a registry. Several threads may use it."""

    def __init__(self, name: Name, reach: Reach) -> None:
        """Nothing is asked yet. Where `reach` allows http, a name without a scheme means http, as Ollama's --insecure
        does."""
        scheme = "http" if reach.plain else name.scheme
        self._base = f"{scheme}://{name.host}/v2/{name.namespace}/{name.model}"
        self._tag = name.tag
        self._link = Link(self._base, reach)
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._link.close()

    def manifest(self) -> Manifest:
        """Raises Missing, Unreachable, UserError for what is no manifest."""
        with self._ask(Target("GET", self._manifest_url, {"Accept": MANIFEST_TYPE})) as answer:
            if answer.status in (400, 404):
                raise Missing(
                    "pull model manifest: file does not exist",
                    hint="check the name and the tag; `llava` means llava:latest",
                )
            self._expect(answer, 200)
            return Manifest.read(answer.body(MAX_MANIFEST_BYTES), "the registry's answer")

    def blob(self, layer: Layer, headers: Mapping[str, str]) -> AbstractContextManager[Answer]:
        """A blob's answer, its body still to come, whatever its status. Raises Unreachable, UserError."""
        return self._ask(Target("GET", f"{self._base}/blobs/{layer.digest}", headers))

    def has(self, layer: Layer) -> bool:
        """Raises Unreachable, UserError."""
        with self._ask(Target("HEAD", f"{self._base}/blobs/{layer.digest}")) as answer:
            if answer.status == 404:
                return False
            self._expect(answer, 200)
            return True

    def upload(self, layer: Layer, path: Path) -> Iterator[int]:
        """Send a blob in chunks; yields how many bytes are there. A chunk that breaks off is sent again from where the
        registry has it. Raises Unreachable after some tries, UserError."""
        with self._ask(Target("POST", f"{self._base}/blobs/uploads/")) as answer:
            self._expect(answer, 202)
            where = self._location(answer)
        done = tries = 0
        with path.open("rb") as file:
            while done < layer.size:
                file.seek(done)
                chunk = file.read(min(CHUNK_BYTES, layer.size - done))
                if not chunk:
                    raise UserError(f"{layer.file_name} became shorter while it was sent", hint="get the model again")
                headers = {
                    "Content-Type": "application/octet-stream",
                    "Content-Range": f"{done}-{done + len(chunk) - 1}",
                }
                try:
                    with self._ask(Target("PATCH", where, headers, chunk)) as answer:
                        self._expect(answer, 202)
                        where, done, tries = self._location(answer), done + len(chunk), 0
                except Unreachable:
                    tries += 1
                    if tries >= UPLOAD_TRIES:
                        raise
                    where, done = self._taken_so_far(where)
                yield done
        closing = f"{where}{'&' if urlsplit(where).query else '?'}{urlencode({'digest': layer.digest})}"
        with self._ask(Target("PUT", closing, {"Content-Type": "application/octet-stream"})) as answer:
            self._expect(answer, 201)

    def put_manifest(self, manifest: Manifest) -> None:
        """Raises Unreachable, UserError."""
        target = Target("PUT", self._manifest_url, {"Content-Type": MANIFEST_TYPE}, manifest.raw)
        with self._ask(target) as answer:
            self._expect(answer, 201)

    @property
    def _manifest_url(self) -> str:
        return f"{self._base}/manifests/{self._tag}"

    def _taken_so_far(self, where: str) -> tuple[str, int]:
        """Where an upload goes on, and behind how many bytes."""
        with self._ask(Target("GET", where)) as answer:
            self._expect(answer, 204)
            span = re.fullmatch(r"(?:bytes=)?0-(\d{1,18})", answer.headers.get("range", ""))
            # 0-0 says no byte and one byte alike; sent from the start, both are right.
            end = int(span[1]) if span else 0
            return self._location(answer), end + 1 if end else 0

    def _location(self, answer: Answer) -> str:
        """Where an upload goes on: also another host may be named, which then gets no authorisation."""
        where = answer.headers.get("location", "")
        if not where:
            raise UserError("the registry does not say where to send a file", hint="ask another registry")
        return where

    @contextmanager
    def _ask(self, target: Target) -> Iterator[Answer]:
        """An answer; after a log-in where the registry asks for one."""
        before = self._link.authorization
        with self._link.open(target) as answer:
            # What another host says about a log-in does not count.
            if answer.status != 401 or not same_origin(answer.url, self._base):
                yield answer
                return
            challenge = answer.headers.get("www-authenticate", "")
        with self._lock:
            if self._link.authorization == before:
                self._link.authorization = self._login(challenge)
        with self._link.open(target) as answer:
            yield answer

    def _login(self, challenge: str) -> str:
        """What Authorization says from now on, by what a 401 asks for."""
        kind, _, rest = challenge.partition(" ")
        known = self._known_login()
        if kind.lower() == "basic" and known:
            return known
        said = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        if kind.lower() != "bearer" or "realm" not in said:
            raise UserError("the registry asks for a log-in", hint=LOGIN_HINT)
        if not same_origin(said["realm"], self._base):
            raise UserError(
                "the registry sends its log-in to another host, which is refused", hint="ask another registry"
            )
        asked = urlencode({key: said[key] for key in ("service", "scope") if key in said})
        url = f"{said['realm']}{'&' if urlsplit(said['realm']).query else '?'}{asked}"
        self._link.authorization = None
        with self._link.open(Target("GET", url, {"Authorization": known} if known else {})) as answer:
            self._expect(answer, 200)
            return f"Bearer {_token(answer.body(MOST_ANSWER_BYTES))}"

    def _known_login(self) -> str | None:
        """What ~/.netrc has for the registry's host, and only for it."""
        try:
            found = netrc.netrc().authenticators(self._link.home.host)
        except (OSError, netrc.NetrcParseError, UnicodeError):
            return None
        if found is None:
            return None
        return "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode("ascii")

    def _expect(self, answer: Answer, status: int) -> None:
        """Raises UserError for another status, Unreachable for one that another time may not have."""
        if answer.status == status:
            return
        if answer.status in (408, 425, 429) or answer.status >= 500:
            raise Unreachable(f"the registry answers {answer.status}", hint="try again later")
        if answer.status in (401, 403):
            raise UserError(f"the registry answers {answer.status}: not for you", hint=LOGIN_HINT)
        said = answer.body(MOST_ANSWER_BYTES).decode("utf-8", errors="replace").strip()
        raise UserError(f"the registry answers {answer.status}: {shortened(said)}", hint="check the model's name")


def _token(raw: bytes) -> str:
    try:
        said = json.loads(raw)
    except (ValueError, RecursionError):
        said = None
    token = (said.get("token") or said.get("access_token")) if isinstance(said, dict) else None
    if not isinstance(token, str) or not _TOKEN.fullmatch(token):
        raise UserError("the registry's log-in gives no token", hint="ask another registry")
    return token
