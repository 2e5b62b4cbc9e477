"""`pumice classify`: which of some labels fits a picture, and how sure that is."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pumice.cli import options
from pumice.cli.options import Beside, Device, Dtype, ImageTokens, ModelName, Preprocess, System, Template
from pumice.cli.terminal import busy, counting
from pumice.errors import UserError

if TYPE_CHECKING:
    from pumice.classification import Classification, Labelling
    from pumice.tasks.calibration import Calibration

SHOWN = 5
"""So many labels of a picture are printed for people."""


class Length(enum.StrEnum):
    """What a label's log-likelihood is divided by."""

    none = "none"
    tokens = "tokens"
    bytes = "bytes"


Pictures = Annotated[list[str] | None, typer.Argument(help="Images, each classified by itself.", metavar="IMAGE")]
LabelList = Annotated[str | None, typer.Option("--labels", help="The labels, with commas between them: cat,dog.")]
LabelFile = Annotated[
    Path | None,
    typer.Option("--labels-file", help="A file with a label a line; behind it, after tabs, the answers that mean it."),
]
Asked = Annotated[str | None, typer.Option("--prompt", help="What is asked instead of which of the labels is shown.")]
Normalise = Annotated[
    Length | None, typer.Option("--normalise", help="Divide a label's log-likelihood by its length; none without it.")
]
Prior = Annotated[
    bool | None, typer.Option("--prior", help="Subtract what each label gets where the picture shows nothing.")
]
AbstainBelow = Annotated[
    float | None, typer.Option("--abstain-below", help="No label where the best has a smaller probability.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="Scores are divided by it: below 1 is surer, above 1 less sure.")
]
CalibrationFile = Annotated[
    Path | None, typer.Option("--calibration", help="Labels, choices and temperature from a file of --save.")
]
LabelledFile = Annotated[
    Path | None,
    typer.Option("--calibrate", help="Fit the temperature to labelled pictures: CSV with a first line of image,label."),
]
Save = Annotated[Path | None, typer.Option("--save", help="Where --calibrate writes what it found.")]
AsJsonLines = Annotated[bool, typer.Option("--json", help="Print a line of JSON for each image.")]


def classify(
    model: ModelName,
    image: Pictures = None,
    labels: LabelList = None,
    labels_file: LabelFile = None,
    prompt: Asked = None,
    system: System = None,
    normalise: Normalise = None,
    prior: Prior = None,
    temperature: Temperature = None,
    abstain_below: AbstainBelow = None,
    calibration: CalibrationFile = None,
    calibrate: LabelledFile = None,
    save: Save = None,
    image_tokens: ImageTokens = None,
    template: Template = None,
    preprocess: Preprocess = None,
    beside: Beside = None,
    dtype: Dtype = None,
    device: Device = None,
    as_json: AsJsonLines = False,
) -> None:
    """Say which label fits an image, and how likely each is.

    pumice classify pebble star.png --labels circle,star,ring
    """
    _check_mode(image or [], calibration, calibrate, save)
    with busy("loading"):
        from pumice.model import load_from

        choices: dict[str, Any] = {
            "labels": _labels(labels, labels_file),
            "prompt": prompt,
            "system": system,
            "normalise": None if normalise is None else normalise.value,
            "prior": prior,
            "temperature": temperature,
            "abstain_below": abstain_below,
            "image_tokens": image_tokens,
        }
        given = {name: value for name, value in choices.items() if value is not None}
        labelling = _labelling(given, calibration, model)
        loaded = load_from(options.source(model, template, preprocess, beside), dtype=dtype, device=device)
    if calibrate is not None and save is not None:
        from pumice.tasks.calibration import calibrate as calibrated

        with counting() as told:
            found = calibrated(loaded, labelling, calibrate, told=told)
        found.save(save)
        print(found.to_json() if as_json else calibration_text(found))
        return
    for each in image or []:
        answer = loaded.classify(each, labelling)
        print(json.dumps(described(each, answer), ensure_ascii=False) if as_json else line(each, answer), flush=True)


def _check_mode(images: list[str], calibration: Path | None, calibrate: Path | None, save: Path | None) -> None:
    if (calibrate is None) != (save is None):
        raise UserError("--calibrate and --save came without each other", hint="give the pictures and the place both")
    if calibrate is not None and (images or calibration is not None):
        raise UserError(
            "--calibrate came with images or with --calibration",
            hint="calibrate first, then classify with what was saved",
        )
    if save is not None and not save.parent.is_dir():
        raise UserError(f"{save} cannot be written: {save.parent} is no folder", hint="name another place")
    if calibrate is None and not images:
        raise UserError("there is no image", hint="name one: pumice classify MODEL photo.jpg --labels cat,dog")


def _labelling(given: Mapping[str, Any], calibration: Path | None, model: str) -> Labelling:
    from pumice.classification import Labelling
    from pumice.tasks.calibration import Calibration

    if calibration is not None:
        return Calibration.load(calibration).under(given, model)
    if "labels" not in given:
        raise UserError("there are no labels", hint="give --labels cat,dog, or --labels-file, or --calibration")
    return Labelling(**given)


def _labels(text: str | None, path: Path | None) -> list[str] | dict[str, list[str]] | None:
    """The labels of one of the two options. In a file, a label with answers behind it has only those."""
    if text is not None and path is not None:
        raise UserError("--labels came with --labels-file", hint="give one of them")
    if text is not None:
        return [each.strip() for each in text.split(",")]
    if path is None:
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"the labels {path} cannot be read: {why}", hint="name a text file, a label a line") from error
    rows = [[word.strip() for word in line.split("\t")] for line in lines if line.strip()]
    alone = [name for name, *answers in rows if not answers]
    if not alone:
        found: dict[str, list[str]] = {}
        for name, *answers in rows:
            found.setdefault(name, []).extend(answers)
        return found
    if len(alone) < len(rows):
        raise UserError(
            f"{path} has answers for some labels, and none for {alone[0]!r:.100}", hint="give them for all, or for none"
        )
    return alone


def line(image: str, found: Classification) -> str:
    """A classification for people."""
    best = ", ".join(f"{each.label} {each.probability:.2f}" for each in found.scored[:SHOWN])
    more = f", {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f"{image}: {'no label' if found.label is None else found.label} ({best}{more})"


def described(image: str, found: Classification) -> dict[str, object]:
    """A classification as plain values, labels from the likeliest."""
    return {
        "image": image,
        "label": found.label,
        "probabilities": dict(found),
        "log_likelihoods": {each.label: each.log_likelihood for each in found.scored},
        "priors": {each.label: each.prior for each in found.scored if each.prior is not None},
        "tokens": {each.label: each.tokens for each in found.scored},
        "seconds": round(found.seconds, 4),
    }


def calibration_text(found: Calibration) -> str:
    """What a calibration changed, in lines."""
    before, after = found.before, found.after
    return (
        f"{found.pictures} pictures, {found.accuracy:.1%} right; temperature {found.labelling.temperature:.3g}\n"
        f"negative log-likelihood {before.nll:.4f} before, {after.nll:.4f} after\n"
        f"expected calibration error {before.ece:.4f} before, {after.ece:.4f} after"
    )
