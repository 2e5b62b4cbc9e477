"""`pumice caption`: a line about each of many pictures."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pumice.cli import options
from pumice.cli.options import Beside, Device, Dtype, ImageTokens, MaxTokens, ModelName, Preprocess, System, Template
from pumice.cli.paths import refuse_mark
from pumice.cli.terminal import counting, loading

Pictures = Annotated[list[str], typer.Argument(help="Images, and folders with images.", metavar="IMAGE")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="The file of JSON lines. What it has already is not asked again.")
]
Asked = Annotated[str | None, typer.Option("--prompt", help="What is asked about each picture.")]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="The same whatever is read beside it, in narrow types too; slower.")
]


def caption(
    model: ModelName,
    image: Pictures,
    output: Output,
    prompt: Asked = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    image_tokens: ImageTokens = None,
    deterministic: Deterministic = False,
    template: Template = None,
    preprocess: Preprocess = None,
    beside: Beside = None,
    dtype: Dtype = None,
    device: Device = None,
) -> None:
    """Describe many pictures into a file of JSON lines; stopped, it goes on where it was.

    pumice caption llava:7b photos/ -o captions.jsonl
    """
    with loading():
        from pumice.engine import Limits, Sampling
        from pumice.model import load_from
        from pumice.question import Question
        from pumice.tasks import captions

        text = captions.PROMPT if prompt is None else prompt
        refuse_mark(text, "leave it out: each picture stands before the prompt")
        sampling = Sampling(max_tokens=max_tokens)
        asked = Question(text, None, system, sampling=sampling, image_tokens=image_tokens)
        loaded = load_from(options.source(model, template, preprocess, beside), dtype=dtype, device=device)
        if deterministic:
            loaded.limit(Limits(deterministic=True))
    with counting() as told:
        found = captions.caption(loaded, image, output, asked, told=told)
    earlier = f", {found.earlier} were there" if found.earlier else ""
    failed = f', {found.failed} could not be: look for "error"' if found.failed else ""
    print(f"{found.described} pictures described{failed}{earlier}: {output}", file=sys.stderr)
