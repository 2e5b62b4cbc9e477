"""HTTP to hosts that a name from outside has chosen: where a connection may go, what it may be told, how much may come
back. httpx2 has its home here.

- A host's addresses are looked up once, checked, and those are what is connected to.
- Authorization goes to the origin that a link was made for, and to no other that a redirect names.
- Bodies are taken as they are sent: a compressed answer is refused, so nothing can grow here.
"""

from __future__ import annotations

import ipaddress
import platform
import socket
import ssl
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import httpx2

from pumice.errors import UserError, shortened

MOST_REDIRECTS = 10
"""How many redirects of one request are followed; Ollama's number."""
CONNECT_S, WHOLE_S = 10.0, 60.0
"""Seconds for a connection, and for a small answer as a whole."""
PORTS = {"https": 443, "http": 80}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
"""RFC 6052: the last 32 bits are an IPv4 address."""
_PUBLIC_IPV6 = ipaddress.ip_network("2000::/3")
_SPECIAL = tuple(map(ipaddress.ip_network, ("168.63.129.16/32", "192.0.0.0/24", "2001::/23")))
"""Numbers that look public, or do to some Pythons: where machines in Azure and Oracle's cloud find their host, and what
IANA keeps for protocols."""
INNER_HINT = "--insecure allows it, by http; with https:// before the name, by https"


class Unreachable(UserError):
    """No answer came, or it broke off: no network, no such host, no server, silence. Another try may help."""


@dataclass(frozen=True)
class Reach:
    """Where a link may go."""

    plain: bool = False
    """http is allowed, beside https."""
    inner: bool = False
    """Addresses that are not of the public internet are allowed: loopback, private, link-local."""
    silent_s: float = 30.0
    """How long an answer may stand still before it counts as broken off."""
    whole_s: float | None = None
    """How long a request may take with its redirects and its body, however busily it comes; looking names up is the
    system's and has times of its own. None sets no end."""
    direct: bool = False
    """By no proxy, which would look names up itself and may find other addresses than were checked."""


class Target(NamedTuple):
    """What a request is: its verb, its URL, its headers and its body."""

    verb: str
    url: str
    headers: Mapping[str, str] = {}
    body: bytes = b""


@dataclass(frozen=True, eq=False)
class Answer:
    """An answer whose body is still to come."""

    status: int
    headers: Mapping[str, str]
    """By lower-case name; a mapping that takes any case."""
    url: str
    """Where it came from, after redirects."""
    _response: httpx2.Response

    def pieces(self) -> Iterator[bytes]:
        """The body's bytes as they come."""
        return self._response.iter_raw()

    def body(self, limit: int) -> bytes:
        """The whole body. Raises UserError where it is longer than `limit` bytes, Unreachable where it takes longer
        than a minute."""
        found, until = bytearray(), time.monotonic() + WHOLE_S
        for piece in self.pieces():
            found += piece
            if len(found) > limit:
                raise UserError(
                    f"an answer of the registry is longer than the {limit} bytes that are read",
                    hint="check the model's name and the registry's address",
                )
            if time.monotonic() > until:
                raise Unreachable("the registry's answer does not come to its end", hint="try again later")
        return bytes(found)

    def hang_up(self) -> None:
        """End the answer from another thread: who waits for its next bytes wakes up."""
        stream = self._response.extensions["network_stream"]
        _shut(stream.get_extra_info("socket"))


class Link:
    """Requests to one origin, and to where it sends them on. Several threads may use one."""

    def __init__(self, home: str, reach: Reach) -> None:
        """`home` is a URL of the origin. Raises UserError for what is no URL."""
        self.home = _url(home)
        self._whole_s = reach.whole_s
        self.authorization: str | None = None
        """Sent to the home origin with each request, once it is set."""
        # Certificates of the system, which a company's own are among, and no proxy but by _proxy.
        self._client = httpx2.Client(
            transport=_Guard(reach),
            timeout=httpx2.Timeout(reach.silent_s, connect=CONNECT_S),
            headers={"User-Agent": agent(), "Accept-Encoding": "identity"},
        )

    def close(self) -> None:
        self._client.close()

    @contextmanager
    def open(self, target: Target) -> Iterator[Answer]:
        """The answer to a request, redirects of GET and HEAD followed.

        Raises UserError where a redirect or address may not be followed, or the answer is compressed; Unreachable
        where none comes, or its body breaks off inside the block.
        """
        clock = _Clock()
        try:
            with clock.running(self._whole_s):
                response = self._followed(target, clock)
                try:
                    _refuse_compressed(response)
                    yield Answer(response.status_code, response.headers, str(response.url), response)
                finally:
                    response.close()
        except (httpx2.TransportError, httpx2.StreamError) as error:
            if _is_about_certificate(error):
                raise UserError(
                    f"{shortened(self.home.host)} cannot prove that it is this host",
                    hint="its certificate is wrong, or the network is not what it seems",
                ) from error
            raise Unreachable(
                f"{shortened(self.home.host)} does not answer", hint="check the network and the name; then try again"
            ) from error

    def _followed(self, target: Target, clock: _Clock) -> httpx2.Response:
        url, away = self.home.join(_url(target.url)), False
        for _ in range(MOST_REDIRECTS + 1):
            away = away or origin(url) != origin(self.home)
            headers = dict(target.headers)
            if self.authorization is not None and not away:
                headers.setdefault("Authorization", self.authorization)
            elif away:
                headers.pop("Authorization", None)
            body, watch = target.body or None, {"trace": clock.see}
            request = self._client.build_request(target.verb, url, headers=headers, content=body, extensions=watch)
            # What .netrc says is for the one question that asks for it (registry.py), not for every request.
            response = self._client.send(request, stream=True, auth=None, follow_redirects=False)
            if not (target.verb in ("GET", "HEAD") and response.status_code in (301, 302, 303, 307, 308)):
                return response
            response.close()
            there = url.join(_url(response.headers.get("location", "")))
            if url.scheme == "https" and there.scheme != "https":
                raise UserError("the registry redirects from https to something else", hint="ask another registry")
            url = there
        raise UserError(f"more than {MOST_REDIRECTS} redirects came, one after another", hint="ask another registry")


class _Clock:
    """Hangs up on all that a request has connected to, once its time is over. A timeout of a socket cannot: it begins
    anew with each byte."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_over = False

    @contextmanager
    def running(self, seconds: float | None) -> Iterator[None]:
        timer = threading.Timer(seconds, self._end) if seconds is not None else None
        if timer is not None:
            timer.daemon = True
            timer.start()
        try:
            yield
        finally:
            if timer is not None:
                timer.cancel()

    def see(self, event: str, about: Mapping[str, Any]) -> None:
        """What httpcore2 tells of a request; a connection when there is one, and again when it speaks TLS."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            with self._lock:
                self._sockets.append(about["return_value"].get_extra_info("socket"))
                if self._is_over:
                    _shut(self._sockets[-1])

    def _end(self) -> None:
        with self._lock:
            self._is_over = True
            for each in self._sockets:
                _shut(each)


class _Guard(httpx2.BaseTransport):
    """Connects to addresses that were checked, or to the proxy that the environment names."""

    def __init__(self, reach: Reach) -> None:
        self._reach = reach
        self._lock = threading.Lock()
        # One a host: connections are kept by address, and a certificate was checked for one host only.
        self._ways: dict[str, httpx2.HTTPTransport] = {}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if url.scheme != "https" and not (url.scheme == "http" and self._reach.plain):
            raise UserError("insecure protocol http", hint="--insecure allows a registry without https")
        proxy = None if self._reach.direct else _proxy(url)
        if proxy is not None:
            # The proxy looks names up, so only what is an address already can be checked.
            _refuse_inner([url.host] if _is_address(url.host) else [], self._reach)
            return self._way(proxy, proxy).handle_request(request)
        problem = None
        for address in looked_up(url.host, url.port or PORTS[url.scheme], self._reach):
            pinned = httpx2.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": url.host},
            )
            try:
                return self._way(url.host, None).handle_request(pinned)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                problem = error
        assert problem is not None
        raise problem

    def _way(self, host: str, proxy: str | None) -> httpx2.HTTPTransport:
        with self._lock:
            if host not in self._ways:
                self._ways[host] = httpx2.HTTPTransport(proxy=httpx2.Proxy(proxy) if proxy else None)
            return self._ways[host]

    def close(self) -> None:
        for way in self._ways.values():
            way.close()


def looked_up(host: str, port: int, reach: Reach) -> list[str]:
    """The addresses of a host, checked. Raises UserError where one of them may not be connected to or the host is an
    address in disguise (`2130706433`, `0177.0.0.1`), Unreachable where there is no such host."""
    if _is_address(host) and not _plain_address(host):
        raise UserError(f"{shortened(host)} is an address in disguise", hint="write four numbers, or a host's name")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise Unreachable(f"there is no host {shortened(host)}", hint="check the network and the name") from error
    addresses = list(dict.fromkeys(str(each[4][0]) for each in found))
    _refuse_inner(addresses, reach)
    return addresses


def is_inner(address: str) -> bool:
    """Is this an address that the public internet does not lead to, also as IPv6 wraps one of IPv4?"""
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        wrapped = parsed.ipv4_mapped or parsed.sixtofour
        if parsed in _NAT64:
            wrapped = ipaddress.IPv4Address(parsed.packed[-4:])
        if wrapped is not None:
            return is_inner(str(wrapped))
        if parsed not in _PUBLIC_IPV6:
            return True
    return not parsed.is_global or parsed.is_multicast or any(parsed in each for each in _SPECIAL)


def origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    """Scheme, host and port of a URL, the port always said."""
    return url.scheme, url.host, url.port or PORTS.get(url.scheme)


def same_origin(one: str, other: str) -> bool:
    """Do two URLs have one scheme, host and port? Raises UserError for what is no URL."""
    return origin(_url(one)) == origin(_url(other))


def agent() -> str:
    """How pumice introduces itself to a server."""
    import importlib.metadata

    version, python = importlib.metadata.version("pumice"), platform.python_version()
    return f"pumice/{version} ({platform.machine()} {sys.platform}) Python/{python}"


def _url(text: str) -> httpx2.URL:
    try:
        return httpx2.URL(text)
    except httpx2.InvalidURL as error:
        raise UserError(f"{shortened(text)} is no URL", hint="check the model's name and its registry") from error


def _shut(connection: socket.socket) -> None:
    # Not the socket's own method: TLS sockets forget there that they are ones, under a reader's feet.
    with suppress(OSError):
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _is_about_certificate(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _refuse_compressed(response: httpx2.Response) -> None:
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise UserError("the registry sent a compressed answer, which was not asked for", hint="ask another registry")


def _refuse_inner(addresses: list[str], reach: Reach) -> None:
    if not reach.inner and any(not _plain_address(each) or is_inner(each) for each in addresses):
        raise UserError("the registry's host is on this machine or in a private network", hint=INNER_HINT)


def _plain_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_address(host: str) -> bool:
    """Would the system take this host for an address without asking anybody? As C does: `127.1`, `0x7f000001` too."""
    if _plain_address(host):
        return True
    try:
        socket.inet_aton(host)
    except (OSError, UnicodeError):
        return False
    return True


def _proxy(url: httpx2.URL) -> str | None:
    """The proxy that HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY mean for a URL."""
    named = urllib.request.getproxies()
    proxy = named.get(url.scheme) or named.get("all")
    if not proxy or urllib.request.proxy_bypass(url.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"
