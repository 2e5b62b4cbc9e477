"""`pumice show`, `pumice prompt`: what a model is, and what it sees. No weights are read."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from pumice import store
from pumice.cli import blocks, options
from pumice.cli.options import (
    AsJson,
    Beside,
    ImagePaths,
    ImageTokens,
    ModelName,
    Preprocess,
    PromptText,
    Raw,
    System,
    Template,
)
from pumice.errors import UserError
from pumice.room.memory import shown

if TYPE_CHECKING:
    from pumice.checkpoints import Checkpoint
    from pumice.config import LlavaConfig, Rotary
    from pumice.image import Prepared
    from pumice.question import Prompter, Question, Seen
    from pumice.source import Source

OWN = ":own"
"""Stands for the template that a model has itself; no template is called so."""
WHOSE = {"hf": "Transformers'", "original": "the authors'"}


class ShowCommand(TyperCommand):
    """`--template` alone is Ollama's, which prints the model's own; with a name it is pumice's, which takes another."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(_lone_template_marked(args)))


def _lone_template_marked(args: Sequence[str]) -> Iterator[str]:
    words = sum(not each.startswith("-") for each in args)
    for number, each in enumerate(args):
        alone = words < 2 or number + 1 == len(args) or args[number + 1].startswith("-")
        yield f"--template={OWN}" if each == "--template" and alone else each


def show(
    model: ModelName,
    template: Annotated[
        str | None,
        typer.Option("--template", help="Print only the template of the store; with a NAME, take another one."),
    ] = None,
    preprocess: Preprocess = None,
    beside: Beside = None,
    as_json: AsJson = False,
    license: Annotated[bool, typer.Option("--license", help="Print only the licence.")] = False,
    modelfile: Annotated[bool, typer.Option("--modelfile", help="Print only the Modelfile.")] = False,
    parameters: Annotated[bool, typer.Option("--parameters", help="Print only the parameters.")] = False,
    system: Annotated[bool, typer.Option("--system", help="Print only the system text.")] = False,
) -> None:
    """Show what a model is: sizes, template, image rules, the memory it will need."""
    found = store.files(model)
    asked = (license, modelfile, parameters, system, template == OWN)
    texts = [what for what, is_asked in zip(blocks.TEXTS, asked) if is_asked]
    if len(texts) > 1:
        options_ = "'--license', '--modelfile', '--parameters', '--system', or '--template'"
        raise UserError(f"only one of {options_} can be specified", hint="give one of them")
    if texts:
        named = found.stored or store.find(model)
        print(blocks.text_of(found, named if named and named.path == found.path else None, texts[0]))
        return
    if vectors := blocks.embedder(found):
        _print_facts(vectors, as_json)
        return
    try:
        checkpoint = options.source(model, template, preprocess, beside).checkpoint()
    except UserError:
        if found.stored is not None and not as_json:
            _print_lines(blocks.blocks(found.stored, None))
        raise
    facts = described(checkpoint) | _card(checkpoint.path)
    if as_json:
        kept = {} if found.stored is None else {"store": blocks.kept(found.stored)}
        facts |= kept
    elif found.stored is not None:
        _print_lines(blocks.blocks(found.stored, checkpoint))
    _print_facts(facts, as_json)


def _print_facts(facts: Mapping[str, object], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):24} {_shown(name, value)}")


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def described(checkpoint: Checkpoint) -> dict[str, object]:
    """The facts of a checkpoint, from its config and the headers of its files."""
    from pumice.checkpoints import expected_tensors
    from pumice.room.footprint import position_bytes

    config = checkpoint.config
    text, vision, image = config.text, config.vision, config.image
    parameters = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    kv_bytes = position_bytes(checkpoint.tensors, config, None)
    facts: dict[str, object] = {"family": config.family, "format": checkpoint.format, "path": str(checkpoint.path)}
    if vision is not None and image is not None:
        facts |= {
            "vision_tower": f"{vision.layers} layers, width {vision.width}, {vision.heads} heads, features of "
            f"hidden state {', '.join(map(str, vision.feature_layers))}",
            "tile": f"{vision.image_px} px in patches of {vision.patch_px}: {vision.tile_tokens} tokens",
            "images": f"{image.mode}, {WHOSE[image.rules]} rules",
            "canvases": " ".join(f"{width}x{height}" for height, width in image.pinpoints) or "none: one view an image",
        }
    facts |= {
        "language_model": f"{text.layers} layers, width {text.width}, {text.heads} heads over {text.kv_heads}",
        "vocabulary": text.vocab,
        "positions": text.max_positions,
        "window": text.window or "none: a token sees all before it",
        "rope_theta": text.rotary.theta,
        "rope_scaling": _scaling(text.rotary),
        "template": config.template,
        "end_tokens": " ".join(checkpoint.tokenizer.token_of(token) for token in config.stop_ids),
        "parameters": sum(parameters.values()),
        "weights": checkpoint.tensors.kinds(),
        "weights_bytes": checkpoint.tensors.nbytes,
        "kv_bytes_per_1000_tokens": kv_bytes * 1000,
    }
    return facts | _image_cost(config, kv_bytes)


def _scaling(rotary: Rotary) -> str:
    said = [f"frequencies divided by {_range(rotary.divisors)}"] if rotary.divisors else []
    said += [f"beyond {rotary.switch} tokens by {_range(rotary.long_divisors)}"] if rotary.long_divisors else []
    said += [f"magnitude {rotary.magnitude:g}"] if rotary.magnitude != 1 else []
    return ", ".join(said) or "none"


def _range(divisors: tuple[float, ...]) -> str:
    return " to ".join(f"{each:g}" for each in sorted({min(divisors), max(divisors)}))


def _image_cost(config: LlavaConfig, kv_bytes: int) -> dict[str, object]:
    """Tokens of one large square image, and what they keep in memory."""
    from pumice.image import grid_for

    if config.image is None or config.vision is None:
        return {}
    edge = 4 * config.vision.image_px
    tokens = grid_for((edge, edge), config.image, config.vision).tokens
    return {"tokens_of_a_square_image": tokens, "kv_bytes_of_a_square_image": tokens * kv_bytes}


def _card(path: Path) -> dict[str, object]:
    """What the quality card in a GGUF file says, in a line; nothing where there is none."""
    from pumice.checkpoints.card import read_card
    from pumice.tasks.card import Card

    text = read_card(path)
    if text is None:
        return {}
    try:
        return {"quality_card": Card.from_json(text).summary}
    except UserError:
        return {"quality_card": "one that cannot be read"}


def _shown(name: str, value: object) -> str:
    if isinstance(value, int) and "bytes" in name:
        return shown(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def prompt(
    model: ModelName,
    text: PromptText = None,
    image: ImagePaths = None,
    image_tokens: ImageTokens = None,
    system: System = None,
    raw: Raw = False,
    template: Template = None,
    preprocess: Preprocess = None,
    beside: Beside = None,
    save_tiles: Annotated[
        Path | None, typer.Option("--save-tiles", help="Write the pictures the model sees there.")
    ] = None,
    all_tokens: Annotated[bool, typer.Option("--all", help="Show each image token instead of their number.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model really sees: the exact prompt, every token with its id, the tiles of each image."""
    asked = options.question(text or "", image or [], system=system, raw=raw)
    asked = dataclasses.replace(asked, image_tokens=image_tokens)
    prompter = _prompter(options.source(model, template, preprocess, beside))
    seen = prompter.see(asked)
    saved = _save(prompter, asked, save_tiles) if save_tiles else []
    if as_json:
        print(json.dumps(_seen(prompter, seen) | {"saved": saved}, ensure_ascii=False))
        return
    from pumice.prompt import prompt_text

    print(prompt_text(seen.parts))
    print()
    for line in _token_lines(prompter, seen.encoded.ids, all_tokens):
        print(line)
    for number, each in enumerate(seen.images, 1):
        print(f"image {number}: {_image_line(each)}")
    print(f"total: {len(seen.encoded.ids)} tokens of {prompter.config.text.max_positions}")
    for path in saved:
        print(f"saved {path}")


def _prompter(source: Source) -> Prompter:
    from pumice.question import Prompter

    checkpoint = source.checkpoint()
    return Prompter(str(source.name), checkpoint.config, checkpoint.tokenizer, source.dressing())


def _token_lines(prompter: Prompter, ids: Sequence[int], all_tokens: bool) -> list[str]:
    image_id = prompter.config.image_token_id
    lines = []
    for token, run in groupby(ids):
        count = len(list(run))
        if token == image_id:
            lines += [f"{token:>7}  <image>"] * count if all_tokens else [f"{token:>7}  <image> x {count}"]
        else:
            lines += [f"{token:>7}  {prompter.tokenizer.token_of(token)}"] * count
    return lines


def _image_line(image: Prepared) -> str:
    grid, (height, width) = image.grid, image.size
    kept = f"{grid.tokens} of {grid.whole} tokens" if grid.tokens < grid.whole else f"{grid.tokens} tokens"
    line = f"{width}x{height} px, {kept}"
    if grid.tiles == 1:
        return f"{line}: one view of {grid.tile_side}x{grid.tile_side}"
    return (
        f"{line}: a base view of {grid.tile_side}x{grid.tile_side}, {grid.columns}x{grid.rows} tiles "
        f"of which {grid.kept_columns}x{grid.kept_rows} features are kept"
    )


def _seen(prompter: Prompter, seen: Seen) -> dict[str, object]:
    from pumice.prompt import prompt_text

    return {
        "prompt": prompt_text(seen.parts),
        "ids": seen.encoded.ids,
        "images": [
            {"size": list(each.size), "tiles": each.grid.tiles, "tokens": each.grid.tokens, "digest": each.digest}
            for each in seen.images
        ],
        "positions": prompter.config.text.max_positions,
    }


def _save(prompter: Prompter, question: Question, folder: Path) -> list[str]:
    """Write each image's views as PNG files; returns their paths."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    saved = []
    for number, pictures in enumerate(prompter.views(question), 1):
        for place, picture in enumerate(pictures):
            path = folder / f"image{number}-{'base' if place == 0 else f'tile{place}'}.png"
            with _writing(path):
                picture.save(path)
            saved.append(str(path))
    return saved


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}", hint="name a folder that you may write to"
        ) from error
