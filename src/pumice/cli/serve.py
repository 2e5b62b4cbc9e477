"""`pumice serve`, and what asks a server that runs: `pumice ps`, `pumice stop`."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import urllib.error
import urllib.request
from datetime import datetime
from typing import Annotated, Any

import typer

from pumice.cli.models import ago, size, table
from pumice.errors import UserError

Host = Annotated[
    str | None, typer.Option("--host", help="Listen there instead of OLLAMA_HOST or 127.0.0.1.", show_default=False)
]
Port = Annotated[int | None, typer.Option("--port", help="Instead of 11434.", min=0, max=65535, show_default=False)]
Offline = Annotated[bool, typer.Option("--offline", help="Open no connection to any other machine.")]
RemoteImages = Annotated[bool, typer.Option("--remote-images", help="Fetch images that are named by http(s) URL.")]
OpenBind = Annotated[bool, typer.Option("--open-bind", help="Let everybody in who reaches the address, without a key.")]
WAIT_S = 30.0
CENTURY_S = 20 * 365.25 * 86400
"""Beyond it is forever."""


def serve(
    host: Host = None,
    port: Port = None,
    offline: Offline = False,
    remote_images: RemoteImages = False,
    open_bind: OpenBind = False,
) -> None:
    """Serve Ollama's and OpenAI's APIs, and a page for people.

    pumice serve

    Ollama's variables count: OLLAMA_HOST, OLLAMA_ORIGINS, OLLAMA_KEEP_ALIVE, OLLAMA_NUM_PARALLEL,
    OLLAMA_CONTEXT_LENGTH, OLLAMA_MAX_QUEUE, OLLAMA_MAX_LOADED_MODELS, OLLAMA_NOPRUNE, OLLAMA_MODELS. Own ones:
    PUMICE_API_KEY (needed where other machines reach the address), PUMICE_API_KEY_FILE, PUMICE_OFFLINE,
    PUMICE_REMOTE_IMAGES, PUMICE_FOLDERS, PUMICE_OPEN_BIND, PUMICE_HOME.
    """
    from pumice.server.settings import Address, Settings

    address = Address.of(os.environ.get("OLLAMA_HOST", ""))
    if host is not None:
        address = Address.of(host)
    if port is not None:
        address = dataclasses.replace(address, port=port)
    flags = {"PUMICE_OFFLINE": offline, "PUMICE_REMOTE_IMAGES": remote_images, "PUMICE_OPEN_BIND": open_bind}
    environment = {**os.environ, **{name: "1" for name, given in flags.items() if given}}
    settings = Settings.of(environment, address)
    from pumice.server.running import serve as run

    run(settings)


def ps() -> None:
    """List the models that a running server has in memory."""
    rows = []
    for each in asked("GET", "/api/ps")["models"]:
        left_s = datetime.fromisoformat(each["expires_at"]).timestamp() - time.time()
        until = "Forever" if left_s > CENTURY_S else "Stopping..." if left_s < 0 else ago(-left_s)
        on_gpu = round(100 * each["size_vram"] / each["size"]) if each["size"] else 0
        place = {0: "100% CPU", 100: "100% GPU"}.get(on_gpu, f"{100 - on_gpu}%/{on_gpu}% CPU/GPU")
        rows.append((each["name"], each["digest"][:12], size(each["size"]), place, str(each["context_length"]), until))
    for line in table(("NAME", "ID", "SIZE", "PROCESSOR", "CONTEXT", "UNTIL"), rows):
        print(line)


def stop(model: Annotated[str, typer.Argument(help="A model in memory.", metavar="MODEL")]) -> None:
    """Let a running server unload a model."""
    try:
        asked("POST", "/api/generate", {"model": model, "keep_alive": 0})
    except UserError as error:
        if "not found" in error.message:
            raise UserError(f"couldn't find model {json.dumps(model)} to stop", hint=error.hint) from error
        raise


def asked(verb: str, path: str, body: dict[str, Any] | None = None) -> Any:
    """What the running server says. Raises UserError for its errors, and where none runs."""
    from pumice.server.settings import base_url, keys

    where = base_url(os.environ)
    headers = {"Content-Type": "application/json"}
    if secrets := keys(os.environ):
        headers["Authorization"] = f"Bearer {secrets[0]}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(where + path, data, headers, method=verb)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        said = error.read(10_000).decode("utf-8", errors="replace")
        raise UserError(_error(said), hint=f"the server at {where} says so") from error
    except (OSError, ValueError) as error:
        raise UserError(f"could not connect to the server at {where}", hint="start it with: pumice serve") from error


def _error(said: str) -> str:
    try:
        return str(json.loads(said)["error"])
    except (ValueError, KeyError, TypeError):
        return said
