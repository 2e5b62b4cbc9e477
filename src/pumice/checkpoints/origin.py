"""What a model that pumice wrote still knows of the folder it was made from: its small files, to the byte, and in GGUF
the types of its weights. With it the way back leads to the same folder.

In a GGUF file it stands in keys that begin with `pumice.`, in a folder of the other format in SOURCE_FILE; others pass
over both.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from pumice.checkpoints.fields import Fields
from pumice.checkpoints.gguf_file import MAX_STRING_BYTES, Value
from pumice.errors import UserError

FILE_KEY = "pumice.file."
SOURCE_KEY = "pumice.source"
SOURCE_FILE = "pumice_source.json"

Format = Literal["hf", "original"]

MAX_FILES_BYTES = 64 * 2**20
"""Of all small files together: several times those of a Llama 3."""
_STRETCH = MAX_STRING_BYTES // 4
"""Characters of a text in one string; a longer text is an array of them. A character has at most four bytes."""
_WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth", ".ckpt", ".msgpack", ".h5", ".onnx", ".index.json", ".part")
_FORMATS: tuple[Format, ...] = ("hf", "original")
_DESCRIBING = (".json", ".jinja", ".model")
"""How the names of files end that say what a model is; what they say is for one format."""
_DTYPES = {str(each)[6:]: each for each in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


@dataclass(frozen=True)
class Origin:
    """`files` by name; `dtypes` by pumice's names of the tensors."""

    format: Format
    files: Mapping[str, bytes]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


def small_files(folder: Path) -> tuple[dict[str, bytes], list[tuple[str, str]]]:
    """The files of a folder that hold no weights; and what stays behind, with the reason."""
    found: dict[str, bytes] = {}
    left: list[tuple[str, str]] = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name.endswith(_WEIGHTS):
            continue
        if not path.is_file():
            left.append((path.name, "a folder"))
        elif sum(map(len, found.values())) + path.stat().st_size > MAX_FILES_BYTES:
            left.append((path.name, f"more than {MAX_FILES_BYTES >> 20} MiB of small files"))
        else:
            found[path.name] = path.read_bytes()
    return found, left


@contextmanager
def as_folder(files: Mapping[str, bytes]) -> Iterator[Path]:
    """The files in a folder for as long as they are read."""
    with tempfile.TemporaryDirectory() as name:
        put_files(Path(name), files)
        yield Path(name)


def put_files(folder: Path, files: Mapping[str, bytes]) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)


# --- as metadata ------------------------------------------------------------------------------------------------------


def file_values(files: Mapping[str, bytes]) -> dict[str, Value]:
    """Texts as strings, everything else as bytes."""
    values = {}
    for name, data in files.items():
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError:
            values[FILE_KEY + name] = Value("u8", list(data))
            continue
        parts = [text[at : at + _STRETCH] for at in range(0, len(text), _STRETCH)]
        values[FILE_KEY + name] = Value("string", text if len(parts) < 2 else parts)
    return values


def source_value(dtypes: Mapping[str, torch.dtype], format: str, names: list[str]) -> Value:
    """The format of the source, and the types of its tensors: the usual one, and the others by name."""
    own = {name: str(dtypes[name])[6:] for name in names if name in dtypes}
    usual = Counter(own.values()).most_common(1)[0][0] if own else None
    others = {name: each for name, each in own.items() if each != usual}
    return Value("string", json.dumps({"format": format, "dtype": usual, "others": others}))


def origin_of(values: Mapping[str, Value], source: str, names: list[str]) -> Origin | None:
    """The way back from a file's metadata, None where it says nothing. `names` are those of the file's tensors."""
    if SOURCE_KEY not in values:
        return None
    fields = inner(Fields({key: each.value for key, each in values.items()}, source), SOURCE_KEY)
    others = fields.inner("others")
    dtypes = {name: _DTYPES[others.one_of(name, None, tuple(_DTYPES))] for name in others.names}
    if "dtype" in fields:
        usual = _DTYPES[fields.one_of("dtype", None, tuple(_DTYPES))]
        dtypes = dict.fromkeys(names, usual) | dtypes
    files = {
        key.removeprefix(FILE_KEY): _content(each, f"{source}: {key}")
        for key, each in values.items()
        if key.startswith(FILE_KEY)
    }
    return Origin(fields.one_of("format", None, _FORMATS), files, dtypes)


def inner(fields: Fields, key: str) -> Fields:
    """The JSON object in a string of the metadata; an empty one when absent."""
    if key not in fields:
        return Fields({}, f"{fields.source}, {key}")
    try:
        found = json.loads(fields.text(key))
    except (ValueError, RecursionError) as error:
        raise fields.wrong(key, "a JSON object") from error
    if not isinstance(found, dict):
        raise fields.wrong(key, "a JSON object")
    return Fields(found, f"{fields.source}, {key}")


def _content(value: Value, what: str) -> bytes:
    _check_name(what.partition(FILE_KEY)[2], what)
    match value:
        case Value("string", str(text)):
            return text.encode("utf-8", errors="surrogateescape")
        case Value("string", list(parts)):
            return "".join(parts).encode("utf-8", errors="surrogateescape")
        case Value("u8", list(numbers)):
            return bytes(numbers)
    raise UserError(f"{what} holds no text and no bytes", hint="the file is damaged; convert the model again")


def _check_name(name: str, what: str) -> None:
    """Raises UserError for a name that leads out of its folder, or is none of a small file."""
    if (
        not name
        or name.startswith(".")
        or name.endswith(_WEIGHTS)
        or set(name) & set('/\\\0:"<>|?*')
        or len(name) > 200
    ):
        raise UserError(f"{what} is not the name of a small file", hint="the file is damaged; convert the model again")


# --- in a folder ------------------------------------------------------------------------------------------------------


def put_source(folder: Path, format: Format, origin: Origin, dtype: torch.dtype | None) -> None:
    """Beside what was written to a folder: the source's files that say nothing about the model, as they are; and where
    the formats differ SOURCE_FILE, with the others that the folder has not the same. dtype: what all weights became."""
    own, _ = small_files(folder)
    free = {name: each for name, each in origin.files.items() if name not in own and not name.endswith(_DESCRIBING)}
    put_files(folder, free)
    if origin.format == format:
        return
    own |= free
    same = [name for name, data in origin.files.items() if own.get(name) == data]
    others = {name: data for name, data in origin.files.items() if name not in same and name != SOURCE_FILE}
    if dtype is not None and "config.json" in others:
        others["config.json"] = retyped(others["config.json"], dtype)
    texts = {name: data.decode("utf-8", errors="surrogateescape") for name, data in others.items()}
    content = {"format": origin.format, "beside": _digest(own), "same": same, "files": texts}
    (folder / SOURCE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="ascii")


def files_of(origin: Origin | None, format: Format) -> dict[str, bytes]:
    """The small files of the folder in this format that a model comes from: directly, or by way of a folder in the
    other format whose own files are still those that were written. Empty where there is none.

    Raises UserError for a SOURCE_FILE that pumice did not write.
    """
    if origin is None or origin.format == format:
        return {} if origin is None else dict(origin.files)
    if SOURCE_FILE not in origin.files:
        return {}
    text = origin.files[SOURCE_FILE].decode("utf-8", errors="replace")
    fields = inner(Fields({SOURCE_FILE: text}, "the source"), SOURCE_FILE)
    if fields.one_of("format", None, _FORMATS) != format or fields.text("beside") != _digest(origin.files):
        return {}
    files, same = fields.inner("files"), fields.raw("same")
    names = same if isinstance(same, list) else []
    found = {name: origin.files[name] for name in names if isinstance(name, str) and name in origin.files}
    for name in files.names:
        _check_name(name, f"{files.source}: {name}")
        found[name] = files.text(name).encode("utf-8", errors="surrogateescape")
    return found


def _digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 of what a folder's small files say about its model."""
    told = hashlib.sha256()
    for name in sorted(files):
        if name.endswith(_DESCRIBING) and name != SOURCE_FILE:
            told.update(f"{name}\0{len(files[name])}\0".encode() + files[name])
    return told.hexdigest()


def retyped(config: bytes, dtype: torch.dtype) -> bytes:
    """A config.json that names another type of weights wherever it names one."""
    return json_bytes(_retyped(json.loads(config), str(dtype)[6:]))


def _retyped(value: object, name: str) -> object:
    match value:
        case dict():
            return {
                key: name if key in ("torch_dtype", "dtype") and isinstance(each, str) else _retyped(each, name)
                for key, each in value.items()
            }
        case list():
            return [_retyped(each, name) for each in value]
    return value


def json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
