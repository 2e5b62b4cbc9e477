"""Work beside the passes: on a CUDA device the eyes have a stream of their own, and rows gain tokens meanwhile."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Mark(Protocol):
    """A place behind what was launched, as a CUDA event is."""

    def query(self) -> bool:
        """Whether all before it is done."""

    def hand_over(self, values: Tensor) -> None:
        """What passes launch from now on comes after the mark: it may read these values, whose memory stays theirs
        until it has."""


class Side(Protocol):
    """Where eyes work."""

    def working(self) -> AbstractContextManager[None]:
        """What is launched inside comes after all that was launched so far, here and by passes."""

    def mark(self) -> Mark:
        """Behind all that was launched here so far."""


class Stream:
    """A second CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> Event:
        return Event(self._stream.record_event(), self._stream.device)


class Event:
    """A mark on a second CUDA stream."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def query(self) -> bool:
        done: bool = self._event.query()  # type: ignore[no-untyped-call]
        return done

    def hand_over(self, values: Tensor) -> None:
        passes = torch.cuda.current_stream(self._device)
        passes.wait_event(self._event)
        # The memory is the second stream's, whose next work would get it as soon as nobody holds it on this side.
        values.record_stream(passes)


class InOrder:
    """No second stream, and its marks: what is launched later comes later."""

    def working(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def mark(self) -> InOrder:
        return self

    def query(self) -> bool:
        return True

    def hand_over(self, values: Tensor) -> None:
        """There is nothing to wait for."""


def side_of(device: torch.device) -> Side:
    """Where eyes on this device work."""
    return Stream(device) if device.type == "cuda" else InOrder()
