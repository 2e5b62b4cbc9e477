"""Offline: no connection leaves this machine, whatever asks for one, in this process and until it ends.

Python tells its audit hooks of each connection, datagram and look-up of a name before the system hears of it, and a
hook may refuse; none can be taken away again. One way around is closed by hand: a socket that is given a name looks it
up before the hooks are told. What may go on: who listens is connected to, this machine is talked to over loopback and
over sockets that are files. Code outside Python has no hooks: of what pumice loads, nothing makes connections there, as
long as the event loop is asyncio's own (`uvicorn.Config(loop="asyncio")`) and not uvloop, which would.
"""

from __future__ import annotations

import errno
import functools
import ipaddress
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

_TO = ("socket.connect", "socket.sendto", "socket.sendmsg")
_NAMES = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
_WITH_ADDRESS = ("bind", "connect", "connect_ex", "sendto", "sendmsg")


def enforce() -> None:
    """From now on this process opens no connection to another machine, and asks no name server; who tries gets an
    OSError, as from a network that is not there. Libraries and child processes of Hugging Face are told too."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.addaudithook(_refuse)
    for name in _WITH_ADDRESS:
        setattr(socket.socket, name, _by_number(getattr(socket.socket, name)))


def _refuse(event: str, about: tuple[Any, ...]) -> None:
    if event in _TO:
        connection, address = about
        # Without an address it goes to where the socket is connected already.
        if address is not None and not _is_here(connection.family, address):
            raise OSError(errno.ENETUNREACH, "pumice is offline: no connection to another machine")
    elif event in _NAMES and not _is_known(about[0]):
        raise OSError(errno.ENETUNREACH, "pumice is offline: no name is looked up")


def _by_number(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of sockets, whose last argument may be an address, that takes addresses in numbers only."""

    @functools.wraps(method)
    def checked(connection: socket.socket, *arguments: Any) -> Any:
        match arguments:
            case (*_, (str() | bytes() | bytearray() as host, int(), *_)) if connection.family in (
                socket.AF_INET,
                socket.AF_INET6,
            ) and not _is_known(host):
                raise OSError(errno.ENETUNREACH, "pumice is offline: no name is looked up")
        return method(connection, *arguments)

    return checked


def _is_here(family: int, address: Any) -> bool:
    if family in (socket.AF_INET, socket.AF_INET6):
        return str(address[0]) == "localhost" or _is_loopback(str(address[0]))
    return family == socket.AF_UNIX


def _is_loopback(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def _is_known(host: Any) -> bool:
    """Is this a host that no server need be asked about: none, localhost, or an address in numbers?"""
    text = host.decode("latin-1") if isinstance(host, bytes | bytearray) else host
    if text in (None, "", "localhost"):
        return True
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
