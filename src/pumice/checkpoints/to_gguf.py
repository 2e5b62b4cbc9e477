"""A checkpoint as GGUF files: the language model, and for a LLaVA the projector file beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pumice.checkpoints.card import CARD_KEY, NO_CARD
from pumice.checkpoints.form import Checkpoint, expected_eyes, fitted
from pumice.checkpoints.gguf_eyes import PROJECTOR_PREFIX, Eyes
from pumice.checkpoints.gguf_eyes_writer import FILE_TYPES, eyes_formats, eyes_tensors, eyes_values
from pumice.checkpoints.gguf_file import ToStore, Value, open_gguf, put_gguf, stored_bytes
from pumice.checkpoints.gguf_vocab_writer import vocab_values
from pumice.checkpoints.gguf_writer import EYES, dtypes, lm_formats, lm_tensors, lm_values, type_values
from pumice.checkpoints.mixes import Mix
from pumice.checkpoints.origin import SOURCE_KEY, Origin, file_values, source_value
from pumice.checkpoints.report import Progress, Report, Written
from pumice.checkpoints.tensors import Tensors
from pumice.checkpoints.whole import check_free, whole
from pumice.config import ImageConfig, ProjectorConfig, VisionConfig
from pumice.errors import UserError
from pumice.quant import FORMATS, Format


@dataclass(frozen=True)
class Types:
    """What the weights are stored as. `mix`: the language model's matrices; None keeps theirs. `eyes`: the matrices of
    tower and projector; None takes F16 beside a mix and otherwise keeps theirs. `again`: blocks may be made of other
    blocks, each time at a loss."""

    mix: Mix | None = None
    eyes: Format | None = None
    again: bool = False


@dataclass(frozen=True)
class _File:
    path: Path
    values: Mapping[str, Value]
    tensors: Sequence[ToStore]

    @property
    def nbytes(self) -> int:
        return sum(stored_bytes(each.shape, each.format) for each in self.tensors)

    def written(self) -> Written:
        kinds = Counter(each.format.name for each in self.tensors)
        return Written(self.path, len(self.tensors), dict(kinds.most_common()), self.nbytes)


def write_pair(
    checkpoint: Checkpoint, path: Path, types: Types, origin: Origin | None, *, force: bool, progress: Progress
) -> Report:
    """`path`, and `mmproj-NAME` beside it. Both appear when both are whole.

    Raises UserError: a file that is there already; numbers that a type cannot hold; a full disk; blocks that would be
    made of blocks.
    """
    notes: list[str] = []
    files = [_language_model(checkpoint, path, types, origin, notes)]
    if sight := _sight(checkpoint, origin):
        files.append(_eyes(sight, path.with_name(PROJECTOR_PREFIX + path.name), types, notes))
    _put(files, force=force, progress=progress)
    return Report(tuple(each.written() for each in files), (), tuple(notes))


def write_eyes(eyes: Eyes, path: Path, types: Types, *, force: bool, progress: Progress) -> Report:
    """A projector file alone, as `write_pair` writes it beside a language model.

    Raises UserError: what `write_pair` raises; tensors that do not fit the file's metadata.
    """
    notes: list[str] = []
    newline = eyes.image.mode == "anyres"
    expected = expected_eyes(eyes.vision, eyes.projector, eyes.width_out, newline=newline)
    tensors = fitted(eyes.entries, expected, eyes.path)
    sight = _Sight(eyes.path, tensors, eyes.vision, eyes.image, eyes.projector, eyes.width_out, eyes.path)
    file = _eyes(sight, path, types, notes)
    _put([file], force=force, progress=progress)
    return Report((file.written(),), (), tuple(notes))


def _put(files: Sequence[_File], *, force: bool, progress: Progress) -> None:
    for each in files:
        check_free(each.path, replace=force)
    total, done = sum(each.nbytes for each in files), 0
    with ExitStack() as stack:
        places = [stack.enter_context(whole(each.path, replace=force)) for each in files]
        for place, each in reversed(list(zip(places, files, strict=True))):
            for tensor, name in zip(each.tensors, put_gguf(place, each.values, each.tensors), strict=True):
                done += stored_bytes(tensor.shape, tensor.format)
                progress(name, done, total)


def _language_model(checkpoint: Checkpoint, path: Path, types: Types, origin: Origin | None, notes: list[str]) -> _File:
    formats = lm_formats(checkpoint, types.mix)
    _refuse_again(checkpoint.tensors, checkpoint.path, formats, types)
    if checkpoint.format == "gguf":
        source = open_gguf(checkpoint.path)
        kind = source.fields.text("general.architecture")
        # What is said anew, and may be said in other words.
        old = "llama.rope.scal" if kind == "llama" else f"{kind}."
        kept = {key: each for key, each in source.values.items() if not key.startswith(old)}
        values = kept | lm_values(checkpoint.config, source.fields.text("general.name", path.stem))
    else:
        values = lm_values(checkpoint.config, path.stem) | _vocabulary(checkpoint, notes)
    sizes = {name: stored_bytes(checkpoint.tensors.shape(name), format) for name, format in formats.items()}
    if types.mix or "general.file_type" not in values:
        values |= type_values(formats, types.mix, sizes)
    if origin is not None:
        values |= {SOURCE_KEY: source_value(dtypes(checkpoint), origin.format, list(formats))}
        values |= file_values(origin.files)
    if checkpoint.config.text.window is not None:
        notes.append(f"llama.cpp lets a token see all before it, the model {checkpoint.config.text.window}")
    return _File(path, values | _card(types), lm_tensors(checkpoint, formats))


def _vocabulary(checkpoint: Checkpoint, notes: list[str]) -> dict[str, Value]:
    config, home = checkpoint.config, checkpoint.home or checkpoint.path
    values, found = vocab_values(home, checkpoint.tokenizer, config.text.vocab, config.stop_ids)
    notes += found
    return values


@dataclass(frozen=True)
class _Sight:
    """The eyes of a model, whatever holds them."""

    path: Path
    tensors: Tensors
    vision: VisionConfig
    image: ImageConfig
    projector: ProjectorConfig
    width_out: int
    file: Path | None
    """The projector file that they are in."""
    source: Value | None = None
    """What the folder said that the model was made from, where `file` does not."""


def _sight(checkpoint: Checkpoint, origin: Origin | None) -> _Sight | None:
    config = checkpoint.config
    if config.vision is None or config.image is None or config.projector is None:
        return None
    names = [name for name in checkpoint.tensors.names() if name.startswith(EYES)]
    source = source_value(dtypes(checkpoint), origin.format, names) if origin is not None else None
    parts = config.vision, config.image, config.projector, config.text.width
    return _Sight(checkpoint.path, checkpoint.tensors, *parts, checkpoint.projector, source)


def _eyes(sight: _Sight, path: Path, types: Types, notes: list[str]) -> _File:
    wanted = types.eyes or (FORMATS["F16"] if types.mix and not _in_blocks(sight.tensors) else None)
    formats = eyes_formats(sight.tensors, wanted)
    _refuse_again(sight.tensors, sight.path, formats, types)
    values = eyes_values(sight.vision, sight.image, sight.width_out, path.stem)
    if sight.file is not None:
        kept = ("general.", "pumice.")
        values = {key: each for key, each in open_gguf(sight.file).values.items() if key.startswith(kept)} | values
    values["general.file_type"] = Value("u32", FILE_TYPES[_usual(formats)])
    if any(each.dtype is None for each in formats.values()):
        values["general.quantization_version"] = Value("u32", 2)
    if sight.source is not None:
        values[SOURCE_KEY] = sight.source
    if sight.projector.layers != 2:
        notes.append(f"the projector has {sight.projector.layers} layers; llama.cpp runs those of 2 layers rightly")
    return _File(path, values | _card(types), eyes_tensors(sight.tensors, formats))


def _usual(formats: Mapping[str, Format]) -> str:
    """The type of most matrices."""
    names = [each.name for name, each in formats.items() if name.endswith("_proj.weight")]
    usual = Counter(names).most_common(1)[0][0]
    return usual if usual in FILE_TYPES else "F32"


def _in_blocks(tensors: Tensors) -> bool:
    return any(tensors.blocks(name) for name in tensors.names() if name.startswith("vision_tower."))


def _refuse_again(tensors: Tensors, path: Path, formats: Mapping[str, Format], types: Types) -> None:
    if types.again:
        return
    for name, format in formats.items():
        have = tensors.blocks(name)
        if have is not None and have != format and format.dtype is None:
            raise UserError(
                f"{path} holds {name} as {have.name}; it would be quantised again, as {format.name}",
                hint="start from the unquantised model, or accept the loss twice with --allow-requantize",
            )


def _card(types: Types) -> dict[str, Value]:
    """Room for a quality card, to be filled in place; a card of the source says nothing of other types."""
    return {CARD_KEY: Value("string", NO_CARD)} if types.mix or types.eyes else {}
