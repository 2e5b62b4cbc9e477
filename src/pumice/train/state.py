"""What a stopped run goes on from: the state file, the log cut to it, and the signals that stop a run between steps."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch

from pumice.errors import UserError
from pumice.network.llava import Llava
from pumice.train.recipe import Recipe

MAY_CHANGE = ("micro_batch", "max_tokens", "save_every")
"""Keys that may differ when a run goes on: how the work is cut and kept; and max_tokens, which may be the remedy for
the sample that stopped the run."""

# What torch.load raises on a file that was cut short or is no state, and load_state_dict on one of another model.
_DAMAGED = (OSError, EOFError, RuntimeError, pickle.UnpicklingError, LookupError, TypeError, ValueError)


class State:
    """Everything the next step depends on, in memory and in one file."""

    def __init__(self, file: Path, recipe: Recipe, network: Llava, optimiser: torch.optim.Optimizer) -> None:
        self._file, self._recipe, self._network, self._optimiser = file, recipe, network, optimiser
        self._saved = 0

    def resume(self) -> int:
        """The step to go on with, 0 where there is no file.

        Raises UserError when the file is damaged, or the run began with another recipe.
        """
        if not self._file.exists():
            return 0
        again = f"remove {self._file.name} or name another output to begin anew"
        try:
            state = torch.load(self._file, weights_only=True)
            begun, step = dict(state["recipe"]), int(state["step"])
        except _DAMAGED as error:
            raise UserError(f"{self._file} is damaged: it holds no state of a training", hint=again) from error
        for key, value in dataclasses.asdict(self._recipe).items():
            if key not in MAY_CHANGE and begun.get(key) != value:
                raise UserError(
                    f"the run in {self._file.parent} began with {key} = {begun.get(key)!r}, the recipe has {value!r}",
                    hint=f"go on with the recipe it began with; or {again}",
                )
        try:
            self._network.load_state_dict(state["network"])
            self._optimiser.load_state_dict(state["optimiser"])
        except _DAMAGED as error:
            raise UserError(f"{self._file} does not fit the model {self._recipe.model}", hint=again) from error
        self._saved = step
        return step

    def save(self, step: int) -> None:
        """Written beside and renamed, so that a kill leaves the older state whole. A step is saved once."""
        if step == self._saved:
            return
        beside = self._file.with_suffix(".part")
        weights = {"network": self._network.state_dict(), "optimiser": self._optimiser.state_dict()}
        torch.save(weights | {"step": step, "recipe": dataclasses.asdict(self._recipe)}, beside)
        os.replace(beside, self._file)
        self._saved = step

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)
        self._saved = 0


def log_from(path: Path, step: int) -> TextIO:
    """A log to append to, cut to its first `step` lines: what followed the last saved state is written again."""
    try:
        log = path.open("a+", encoding="utf-8", newline="\n", buffering=1)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}", hint="name another output") from error
    log.seek(0)
    for _ in range(step):
        log.readline()
    log.truncate(log.tell())
    return log


class Stop:
    """Which signal asked a run to stop, if one has."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def ask(self, number: int, frame: FrameType | None) -> None:
        """A signal handler. A second Ctrl-C does not wait for the step to end."""
        if self.asked == number == signal.SIGINT:
            raise KeyboardInterrupt("stopped at once; the same command goes on from the last saved step")
        self.asked = number

    def leave(self, words: str) -> None:
        """As Python leaves on this signal: KeyboardInterrupt on Ctrl-C, SystemExit otherwise."""
        raise KeyboardInterrupt(words) if self.asked == signal.SIGINT else SystemExit(words)


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Inside, SIGTERM and Ctrl-C are remembered instead of obeyed. One that is ignored, as Ctrl-C is in a script's
    background, stays ignored."""
    stop = Stop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heard = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in heard:
        signal.signal(number, stop.ask)
    try:
        yield stop
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
