"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pumice.errors import UserError


@contextmanager
def whole(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A place beside `path` to write a file or a folder to. It takes the name `path` when the block ends well, and is
    gone when it does not; what a killed process left there goes with the next try.

    Raises UserError: `check_free`, or what the system says when it does not take the bytes.
    """
    check_free(path, replace=replace)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        yield partial
        if path.is_dir() and any(path.iterdir()):
            _remove(path)
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}", hint="check the disk's free space and the folder"
        ) from error
    finally:
        _remove(partial)


def check_free(path: Path, *, replace: bool = False) -> None:
    """Raises UserError where `path` is there already. With `replace` a file may be, and a folder that holds a
    checkpoint and no other folders: nothing else is worth less than a slip of the hand."""
    if not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir())):
        return
    if not replace:
        raise UserError(f"{path} is there already", hint="name a new one, remove that one, or replace it with --force")
    inner = list(path.iterdir()) if path.is_dir() else []
    if inner and (not (path / "config.json").is_file() or any(each.is_dir() for each in inner)):
        raise UserError(f"{path} is a folder with other things than a checkpoint in it", hint="name a new folder")


def sweep(folder: Path, name: str = "*") -> None:
    """Remove what earlier processes began in a folder, under this name or any, and will not end."""
    for old in folder.glob(f".{name}.*.part"):
        number = old.name.removesuffix(".part").rpartition(".")[2]
        if number.isdecimal() and not _alive(int(number)):
            _remove(old)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()
