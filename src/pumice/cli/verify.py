"""`pumice verify`: how far a build of a model is from another."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pumice.cli import options
from pumice.cli.options import AsJson, Beside, Device, Dtype, ImagePaths, ModelName, Preprocess, Template
from pumice.cli.terminal import counting
from pumice.errors import UserError

if TYPE_CHECKING:
    from pumice.tasks.card import Card

Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        help="Another build of the model, or a file of --save; without it pumice-values.safetensors beside the model.",
    ),
]
AgainstBeside = Annotated[
    list[str] | None, typer.Option("--against-with", help="What the reference needs beside it, as --with.")
]
Save = Annotated[
    Path | None,
    typer.Option("--save", help="Write the model's values to this .safetensors file, a reference for later."),
]
Keep = Annotated[bool, typer.Option("--keep", help="Write the card into the model's GGUF file, which has room for it.")]
MaxKl = Annotated[float | None, typer.Option("--max-kl", help="Exit with 1 above this mean KL divergence, in nats.")]
MinAgreement = Annotated[
    float | None, typer.Option("--min-agreement", help="Exit with 1 below this share of same best tokens.")
]
MinCosine = Annotated[
    float | None, typer.Option("--min-cosine", help="Exit with 1 where a feature's cosine is below this.")
]


def verify(
    model: ModelName,
    against: Against = None,
    save: Save = None,
    keep: Keep = False,
    image: ImagePaths = None,
    max_kl: MaxKl = None,
    min_agreement: MinAgreement = None,
    min_cosine: MinCosine = None,
    template: Template = None,
    preprocess: Preprocess = None,
    beside: Beside = None,
    against_beside: AgainstBeside = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare a model with another build of it: pixels, tower, language model.

    pumice verify llava-q4.gguf --against llava-f16.gguf
    """
    if save is not None and (against is not None or keep):
        raise UserError(
            "--save came with --against or --keep", hint="save the reference's values first, then compare with them"
        )
    with counting() as told:
        from pumice.tasks.card import Bounds
        from pumice.tasks.verify import How, compare
        from pumice.tasks.verify import save as save_values

        bounds = Bounds(max_kl, min_agreement, min_cosine)
        source = options.source(model, template, preprocess, beside)
        how = How(image or [], keep, dtype, device, told)
        if save is not None:
            save_values(source, save, how)
            return
        other = None if against is None else options.source(against, template, preprocess, against_beside)
        card = compare(source, other, how)
    if as_json:
        print(card.to_json())
    else:
        print_card(card)
    broken = bounds.broken(card)
    for each in broken:
        print(f"out of bounds: {each}", file=sys.stderr)
    if broken:
        raise typer.Exit(1)


def print_card(card: Card) -> None:
    """A table; a rule between the parts."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(f"model      {card.model}\nreference  {card.reference}")
    print(f"{card.questions} questions, {card.pictures} pictures, {card.places} places of the reference's answers")
    table = Table("part", "figure", "value", "in a word", box=box.SIMPLE_HEAD)
    last = ""
    for row in card.rows():
        if row.part != last and last:
            table.add_section()
        table.add_row(row.part if row.part != last else "", *row[1:])
        last = row.part
    Console(highlight=False).print(table)
