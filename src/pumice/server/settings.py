"""What a server is told by its environment, Ollama's variables and pumice's own; and where a client finds it."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pumice.durations import SECOND_NS, keep_alive_setting
from pumice.errors import UserError, shortened

PORT = 11434
"""Ollama's."""
MIB = 1 << 20
_SCHEME_PORTS = {"http": 80, "https": 443}
_ADDRESS_HINT = "write OLLAMA_HOST as 127.0.0.1:11434, [::1]:11434 or http://name:port"
_NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_.])?")
_YES, _NO = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
_GO_NO = frozenset({"0", "f", "F", "false", "FALSE", "False"})


@dataclass(frozen=True)
class Address:
    """What OLLAMA_HOST says: where a server listens, and where its clients go."""

    scheme: str = "http"
    host: str = "127.0.0.1"
    """A name or an address, IPv6 without brackets; empty for every address of the machine."""
    port: int = PORT
    prefix: str = ""
    """Before every path, for a server behind a proxy: empty, or `/name`."""

    @classmethod
    def of(cls, text: str) -> Address:
        """As Ollama reads it: `http://h` is port 80, `h` is 11434, a port that is none is the scheme's own. Raises
        UserError for a scheme other than http and https, and for what is no host."""
        scheme, separator, rest = _bare(text).rpartition("://")
        if separator and scheme not in _SCHEME_PORTS:
            raise UserError(f"OLLAMA_HOST: {shortened(text)} has an unknown scheme", hint=_ADDRESS_HINT)
        default = _SCHEME_PORTS.get(scheme, PORT)
        place, _, path = rest.partition("/")
        host, port = _host_and_port(place, default)
        if host and not (_NAME.fullmatch(host) or _parsed(host)):
            raise UserError(f"OLLAMA_HOST: {shortened(text)} has no host that can be one", hint=_ADDRESS_HINT)
        path = path.strip("/")
        return cls(scheme or "http", host, port, f"/{path}" if path else "")

    @property
    def base_url(self) -> str:
        """What a client puts before its paths. An address that means all of them becomes loopback."""
        parsed = _parsed(self.host)
        host = self.host or "127.0.0.1"
        if parsed is not None and parsed.is_unspecified:
            host = "127.0.0.1" if parsed.version == 4 else "::1"
        return f"{self.scheme}://{f'[{host}]' if ':' in host else host}:{self.port}{self.prefix}"

    @property
    def is_loopback(self) -> bool:
        """Does nothing but this machine reach it? A name other than localhost may lead anywhere."""
        parsed = _parsed(self.host)
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped:
            parsed = parsed.ipv4_mapped
        return parsed.is_loopback if parsed is not None else self.host.lower() == "localhost"


@dataclass(frozen=True)
class Settings:
    """How a server behaves. Raises UserError for an address that others reach, without a key and without the word
    that this is meant."""

    host: str = "127.0.0.1"
    """As `Address.host`."""
    port: int = PORT
    """0 lets the system choose."""
    origins: tuple[str, ...] = ()
    """Web origins that may ask, beside those of this machine; `*` inside one stands for anything."""
    keep_alive_ns: int = 300 * SECOND_NS
    """How long a model stays in memory after its last answer."""
    parallel: int | None = None
    """Requests that one model answers at a time; None leaves it to pumice."""
    context: int | None = None
    """Tokens of context where a request names none; None leaves it to the model."""
    max_queue: int = 512
    """Requests that are answered or wait at most; one more is refused with 503."""
    max_models: int = 3
    """Models in memory at most."""
    keys: tuple[str, ...] = ()
    """API keys. With one or more, every request needs one of them."""
    debug: bool = False
    offline: bool = False
    """No connection leaves this machine."""
    remote_images: bool = False
    """Pictures may be named by http(s) URL, which this machine then fetches."""
    folders: bool = False
    """Embedding models may be named by the whole path of their folder on this machine, by whoever may ask."""
    open_bind: bool = False
    """The explicit word: everybody who reaches the address may use it, without a key."""
    max_body_bytes: int = 64 * MIB
    """Of a request; a model's file (`/api/blobs`) is as long as it is."""
    max_bodies_bytes: int = 512 * MIB
    """Of all requests that wait or are answered, together, by `bodies.weight`; one more is refused with 503."""
    max_images: int = 64
    """Pictures of one request."""
    request_read_s: float = 120.0
    """How long a request's body may take to come; how long a model's file, or who reads an answer, may stand still."""
    prunes: bool = True
    """At its start, files of pumice's own store that belong to no model are removed."""
    drain_s: float = 30.0
    """How long answers may take to end, once the server is told to stop."""
    stuck_s: float = 120.0
    """How long work may wait without a step of an engine before the server calls itself ill."""

    def __post_init__(self) -> None:
        if not (Address(host=self.host).is_loopback or self.keys or self.open_bind):
            raise UserError(
                f"other machines can reach {shortened(self.host or '0.0.0.0')}, and no API key is set",
                hint="set PUMICE_API_KEY to a secret; or listen on 127.0.0.1; or set PUMICE_OPEN_BIND=1, which lets "
                "everybody in",
            )

    @classmethod
    def of(cls, environment: Mapping[str, str], address: Address | None = None) -> Settings:
        """What the variables say, and `address` in place of OLLAMA_HOST. Raises UserError for what cannot be read.

        Ollama's: OLLAMA_HOST, OLLAMA_ORIGINS, OLLAMA_KEEP_ALIVE, OLLAMA_NUM_PARALLEL, OLLAMA_CONTEXT_LENGTH,
        OLLAMA_MAX_QUEUE, OLLAMA_MAX_LOADED_MODELS, OLLAMA_NOPRUNE, OLLAMA_DEBUG. Own: PUMICE_API_KEY (several with
        commas), PUMICE_API_KEY_FILE (one a line), PUMICE_OFFLINE, PUMICE_REMOTE_IMAGES, PUMICE_FOLDERS,
        PUMICE_OPEN_BIND.
        """
        said = {name: _bare(value) for name, value in environment.items()}
        address = address or Address.of(said.get("OLLAMA_HOST", ""))
        return cls(
            host=address.host,
            port=address.port,
            origins=_listed(said.get("OLLAMA_ORIGINS", "")),
            keep_alive_ns=_kept(said.get("OLLAMA_KEEP_ALIVE", "")),
            parallel=_count(said, "OLLAMA_NUM_PARALLEL") or None,
            context=_count(said, "OLLAMA_CONTEXT_LENGTH") or None,
            max_queue=_count(said, "OLLAMA_MAX_QUEUE", cls.max_queue),
            max_models=_count(said, "OLLAMA_MAX_LOADED_MODELS") or cls.max_models,
            keys=keys(environment),
            debug=_go_flag(said, "OLLAMA_DEBUG"),
            prunes=not _go_flag(said, "OLLAMA_NOPRUNE"),
            offline=_flag(said, "PUMICE_OFFLINE"),
            remote_images=_flag(said, "PUMICE_REMOTE_IMAGES"),
            folders=_flag(said, "PUMICE_FOLDERS"),
            open_bind=_flag(said, "PUMICE_OPEN_BIND"),
        )


def base_url(environment: Mapping[str, str]) -> str:
    """Where a client finds the server that OLLAMA_HOST names. Raises UserError where it names none."""
    return Address.of(environment.get("OLLAMA_HOST", "")).base_url


def keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The API keys that PUMICE_API_KEY and PUMICE_API_KEY_FILE name; a client sends the first. Raises UserError for a
    file that cannot be read or holds none, and for a key that no header can carry."""
    found = list(_listed(_bare(environment.get("PUMICE_API_KEY", ""))))
    name = _bare(environment.get("PUMICE_API_KEY_FILE", ""))
    if name:
        try:
            lines = Path(name).read_text(encoding="utf-8").split()
        except (OSError, ValueError) as error:
            raise UserError(
                f"PUMICE_API_KEY_FILE: {shortened(name)} cannot be read", hint="name a text file with one key a line"
            ) from error
        if not lines:
            raise UserError(f"PUMICE_API_KEY_FILE: {shortened(name)} holds no key", hint="write one key a line into it")
        found += lines
    if any(not re.fullmatch(r"[!-~]+", key) for key in found):
        raise UserError(
            "an API key has spaces or letters that a header cannot carry", hint="use ASCII letters, digits and signs"
        )
    return tuple(dict.fromkeys(found))


def _bare(text: str) -> str:
    """Without the blanks and quotes that Ollama takes off each variable."""
    return text.strip().strip("\"'").strip()


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, map(str.strip, text.split(","))))


def _host_and_port(place: str, default: int) -> tuple[str, int]:
    """As Go's net.SplitHostPort, and the whole as a host where it sees no port."""
    if not place:
        return "127.0.0.1", default
    bracketed = re.fullmatch(r"\[([^\[\]]*)\](?::(.*))?", place)
    if bracketed:
        return bracketed[1], _port(bracketed[2], default)
    if place.count(":") != 1:  # a name alone, or IPv6 without brackets
        return place, default
    host, _, port = place.partition(":")
    return host, _port(port, default)


def _port(text: str | None, default: int) -> int:
    number = int(text) if text and re.fullmatch(r"[0-9]{1,9}", text) else -1
    return number if 0 <= number <= 65535 else default


def _parsed(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _kept(text: str) -> int:
    if not text:
        return Settings.keep_alive_ns
    try:
        return keep_alive_setting(text)
    except UserError as error:
        raise UserError(f"OLLAMA_KEEP_ALIVE: {error.message}", hint=error.hint) from error


def _count(said: Mapping[str, str], name: str, default: int = 0) -> int:
    text = said.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"{name}: {shortened(text)} is no whole number from 0", hint=f"set {name} to a number")
    return int(text)


def _go_flag(said: Mapping[str, str], name: str) -> bool:
    """As Go's ParseBool; any other word is yes."""
    return said.get(name, "") not in _GO_NO | {""}


def _flag(said: Mapping[str, str], name: str) -> bool:
    text = said.get(name, "").lower()
    if text and text not in _YES | _NO:
        raise UserError(f"{name}: {shortened(text)} is neither yes nor no", hint=f"set {name} to 1 or 0")
    return text in _YES
