"""What `pumice show` says of a model in a store: Ollama's blocks, and its texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pumice.errors import UserError
from pumice.store import Files, Folder, Installed, Stored, facts, model_info

if TYPE_CHECKING:
    from pumice.checkpoints import Checkpoint

TEXTS = ("license", "modelfile", "parameters", "system", "template")

Row = tuple[str, ...]


def text_of(files: Files, model: Installed | None, what: str) -> str:
    """One of TEXTS. Raises UserError for a model that has no name here and so has none."""
    if model is None:
        raise UserError(
            f"{files.title} is in no store, so no {what} was kept for it",
            hint="`pumice show` says what its files say, `pumice prompt` prints a whole prompt",
        )
    match what:
        case "license":
            return "\n".join(model.texts("license")) if isinstance(model, Stored) else ""
        case "modelfile":
            return facts.modelfile(model)
        case "parameters":
            return facts.parameters(model)
        case "system":
            return facts.system(model)
    return facts.template(model)


def kept(model: Stored) -> dict[str, object]:
    """The same as Ollama's API has it, for --json. Raises UserError."""
    return {
        "name": model.title,
        "digest": model.digest,
        "size_bytes": model.size,
        "from": model.place,
        "details": dataclasses.asdict(facts.details(model)),
        "capabilities": facts.capabilities(model),
        "parameters": model.parameters(),
        "template": model.text("template"),
        "system": model.text("system"),
        "license": model.texts("license"),
    }


def blocks(model: Stored, checkpoint: Checkpoint | None) -> Iterator[str]:
    """Lines. Without a checkpoint, which pumice may not be able to read, only what the store says. Raises UserError."""
    details = facts.details(model)
    yield from _block("Model", _sizes(details, checkpoint))
    yield from _block("Capabilities", [(each,) for each in facts.capabilities(model)])
    if checkpoint is not None and checkpoint.config.vision is not None:
        yield from _block("Projector", _projector(checkpoint))
    rows = [tuple(line.split(None, 1)) for line in facts.parameters(model).splitlines()]
    yield from _block("Parameters", rows)
    for title, text in (("System", model.text("system") or ""), ("License", "\n".join(model.texts("license")))):
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        yield from _block(title, [(line,) for line in lines[:2]] + ([("...",)] if len(lines) > 2 else []))


def embedder(found: Files) -> dict[str, object] | None:
    """The facts of an embedding model; None for any other."""
    model = Folder(found.title, found.path, "disk")
    if not model.embeds:
        return None
    said = model_info.of_model(model)
    return {
        "family": facts.details(model).family,
        "format": "sentence-transformers",
        "path": str(found.path),
        "capabilities": ", ".join(facts.capabilities(model)),
        "positions": said.get(f"{said['general.architecture']}.context_length", "not said"),
        "width": said.get(f"{said['general.architecture']}.embedding_length", "not said"),
        "parameters": said.get("general.parameter_count", "not said"),
        "files_bytes": model.size,
    }


def _block(title: str, rows: Sequence[Row]) -> Iterator[str]:
    """A title and its rows; nothing without rows."""
    if not rows:
        return
    yield f"  {title}"
    width = max(len(row[0]) for row in rows) + 4
    for row in rows:
        yield f"    {row[0].ljust(width)}{row[1]}".rstrip() if len(row) > 1 else f"    {row[0]}"
    yield ""


def _sizes(details: facts.Details, checkpoint: Checkpoint | None) -> list[Row]:
    rows: list[Row] = [("architecture", details.family), ("parameters", details.parameter_size)]
    if checkpoint is not None:
        text = checkpoint.config.text
        rows += [("context length", str(text.max_positions)), ("embedding length", str(text.width))]
    return [row for row in [*rows, ("quantization", details.quantization_level)] if row[1]]


def _projector(checkpoint: Checkpoint) -> list[Row]:
    from pumice.checkpoints import expected_tensors

    config = checkpoint.config
    assert config.vision is not None
    eyes = ("vision_tower.", "multi_modal_projector.", "image_newline")
    count = sum(math.prod(shape) for name, shape in expected_tensors(config).items() if name.startswith(eyes))
    return [
        ("architecture", "clip"),
        ("parameters", f"{count / 1e6:.2f}M"),
        ("embedding length", str(config.vision.width)),
        ("dimensions", str(config.text.width)),
    ]
