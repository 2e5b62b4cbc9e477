"""`--offline`: a process of its own, since what it sets cannot be taken back. One audit hook before it and one behind
it write down what is tried and what is let through."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHILD = """
import asyncio, json, os, socket, sys, tempfile, threading, urllib.request
from pathlib import Path

tried, passed = [], []

def shown(about):
    rest = about[1:] if hasattr(about[0], "family") else about
    return [each if isinstance(each, str | int) else repr(each) for each in rest]

def writing(to):
    def hook(event, about):
        if event.startswith("socket.") and event not in ("socket.__new__", "socket.bind", "socket.gethostname"):
            to.append([event, *shown(about)])
    return hook

sys.addaudithook(writing(tried))
import httpx2, uvicorn
from pumice.server import offline
from pumice.server.guard import Guard
from pumice.server.settings import Settings
offline.enforce()
sys.addaudithook(writing(passed))

said = {}

def attempt(name, call):
    before = len(tried)
    try:
        call()
        said[name] = "done"
    except Exception as error:
        said[name] = type(error).__name__ + ("" if isinstance(error, OSError) else f": {error}")
    if len(tried) == before:
        said[name] += ", untried"

def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as one:
        one.settimeout(5)
        one.connect(address)

def bind(host):
    with socket.socket() as one:
        one.bind((host, 0))

def send(family, address):
    with socket.socket(family, socket.SOCK_DGRAM) as one:
        one.sendto(b"x", address)

def sendmsg(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendmsg([b"x"], [], 0, address)

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})

def serve():
    guarded = Guard(app, Settings())
    config = uvicorn.Config(guarded, host="localhost", port=0, loop="asyncio", log_level="critical", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx2.Client(trust_env=False) as client:
        assert client.get(f"http://127.0.0.1:{port}/").text == "ok"
        assert client.get(f"http://localhost:{port}/").text == "ok"
    server.should_exit = True
    thread.join()

def unix():
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(folder + "/s")
        listening.listen()
        connect(socket.AF_UNIX, folder + "/s")

def datagram_here():
    kind = (socket.AF_INET, socket.SOCK_DGRAM)
    with socket.socket(*kind) as one, socket.socket(*kind) as other:
        one.bind(("127.0.0.1", 0))
        other.sendto(b"x", one.getsockname())
        other.connect(one.getsockname())
        other.send(b"y")
        other.sendmsg((b"z", b"z"))
        assert one.recv(9) + one.recv(9) + one.recv(9) == b"xyzz"

def pull():
    from pumice.store import transfer
    from pumice.store.layout import OwnStore
    from pumice.store.link import Reach
    from pumice.store.names import Name
    list(transfer.pull(Name.parse("llava"), transfer.Shelves(OwnStore(Path("nowhere"))), Reach()))

def hub():
    from pumice.store import hub as of
    list(of.pull("llava-hf/llava-1.5-7b-hf"))

def remote():
    from pumice.server.remote import Remote
    Remote(Settings(remote_images=True)).fetch("https://93.184.215.14/a.png")

attempt("server and clients on loopback", serve)
attempt("socket that is a file", unix)
attempt("datagrams on loopback", datagram_here)
attempt("mapped loopback", lambda: connect(socket.AF_INET6, ("::ffff:127.0.0.1", 9)))
attempt("connect", lambda: connect(socket.AF_INET, ("93.184.215.14", 80)))
attempt("connect to the network around", lambda: connect(socket.AF_INET, ("192.168.1.1", 80)))
attempt("connect to 0.0.0.0", lambda: connect(socket.AF_INET, ("0.0.0.0", 9)))
attempt("connect by a name", lambda: connect(socket.AF_INET, ("example.com", 80)))
attempt("connect_ex by a name", lambda: socket.socket().connect_ex((b"example.com", 80)))
attempt("connect by a name and IPv6", lambda: connect(socket.AF_INET6, ("example.com", 80, 0, 0)))
attempt("datagram by a name", lambda: send(socket.AF_INET, ("example.com", 53)))
attempt("sendmsg by a name", lambda: sendmsg(("example.com", 53)))
attempt("bind by a name", lambda: bind("example.com"))
attempt("bind", lambda: bind("localhost"))
attempt("connect by IPv6", lambda: connect(socket.AF_INET6, ("2606:4700::1111", 80)))
attempt("connect by a mapped address", lambda: connect(socket.AF_INET6, ("::ffff:8.8.8.8", 80)))
attempt("connect_ex", lambda: socket.socket().connect_ex(("8.8.8.8", 53)))
attempt("create_connection", lambda: socket.create_connection(("8.8.8.8", 53), 5))
attempt("datagram", lambda: send(socket.AF_INET, ("8.8.8.8", 53)))
attempt("datagram by IPv6", lambda: send(socket.AF_INET6, ("2606:4700::1111", 53)))
attempt("sendmsg", lambda: sendmsg(("8.8.8.8", 53)))
attempt("connected datagram", lambda: connect(socket.AF_INET, ("8.8.8.8", 53), socket.SOCK_DGRAM))
attempt("name", lambda: socket.getaddrinfo("example.com", 80))
attempt("name in bytes", lambda: socket.getaddrinfo(b"example.com", 80))
attempt("gethostbyname", lambda: socket.gethostbyname("example.com"))
attempt("gethostbyname_ex", lambda: socket.gethostbyname_ex("example.com"))
attempt("asyncio", lambda: asyncio.run(asyncio.open_connection("8.8.8.8", 53)))
attempt("asyncio by a name", lambda: asyncio.run(asyncio.open_connection("example.com", 80)))
attempt("urllib", lambda: urllib.request.urlopen("http://93.184.215.14/", timeout=5))
attempt("httpx2", lambda: httpx2.get("http://93.184.215.14/", trust_env=False))
attempt("pull", pull)
attempt("remote", remote)
attempt("hub", hub)
print(json.dumps({"said": said, "passed": passed, "tried": tried}))
"""


def ran(tmp_path: Path, *command: str) -> dict[str, Any]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    done = subprocess.run(
        [*command, sys.executable, str(script), "hub"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


HERE = ("127.0.0.1", "::1", "::ffff:127.0.0.1", "localhost")


def test_j_offline_opens_no_connection(tmp_path: Path) -> None:
    """attacks.md J: `--offline` with an audit hook: zero connects, however they are tried; loopback goes on."""
    found = ran(tmp_path)
    said = found["said"]
    for name in ("server and clients on loopback", "socket that is a file", "datagrams on loopback"):
        assert said.pop(name) == "done"
    assert said.pop("bind") == "done, untried"
    assert said.pop("mapped loopback") == "ConnectionRefusedError"  # let through; nobody listens there
    assert said.pop("hub").startswith(("UserError", "Unreachable"))  # huggingface_hub itself stays at home
    assert "93.184.215.14" in said.pop("remote")
    assert "registry.ollama.ai" in said.pop("pull")
    assert said.pop("httpx2").startswith("ConnectError")
    assert said.pop("urllib") == "URLError"
    # A name that a socket would look up itself is refused before the hooks could be told.
    named = {name: said.pop(name) for name in list(said) if "by a name" in name and name != "asyncio by a name"}
    assert len(named) == 6
    assert set(named.values()) == {"OSError, untried"}, named
    assert set(said.values()) == {"OSError"}, said
    for event, *about in found["passed"]:
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            here = about[0].startswith(tuple(f"('{host}'" for host in HERE))
            assert here or "/s" in about[0] or about == ["None"], about
        elif event == "socket.getaddrinfo":
            assert about[0] in (*HERE, "None", "93.184.215.14", "8.8.8.8"), about
    refused = [each for each in found["tried"] if each not in found["passed"]]
    assert len(refused) >= 18


def test_j_offline_as_the_system_sees_it(tmp_path: Path) -> None:
    """attacks.md J, below Python: what strace sees of the same process."""
    if shutil.which("strace") is None:
        pytest.skip("strace, which watches the system's calls, is not here")
    log = tmp_path / "calls"
    ran(tmp_path, "strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg,sendmmsg", "-o", str(log))
    calls = [line for line in log.read_text().splitlines() if "AF_INET" in line]
    assert calls
    assert all('"127.0.0.1"' in line or '"::1"' in line or '"::ffff:127.0.0.1"' in line for line in calls), calls
