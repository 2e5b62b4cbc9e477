"""`pumice convert`, `pumice quantize`: a model from one format to another."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli import options
from pumice.cli.options import AsJson, Beside, Rule, Template
from pumice.cli.terminal import counting
from pumice.cli.verify import print_card
from pumice.errors import UserError

if TYPE_CHECKING:
    from pumice.checkpoints.report import Progress, Report
    from pumice.tasks.card import Card

Source = Annotated[
    str,
    typer.Argument(help="A checkpoint folder, a .gguf file, or a bundled model: pebble, pebble:1.5.", metavar="SRC"),
]
Destination = Annotated[
    str,
    typer.Argument(help="NAME.gguf, with mmproj-NAME.gguf beside it; anything else is a folder.", metavar="DST"),
]
File = Annotated[
    str, typer.Argument(help="NAME.gguf, with mmproj-NAME.gguf beside it; of an mmproj alone itself.", metavar="DST")
]
Quant = Annotated[
    str | None, typer.Option("--quant", help="Q4_K_M, Q8_0, Q4_0, F16…; as the source has it without it.")
]
To = Annotated[str, typer.Option("--to", help="Q4_K_M, Q8_0, Q4_0, F16…")]
Vision = Annotated[
    str | None, typer.Option("--vision", help="f16, q8_0, f32 or bf16 for tower and projector; f16 beside a quant.")
]
FolderDtype = Annotated[
    str | None,
    typer.Option("--dtype", help="Of a folder: float32, bfloat16 or float16; as the source without it."),
]
FolderFormat = Annotated[
    Rule | None, typer.Option("--format", help="Of a folder: hf, or original for the LLaVA authors'; hf without it.")
]
Requantise = Annotated[
    bool, typer.Option("--allow-requantize", help="Quantise what is quantised already, at a second loss.")
]
KeepCard = Annotated[
    bool, typer.Option("--card", help="Then compare DST with SRC and keep the card in DST; SRC must fit in memory.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at DST.")]


def convert(
    src: Source,
    dst: Destination,
    quant: Quant = None,
    vision: Vision = None,
    dtype: FolderDtype = None,
    format: FolderFormat = None,
    beside: Beside = None,
    template: Template = None,
    requantise: Requantise = False,
    card: KeepCard = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as GGUF, Hugging Face's folder or the authors'.

    pumice convert llava-1.5-7b-hf llava.gguf --quant Q4_K_M
    """
    if card and quant is None:
        raise UserError("--card came without --quant", hint="name a type; what is as in SRC needs no card")
    from pumice.conversion import Choices, is_projector
    from pumice.conversion import convert as converted

    if card and is_projector(src):
        raise UserError(f"--card came, and {src} is a projector alone", hint="a card is of a whole model: leave it out")

    with progress() as told:
        choices = Choices(dtype, template, requantise, force, told, format.value if format else None)
        report = converted(src, dst, quant=quant, vision=vision, beside=tuple(beside or ()), choices=choices)
    kept = kept_card(src, dst, template, beside) if card else None
    if as_json:
        found = {"card": json.loads(kept.to_json())} if kept else {}
        print(json.dumps(described(report) | found, ensure_ascii=False))
        return
    print(report)
    if kept:
        print_card(kept)


def quantize(
    src: Source,
    dst: File,
    to: To,
    vision: Vision = None,
    beside: Beside = None,
    requantise: Requantise = False,
    card: KeepCard = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write a model as quantised GGUF files.

    pumice quantize llava-f16.gguf llava-q4.gguf --to Q4_K_M
    """
    convert(src, dst, to, vision, None, None, beside, None, requantise, card, force, as_json)


def kept_card(src: str, dst: str, template: str | None, beside: list[str] | None) -> Card:
    """How far what was written is from its source, as the card in it says from now on."""
    with counting() as told:
        from pumice.tasks.verify import How, compare

        reference = options.source(src, template, None, beside)
        return compare(options.source(dst, None, None, None), reference, How(keep=True, progress=told))


def described(report: Report) -> dict[str, object]:
    """A report as plain values."""
    return {
        "written": [dataclasses.asdict(each) | {"path": str(each.path)} for each in report.written],
        "left_out": [{"what": what, "why": why} for what, why in report.left_out],
        "notes": list(report.notes),
    }


@contextmanager
def progress() -> Iterator[Progress | None]:
    """A bar on a terminal's stderr; a pipe or a log gets nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading", total=None)

        def told(name: str, done: int, total: int) -> None:
            bar.update(task, description=name, completed=done, total=total)

        yield told
