"""Pictures by URL: attacks.md E, line by line. The internet of these tests is made up: names lead to addresses of a
table, and public addresses to one server on this machine; nothing else can be connected to."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pumice.errors import UserError
from pumice.server import remote
from pumice.server.remote import Remote
from pumice.server.settings import Settings
from wires import Fake, Handler, send, serving

ON = Settings(remote_images=True, max_body_bytes=300_000)
PICTURE = b"\x89PNG\r\n\x1a\n" + b"p" * 5000
PNG = {"Content-Type": "image/png"}
PUBLIC, OTHER = "93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"


@dataclass
class Internet:
    names: dict[str, list[list[str]]]
    """The addresses of each name, one look-up after another; the last ones stay."""
    servers: dict[tuple[str, int], int] = field(default_factory=dict)
    """Ports of this machine that stand for public addresses."""
    looked_up: list[str] = field(default_factory=list)
    connected: list[tuple[str, int]] = field(default_factory=list)


@pytest.fixture
def internet(monkeypatch: pytest.MonkeyPatch) -> Internet:
    made = Internet({"ok.example": [[PUBLIC]]})
    look_up, connect = socket.getaddrinfo, socket.create_connection

    def looking(host: Any, port: Any, *rest: Any, **options: Any) -> Any:
        text = host.decode() if isinstance(host, bytes) else host
        made.looked_up.append(text)
        answers = made.names.get(text)
        if answers is None:
            if not (text[:1].isdigit() or ":" in text or text == "localhost"):
                raise socket.gaierror(socket.EAI_NONAME, "no such host")
            return look_up(host, port, *rest, **options)
        addresses = answers.pop(0) if len(answers) > 1 else answers[0]
        return [each for address in addresses for each in look_up(address, port, *rest, **options)]

    def connecting(to: tuple[str, int], *rest: Any, **options: Any) -> socket.socket:
        made.connected.append(to)
        if to not in made.servers:
            raise ConnectionRefusedError("nobody is there")
        seen = list(made.looked_up)
        try:
            return connect(("127.0.0.1", made.servers[to]), *rest, **options)
        finally:
            made.looked_up[:] = seen

    monkeypatch.setattr(socket, "getaddrinfo", looking)
    monkeypatch.setattr(socket, "create_connection", connecting)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # is not asked
    return made


@pytest.fixture
def web(internet: Internet) -> Iterator[Fake]:
    """A server at port 80 of two public addresses; it answers with a picture."""
    with serving(Fake(fault=answering(PNG))) as fake:
        port = int(fake.url.rpartition(":")[2])
        internet.servers |= {(PUBLIC, 80): port, (OTHER, 80): port}
        yield fake


def answering(headers: dict[str, str], status: int = 200, body: bytes = PICTURE) -> Callable[[Handler, Fake], bool]:
    return lambda handler, fake: (send(handler, status, body, headers), True)[1]


def refused(url: str, settings: Settings = ON) -> UserError:
    with pytest.raises(UserError) as caught:
        Remote(settings).fetch(url)
    assert len(caught.value.message) < 300
    return caught.value


def test_a_picture(internet: Internet, web: Fake) -> None:
    """One look-up, one connection, to the address that was looked up; and no word about who asks."""
    for url in ("http://ok.example/a.png?x=1#y", "HTTP://OK.example", f"http://{PUBLIC}/", f"http://[{OTHER}]/"):
        internet.looked_up.clear(), internet.connected.clear()
        assert Remote(ON).fetch(url) == PICTURE
        assert len(internet.connected) == 1
        assert len(set(internet.looked_up)) == 1
    verb, path, headers = web.asked[0]
    assert (verb, path, headers["Host"], headers["User-Agent"]) == ("GET", "/a.png?x=1", "ok.example", "pumice")
    assert not {"Authorization", "Cookie", "Referer"} & set(headers)


def test_e_off_by_default(internet: Internet, web: Fake) -> None:
    """attacks.md E: remote URLs are off by default, and whoever asks is told in Ollama's words."""
    for settings in (Settings(), Settings(remote_images=True, offline=True)):
        for url in ("http://ok.example/a.png", "https://ok.example/a.png", "file:///etc/passwd", ""):
            problem = refused(url, settings)
            assert problem.message == "image URLs are not currently supported, please use base64 encoded data instead"
            assert "data:" in problem.hint
    assert "PUMICE_REMOTE_IMAGES=1" in refused("http://ok.example/a.png", Settings()).hint
    assert not internet.looked_up
    assert not internet.connected
    assert not web.asked


INNER = [
    "127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "[::]", "2130706433", "0177.0.0.1",
    "0x7f000001", "0x7f.1", "127.1", "017700000001", "127.0.0.1.", "169.254.169.254", "[::ffff:a9fe:a9fe]",
    "[fd00:ec2::254]",
    "metadata.google.internal", "168.63.129.16", "100.100.100.200", "192.0.0.192", "10.0.0.1", "192.168.1.1",
    "172.31.0.1", "[fe80::1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "localhost.", "LOCALHOST", "inner.example",
    "both.example", "224.0.0.1", "255.255.255.255", "[::127.0.0.1]", "[fe80::1%25lo]",
]  # fmt: skip


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize("host", INNER)
def test_e_inner_addresses(host: str, scheme: str, internet: Internet, web: Fake) -> None:
    """attacks.md E: loopback, decimal, octal, mapped, link-local, metadata hosts; CVE-2025-6242, CVE-2026-33626.
    Nothing is connected to, also where only one of a name's addresses is inner."""
    internet.names |= {
        "metadata.google.internal": [["169.254.169.254"]],
        "inner.example": [["192.168.0.7"]],
        "both.example": [[PUBLIC, "127.0.0.1"]],
        "127.0.0.1.": [["127.0.0.1"]],
        "localhost.": [["127.0.0.1"]],
    }
    for port in ("", ":80", ":11434"):
        refused(f"{scheme}://{host}{port}/latest/meta-data")
    assert not internet.connected
    assert not web.asked


@pytest.mark.parametrize(
    "url",
    [
        "http://ok.example\\@127.0.0.1/", "http://ok.example\\.127.0.0.1/", "http:\\\\ok.example/", "http://ok.example/\\x",
        "http://ok.example@127.0.0.1/", "http://127.0.0.1@ok.example/", "http://a:b@ok.example/", "http://@ok.example/",
        "http://ok.example%40127.0.0.1/", "http://ok.example%2f@127.0.0.1/", "http://ok.example /", "http://ok.example\t/",
        "http://ok.example\n/", "http://ok.example/\r\nX: y", "\x00http://ok.example/", " http://ok.example/",
        "http://ok.example/\x7f", "http:///ok.example/", "http://", "http:ok.example", "//ok.example/", "ok.example",
        "http://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/", "http://ok\u3002example/", "http://ok.example/" + "x" * 9000,
        "http://ok.example/ü.png",
    ],
)  # fmt: skip
def test_e_urls_that_two_readers_read_differently(url: str, internet: Internet, web: Fake) -> None:
    """attacks.md E, CVE-2026-24779: backslashes, users, blanks, letters that become others: before any look-up."""
    refused(url)
    assert not internet.looked_up
    assert not internet.connected


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc/passwd", "file://localhost/etc/passwd", "ftp://ok.example/x", "gopher://ok.example:70/_x",
        "/etc/passwd", "etc/passwd", "data:text/html;base64,QUJD", "data:image/png;base64,###",
        "blob:http://ok.example/x",
        "javascript:alert(1)", "dict://ok.example/", "unix:///var/run/docker.sock", "httpx://ok.example/",
        "s3://a/b",
        "",
        "data:image/png;base64," + "A" * 133_000_000,
    ],
    ids=lambda url: url[:40],
)  # fmt: skip
def test_e_other_schemes(url: str, internet: Internet) -> None:
    """attacks.md E: file:, ftp:, gopher:, and data: of 100 MB or of no picture: none is for the network."""
    began = time.monotonic()
    refused(url)
    assert time.monotonic() - began < 5
    assert not internet.looked_up
    assert not internet.connected


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/", "http://localhost/", "http://[::1]/", "http://2130706433/", "http://inner.example/",
        "//127.0.0.1/", "file:///etc/passwd", "ftp://127.0.0.1/", "gopher://127.0.0.1/", "http://ok.example\\@127.0.0.1/",
        "http://169.254.169.254/latest/", "http://ok.example@127.0.0.1/", "", "http://[::1", "https://127.0.0.1/",
    ],
)  # fmt: skip
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_e_redirects(location: str, status: int, internet: Internet, web: Fake) -> None:
    """attacks.md E, CVE-2026-63764: where a redirect leads is checked like the first address."""
    internet.names["inner.example"] = [["10.9.8.7"]]
    web.fault = lambda handler, fake: (send(handler, status, b"", {"Location": location}), True)[1]
    refused("http://ok.example/a.png")
    assert set(internet.connected) == {(PUBLIC, 80)}
    assert len(web.asked) <= 11


def test_e_a_chain_of_redirects(internet: Internet, web: Fake) -> None:
    """attacks.md E: ten are followed, an eleventh is not, and the last hop of a chain is checked too."""

    def chain(last: str, length: int) -> Callable[[Handler, Fake], bool]:
        def step(handler: Handler, fake: Fake) -> bool:
            at = int(handler.path.strip("/") or 0)
            if at == length:
                send(handler, *((200, PICTURE, PNG) if not last else (302, b"", {"Location": last})))
            else:
                send(handler, 302, b"", {"Location": f"http://ok.example/{at + 1}"})
            return True

        return step

    web.fault = chain("", 10)
    assert Remote(ON).fetch("http://ok.example/0") == PICTURE
    web.fault = chain("", 11)
    refused("http://ok.example/0")
    web.fault = chain("http://127.0.0.1/", 3)
    refused("http://ok.example/0")
    assert set(internet.connected) == {(PUBLIC, 80)}


def test_e_an_answer_of_dns_that_changes(internet: Internet, web: Fake) -> None:
    """attacks.md E: looked up once, and that is connected to; a redirect to the same name is looked up anew."""
    internet.names["changing.example"] = [[PUBLIC], ["127.0.0.1"]]
    assert Remote(ON).fetch("http://changing.example/") == PICTURE
    assert internet.connected == [(PUBLIC, 80)]
    refused("http://changing.example/")
    internet.names["changing.example"] = [[PUBLIC], ["127.0.0.1"]]
    web.fault = lambda handler, fake: (send(handler, 302, b"", {"Location": "http://changing.example/2"}), True)[1]
    refused("http://changing.example/1")
    assert set(internet.connected) == {(PUBLIC, 80)}


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (200, {"Content-Type": "text/html"}),
        (200, {"Content-Type": "image/svg+xml"}),
        (200, {"Content-Type": "application/octet-stream"}),
        (200, {"Content-Type": "text/plain; image/png"}),
        (200, {}),
        (200, PNG | {"Content-Encoding": "gzip"}),
        (404, PNG),
        (206, PNG),
        (401, PNG),
        (500, PNG),
        (304, PNG),
    ],
)
def test_e_what_is_no_picture(status: int, headers: dict[str, str], web: Fake) -> None:
    """attacks.md E: a wrong content type, or no 200; nor is anything unpacked."""
    web.fault = answering(headers, status, b"" if status == 304 else PICTURE)
    assert "public internet" in refused("http://ok.example/a.png").message


def test_e_content_types_are_read_as_http_writes_them(web: Fake) -> None:
    web.fault = answering({"Content-Type": "Image/PNG ; charset=binary"})
    assert Remote(ON).fetch("http://ok.example/") == PICTURE


def test_e_an_endless_body(web: Fake) -> None:
    """attacks.md E: no more is read than a request's body may have."""
    sent = []

    def endless(handler: Handler, fake: Fake) -> bool:
        handler.send_response(200)
        handler.send_header("Content-Type", "image/png")
        handler.end_headers()
        handler.close_connection = True
        while True:
            handler.wfile.write(b"x" * 65_536)
            sent.append(65_536)

    web.fault = endless
    assert "longer than 300000 bytes" in refused("http://ok.example/").message
    assert sum(sent) < 30_000_000


def test_pictures_of_one_request_share_their_bytes(web: Fake) -> None:
    few = Settings(remote_images=True, max_body_bytes=2 * len(PICTURE))
    fetching = Remote(few)
    assert [fetching.fetch("http://ok.example/") for _ in range(2)] == [PICTURE, PICTURE]
    with pytest.raises(UserError, match="longer than"):
        fetching.fetch("http://ok.example/")
    assert Remote(few).fetch("http://ok.example/") == PICTURE


def trickle(before: bytes, every: bytes) -> Callable[[Handler, Fake], bool]:
    def slow(handler: Handler, fake: Fake) -> bool:
        handler.wfile.write(before)
        handler.close_connection = True
        while True:
            time.sleep(0.1)
            handler.wfile.write(every)

    return slow


@pytest.mark.parametrize(
    ("before", "every"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 9999\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n", b"X: y\r\n"),
        (b"", b"H"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 9999\r\n\r\n", b""),
    ],
    ids=["body", "headers", "status", "continue", "silence"],
)
def test_e_slow_answers(before: bytes, every: bytes, web: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """attacks.md E: slow loris. A byte now and then starts every timeout of a socket anew, but not this clock."""
    monkeypatch.setattr(remote, "WHOLE_S", 1.0)
    web.fault = trickle(before, every)
    began, threads = time.monotonic(), threading.active_count()
    fetching = Remote(ON)
    with pytest.raises(UserError):
        fetching.fetch("http://ok.example/")
    assert 0.5 < time.monotonic() - began < 20
    web.fault = answering(PNG)
    with pytest.raises(UserError, match="more than 1 seconds"):
        fetching.fetch("http://ok.example/")
    assert Remote(ON).fetch("http://ok.example/") == PICTURE
    patience_s = time.monotonic() + 20
    while threading.active_count() > threads + 2:  # the server's, for its connections
        assert time.monotonic() < patience_s, threading.enumerate()
        time.sleep(0.05)


def test_e_one_sentence_whatever_is_there(internet: Internet, web: Fake) -> None:
    """A refused address, one where nobody answers, and a name that is none: nobody learns what this machine reaches."""
    internet.names["inner.example"], internet.names["shut.example"] = [["10.0.0.1"]], [["8.8.8.8"]]
    said = {refused(f"http://{name}.example/").message.replace(name, "_") for name in ("inner", "shut", "none")}
    assert len(said) == 1


def test_https_is_checked_for_the_name(tmp_path: Path, internet: Internet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The certificate is the host's of the URL, though an address is connected to; and https does not become http."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not here")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ok.example",
         "-addext", "subjectAltName=DNS:ok.example", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    internet.names["other.example"] = [[PUBLIC]]
    with serving(Fake(fault=answering(PNG)), context) as fake:
        internet.servers[PUBLIC, 443] = int(fake.url.rpartition(":")[2])
        assert Remote(ON).fetch("https://ok.example/") == PICTURE
        asked = len(fake.asked)
        refused("https://other.example/")
        assert len(fake.asked) == asked
        fake.fault = trickle(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n")
        monkeypatch.setattr(remote, "WHOLE_S", 1.0)
        began = time.monotonic()
        refused("https://ok.example/")
        assert time.monotonic() - began < 20
        fake.fault = lambda handler, of: (send(handler, 302, b"", {"Location": "http://ok.example/"}), True)[1]
        refused("https://ok.example/")
    assert {port for _, port in internet.connected} == {443}
