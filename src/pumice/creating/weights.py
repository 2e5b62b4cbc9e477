"""The weights of a new model: GGUF files as they are, all else by conversion, and quantised where it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pumice.creating.following import following
from pumice.creating.layers import Base, config_of
from pumice.creating.recipe import checked, no_adapter
from pumice.errors import UserError, shortened
from pumice.store import Folder, Installed, gguf_keys
from pumice.store.blobs import Blobs, chunks, open_regular
from pumice.store.gguf_keys import Said
from pumice.store.manifest import ROLE_TYPE, Layer
from pumice.store.transfer import Progress

if TYPE_CHECKING:
    from pumice.checkpoints import Checkpoint

WEIGHTS = (".safetensors", ".bin", ".pth")
NO_DIGEST = "0000000000000000000"
"""What Ollama tells of a file that has none yet."""
_DENSE = ("F16", "BF16", "F32")
_MODEL, _EYES = f"{ROLE_TYPE}model", f"{ROLE_TYPE}projector"

Making = Generator[Progress, None, Base]


@dataclass(frozen=True)
class Bench:
    """Where weights are made: the blobs that they become, a folder for what is under way, the file name of the model,
    and the mix that its matrices are to have."""

    blobs: Blobs
    shop: Path
    title: str
    mix: str | None
    worded: bool = False
    """Is there a template already? Then a file's own need not be known."""


def of_files(files: Mapping[str, Path], bench: Bench) -> Making:
    """From files by the names that they have beside each other. Raises UserError, in Ollama's words where it has some:
    what is no model, or none that pumice runs."""
    for name in files:
        checked(name)
    gguf = {name: path for name, path in files.items() if name.lower().endswith(".gguf") or _is_gguf(path)}
    if gguf:
        return (yield from _of_gguf(gguf, bench))
    if not any(name.endswith(WEIGHTS) for name in files):
        raise UserError("unknown type", hint="send GGUF files, or safetensors files and the config.json beside them")
    folder = bench.shop / "source"
    for name, path in files.items():
        try:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(path.absolute())
        except (OSError, UnicodeEncodeError) as error:
            # Too long, no text, or a file and a folder at once.
            raise UserError(f"{shortened(name)} cannot be the name of a file", hint="send it by another") from error
    return (yield from _of_folder(folder, bench))


def of_model(model: Installed, bench: Bench) -> Making:
    """From one that is on this machine: its layers as they are, or a folder's weights by conversion.

    Raises UserError for one that is not here whole, and what `of_files` raises."""
    if isinstance(model, Folder):
        return (yield from _of_folder(model.path, bench))
    layers = tuple(replace(each, origin=model.title) for each in model.manifest.layers)
    config = {key: value for key, value in model.config.items() if key not in ("architecture", "os", "rootfs")}
    base = Base(layers, config, model)
    if base.role("model") and (bench.mix or not base.role("template")):
        if base.role("adapter"):
            raise no_adapter()
        given = replace(bench, worded=bool(base.role("template")))
        look = yield from _looked_at(model.path, model.beside, {str(model.path): model.title}, given)
        base = yield from _finished(base, look, bench)
    for each in base.layers:
        if each in layers:
            bench.blobs.take(model.blobs.path(each), each)
    return base


def with_eyes(base: Base, files: Mapping[str, Path], bench: Bench) -> Making:
    """A model that is here, with a projector file that came beside it instead of its own. Raises UserError."""
    for name, path in files.items():
        yield Progress("parsing GGUF")
        if not gguf_keys.said(path, name).is_projector:
            raise UserError(f"{name} came beside a model, and is no projector", hint="name the model, or the files")
        weights = base.role("model")
        if len(weights) == 1:
            model = bench.blobs.path(weights[0])
            yield from _looked_at(
                model, (path,), {str(model): bench.title, str(path): name}, replace(bench, worded=True)
            )
        layer = yield from _taken(path, name, _EYES, bench)
        kept = [each for each in base.layers if each.role != "projector"]
        named = base.config.get("model_families") or [base.config.get("model_family")]
        families = [*named, "clip"] if isinstance(named, list) and "clip" not in named else named
        base = replace(base, layers=(*kept, layer), config={**base.config, "model_families": families})
    return base


def _of_gguf(files: Mapping[str, Path], bench: Bench) -> Making:
    said: dict[str, Said] = {}
    for name, path in files.items():
        yield Progress("parsing GGUF")
        said[name] = gguf_keys.said(path, name)
        if said[name].values.get("general.type") == "adapter":
            raise no_adapter()
    eyes = [name for name in files if said[name].is_projector]
    models = [name for name in files if name not in eyes]
    if len(models) != 1 or len(eyes) > 1:
        raise UserError(
            f"{len(models)} GGUF files with weights and {len(eyes)} with a projector came",
            hint="send one of a language model, and at most one with its eyes",
        )
    path, beside = files[models[0]], tuple(files[each] for each in eyes)
    look = yield from _looked_at(path, beside, {str(each): name for name, each in files.items()}, bench)
    layers = []
    if bench.mix is None or said[models[0]].file_type == bench.mix:
        layers.append((yield from _taken(path, models[0], _MODEL, bench)))
    for each in eyes:
        layers.append((yield from _taken(files[each], each, _EYES, bench)))
    base = Base(tuple(layers), config_of(said[models[0]], sees=bool(eyes)))
    return (yield from _finished(base, look, bench))


@dataclass(frozen=True)
class _Look:
    """A model of GGUF files as a whole."""

    said: Said
    checkpoint: Checkpoint | None
    """None of a kind that pumice does not run."""


def _looked_at(
    path: Path, beside: tuple[Path, ...], places: Mapping[str, str], bench: Bench
) -> Generator[Progress, None, _Look]:
    """Read the files' heads. Raises UserError for what is damaged, does not fit together, or cannot be quantised."""
    yield Progress("validating GGUF model")
    said = gguf_keys.said(path, places[str(path)])
    with _named(places):
        checkpoint = _read(path, beside, said, worded=bench.worded)
    if bench.mix not in (None, said.file_type):
        if checkpoint is None:
            raise UserError(f'unsupported architecture "{said.architecture}"', hint="quantise it with another program")
        if said.file_type not in _DENSE:
            words = "quantization is only supported for F16, BF16 and F32 models"
            raise UserError(words, hint="begin with such a model")
    return _Look(said, checkpoint)


def _finished(base: Base, look: _Look, bench: Bench) -> Making:
    """With the eyes that lie beside the model's file, its template's name, and its mix."""
    said, checkpoint = look.said, look.checkpoint
    if checkpoint is None:
        return base
    base = replace(base, template=checkpoint.config.template)
    if checkpoint.projector and not base.role("projector"):
        eyes = yield from _taken(checkpoint.projector, checkpoint.projector.name, _EYES, bench)
        base = replace(base, layers=(*base.layers, eyes), config=config_of(said, sees=True))
    if bench.mix in (None, said.file_type):
        return base
    # Its eyes are kept as they are.
    (model,) = yield from _converted(checkpoint, said.file_type, bench, (_MODEL,))
    others = [each for each in base.layers if each.role != "model"]
    made = gguf_keys.said(bench.blobs.path(model), bench.title)
    return replace(base, layers=(model, *others), config=dict(base.config) | _types(made))


def _of_folder(folder: Path, bench: Bench) -> Making:
    from pumice import checkpoints

    inner = sorted(each.parent for each in folder.glob("*/config.json"))
    with _named({f"{folder}/": "", str(folder): bench.title}):
        yield Progress("converting model")
        checkpoint = checkpoints.read(folder, beside=inner, alone=True)
        layers = yield from _converted(checkpoint, _dense_type(checkpoint), bench, (_MODEL, _EYES))
    said = gguf_keys.said(bench.blobs.path(layers[0]), bench.title)
    return Base(layers, config_of(said, sees=len(layers) > 1), template=checkpoint.config.template)


def _read(path: Path, beside: tuple[Path, ...], said: Said, *, worded: bool) -> Checkpoint | None:
    """None for a model of another kind than pumice runs: it is kept, as Ollama keeps it. Raises UserError for what is
    damaged, or does not fit together."""
    from pumice import checkpoints
    from pumice.checkpoints.gguf import ARCHITECTURES
    from pumice.checkpoints.gguf_file import open_gguf

    if said.architecture in ARCHITECTURES:
        return checkpoints.read(path, beside=beside, worded=worded)
    for each in (path, *beside):
        open_gguf(each)
    return None


def _converted(
    checkpoint: Checkpoint, kind: str, bench: Bench, media_types: Sequence[str]
) -> Generator[Progress, None, tuple[Layer, ...]]:
    """Write the checkpoint as GGUF files, the language model's and the eyes' where it has some; as many of them as
    there are media types become blobs."""
    from pumice.checkpoints.convert import Target, write
    from pumice.checkpoints.mixes import mix
    from pumice.checkpoints.to_gguf import Types

    target = Target(bench.shop / f"{bench.title}.gguf", Types(mix(bench.mix) if bench.mix else None))
    status = f"quantizing {kind} model to {bench.mix}" if bench.mix else "converting model"

    def work(told: Callable[[Progress], None]) -> list[Path]:
        report = write(checkpoint, target, lambda name, done, total: told(Progress(status, NO_DIGEST, total, done)))
        return [each.path for each in report.written]

    with _named({f"{bench.shop}/": ""}):
        written = yield from following(work)
    yield Progress("verifying conversion")
    return tuple(bench.blobs.keep(each, kind) for each, kind in zip(written, media_types))


def _taken(path: Path, name: str, media_type: str, bench: Bench) -> Generator[Progress, None, Layer]:
    """A file as a blob. One that is a blob here already was checked when it came."""
    if path.parent == bench.blobs.folder:
        held = bench.blobs.held(path.name.replace("-", ":", 1))
        assert held is not None, "the recipe names blobs that are here"
        return replace(held, media_type=media_type)

    def work(told: Callable[[Progress], None]) -> Layer:
        with open_regular(path) as file, bench.blobs.arriving() as arrival:
            total = os.fstat(file.fileno()).st_size
            for each in chunks(file):
                arrival.write(each)
                told(Progress(f"copying file {name}", NO_DIGEST, total, arrival.size))
        return Layer(media_type, arrival.digest, arrival.size)

    try:
        return (yield from following(work))
    except OSError as error:
        raise UserError(f"{name} cannot be read", hint="check who may read it") from error


def _types(said: Said) -> dict[str, object]:
    return {"model_type": config_of(said, sees=False)["model_type"], "file_type": said.file_type}


def _dense_type(checkpoint: Checkpoint) -> str:
    from pumice.checkpoints.recoded import FORMAT_OF

    tensors = checkpoint.tensors
    largest = max(tensors.names(), key=lambda name: tensors.shape(name)[0] * (len(tensors.shape(name)) > 1))
    kind = FORMAT_OF.get(tensors.dtype(largest))
    return kind.name if kind else "F32"


def _is_gguf(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


@contextmanager
def _named(places: Mapping[str, str]) -> Iterator[None]:
    """Errors with the names that files came by, instead of where they lie here."""
    try:
        yield
    except UserError as error:
        message, hint = error.message, error.hint
        for place, name in places.items():
            message, hint = message.replace(place, name), hint.replace(place, name)
        raise UserError(message, hint=hint) from error
