"""Pictures that a request names by URL, where the server's owner allows that this machine fetches them.

A URL is a way to make this machine ask where its sender cannot. So: http and https, to addresses of the public internet
only; all that a name has are checked, and those are what is connected to, at each redirect again (`pumice.store.link`);
no proxy, which would look names up anew; no passwords; so many bytes and seconds; and nothing but what calls itself a
picture. Who asks for another place is told one sentence, the same whatever is there, so that it tells nobody what this
machine can reach.
"""

from __future__ import annotations

import re
import time
from contextlib import closing

from pumice.errors import UserError, shortened
from pumice.server.settings import Settings
from pumice.store.link import Link, Reach, Target

WHOLE_S, SILENT_S = 20.0, 5.0
"""Seconds for all the pictures of a request, and for a stretch in which nothing comes."""
KINDS = frozenset(
    f"image/{kind}" for kind in ("jpeg", "jpg", "png", "webp", "gif", "bmp", "tiff", "avif", "heic", "heif")
)
"""Content types of the pictures that pumice reads. Which it is, its bytes say later."""
LONGEST = 8192
"""Characters of a URL."""
# No backslash, blank or sign that two readers of URLs may take for two things, and no user before the host.
_URL = re.compile(r"https?://[A-Za-z0-9._\[\]:-]+([/?#][!-\[\]-~]*)?", re.IGNORECASE)


class Remote:
    """Fetches the pictures of one request, which may be as many bytes together as a request's body. It waits for the
    network: call it in a thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._left = settings.max_body_bytes
        self._until = time.monotonic() + WHOLE_S

    def fetch(self, url: str) -> bytes:
        """The bytes that a URL leads to. Raises UserError where this server fetches none, and for everything that is
        not a picture of the public internet."""
        if not self._settings.remote_images or self._settings.offline:
            why = "it is offline" if self._settings.offline else "PUMICE_REMOTE_IMAGES=1 allows http and https"
            raise UserError(
                "image URLs are not currently supported, please use base64 encoded data instead",
                hint=f"send a data: URL; this server fetches no pictures: {why}",
            )
        if len(url) > LONGEST or not _URL.fullmatch(url):
            raise UserError(
                f"the image URL {shortened(url)} is not one that is fetched",
                hint="write http:// or https://, no password, and what is not ASCII as %xx; or send a data: URL",
            )
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise UserError(f"the image URLs took more than {WHOLE_S:g} seconds", hint="send data: URLs")
        try:
            data = self._fetched(url, seconds)
        except UserError as error:
            raise _refused(url) from error
        if data is None:
            raise _refused(url)
        if len(data) > self._left:
            raise UserError(
                f"what the image URLs lead to is longer than {self._settings.max_body_bytes} bytes",
                hint="shrink the pictures, or ask about fewer of them",
            )
        self._left -= len(data)
        return data

    def _fetched(self, url: str, seconds: float) -> bytes | None:
        """What is there, as far as it is needed to see that it is too long; None for no picture."""
        reach = Reach(plain=True, direct=True, silent_s=min(SILENT_S, seconds), whole_s=seconds)
        headers = {"Accept": ", ".join(sorted(KINDS)), "User-Agent": "pumice"}
        with closing(Link(url, reach)) as link, link.open(Target("GET", url, headers)) as answer:
            kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            if answer.status != 200 or kind not in KINDS:
                return None
            data = bytearray()
            for piece in answer.pieces():
                data += piece
                if len(data) > self._left:
                    break
            return bytes(data)


def _refused(url: str) -> UserError:
    return UserError(
        f"the image URL {shortened(url)} does not lead to a picture of the public internet",
        hint="it must answer with 200 and an image's content type, from a public address; or send a data: URL",
    )
