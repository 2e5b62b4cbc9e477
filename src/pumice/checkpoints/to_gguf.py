"""A checkpoint as GGUF files: the language model, and for a LLaVA the projector file beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from pumice.checkpoints.card import CARD_KEY, NO_CARD
from pumice.checkpoints.form import Checkpoint
from pumice.checkpoints.gguf_eyes import PROJECTOR_PREFIX
from pumice.checkpoints.gguf_eyes_writer import FILE_TYPES, eyes_formats, eyes_tensors, eyes_values
from pumice.checkpoints.gguf_file import ToStore, Value, open_gguf, put_gguf, stored_bytes
from pumice.checkpoints.gguf_vocab_writer import vocab_values
from pumice.checkpoints.gguf_writer import dtypes, lm_formats, lm_tensors, lm_values, type_values
from pumice.checkpoints.mixes import Mix
from pumice.checkpoints.origin import SOURCE_KEY, Origin, file_values, source_value
from pumice.checkpoints.report import Progress, Report, Written
from pumice.checkpoints.whole import check_free, whole
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
    if checkpoint.config.vision is not None:
        files.append(_eyes(checkpoint, path.with_name(PROJECTOR_PREFIX + path.name), types, origin, notes))
    for each in files:
        check_free(each.path, replace=force)
    total, done = sum(each.nbytes for each in files), 0
    with ExitStack() as stack:
        places = [stack.enter_context(whole(each.path, replace=force)) for each in files]
        for place, each in reversed(list(zip(places, files, strict=True))):
            for tensor, name in zip(each.tensors, put_gguf(place, each.values, each.tensors), strict=True):
                done += stored_bytes(tensor.shape, tensor.format)
                progress(name, done, total)
    return Report(tuple(each.written() for each in files), (), tuple(notes))


def _language_model(checkpoint: Checkpoint, path: Path, types: Types, origin: Origin | None, notes: list[str]) -> _File:
    formats = lm_formats(checkpoint, types.mix)
    _refuse_again(checkpoint, formats, types)
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


def _eyes(checkpoint: Checkpoint, path: Path, types: Types, origin: Origin | None, notes: list[str]) -> _File:
    wanted = types.eyes or (FORMATS["F16"] if types.mix and not _in_blocks(checkpoint) else None)
    formats = eyes_formats(checkpoint, wanted)
    _refuse_again(checkpoint, formats, types)
    values = eyes_values(checkpoint.config, path.stem)
    if checkpoint.projector is not None:
        kept = ("general.", "pumice.")
        values = {
            key: each for key, each in open_gguf(checkpoint.projector).values.items() if key.startswith(kept)
        } | values
    values["general.file_type"] = Value("u32", FILE_TYPES[_usual(formats)])
    if any(each.dtype is None for each in formats.values()):
        values["general.quantization_version"] = Value("u32", 2)
    if origin is not None:
        values[SOURCE_KEY] = source_value(dtypes(checkpoint), origin.format, list(formats))
    projector = checkpoint.config.projector
    if projector is not None and projector.layers != 2:
        notes.append(f"the projector has {projector.layers} layers; llama.cpp runs those of 2 layers rightly")
    return _File(path, values | _card(types), eyes_tensors(checkpoint, formats))


def _usual(formats: Mapping[str, Format]) -> str:
    """The type of most matrices."""
    names = [each.name for name, each in formats.items() if name.endswith("_proj.weight")]
    usual = Counter(names).most_common(1)[0][0]
    return usual if usual in FILE_TYPES else "F32"


def _in_blocks(checkpoint: Checkpoint) -> bool:
    return any(
        checkpoint.tensors.blocks(name) for name in checkpoint.tensors.names() if name.startswith("vision_tower.")
    )


def _refuse_again(checkpoint: Checkpoint, formats: Mapping[str, Format], types: Types) -> None:
    if types.again:
        return
    for name, format in formats.items():
        have = checkpoint.tensors.blocks(name)
        if have is not None and have != format and format.dtype is None:
            raise UserError(
                f"{checkpoint.path} holds {name} as {have.name}; it would be quantised again, as {format.name}",
                hint="start from the unquantised model, or accept the loss twice with --allow-requantize",
            )


def _card(types: Types) -> dict[str, Value]:
    """Room for a quality card, to be filled in place; a card of the source says nothing of other types."""
    return {CARD_KEY: Value("string", NO_CARD)} if types.mix or types.eyes else {}
