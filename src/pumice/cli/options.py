"""The options that several verbs share, and what they become."""

from __future__ import annotations

import enum
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pumice.question import Images, Question
    from pumice.source import Source


class Rule(enum.StrEnum):
    """Whose preprocessing images follow, or whose format a folder has."""

    hf = "hf"
    original = "original"


ModelName = Annotated[
    str,
    typer.Argument(help="A checkpoint folder, a .gguf file, or a name that `pumice list` shows.", metavar="MODEL"),
]
PromptText = Annotated[
    str | None, typer.Argument(help="What to ask. Paths of images in it are attached.", metavar="[PROMPT]")
]
ImagePaths = Annotated[
    list[str] | None, typer.Option("--image", "-i", help="An image to ask about; repeat for several.")
]
System = Annotated[str | None, typer.Option("--system", help="System text instead of the template's own.")]
ImageTokens = Annotated[
    int | None, typer.Option("--image-tokens", help="The most tokens that one image may take; all without it.")
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Longest answer, in tokens.")]
Raw = Annotated[bool, typer.Option("--raw", help="Send the prompt as it stands, with <image> where each image goes.")]
Template = Annotated[str | None, typer.Option("--template", help="Prompt template instead of the checkpoint's own.")]
Preprocess = Annotated[Rule | None, typer.Option("--preprocess", help="Image rules instead of the checkpoint's own.")]
Beside = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        "--mmproj",
        help="What the checkpoint needs beside it: CLIP tower, mmproj file, the model under a LoRA.",
    ),
]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; as the file without it.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1, mps; the best there is without it.")]
GpuLayers = Annotated[
    int | None,
    typer.Option("--gpu-layers", "-ngl", help="Layers on the GPU, others on the CPU: the head, then the last blocks."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


def source(name: str, template: str | None, preprocess: Rule | None, beside: list[str] | None) -> Source:
    """Where the model comes from, by these options."""
    from pumice.source import Source

    return Source(name, template, preprocess.value if preprocess else None, tuple(beside or ()))


def question(prompt: str, images: list[str], *, system: str | None, raw: bool) -> Question:
    """A question from the command line: images named in the prompt are attached."""
    from pumice.cli.paths import images_in, refuse_mark
    from pumice.question import Question

    if raw:
        return Question(prompt, list(images), system, raw=True)
    text, named = images_in(prompt)
    for path in named:
        print(f"Added image '{path}'", file=sys.stderr)
    refuse_mark(text, "attach images with -i, they stand before the text; --raw sends a prompt with marks as it stands")
    attached: Images = [*images, *named]
    return Question(text, attached, system)
