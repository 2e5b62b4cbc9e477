"""The server as a process: its socket, its signals, its end."""

from __future__ import annotations

import signal
import socket
import sys
from contextlib import suppress

import uvicorn

from pumice.errors import UserError
from pumice.server import offline
from pumice.server.app import application
from pumice.server.logs import config as log_config
from pumice.server.patience import Patient
from pumice.server.settings import Settings

SWITCH_S = 0.0005
"""How long the engine's Python may keep the event loop from running; Python's own 5 ms would stand in each token."""
BACKLOG = 2048
MACOS_FILES = 10240
"""OPEN_MAX of its <sys/syslimits.h>, beyond which no process may go whatever its limit says."""


def listening(settings: Settings) -> socket.socket:
    """The socket of an address. Raises UserError, beginning as Ollama's does, for one that cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio sends small pieces at once only on sockets that say they are TCP.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((settings.host or "0.0.0.0", settings.port))
    except OSError as error:
        found.close()
        place = f"{settings.host}:{settings.port}"
        words = (error.strerror or str(error)).lower()
        raise UserError(
            f"listen tcp {place}: bind: {words}",
            hint="another server may be there already: stop it, or give another --port",
        ) from error
    found.listen(BACKLOG)
    return found


def allow_connections() -> None:
    """As many as the system lets this process have, as Go's programs do: shells hand down 1024 files, and of more the
    server would take none for a second each time, from anybody."""
    try:
        import resource
    except ImportError:  # Windows, which has no such number
        return
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for count in (most, MACOS_FILES):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))
            return


def serve(settings: Settings) -> None:
    """Answer until a signal comes; then take no more, let answers end, and leave. Raises UserError; see `listening`."""
    if settings.offline:
        offline.enforce()
    allow_connections()
    place = listening(settings)
    host, port = place.getsockname()[:2]
    config = uvicorn.Config(
        application(settings),
        loop="asyncio",
        http=Patient,
        ws="none",
        lifespan="on",
        log_config=log_config(debug=settings.debug),
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_s)),
        timeout_keep_alive=75,
    )
    sys.setswitchinterval(SWITCH_S)
    # uvicorn raises a signal again when all is done; it has done its work by then.
    signal.signal(signal.SIGTERM, lambda *_: None)
    print(f"Listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[place])
