"""`pumice create`: a model of one's own, in Ollama's words. No server is needed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pumice.errors import UserError

NewName = Annotated[str, typer.Argument(help="What the model is to be called.", metavar="NAME")]
File = Annotated[
    str | None,
    typer.Option(
        "--file", "-f", help="The Modelfile, or - for stdin; `Modelfile` here without it, else FROM this folder."
    ),
]
Quantize = Annotated[
    str | None, typer.Option("--quantize", "-q", help="Q4_K_M, Q8_0, Q4_0…: what F16, BF16 or F32 weights become.")
]


def create(name: NewName, file: File = None, quantize: Quantize = None) -> None:
    """Make a model in pumice's own store: from a model, GGUF files, or a LLaVA folder.

    pumice create mine -f Modelfile -q Q4_K_M
    """
    from dataclasses import replace

    from pumice import creating, store
    from pumice.cli.transfer import show
    from pumice.creating.local import of_this_machine
    from pumice.modelfile import read_modelfile

    try:
        made = store.Name.parse(name)
    except UserError as error:
        raise UserError("invalid model name", hint=error.hint) from error
    content, folder = _content(file)
    said = read_modelfile(content)
    for each in said.ignored:
        print(f"warning: parameter {each} is deprecated", file=sys.stderr)
    recipe = replace(of_this_machine(said, folder), quantize=quantize)
    show(creating.create(made, recipe, store.own_store()))


def _content(file: str | None) -> tuple[bytes, Path]:
    """A Modelfile's bytes, and the folder that its paths begin in."""
    if file == "-":
        return sys.stdin.buffer.read(), Path.cwd()
    path = Path(file or "Modelfile").expanduser()
    if file is None and not path.exists():
        return b"FROM .", Path.cwd()
    try:
        return path.read_bytes(), path.absolute().parent
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", hint="name the Modelfile with --file") from error
