"""Many pictures, each described once, into a file of JSON lines. Who is stopped, however hard, goes on where it was.

A line is written whole when its picture is done, in the order of the pictures: `image`, `caption` or `error`, and
`run`, which stands for the model and the question. So a file never holds lines of two runs.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pumice.engine.archive import model_digest
from pumice.errors import UserError, shortened
from pumice.image import blank
from pumice.model import Model
from pumice.question import Question

PROMPT = "Describe the picture."
ENDINGS = frozenset(["jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "heic", "heif"])
"""Of a folder, files with these endings are pictures."""
MAX_LINE_BYTES = 2**24

Told = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Captions:
    """How many pictures were described, could not be, and were done before."""

    described: int
    failed: int
    earlier: int


def caption(
    model: Model,
    images: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    question: Question | None = None,
    *,
    told: Told = lambda name, done, total: None,
) -> Captions:
    """Describes pictures, and writes a line of JSON for each that `output` does not have yet.

    images: files, and folders, of which all pictures in all folders below are taken, but for linked folders. question:
    what each is asked, with everything but an image in it. told: the picture that was done last, how many are done, and
    of how many.

    A picture that cannot be read has a line with the error. Raises UserError for a wrong question and a text model,
    where a path is missing, a folder cannot be read or there is no picture, and where `output` cannot be written, is
    written by another process, or has lines of another model, question or kind.
    """
    asked = question or Question(PROMPT, sampling=model.sampling)
    names = list(dict.fromkeys(_pictures(images)))
    if not names:
        places = ", ".join(os.fspath(each) for each in images)
        raise UserError(f"there is no picture in {shortened(places)}", hint=f"they end in {', '.join(sorted(ENDINGS))}")
    run = _run(model, asked)
    failed = 0
    with _opened(Path(output)) as file:
        done = _done(file, run, Path(output))
        left = [name for name in names if name not in done]
        answers = model.ask_each(dataclasses.replace(asked, image=name) for name in left)
        for count, (name, answer) in enumerate(zip(left, answers, strict=True), 1):
            row = {"image": name}
            if isinstance(answer, UserError):
                row |= {"error": answer.message, "hint": answer.hint}
                failed += 1
            else:
                row |= {"caption": answer.text}
            _write(file, row | {"run": run})
            told(name, count, len(left))
    return Captions(len(left) - failed, failed, len(names) - len(left))


def _run(model: Model, question: Question) -> str:
    """Twelve digits for all that decides about an answer but for the picture: weights, what the model sees of the
    question, how it is drawn. Raises UserError for what is wrong with the question, whatever the picture."""
    opened = model.open(dataclasses.replace(question, image=blank((64, 64), model.eyes()[0])))
    asked = (opened.request.ids, model.dressing, question.sampling, question.form, question.image_tokens)
    return model_digest(model.network, *asked)[:12]


def _pictures(images: Iterable[str | os.PathLike[str]]) -> Iterator[str]:
    for each in images:
        path = os.fspath(each)
        if not os.path.exists(path):
            raise UserError(f"there is no picture or folder {shortened(path)}", hint="look at the path again")
        if not os.path.isdir(path):
            yield path
            continue
        for folder, folders, files in os.walk(path, onerror=_unread):
            folders.sort()
            for name in sorted(files):
                if name.rpartition(".")[2].lower() in ENDINGS:
                    yield os.path.join(folder, name)


def _unread(error: OSError) -> None:
    raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}", hint="make it readable") from error


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, made where it is not there, for this process alone; what was written is on the disk in the end."""
    try:
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield file
            os.fsync(file.fileno())
    except BlockingIOError as error:
        raise UserError(
            f"{path} is being written by another process", hint="wait for it, or name another file"
        ) from error
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}", hint="name another place, or make room"
        ) from error


def _done(file: BinaryIO, run: str, path: Path) -> set[str]:
    """The pictures that have their line. The end of a line that was not written whole is cut off."""
    done: set[str] = set()
    whole = 0
    while line := file.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n"):
            if len(line) == MAX_LINE_BYTES:
                raise _foreign(path, len(done) + 1)
            break
        try:
            row = json.loads(line)
            image, of = str(row["image"]), str(row["run"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _foreign(path, len(done) + 1) from error
        if of != run:
            raise UserError(
                f"line {len(done) + 1} of {path} was written with another model, question or choices",
                hint="give those again to go on, or name another file",
            )
        done.add(image)
        whole += len(line)
    file.truncate(whole)
    file.seek(whole)
    return done


def _foreign(path: Path, number: int) -> UserError:
    return UserError(f"line {number} of {path} is none that pumice caption writes", hint="name another file")


def _write(file: BinaryIO, row: dict[str, str]) -> None:
    # A name that is no UTF-8 is written as the escapes that JSON has for it.
    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
    file.flush()
