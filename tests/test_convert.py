"""Conversion: what pumice writes says the same to the gguf package, to Transformers and to pumice itself."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import pumice
import tiny
from conftest import reference
from pumice import Sampling, UserError, checkpoints
from pumice.checkpoints.card import CARD_BYTES, CARD_KEY, read_card
from pumice.checkpoints.gguf import name_of
from pumice.checkpoints.gguf_eyes import name_of as eyes_name_of
from pumice.checkpoints.gguf_file import Value, open_gguf
from pumice.checkpoints.report import Report
from pumice.conversion import Choices
from test_cli import Command, command  # noqa: F401 (a fixture)
from test_gguf import edited, logits, pair

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
FEW = Sampling(max_tokens=16)
WORDS = "What is shown? The sign says stop."


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hugging Face folders, and beside each what it was converted to."""
    root = tmp_path_factory.mktemp("convert")
    folders = {
        f"{family}-{lm}": tiny.hf_folder(root / f"{family}-{lm}", family=family, lm=lm, seed=5)
        for family, lm in [("1.5", "vicuna"), ("1.6", "vicuna"), ("1.5", "yi"), ("1.6", "mistral"), ("1.6", "llama3")]
    }
    for name, folder in folders.items():
        pumice.convert(folder, root / f"{name}.gguf")
    return folders


def converted(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.gguf")


def projector_of(path: Path) -> Path:
    return path.with_name(f"mmproj-{path.name}")


def same_tensors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> None:
    """To the bit, types included."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


# --- what is computed -------------------------------------------------------------------------------------------------


def agree(ours: Path | str, theirs: Path | str, **named: Any) -> None:
    """Prompts, pixels, logits and greedy tokens of two checkpoints."""
    first, second = pumice.load(ours, dtype="float32"), pumice.load(theirs, dtype="float32", **named)
    question = pumice.Question(WORDS, PICTURE, sampling=FEW)
    found, wanted = first.see(question), second.see(question)
    images = {first.config.image_token_id: -200, second.config.image_token_id: -200}
    ids, expected = ([images.get(id, id) for id in seen.encoded.ids] for seen in (found, wanted))
    assert ids == expected
    assert np.array_equal(found.images[0].pixels, wanted.images[0].pixels)
    a, b = logits(first, found), logits(second, wanted)
    rows = min(a.shape[1], b.shape[1])
    assert float((a[:, :rows] - b[:, :rows]).abs().max()) < 2e-5 * float(b.abs().max())
    assert first.answer(question).tokens == second.answer(question).tokens


@pytest.mark.parametrize("name", ["1.5-vicuna", "1.6-vicuna", "1.5-yi", "1.6-mistral", "1.6-llama3"])
def test_to_gguf_and_back(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    """The pair computes what the folder does; the way back leads to the same small files and the same tensors."""
    folder = made[name]
    agree(converted(folder), folder)
    first, second = checkpoints.read(folder), checkpoints.read(converted(folder))
    assert second.config == first.config
    assert second.projector == projector_of(converted(folder))
    report = pumice.convert(converted(folder), tmp_path / "back")
    third = checkpoints.read(tmp_path / "back")
    assert third.config == first.config
    same_tensors(dict(third.tensors), dict(first.tensors))
    small = [path for path in folder.iterdir() if path.suffix != ".safetensors"]
    assert len(small) > 5
    for path in small:
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    assert len(list((tmp_path / "back").iterdir())) == len(small) + 1
    assert report.notes == ()


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "today"])
@pytest.mark.parametrize(("family", "lm"), [("1.5", "vicuna"), ("1.6", "mistral"), ("1.6", "llama3")])
def test_a_pair_of_others_as_a_folder(family: str, lm: str, legacy: bool, tmp_path: Path) -> None:
    """What the gguf package wrote becomes a folder that Transformers runs, to the same logits and greedy tokens."""
    source = tiny.hf_folder(tmp_path / "hf", family=family, lm=lm, seed=6)
    path, template = pair(source, tmp_path / "pair", legacy=legacy), checkpoints.read(source).config.template
    report = pumice.convert(path, tmp_path / "out", choices=Choices(template=template))
    agree(tmp_path / "out", path, template=template)
    found = checkpoints.read(tmp_path / "out").config
    assert found.vision is not None
    assert found.vision.layers == (2 if legacy else 3)
    assert any("last norm" in note for note in report.notes) == legacy
    transformers_agrees(tmp_path / "out")


def transformers_agrees(folder: Path) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    ours = pumice.load(folder, dtype="float32")
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    question = pumice.Question(WORDS, PICTURE, sampling=FEW)
    seen = ours.see(question)
    text = "".join("<image>" if part.kind == "image" else part.text for part in seen.parts)
    text = text.removeprefix(ours.tokenizer.token_of(ours.tokenizer.bos_id or 0))  # Transformers puts its own
    given = AutoProcessor.from_pretrained(folder)(text=text, images=PICTURE, return_tensors="pt")
    assert given["input_ids"][0].tolist() == seen.encoded.ids
    with torch.inference_mode():
        expected = theirs(**given).logits[0]
        tokens = theirs.generate(**given, max_new_tokens=FEW.max_tokens, do_sample=False, pad_token_id=0)
    found = logits(ours, seen)
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    assert ours.answer(question).tokens == tuple(tokens[0, len(seen.encoded.ids) :].tolist())


AUTHORS = {
    "llava-v1.5-tiny": ["llava-v1.5-tiny-clip"],
    "llava-v1.6-mistral-tiny": ["llava-v1.6-mistral-tiny-clip"],
    "llava-v1.5-tiny-lora": ["vicuna-tiny", "llava-v1.5-tiny-clip"],
}


@pytest.mark.parametrize("name", AUTHORS)
def test_the_authors_folders(name: str, tmp_path: Path) -> None:
    """To GGUF, to a folder, and from that GGUF to the same folder; Transformers computes the same from it."""
    root = reference("golden/models-original")
    beside = [root / each for each in AUTHORS[name]]
    pumice.convert(root / name, tmp_path / "m.gguf", beside=beside)
    agree(tmp_path / "m.gguf", root / name, beside=beside)
    report = pumice.convert(root / name, tmp_path / "a", beside=beside)
    assert any("<image> became token 400" in note for note in report.notes)
    agree(tmp_path / "a", root / name, beside=beside)
    transformers_agrees(tmp_path / "a")
    pumice.convert(tmp_path / "m.gguf", tmp_path / "b")
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_vocabulary_without_a_free_row_grows(tmp_path: Path) -> None:
    """By rows that hold the mean of the others: never the best token."""
    folder = tiny.hf_folder(tmp_path / "hf", family="1.5", lm="vicuna", seed=7)
    path = pair(folder, tmp_path / "pair")
    values = dict(open_gguf(path).values)
    tokens = [text if text != "<image>" else "<else>" for text in values["tokenizer.ggml.tokens"].value]
    full = [text if not text.startswith("[PAD") else f"w{row}" for row, text in enumerate(tokens)]
    values["tokenizer.ggml.tokens"] = dataclasses.replace(values["tokenizer.ggml.tokens"], value=full)
    other = edited(path, values=values)
    path.unlink()
    report = pumice.convert(other, tmp_path / "out", choices=Choices(template="vicuna_v1"))
    rows = len(full)
    assert f"the vocabulary grew from {rows} to {rows + 64} rows; the new ones hold the mean of the old" in report.notes
    agree(tmp_path / "out", other, template="vicuna_v1")
    found, old = checkpoints.read(tmp_path / "out"), checkpoints.read(other, template="vicuna_v1")
    assert found.config.image_token_id == rows
    for name in ("lm_head.weight", "language_model.embed_tokens.weight"):
        assert torch.equal(found.tensors[name][:rows], old.tensors[name])
        mean = old.tensors[name].mean(dim=0)
        assert torch.allclose(found.tensors[name][rows:], mean.expand(64, -1), atol=1e-6)


@pytest.mark.parametrize("name", ["pebble", "pebble:1.5"])
def test_pebble(name: str, tmp_path: Path) -> None:
    report = pumice.convert(name, tmp_path / "p.gguf")
    assert any("cuts a text" in note for note in report.notes)
    for path, question in (("sign", "What does the sign say?"), ("star", "What colour is it?")):
        image = Path(__file__).parent.parent / f"docs/images/{path}.png"
        ours, theirs = pumice.load(tmp_path / "p.gguf"), pumice.load(name)
        assert str(ours.ask(question, image)) == str(theirs.ask(question, image))
    pumice.convert(name, tmp_path / "q.gguf", quant="Q8_0")
    assert str(pumice.load(tmp_path / "q.gguf").ask(question, image)) == str(theirs.ask(question, image))
    pumice.convert(tmp_path / "p.gguf", tmp_path / "back")
    source = checkpoints.read(pumice.source.store.resolve(name))
    same_tensors(load_file(tmp_path / "back" / "model.safetensors"), load_file(source.path / "model.safetensors"))


# --- the files, by the gguf package -----------------------------------------------------------------------------------


def fields_of(path: Path) -> dict[str, Any]:
    reader = gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def types_of(path: Path, key: str) -> list[str]:
    return [each.name for each in gguf.GGUFReader(path).fields[key].types]


def test_the_language_model_by_the_gguf_package(made: dict[str, Path]) -> None:
    path = converted(made["1.6-mistral"])
    first, found = checkpoints.read(made["1.6-mistral"]), fields_of(path)
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.file_type": 0, "llama.block_count": 3,
        "llama.context_length": 8192, "llama.embedding_length": 64, "llama.feed_forward_length": 112,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 1e6, "tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False, "tokenizer.ggml.add_space_prefix": True,
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    strict = {
        "general.file_type": "UINT32", "llama.block_count": "UINT32", "llama.vocab_size": "UINT32",
        "llama.rope.freq_base": "FLOAT32", "llama.attention.layer_norm_rms_epsilon": "FLOAT32",
        "tokenizer.ggml.add_bos_token": "BOOL", "tokenizer.ggml.bos_token_id": "UINT32",
    }  # fmt: skip
    assert {key: types_of(path, key) for key in strict} == {key: [kind] for key, kind in strict.items()}
    assert types_of(path, "tokenizer.ggml.token_type") == ["ARRAY", "INT32"]
    assert types_of(path, "tokenizer.ggml.scores") == ["ARRAY", "FLOAT32"]
    rows = first.config.text.vocab
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == len(kinds) == len(found["tokenizer.ggml.scores"]) == rows
    assert kinds[:3] == [2, 3, 3]
    assert kinds[tokens.index("<0x0A>")] == 6
    assert kinds[tokens.index("<image>")] == 3
    assert (tokens[-1], kinds[-1]) == (f"[PAD{rows - 1}]", 5)
    tensors = {each.name: each for each in gguf.GGUFReader(path).tensors}
    assert list(tensors)[:4] == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_k.weight"]
    assert len(tensors) == 3 + 9 * 3
    for key, each in tensors.items():
        values = first.tensors[name_of(key)].numpy()
        if heads := {"attn_q": 4, "attn_k": 2}.get(key.split(".")[2] if key.startswith("blk") else ""):
            values = values.reshape(heads, 2, -1, 64).swapaxes(1, 2).reshape(values.shape)
        assert each.tensor_type.name == "F32"
        assert np.array_equal(each.data, values), key


@pytest.mark.parametrize("family", ["1.5", "1.6"])
def test_the_projector_by_the_gguf_package(family: str, made: dict[str, Path]) -> None:
    """In today's naming: fc1 is ffn_up, the whole tower is there, and a key says where it is read out."""
    path = projector_of(converted(made[f"{family}-vicuna"]))
    first, found = checkpoints.read(made[f"{family}-vicuna"]), fields_of(path)
    expected = {
        "general.architecture": "clip", "general.type": "mmproj", "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp", "clip.use_gelu": False, "clip.vision.image_size": 28,
        "clip.vision.patch_size": 14, "clip.vision.embedding_length": 32, "clip.vision.feed_forward_length": 64,
        "clip.vision.block_count": 3, "clip.vision.attention.head_count": 4, "clip.vision.feature_layer": [2],
    }  # fmt: skip
    assert {key: found[key] for key in expected} == expected
    assert types_of(path, "clip.vision.feature_layer") == ["ARRAY", "INT32"]
    assert found.get("clip.vision.image_grid_pinpoints") == (
        [56, 28, 28, 56, 56, 56, 28, 84, 84, 28] if family == "1.6" else None
    )
    tensors = {each.name: each for each in gguf.GGUFReader(path).tensors}
    assert {"mm.0.weight", "mm.2.bias", "v.class_embd", "v.patch_embd.weight", "v.position_embd.weight"} <= set(tensors)
    assert ("v.image_newline" in tensors) == (family == "1.6")
    assert tensors["v.blk.2.ffn_up.weight"].data.shape == (64, 32)
    # llama.cpp would run the features through a norm of this name without the prefix.
    assert "v.post_ln.weight" not in tensors
    assert "pumice.v.post_ln.weight" in tensors
    for key, each in tensors.items():
        values = first.tensors[eyes_name_of(key, swapped=False)].numpy()
        assert np.array_equal(each.data, values), key


MORE_BITS_OF_32 = {0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31}
MORE_BITS_OF_40 = {0, 1, 2, 3, 4, 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, 35, 36, 37, 38, 39}


def apart(values: list[str], down: list[str], out: list[str]) -> dict[str, list[str]]:
    return {"attn_v": values, "ffn_down": down, "attn_output": out}


def everywhere(layers: int, values: str, down: str, out: str) -> dict[str, list[str]]:
    return apart([values] * layers, [down] * layers, [out] * layers)


def where(layers: int, chosen: set[int], better: str, base: str) -> dict[str, list[str]]:
    kinds = [better if layer in chosen else base for layer in range(layers)]
    return apart(kinds, kinds, [base] * layers)


TABLE: list[tuple[str, int, tuple[int, int], str, str, dict[str, list[str]]]] = [
    ("Q4_0", 32, (32, 32), "Q4_0", "Q6_K", everywhere(32, "Q4_0", "Q4_0", "Q4_0")),
    ("Q5_1", 32, (32, 32), "Q5_1", "Q6_K", everywhere(32, "Q5_1", "Q5_1", "Q5_1")),
    ("Q8_0", 32, (32, 32), "Q8_0", "Q8_0", everywhere(32, "Q8_0", "Q8_0", "Q8_0")),
    ("Q2_K", 32, (32, 32), "Q2_K", "Q6_K", everywhere(32, "Q3_K", "Q3_K", "Q3_K")),
    ("Q2_K", 32, (32, 8), "Q2_K", "Q6_K", everywhere(32, "Q4_K", "Q3_K", "Q3_K")),
    ("Q2_K", 32, (32, 16), "Q2_K", "Q6_K", everywhere(32, "Q3_K", "Q3_K", "Q3_K")),
    ("Q3_K_S", 32, (32, 32), "Q3_K", "Q6_K", everywhere(32, "Q3_K", "Q3_K", "Q3_K")),
    (
        "Q3_K_M", 32, (32, 32), "Q3_K", "Q6_K",
        apart(["Q5_K"] * 2 + ["Q4_K"] * 30, ["Q5_K"] * 2 + ["Q4_K"] * 30, ["Q4_K"] * 32),
    ),
    ("Q3_K_L", 32, (32, 32), "Q3_K", "Q6_K", everywhere(32, "Q5_K", "Q5_K", "Q5_K")),
    (
        "Q4_K_S", 32, (32, 32), "Q4_K", "Q6_K",
        apart(["Q5_K"] * 4 + ["Q4_K"] * 28, ["Q5_K"] * 4 + ["Q4_K"] * 28, ["Q4_K"] * 32),
    ),
    (
        "Q4_K_S", 40, (40, 40), "Q4_K", "Q6_K",
        apart(["Q5_K"] * 4 + ["Q4_K"] * 36, ["Q5_K"] * 5 + ["Q4_K"] * 35, ["Q4_K"] * 40),
    ),
    ("Q4_K_M", 32, (32, 8), "Q4_K", "Q6_K", where(32, MORE_BITS_OF_32, "Q6_K", "Q4_K")),
    ("Q4_K_M", 40, (40, 40), "Q4_K", "Q6_K", where(40, MORE_BITS_OF_40, "Q6_K", "Q4_K")),
    ("Q5_K_S", 32, (32, 32), "Q5_K", "Q6_K", everywhere(32, "Q5_K", "Q5_K", "Q5_K")),
    ("Q5_K_M", 32, (32, 32), "Q5_K", "Q6_K", where(32, MORE_BITS_OF_32, "Q6_K", "Q5_K")),
    ("Q6_K", 32, (32, 8), "Q6_K", "Q6_K", everywhere(32, "Q6_K", "Q6_K", "Q6_K")),
    (
        "Q4_K_S", 80, (64, 8), "Q4_K", "Q6_K",
        apart(["Q5_K"] * 80, ["Q5_K"] * 10 + ["Q4_K"] * 70, ["Q4_K"] * 80),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layers", "heads", "base", "output", "others"), TABLE, ids=lambda each: str(each)[:9])
def test_mixes(
    name: str, layers: int, heads: tuple[int, int], base: str, output: str, others: dict[str, list[str]]
) -> None:
    """Against lists typed from what llama-quantize does (spec, 4.6)."""
    from pumice.checkpoints.mixes import format_of, mix
    from pumice.config import TextConfig

    text = TextConfig(32000, 4096, layers, *heads, head_width=128, ffn_width=11008)

    def kind(key: str, columns: int = 4096) -> str:
        return format_of(f"{key}.weight", columns, mix(name), text).name

    assert kind("output") == output
    assert kind("token_embd") == base
    for layer in range(layers):
        for part in ("attn_q", "attn_k", "ffn_gate", "ffn_up"):
            assert kind(f"blk.{layer}.{part}") == base
        for part, kinds in others.items():
            assert kind(f"blk.{layer}.{part}") == kinds[layer], (part, layer)


def test_mixes_where_rows_are_no_whole_blocks() -> None:
    from pumice.checkpoints.mixes import format_of, mix
    from pumice.config import TextConfig

    text = TextConfig(448, 320, 8, 4, 4, head_width=80, ffn_width=320)
    tied = dataclasses.replace(text, tied_embeddings=True)
    for name, columns, kinds in (
        ("Q2_K", 320, ("Q8_0", "Q4_0", "Q4_0")),
        ("Q3_K_S", 320, ("Q8_0", "Q4_0", "Q4_0")),
        ("Q4_K_S", 320, ("Q8_0", "Q5_0", "Q5_1")),
        ("Q5_K_S", 320, ("Q8_0", "Q5_1", "Q5_1")),
        ("Q6_K", 320, ("Q8_0", "Q8_0", "Q8_0")),
        ("Q4_0", 320, ("Q8_0", "Q4_0", "Q4_0")),
        ("Q4_K_M", 100, ("F16", "F16", "F16")),
    ):
        found = [
            format_of(key, columns, mix(name), text).name
            for key in ("output.weight", "token_embd.weight", "blk.0.attn_v.weight")
        ]
        assert tuple(found) == kinds, name
    assert format_of("token_embd.weight", 512, mix("q4_k"), tied).name == "Q6_K"
    with pytest.raises(UserError, match="Q4_K_M"):
        mix("Q4_K_X")


def test_quantised_values_are_those_of_the_gguf_package(made: dict[str, Path], tmp_path: Path) -> None:
    report = pumice.convert(made["1.5-vicuna"], tmp_path / "q.gguf", quant="Q4_0", vision="q8_0")
    first = checkpoints.read(made["1.5-vicuna"])
    lm, eyes = (gguf.GGUFReader(each.path) for each in report.written)
    counted = {"Q4_0": 0, "Q8_0": 0, "F16": 0}
    for each in (*lm.tensors, *eyes.tensors):
        name = name_of(each.name) if each in lm.tensors else eyes_name_of(each.name, swapped=False)
        values, kind = first.tensors[name].numpy(), each.tensor_type
        if kind.name == "F32" or "attn_q" in each.name or "attn_k" in each.name:
            continue
        counted[kind.name] += 1
        wanted = gguf.quants.quantize(values, kind)
        assert np.array_equal(each.data.view(np.uint8).ravel(), wanted.view(np.uint8).ravel()), each.name
    # The embedding, and v, o, gate and up of three blocks. The rows of down, 112, are no whole blocks of 32.
    assert counted["Q4_0"] == 1 + 4 * 3
    assert counted["F16"] == 3
    assert report.written[0].kinds == {"Q4_0": 1 + 6 * 3, "F32": 7, "F16": 3, "Q8_0": 1}
    assert report.written[1].kinds["Q8_0"] == 6 * 3 + 2
    assert {each.tensor_type.name for each in eyes.tensors if "embd" in each.name} == {"F32"}
    for reader in (lm, eyes):
        assert reader.fields[CARD_KEY].contents() == " " * CARD_BYTES
        assert reader.fields["general.quantization_version"].contents() == 2
    assert lm.fields["general.file_type"].contents() == 2
    assert CARD_KEY not in fields_of(converted(made["1.5-vicuna"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    """Matrices keep their type in GGUF, vectors become F32; the way back restores both."""
    folder = tiny.hf_folder(tmp_path / "hf", family="1.6", lm="vicuna")
    state = {key: each.to(dtype) for key, each in load_file(folder / "model.safetensors").items()}
    norm = next(key for key in state if key.endswith("model.norm.weight"))
    state[norm] = state[norm].float()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    report = pumice.convert(folder, tmp_path / "m.gguf")
    name = "BF16" if dtype == torch.bfloat16 else "F16"
    assert report.written[0].kinds == {name: 23, "F32": 7}
    first, second = checkpoints.read(folder), checkpoints.read(tmp_path / "m.gguf")
    for key in first.tensors.names():
        assert torch.equal(second.tensors[key].float(), first.tensors[key].float()), key
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(report.written[1].path).tensors}
    assert kinds["v.patch_embd.weight"] == ("F32" if dtype == torch.bfloat16 else "F16")
    assert kinds["v.position_embd.weight"] == "F32"
    pumice.convert(tmp_path / "m.gguf", tmp_path / "back")
    same_tensors(dict(checkpoints.read(tmp_path / "back").tensors), dict(first.tensors))
    agree(tmp_path / "m.gguf", folder)


def test_gguf_to_gguf_keeps_what_it_holds(tmp_path: Path) -> None:
    """Blocks stay blocks, unknown keys stay; the projector gets today's naming."""
    folder = tiny.hf_folder(tmp_path / "hf", family="1.5", lm="mistral", seed=6)
    path = pair(folder, tmp_path / "pair", quant="Q8_0")
    choices = Choices(template="mistral_instruct")
    pumice.convert(path, tmp_path / "m.gguf", choices=choices)
    old, new = fields_of(path), fields_of(tmp_path / "m.gguf")
    assert {key: new[key] for key in old} == old
    first, second = ({e.name: e for e in gguf.GGUFReader(each).tensors} for each in (path, tmp_path / "m.gguf"))
    assert first.keys() == second.keys()
    for name, each in first.items():
        assert each.tensor_type == second[name].tensor_type
        assert np.array_equal(each.data, second[name].data), name
    agree(tmp_path / "m.gguf", path, template="mistral_instruct")
    with pytest.raises(UserError, match=r"as Q8_0; it would be quantised again, as Q4_0.*\n.*--allow-requantize"):
        pumice.convert(path, tmp_path / "q.gguf", quant="Q4_0", choices=choices)
    assert not (tmp_path / "q.gguf").exists()
    pumice.convert(path, tmp_path / "q.gguf", quant="Q4_0", choices=dataclasses.replace(choices, requantise=True))
    assert "Q4_0" in checkpoints.read(tmp_path / "q.gguf").tensors.kinds()
    pumice.convert(path, tmp_path / "f.gguf", quant="F32", choices=choices)
    assert "Q8_0" not in checkpoints.read(tmp_path / "f.gguf").tensors.kinds()
    for dtype, wanted in ((None, torch.float16), ("bfloat16", torch.bfloat16)):
        out = tmp_path / f"out-{dtype}"
        pumice.convert(path, out, choices=dataclasses.replace(choices, dtype=dtype))
        found = checkpoints.read(out).tensors
        name = "language_model.layers.0.mlp.up_proj.weight"
        assert found.dtype(name) == wanted
        assert torch.equal(found[name], checkpoints.read(path, template="vicuna_v1").tensors[name].to(wanted))


def test_the_projector_of_the_same_name_is_taken(made: dict[str, Path], tmp_path: Path) -> None:
    """Two models that fit each other's projectors lie in one folder."""
    for name in ("1.5-vicuna", "1.5-yi"):
        pumice.convert(made[name], tmp_path / f"{name}.gguf")
    assert checkpoints.read(tmp_path / "1.5-yi.gguf").projector == tmp_path / "mmproj-1.5-yi.gguf"


# --- tokenizers -------------------------------------------------------------------------------------------------------


def through_metadata(folder: Path) -> Any:
    """The tokenizer of a folder as a reader of llama.cpp's keys alone finds it."""
    from pumice.checkpoints.fields import Fields
    from pumice.checkpoints.gguf_vocab import tokenizer
    from pumice.checkpoints.gguf_vocab_writer import vocab_values
    from pumice.tokenizer import Tokenizer

    words = Tokenizer.from_folder(folder)
    values, notes = vocab_values(folder, words, words.vocab_size, (words.eos_id or 0,))
    fields = Fields({key: each.value for key, each in values.items()}, "metadata")
    return words, tokenizer(fields), fields, notes


def ids_of(words: Any, text: str) -> list[int]:
    from pumice.prompt import Part

    found: list[int] = words.encode([Part("text", text)], [], image_id=-200).ids
    return found


@pytest.mark.parametrize("name", ["vicuna15-28", "mistral16-28", "yi16-28", "mistral15-42"])
@pytest.mark.parametrize("scores", [True, False], ids=["model", "merges"])
def test_pieces_of_golden_folders(name: str, scores: bool, tmp_path: Path) -> None:
    """With the scores of tokenizer.model, and with those that the order of the merges gives."""
    folder = reference("golden/models") / name
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and (scores or path.suffix != ".model"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    theirs, ours, fields, _ = through_metadata(tmp_path)
    texts = json.loads((Path(__file__).parent / "golden/token_texts.json").read_text(encoding="utf-8"))
    texts = [piece for each in texts["samples"] for piece in each["prompt"].split("<image>")]
    for text in (*texts, *tiny.WORDS.split(), tiny.WORDS, WORDS, "  two  spaces\n\n", "ünïcödé 漢字"):
        assert ids_of(ours, text) == ids_of(theirs, text), text
    assert ours.bos_id == theirs.bos_id
    assert ours.adds_bos == theirs.adds_bos
    assert fields.raw("tokenizer.ggml.tokens").count("<unk>") == 1


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "qwen2"])
def test_vocabularies_of_llama_cpp_through_tokenizer_json(name: str, tmp_path: Path) -> None:
    """GGUF to tokenizer.json, and that back: the same ids of llama.cpp's own texts, from merges alone."""
    from pumice.checkpoints.gguf_vocab import tokenizer_files

    path = reference("data/vocab") / f"ggml-vocab-{name}.gguf"
    first = open_gguf(path).fields
    for file, content in tokenizer_files(first).items():
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    middle, last, fields, notes = through_metadata(tmp_path)
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text(encoding="utf-8").splitlines()
    for text, line in zip(texts, lines):
        for words in (middle, last):
            assert ids_of(words, text)[int(words.adds_bos) :] == [int(each) for each in line.split()], text
    assert notes == []
    same = ["tokens", "model", "token_type"] if name == "llama-spm" else ["tokens", "model", "merges", "pre"]
    for key in same:
        assert fields.raw(f"tokenizer.ggml.{key}") == first.raw(f"tokenizer.ggml.{key}"), key


def test_scores_are_an_order_of_merges() -> None:
    from pumice.checkpoints.gguf_vocab_writer import scores_of

    vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
    scores, lost = scores_of([("a", "b"), ("b", "c"), ("ab", "c")], vocab)
    assert scores == {3: -1.0, 4: -2.0, 5: -3.0}
    assert lost == 1  # a and bc make abc too, which llama.cpp would do
    assert scores_of([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], vocab)[1] == 0


# --- whole or not at all ----------------------------------------------------------------------------------------------


def process(*arguments: object, **named: Any) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'pumice'; from pumice.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, **named
    )


@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_a_full_disk(name: str, tmp_path: Path) -> None:
    """The system takes a megabyte of a file and no more."""
    import resource

    limit = (2**20, 2**20)
    done = process(
        "convert", "pebble", tmp_path / "w" / name, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written: File too large" in done.stderr
    assert list((tmp_path / "w").iterdir()) == []


SLOWLY = """
import sys, time, pathlib, pumice
from pumice.conversion import Choices
def wait(name, done, total):
    if done > total / 2:
        pathlib.Path(sys.argv[3]).touch()
        time.sleep(60)
pumice.convert(sys.argv[1], sys.argv[2], choices=Choices(progress=wait))
"""


@pytest.mark.parametrize("name", ["out.gguf", "out"])
def test_a_killed_conversion(name: str, tmp_path: Path) -> None:
    """It leaves nothing that loads or looks finished, and the same command goes through afterwards."""
    place, ready = tmp_path / "w", tmp_path / "ready"
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, "pebble", str(place / name), str(ready)])
    for _ in range(600):
        if ready.exists():
            break
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = list(place.iterdir())
    assert left
    assert all(each.name.startswith(".") and each.name.endswith(".part") for each in left)
    for each in left:
        with pytest.raises(UserError):
            pumice.load(each)
    pumice.convert("pebble", place / name)
    assert sorted(each.name for each in place.iterdir()) == sorted(
        [name, *(["mmproj-out.gguf"] if "." in name else [])]
    )
    assert pumice.load(place / name).config.image is not None


def test_what_is_there_already(made: dict[str, Path], tmp_path: Path) -> None:
    folder, force = made["1.5-vicuna"], Choices(force=True)
    out = tmp_path / "m.gguf"
    projector_of(out).write_bytes(b"mine")
    with pytest.raises(UserError, match=r"mmproj-m.gguf is there already.*\n.*--force"):
        pumice.convert(folder, out)
    assert not out.exists()
    assert projector_of(out).read_bytes() == b"mine"
    pumice.convert(folder, out, choices=force)
    assert pumice.load(out).config.family == "llava-1.5"
    (tmp_path / "f").mkdir()
    pumice.convert(folder, tmp_path / "f")  # an empty folder is no loss
    with pytest.raises(UserError, match="is there already"):
        pumice.convert(folder, tmp_path / "f")
    (tmp_path / "f" / "old.txt").write_text("x")
    pumice.convert(folder, tmp_path / "f", choices=force)
    assert not (tmp_path / "f" / "old.txt").exists()
    (tmp_path / "f" / "inner").mkdir()
    with pytest.raises(UserError, match="other things than a checkpoint"):
        pumice.convert(folder, tmp_path / "f", choices=force)
    with pytest.raises(UserError, match="itself, or in it"):
        pumice.convert(out, out, choices=force)
    with pytest.raises(UserError, match="itself, or in it"):
        pumice.convert(folder, folder, choices=force)
    with pytest.raises(UserError, match="itself, or in it"):
        pumice.convert(out, out.parent, choices=force)


def test_choices_that_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    folder = made["1.5-vicuna"]
    for words, named in (
        ("only a GGUF file holds quantised", {"dst": tmp_path / "x", "quant": "Q4_0"}),
        ("and a dtype came", {"dst": tmp_path / "x.gguf", "choices": Choices(dtype="float16")}),
        ("no quantisation named 'Q9'", {"dst": tmp_path / "x.gguf", "quant": "Q9"}),
        ("vision is 'q4_0'", {"dst": tmp_path / "x.gguf", "vision": "q4_0"}),
        ("dtype is 'int8'", {"dst": tmp_path / "x", "choices": Choices(dtype="int8")}),
    ):
        with pytest.raises(UserError, match=words):
            pumice.convert(folder, **named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("value", "quant", "words"),
    [
        (1e5, "F16", "beyond what F16"),
        (float("nan"), "Q8_0", "no number"),
        (float("-inf"), "Q4_K_M", "no number"),
        (float("inf"), "BF16", "no number"),
    ],
)
def test_numbers_that_no_type_holds(value: float, quant: str, words: str, tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path / "hf", family="1.5")
    state = load_file(folder / "model.safetensors")
    state[next(key for key in state if key.endswith("lm_head.weight"))][3, 5] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lm_head.weight has a value that is .*{words}"):
        pumice.convert(folder, tmp_path / "m.gguf", quant=quant)
    assert [each.name for each in tmp_path.iterdir()] == ["hf"]


def test_leftovers_are_reported(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path / "hf", family="1.5")
    state = load_file(folder / "model.safetensors")
    state["model.language_model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "runs").mkdir()
    (folder / "picture.png").write_bytes(b"\x89PNG\xff")
    report = pumice.convert(folder, tmp_path / "m.gguf")
    assert ("runs", "a folder") in report.left_out
    assert (
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq",
        "computed from the config",
    ) in report.left_out
    assert "left out runs: a folder" in str(report)
    pumice.convert(tmp_path / "m.gguf", tmp_path / "back")
    assert (tmp_path / "back" / "picture.png").read_bytes() == b"\x89PNG\xff"


@pytest.mark.parametrize("name", ["../evil", "/etc/passwd", ".hidden", "model.safetensors", "a\0b", ""])
def test_names_of_small_files_stay_in_their_folder(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    pumice.convert(made["1.5-vicuna"], path)
    bad = edited(path, values={f"pumice.file.{name}": Value("string", "x")})
    with pytest.raises(UserError, match="is not the name of a small file"):
        checkpoints.read(bad)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("pumice.source", "[]", "a JSON object"),
        ("pumice.source", '{"format": "zip"}', "'hf' or 'original'"),
        ("pumice.source", '{"format": "hf", "dtype": "int4"}', "float64"),
        ("pumice.model", "{" * 10**5, "a JSON object"),
        ("pumice.model", '{"stop_ids": [-1]}', "stop_ids"),
        ("pumice.model", '{"template": "nobody"}', "no prompt template"),
    ],
)
def test_damaged_keys_are_refused(key: str, value: str, words: str, made: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    pumice.convert(made["1.5-vicuna"], path)
    with pytest.raises(UserError, match=words):
        checkpoints.read(edited(path, values={key: Value("string", value)}))


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_command_line(command: Command, tmp_path: Path) -> None:  # noqa: F811
    done = command("convert", "pebble", tmp_path / "p.gguf", "--vision", "f16", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert [Path(each["path"]).name for each in told["written"]] == ["p.gguf", "mmproj-p.gguf"]
    assert done.err == ""
    done = command("quantize", tmp_path / "p.gguf", tmp_path / "q.gguf", "--to", "q4_k_m")
    assert done.code == 0, done.err
    assert "wrote" in done.out
    assert "Q4_K" in done.out
    kinds = {each.name: each.tensor_type.name for each in gguf.GGUFReader(tmp_path / "q.gguf").tensors}
    assert kinds["token_embd.weight"] == "Q6_K"  # it is the output too
    assert kinds["blk.1.ffn_down.weight"] == "Q5_0"  # 640 columns: no whole blocks of 256
    assert fields_of(tmp_path / "q.gguf")["general.file_type"] == 15
    assert read_card(tmp_path / "q.gguf") is None
    done = command("quantize", tmp_path / "q.gguf", tmp_path / "r.gguf", "--to", "Q8_0")
    assert done.code == 2
    assert "--allow-requantize" in done.err


def test_a_card_is_made_with_the_file(command: Command, tmp_path: Path) -> None:  # noqa: F811
    """The card that verify makes of the two; other types do not inherit it, a copy does."""
    done = command("convert", "pebble", tmp_path / "p.gguf", "--card")
    assert done.code == 2
    assert "--card came without --quant" in done.err
    assert not (tmp_path / "p.gguf").exists()
    done = command("convert", "pebble", tmp_path / "p.gguf", "--quant", "Q8_0", "--card", "--json")
    assert done.code == 0, done.err
    kept = read_card(tmp_path / "p.gguf")
    assert kept is not None
    assert json.loads(kept) == json.loads(done.out)["card"]
    card = pumice.verify(tmp_path / "p.gguf", "pebble")
    assert card.to_json() == kept
    assert 0 < card.whole.kl_mean < 0.1
    pumice.convert(tmp_path / "p.gguf", tmp_path / "copy.gguf")
    assert read_card(tmp_path / "copy.gguf") == kept
    pumice.convert(tmp_path / "p.gguf", tmp_path / "eyes.gguf", vision="q8_0")
    assert read_card(tmp_path / "eyes.gguf") is None
    choices = Choices(requantise=True)
    pumice.convert(tmp_path / "p.gguf", tmp_path / "q.gguf", quant="Q4_0", choices=choices)
    assert read_card(tmp_path / "q.gguf") is None
    done = command("quantize", "pebble", tmp_path / "r.gguf", "--to", "Q4_0", "--card")
    assert done.code == 0, done.err
    assert "KL divergence" in done.out
    assert read_card(tmp_path / "r.gguf") is not None


def test_a_report_is_data(made: dict[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    choices = Choices(progress=lambda *each: seen.append(each))
    report = pumice.convert(made["1.5-vicuna"], tmp_path / "m.gguf", choices=choices)
    assert isinstance(report, Report)
    assert [each.path.name for each in report.written] == ["m.gguf", "mmproj-m.gguf"]
    assert sum(each.tensors for each in report.written) == len(seen)
    assert seen[-1][1] == seen[-1][2] == sum(each.nbytes for each in report.written)
    assert [each[1] for each in seen] == sorted(each[1] for each in seen)


# --- a projector file alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "today"])
@pytest.mark.parametrize("kind", ["Q8_0", "F16", "BF16"])
def test_a_projector_alone(kind: str, legacy: bool, tmp_path: Path) -> None:
    """The gguf package's values of it, and the file that the pair would get."""
    folder = tiny.hf_folder(tmp_path / "hf", family="1.6", lm="mistral", seed=6)
    path = pair(folder, tmp_path / "pair", legacy=legacy)
    source, out = path.with_name("mmproj.gguf"), tmp_path / "mmproj-q.gguf"
    report = pumice.convert(source, out, quant=kind)
    assert [each.path for each in report.written] == [out]
    choices = Choices(template="mistral_instruct")
    pumice.convert(path, tmp_path / "both" / "q.gguf", vision=kind.lower(), choices=choices)
    assert out.read_bytes() == (tmp_path / "both" / "mmproj-q.gguf").read_bytes()
    old = {eyes_name_of(each.name, swapped=legacy): each for each in gguf.GGUFReader(source).tensors}
    counted = 0
    for each in gguf.GGUFReader(out).tensors:
        name, values = eyes_name_of(each.name, swapped=False), old.pop(eyes_name_of(each.name, swapped=False)).data
        if each.tensor_type.name == kind:
            counted += 1
            wanted = gguf.quants.quantize(values.astype(np.float32), each.tensor_type)
            assert np.array_equal(each.data.view(np.uint8).ravel(), wanted.view(np.uint8).ravel()), name
        else:
            assert each.tensor_type.name == "F32"
            assert np.array_equal(each.data, values.astype(np.float32)), name
    assert not old
    blocks = 2 if legacy else 3
    assert counted == 6 * blocks + 2 + (kind == "F16")  # llama.cpp's convolution is F16 or F32
    assert fields_of(out)["general.file_type"] == {"Q8_0": 7, "F16": 1, "BF16": 32}[kind]


@pytest.mark.usefixtures("unrounded")
def test_a_projector_alone_beside_its_language_model(command: Command, tmp_path: Path) -> None:  # noqa: F811
    """It runs with the model, and unpacks again to the same features."""
    folder = tiny.hf_folder(tmp_path / "hf", family="1.5", seed=6)
    path = pair(folder, tmp_path / "pair", legacy=True)
    source, small = path.with_name("mmproj.gguf"), tmp_path / "mmproj-s.gguf"
    done = command("quantize", source, small, "--to", "q8_0")
    assert done.code == 0, done.err
    first, second = (pumice.load(path, mmproj=each, dtype="float32", template="vicuna_v1") for each in (source, small))
    seen = first.see(pumice.Question(WORDS, PICTURE))
    a, b = first.features(seen.images)[0], second.features(seen.images)[0]
    assert 0 < float((a - b).norm() / a.norm()) < 0.02
    pumice.convert(small, tmp_path / "mmproj-f.gguf", vision="f32")
    third = pumice.load(path, mmproj=tmp_path / "mmproj-f.gguf", dtype="float32", template="vicuna_v1")
    assert torch.allclose(third.features(seen.images)[0], b, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="itself, or in it"):
        pumice.convert(small, small, quant="F16", choices=Choices(force=True))
    with pytest.raises(UserError, match="is there already"):
        pumice.convert(source, small, quant="F16")


def test_a_projector_alone_and_what_has_no_place(
    command: Command,  # noqa: F811
    made: dict[str, Path],
    tmp_path: Path,
) -> None:
    source, out = projector_of(converted(made["1.5-vicuna"])), tmp_path / "mmproj-x.gguf"
    for words, named in (
        ("and no type came", {}),
        ("and Q4_K_M came", {"quant": "Q4_K_M"}),
        ("and F16 and Q8_0 came", {"quant": "Q8_0", "vision": "f16"}),
        ("no .gguf", {"dst": tmp_path / "x", "quant": "Q8_0"}),
        ("and dtype came", {"quant": "Q8_0", "choices": Choices(dtype="float16")}),
        ("and template came", {"quant": "Q8_0", "choices": Choices(template="vicuna_v1")}),
        ("and format came", {"quant": "Q8_0", "choices": Choices(format="original")}),
        ("and beside came", {"quant": "Q8_0", "beside": made["1.5-vicuna"]}),
    ):
        with pytest.raises(UserError, match=words):
            pumice.convert(source, **{"dst": out, **named})
    done = command("quantize", source, out, "--to", "Q8_0", "--card")
    assert done.code == 2
    assert "a projector alone" in done.err
    assert not list(tmp_path.iterdir())
    (tmp_path / "in.gguf").write_bytes(source.read_bytes())
    bad = edited(tmp_path / "in.gguf", names={"v.blk.0.ln1.weight": "v.blk.0.ln9.weight"})
    with pytest.raises(UserError, match=r"lacks 'vision_tower.encoder.layers.0.layer_norm1.weight'"):
        pumice.convert(bad, out, quant="Q8_0")
    assert not out.exists()
