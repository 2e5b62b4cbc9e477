"""The interactive chat of `pumice run`: a line is a turn, a slash is a command, three quotes hold many lines."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence

from pumice.cli.paths import images_in
from pumice.engine.sampling import Sampling
from pumice.errors import UserError
from pumice.model import Chat, Model

FENCE = '"""'
HELP = """/image PATH   attach an image to the next message (a path in the message does too)
/clear        forget the conversation
/help, /?     this
/bye, /exit   leave (Ctrl-D too); Ctrl-C stops an answer
\"\"\"           begins and ends a message of many lines"""


def talk(model: Model, *, system: str | None, sampling: Sampling, images: Sequence[str]) -> None:
    """Read turns from the terminal until its end. Errors of a turn are shown and the chat goes on."""
    with contextlib.suppress(ImportError):
        # Line editing and history come with the module being there; some builds of Python lack it.
        importlib.import_module("readline")
    chat = model.chat(system=system, sampling=sampling)
    pending = list(images)
    print("Ask away; /help lists the commands.", file=sys.stderr)
    for message in _messages():
        try:
            if not message.startswith("/") or images_in(message)[1]:
                pending = _turn(chat, message, pending)
            elif message.split()[0] in ("/bye", "/exit"):
                return
            else:
                pending = _command(chat, message, pending)
        except UserError as error:
            print(f"error: {error.message}\n{error.hint}", file=sys.stderr)


def _turn(chat: Chat, message: str, pending: list[str]) -> list[str]:
    """Ask, and print the answer as it comes. Returns the images still to be sent: none, unless the turn failed."""
    text, named = images_in(message)
    for path in named:
        print(f"Added image '{path}'", file=sys.stderr)
    images = [*pending, *named]
    if not text:
        print("Attached; now ask.", file=sys.stderr)
        return images
    if "<image>" in text:
        raise UserError(
            "the message holds the mark <image>, which is plain text here",
            hint="attach images with /image PATH, or name their paths",
        )
    try:
        for piece in chat.stream(text, images):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        print("\n(stopped; this turn is forgotten)", file=sys.stderr)
    print(flush=True)
    return []


def _command(chat: Chat, message: str, pending: list[str]) -> list[str]:
    """Obey a slash; returns the images that wait for the next message."""
    word, _, rest = message.partition(" ")
    match word:
        case "/image" if rest.strip():
            path = rest.strip().strip("'\"").replace("\\ ", " ")
            _check_image(path)
            print(f"Added image '{path}'", file=sys.stderr)
            return [*pending, path]
        case "/clear":
            chat.clear()
            print("Forgotten.", file=sys.stderr)
            return []
        case "/help" | "/?":
            print(HELP, file=sys.stderr)
            return pending
        case _:
            raise UserError(f"{message!r} is no command", hint="/help lists them")


def _check_image(path: str) -> None:
    from pumice.image import open_image

    open_image(path)


def _messages() -> Iterator[str]:
    """Messages from stdin, without outer white space; ends at the end of the input."""
    while True:
        try:
            line = input(">>> ").strip()
            if line.startswith(FENCE):
                lines = [line.removeprefix(FENCE)]
                while not lines[-1].rstrip().endswith(FENCE) or (len(lines) == 1 and not lines[0].strip()):
                    lines.append(input("... "))
                line = "\n".join(lines).rstrip().removesuffix(FENCE).strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nUse /bye or Ctrl-D to leave.", file=sys.stderr)
            continue
        if line:
            yield line
