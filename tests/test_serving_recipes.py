"""What docs/serving.md tells its readers to write: the proxy, the service, the container, the tunnel."""

from __future__ import annotations

import asyncio
import configparser
import http.client
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from starlette.types import Receive, Scope, Send

from pumice.server.guard import Guard
from pumice.server.settings import Settings
from served import listening

ROOT = Path(__file__).parent.parent
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
KEY = {"Authorization": "Bearer secret"}
AT_HOME = {"Host": "llava.example.org", "Origin": "https://llava.example.org"}


def recipe(language: str) -> str:
    """The one block of this language on the page."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "docs/serving.md").read_text(), re.M | re.S)
    return found


# --- the reverse proxy ------------------------------------------------------------------------------------------------


class Echo:
    """Says which host it was asked as and how many bytes came first. Each further line of a chat waits for a `/go`."""

    def __init__(self) -> None:
        self.goes_on = asyncio.Semaphore(0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        first = 0
        if scope["path"] == "/go":
            self.goes_on.release()
        else:
            first = len((await receive()).get("body", b""))
        headers = [(b"content-type", b"application/x-ndjson")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        said = {"host": dict(scope["headers"])[b"host"].decode(), "first": first}
        await send({"type": "http.response.body", "body": json.dumps(said).encode() + b"\n", "more_body": True})
        for number in range(2 * (scope["path"] == "/api/chat")):
            await self.goes_on.acquire()
            await send({"type": "http.response.body", "body": b"%d\n" % number, "more_body": True})
        await send({"type": "http.response.body", "body": b"{}\n"})


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of nginx, with the page's configuration but for TLS, before the guard of a server with a key."""
    if NGINX is None:
        pytest.skip("nginx is not installed")
    settings = Settings(keys=("secret",), origins=("https://llava.example.org",))
    folder = tmp_path_factory.mktemp("nginx")
    with socket.socket() as free, listening(Guard(Echo(), settings)) as port:
        free.bind(("127.0.0.1", 0))
        own = free.getsockname()[1]
        free.close()
        server = re.sub(r"^ *ssl_.*\n", "", recipe("nginx"), flags=re.M)
        server = server.replace("listen 443 ssl", f"listen 127.0.0.1:{own}").replace("11434", str(port))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = " ".join(f"{each}_temp_path {folder}/{each};" for each in kinds)
        configuration = folder / "nginx.conf"
        configuration.write_text(
            f"daemon off; pid {folder}/pid; error_log stderr; events {{}}\n"
            f"http {{ access_log off; {temporary}\n{server}}}"
        )
        command = [NGINX, "-c", str(configuration), "-p", str(folder), "-e", "stderr"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                while not _listens(own):
                    assert process.poll() is None, process.stderr.read() if process.stderr else ""
                    time.sleep(0.01)
                yield own
            finally:
                process.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as trying:
        return trying.connect_ex(("127.0.0.1", port)) == 0


def ask(port: int, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request(method, path, b"{}" if method == "POST" else None, headers)
        answer = client.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()


def test_a_stream_comes_through_the_proxy_piece_by_piece(front: int) -> None:
    with closing(http.client.HTTPConnection("127.0.0.1", front, timeout=60)) as client:
        client.request("POST", "/api/chat", b"{}", KEY | AT_HOME)
        answer = client.getresponse()
        assert json.loads(answer.readline())["host"].startswith("127.0.0.1:")
        for line in (b"0\n", b"1\n"):
            # No line is made before the last has come and this is asked: one that is held back is held for ever.
            assert ask(front, "GET", "/go", KEY)[0] == 200
            assert answer.readline() == line


def test_the_proxy_lets_the_key_and_the_origin_be_checked(front: int) -> None:
    assert ask(front, "GET", "/api/tags", {"Host": "llava.example.org"})[0] == 401
    assert ask(front, "GET", "/api/tags", {"Authorization": "Bearer wrong"})[0] == 401
    status, headers, _ = ask(front, "GET", "/api/tags", KEY | AT_HOME)
    assert (status, headers["access-control-allow-origin"]) == (200, "https://llava.example.org")
    # Of a page that the proxy's users open elsewhere; their password or cookie goes with it.
    assert ask(front, "POST", "/api/pull", KEY | {"Origin": "https://elsewhere.example"})[0] == 403
    assert ask(front, "GET", "//api/tags", {})[0] == 401
    assert ask(front, "GET", "/health", {})[0] == 200


def test_a_models_file_passes_the_proxy_as_it_comes_and_other_bodies_up_to_the_servers_limit(front: int) -> None:
    lines = [
        "POST /api/blobs/sha256:0 HTTP/1.1",
        "Host: x",
        "Authorization: Bearer secret",
        "Content-Length: 9999999999",
    ]
    with socket.create_connection(("127.0.0.1", front), timeout=60) as client:
        client.sendall("\r\n".join([*lines, "", "weights"]).encode())
        response = http.client.HTTPResponse(client)
        response.begin()
        assert response.status == 200
        assert json.loads(response.readline())["first"] == len("weights")
    (least,) = re.findall(r"client_max_body_size ([1-9]\d*)m;", recipe("nginx"))
    assert int(least) * 2**20 > Settings().max_body_bytes


# --- the service ------------------------------------------------------------------------------------------------------


def test_the_service_leaves_time_for_answers_and_may_write_where_its_models_lie() -> None:
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(recipe("ini"))
    service, place = unit["Service"], "/var/lib/pumice"
    assert float(service["TimeoutStopSec"]) > Settings().drain_s
    assert service["Environment"] == f"PUMICE_HOME={place}"
    assert service["ReadWritePaths"] == place
    assert service["ExecStart"] == f"{place}/venv/bin/pumice serve"
    assert unit["Unit"]["Wants"] == unit["Unit"]["After"] == "network-online.target"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_service(tmp_path: Path) -> None:
    unit = tmp_path / "pumice.service"
    unit.write_text(recipe("ini").replace("/var/lib/pumice/venv/bin/pumice", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, [each for each in done.stderr.splitlines() if "pumice" in each]) == (0, [])


# --- the container ----------------------------------------------------------------------------------------------------


def test_the_container_listens_asks_for_its_health_and_leaves_a_build_behind() -> None:
    lines = [each.split(maxsplit=1) for each in recipe("dockerfile").splitlines() if each and each[0] != "#"]
    said = dict(lines)
    environment = dict(each.split("=", 1) for each in said["ENV"].split())
    settings = Settings.of(environment | {"PUMICE_API_KEY": "secret"})
    assert (settings.host, str(settings.port)) == ("0.0.0.0", said["EXPOSE"])
    assert environment["PUMICE_HOME"] == said["VOLUME"]
    assert ["RUN", f"useradd --create-home --home-dir {said['VOLUME']} {said['USER']}"] in lines
    assert json.loads(said["CMD"]) == ["pumice", "serve"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "build", "**/.venv"} <= set(ignored)


def test_the_containers_health_is_asked_without_a_key() -> None:
    (line,) = re.findall(r"^HEALTHCHECK CMD (.*)$", recipe("dockerfile"), re.M)
    _, flag, code = shlex.split(line)
    with listening(Guard(Echo(), Settings(keys=("secret",)))) as port:
        subprocess.run([sys.executable, flag, code.replace("11434", str(port))], check=True)
    failed = subprocess.run([sys.executable, flag, code.replace("11434", str(port))], capture_output=True)
    assert failed.returncode == 1


# --- the public address -----------------------------------------------------------------------------------------------


def test_the_tunnels_server_has_a_key_and_knows_its_own_address(tmp_path: Path) -> None:
    """With a pyngrok that opens nothing, and a pumice that says what it was given."""
    (tmp_path / "pyngrok").mkdir()
    (tmp_path / "pyngrok/__init__.py").touch()
    (tmp_path / "pyngrok/ngrok.py").write_text(
        "from types import SimpleNamespace\n"
        "def connect(addr, *, host_header):\n"
        "    assert addr == host_header\n"
        "    return SimpleNamespace(public_url='https://abc.ngrok.example')\n"
    )
    pumice = tmp_path / "pumice"
    pumice.write_text('#!/bin/sh\necho "$1 $PUMICE_API_KEY $OLLAMA_ORIGINS"\n')
    pumice.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-u", "-c", recipe("python")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, second = done.stdout.split("\n")[:2]
    url, key = first.split()
    assert len(key) >= 32
    assert second == f"serve {key} {url}"
