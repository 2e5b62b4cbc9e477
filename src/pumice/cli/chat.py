"""The interactive chat of `pumice run`: a line is a turn, a slash is a command, three quotes hold many lines."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Sequence

from pumice.cli.paths import images_in, real_path, refuse_mark
from pumice.cli.terminal import print_error, read_line
from pumice.cli.tokens import print_likely
from pumice.conversation import Chat
from pumice.errors import UserError
from pumice.image import open_image
from pumice.model import Model

COMMANDS = ("/image", "/clear", "/help", "/?")
LEAVING = ("/bye", "/exit")
FENCE = '"""'
HELP = """/image PATH   attach an image to the next message (a path in the message does too)
/clear        forget the conversation
/help, /?     this
/bye, /exit   leave (Ctrl-D too); Ctrl-C stops an answer
\"\"\"           begins and ends a message of many lines"""


def talk(model: Model, chat: Chat, images: Sequence[str]) -> None:
    """Read turns from the terminal until its end. Errors of a turn are shown and the chat goes on."""
    with contextlib.suppress(ImportError):
        # Line editing and history come with the module being there; some builds of Python lack it.
        importlib.import_module("readline")
    pending = list(images)
    for path in pending:
        _check_image(model, path)
    print("Ask away; /help lists the commands.", file=sys.stderr)
    for message in _messages():
        word = message.split()[0]
        try:
            if word in LEAVING:
                return
            if word in COMMANDS or (word.startswith("/") and not images_in(message)[1]):
                pending = _command(model, chat, message, pending)
            else:
                pending = _turn(model, chat, message, pending)
        except UserError as error:
            print_error(error)


def _turn(model: Model, chat: Chat, message: str, pending: list[str]) -> list[str]:
    """Ask, and print the answer as it comes, and what was asked about its tokens. Returns the images still to be sent:
    those of a message without words."""
    text, named = images_in(message)
    for path in named:
        print(f"Added image '{path}'", file=sys.stderr)
    images = [*pending, *named]
    if not text:
        print("Attached; now ask.", file=sys.stderr)
        return images
    refuse_mark(text, "attach images with /image PATH, or name their paths")
    try:
        stream = chat.stream(text, images)
        for piece in stream:
            print(piece, end="", flush=True)
        print(flush=True)
        print_likely(stream.answer.logprobs, model.tokenizer)
    except KeyboardInterrupt:
        print("\n(stopped; this turn is forgotten)", file=sys.stderr)
        print(flush=True)
    except UserError as error:
        # What the model refuses once it would refuse each time.
        print_error(error)
        if images:
            print("(the images of this turn are dropped)", file=sys.stderr)
    return []


def _command(model: Model, chat: Chat, message: str, pending: list[str]) -> list[str]:
    """Obey a slash; returns the images that wait for the next message."""
    word, _, rest = message.partition(" ")
    match word:
        case "/image" if rest.strip():
            path = real_path(rest)
            _check_image(model, path)
            print(f"Added image '{path}'", file=sys.stderr)
            return [*pending, path]
        case "/image":
            raise UserError("/image came without a path", hint="write /image photo.jpg")
        case "/clear":
            chat.clear()
            print("Forgotten.", file=sys.stderr)
            return []
        case "/help" | "/?":
            print(HELP, file=sys.stderr)
            return pending
        case _:
            raise UserError(f"{message!r} is no command", hint="/help lists them")


def _check_image(model: Model, path: str) -> None:
    """Raises UserError now for what would fail later: no such picture, or a model without eyes."""
    model.eyes()
    open_image(path)


def _messages() -> Iterator[str]:
    """Messages from stdin, without outer white space; ends at the end of the input."""
    while True:
        try:
            line = read_line(">>> ").strip()
            if line.startswith(FENCE):
                lines = [line.removeprefix(FENCE)]
                while not lines[-1].rstrip().endswith(FENCE) or (len(lines) == 1 and not lines[0].strip()):
                    lines.append(read_line("... "))
                line = "\n".join(lines).rstrip().removesuffix(FENCE).strip()
        except EOFError:
            print(file=sys.stderr)
            return
        except KeyboardInterrupt:
            print("\nUse /bye or Ctrl-D to leave.", file=sys.stderr)
            continue
        if line:
            yield line
