"""Language models and projectors in GGUF: written by the gguf package, as llama.cpp's converters write them, and read
as the Hugging Face folder that they are made of."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import resource
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image

import pumice
import tiny
from conftest import reference
from pumice import Sampling, UserError, checkpoints
from pumice.checkpoints.gguf_file import Stored, ToStore, Value, open_gguf, write_gguf
from pumice.checkpoints.gguf_vocab import stop_ids, tokenizer
from pumice.checkpoints.mapped import MappedFile
from pumice.engine import passes
from pumice.network.llava import generate
from pumice.ops import cpu, library
from pumice.prompt import Part
from pumice.quant import QTensor
from pumice.train import Recipe, train
from test_cli import Command, command  # noqa: F401 (a fixture)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8))
FEW = Sampling(max_tokens=24)

LM_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
EYE_NAMES = {
    "vision_tower.embeddings.class_embedding": "v.class_embd", "vision_tower.pre_layrnorm": "v.pre_ln",
    "vision_tower.embeddings.patch_embedding": "v.patch_embd", "vision_tower.post_layernorm": "v.post_ln",
    "vision_tower.embeddings.position_embedding": "v.position_embd", "vision_tower.encoder.layers": "v.blk",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out", "layer_norm": "ln",
    "multi_modal_projector.linear_1": "mm.0", "multi_modal_projector.linear_2": "mm.2",
}  # fmt: skip


def pair(folder: Path, out: Path, *, quant: str = "F32", legacy: bool = True) -> Path:
    """What the converters make of a folder: `out/lm.gguf`, `out/mmproj.gguf`. `legacy`: the first converters' naming,
    which drops the last block of the tower and calls fc1 `ffn_down`; else today's, with all of it."""
    out.mkdir()
    found = checkpoints.read(folder)
    _language_model(found, folder, out / "lm.gguf", quant)
    _projector(found, out / "mmproj.gguf", legacy=legacy)
    return out / "lm.gguf"


def _language_model(found: checkpoints.Checkpoint, folder: Path, path: Path, quant: str) -> None:
    writer, text = gguf.GGUFWriter(path, "llama"), found.config.text
    writer.add_context_length(text.max_positions)
    writer.add_embedding_length(text.width)
    writer.add_block_count(text.layers)
    writer.add_feed_forward_length(text.ffn_width)
    writer.add_head_count(text.heads)
    writer.add_head_count_kv(text.kv_heads)
    writer.add_layer_norm_rms_eps(text.norm_eps)
    writer.add_rope_freq_base(text.rotary.theta)
    _vocabulary(writer, found, json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")))
    kind = gguf.GGMLQuantizationType[quant]
    for name in found.tensors.names():
        if not name.startswith(("language_model.", "lm_head.")):
            continue
        values = found.tensors[name].float().numpy()
        key = name.replace("lm_head", "output").removeprefix("language_model.").replace("embed_tokens", "token_embd")
        key = "output_norm.weight" if key == "norm.weight" else key
        if key.startswith("layers."):
            _, index, inner, part = *key.split(".", 2), ""
            inner, _, part = inner.rpartition(".")
            key = f"blk.{index}.{LM_NAMES[inner]}.{part}"
            heads = {"attn_q": text.heads, "attn_k": text.kv_heads}.get(LM_NAMES[inner])
            if heads:  # LlamaModel.permute of convert_hf_to_gguf.py
                values = values.reshape(heads, 2, -1, text.width).swapaxes(1, 2).reshape(values.shape)
        if quant != "F32" and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, values)
    _finish(writer)


def _vocabulary(writer: gguf.GGUFWriter, found: checkpoints.Checkpoint, spec: dict[str, Any]) -> None:
    rows = found.config.text.vocab
    tokens, kinds, scores = [f"[PAD{row}]" for row in range(rows)], [5] * rows, [-1e4] * rows
    for text, id in spec["model"]["vocab"].items():
        tokens[id], kinds[id], scores[id] = text, 6 if text.startswith("<0x") else 1, -1e3
    for rank, (left, right) in enumerate(spec["model"]["merges"]):
        id = spec["model"]["vocab"][left + right]
        scores[id] = max(scores[id], -float(rank))
    for token in spec["added_tokens"]:
        tokens[token["id"]], kinds[token["id"]] = token["content"], 3
    words = found.tokenizer
    if spec["decoder"]["type"] == "ByteLevel":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(scores)
        writer.add_unk_token_id(words.id_of("<unk>"))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if words.bos_id is not None:
        writer.add_bos_token_id(words.bos_id)
    writer.add_eos_token_id(found.config.stop_ids[0])
    writer.add_add_bos_token(words.adds_bos)


def _projector(found: checkpoints.Checkpoint, path: Path, *, legacy: bool) -> None:
    writer, vision, image = gguf.GGUFWriter(path, "clip"), found.config.vision, found.config.image
    assert vision is not None
    assert image is not None
    layers = vision.layers - 1 if legacy else vision.layers
    numbers = {
        "image_size": vision.image_px, "patch_size": vision.patch_px, "embedding_length": vision.width,
        "feed_forward_length": vision.ffn_width, "projection_dim": 768, "block_count": layers,
        "attention.head_count": vision.heads,
    }  # fmt: skip
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", vision.norm_eps)
    writer.add_array("clip.vision.image_mean", list(image.mean))
    writer.add_array("clip.vision.image_std", list(image.std))
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_bool("clip.use_gelu", False)
    if legacy:
        writer.add_bool("clip.has_llava_projector", True)
    else:
        writer.add_string("clip.projector_type", "mlp")
        writer.add_array("clip.vision.feature_layer", [vision.layers - 1])
    if image.mode == "anyres":
        # The converter copies the authors' list, whose pairs are (width, height).
        writer.add_array("clip.vision.image_grid_pinpoints", [edge for canvas in image.pinpoints for edge in canvas])
    names = EYE_NAMES | {"mlp.fc1": "ffn_down" if legacy else "ffn_up", "mlp.fc2": "ffn_up" if legacy else "ffn_down"}
    names |= {"image_newline": "model.image_newline" if legacy else "v.image_newline"}
    for name in found.tensors.names():
        key = name
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        dropped = legacy and key.startswith(("v.post_ln", f"v.blk.{layers}."))
        if key.startswith(("v.", "mm.", "model.")) and not dropped:
            writer.add_tensor(key, found.tensors[name].float().numpy())
    _finish(writer)


def _finish(writer: gguf.GGUFWriter) -> None:
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def logits(model: pumice.model.Model, seen: Any) -> torch.Tensor:
    network = model.network
    with torch.inference_mode():
        features = network.encode(torch.from_numpy(seen.images[0].pixels), [seen.images[0].grid])
        ids = torch.tensor([seen.encoded.ids])
        return network.logits(network(network.embed(ids, features))[0])


@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "today"])
@pytest.mark.parametrize("family", ["1.5", "1.6"])
@pytest.mark.parametrize("lm", ["vicuna", "mistral", "yi", "llama3"])
def test_a_pair_computes_what_its_folder_computes(lm: str, family: str, legacy: bool, tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path / "hf", family=family, lm=lm, seed=5)
    theirs = pumice.load(folder, preprocess="original")
    ours = pumice.load(pair(folder, tmp_path / "gguf", legacy=legacy), template=theirs.config.template)
    question = pumice.Question("What is shown? The sign says stop.", PICTURE, sampling=FEW)
    seen, expected = ours.see(question), theirs.see(question)
    words = [(a, b) for a, b in zip(seen.encoded.ids, expected.encoded.ids, strict=True) if a != -200]
    assert all(a == b for a, b in words)
    assert np.array_equal(seen.images[0].pixels, expected.images[0].pixels)
    found, wanted = logits(ours, seen), logits(theirs, expected)
    assert float((found - wanted).abs().max()) < 2e-5 * float(wanted.abs().max())
    assert ours.answer(question).tokens == theirs.answer(question).tokens
    assert ours.config.family == f"llava-{family}"


@pytest.mark.parametrize("quant", ["Q8_0", "Q4_0", "BF16"])
def test_quantised_weights_are_those_of_the_file(quant: str, tmp_path: Path, unrounded: None) -> None:
    """In blocks: the same answer as from a folder that holds the unpacked numbers, and a fraction of its memory."""
    folder = tiny.hf_folder(tmp_path / "hf", family="1.5", lm="mistral", seed=6)
    path = pair(folder, tmp_path / "gguf", quant=quant)
    blocks = pumice.load(path, template="mistral_instruct", dtype="float32")
    dense = pumice.load(path, template="mistral_instruct", dtype="float32")
    found = checkpoints.read(path)
    with torch.no_grad():
        for name, module in dense.network.language_model.named_modules():
            if name.endswith("_proj"):
                module.weight = torch.nn.Parameter(found.tensors[f"language_model.{name}.weight"].float())
    assert (
        blocks.ask("What is it?", PICTURE, sampling=FEW).tokens
        == dense.ask("What is it?", PICTURE, sampling=FEW).tokens
    )
    if quant == "Q4_0":
        assert found.tensors.nbytes < 0.4 * checkpoints.read(folder).tensors.nbytes


@pytest.mark.parametrize(("quant", "tiles"), [("Q8_0", False), ("Q4_0", False), ("Q4_0", True)])
def test_kernels_are_near_the_unrounded_numbers(
    quant: str, tiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Prompt and decode steps on the kernels, with eyes in eight bits, or in bfloat16 where a CPU has tiles: near what
    the same file gives without these roundings. With keys as they are, and a prompt rounded as its last position is
    alone, which it is not in tiles, the fast loop is the plain one."""
    monkeypatch.setattr(passes, "cache_type", lambda model: torch.float32)
    monkeypatch.setattr(library, "bf16_tiles", lambda: tiles)
    if not tiles:
        number = min(library.instruction_set(), library.INSTRUCTION_SETS["avx512"])
        monkeypatch.setattr(cpu, "instruction_set", lambda: number)
    folder = tiny.hf_folder(tmp_path / "hf", family="1.6", lm="mistral", seed=6)
    path = pair(folder, tmp_path / "gguf", quant=quant)
    model = pumice.load(path, template="mistral_instruct")
    question = pumice.Question("What is it?", PICTURE, sampling=FEW)
    seen = model.see(question)
    found, answer = logits(model, seen), model.answer(question).tokens
    features = model.features(seen.images)
    if not tiles:
        assert list(answer) == list(generate(model.network, seen.encoded.ids, features, FEW.max_tokens))
    matrix = model.network.vision_tower.encoder.layers[0].mlp.fc1.weight
    assert matrix.dtype == torch.bfloat16 if tiles else isinstance(matrix, QTensor)
    request.getfixturevalue("unrounded")
    plain = pumice.load(path, template="mistral_instruct", dtype="float32")
    wanted = logits(plain, plain.see(question))
    assert float((found - wanted).norm()) < 0.05 * float(wanted.norm())
    assert not torch.equal(found, wanted)


@pytest.mark.parametrize("tiles", [False, True])
def test_narrower_eyes_leave_no_pages_of_their_file(
    tiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of their matrices gives its pages back once it is in eight bits or in bfloat16, and nothing else does."""
    monkeypatch.setattr(library, "bf16_tiles", lambda: tiles)
    path = pair(tiny.hf_folder(tmp_path / "hf", family="1.5", seed=6), tmp_path / "gguf", quant="Q4_0")
    whole = MappedFile.give_back
    given: list[tuple[str, int, int]] = []

    def give_back(file: MappedFile, start: int, size: int) -> None:
        given.append((file.path.name, start, size))
        whole(file, start, size)

    monkeypatch.setattr(MappedFile, "give_back", give_back)
    model = pumice.load(path)
    model.ask("What is it?", sampling=FEW)
    assert not given
    features = model.features(model.see(pumice.Question("What is it?", PICTURE)).images)
    wanted = [each for each in open_gguf(path.with_name("mmproj.gguf")).tensors.values() if len(each.shape) == 2]
    wanted = [each for each in wanted if each.name != "v.position_embd.weight"]
    assert sorted(given) == sorted(("mmproj.gguf", each.start, each.nbytes) for each in wanted)
    again = pumice.load(path)
    monkeypatch.setattr(MappedFile, "give_back", lambda *_: None)
    assert torch.equal(features[0], again.features(again.see(pumice.Question("What is it?", PICTURE)).images)[0])


def test_damaged_files_pass_the_kernels_or_are_refused(tmp_path: Path) -> None:
    """Whatever a file says, the process lives: a UserError, or an answer that is worth nothing."""
    path = pair(tiny.hf_folder(tmp_path / "hf", family="1.5", seed=7), tmp_path / "gguf", quant="Q4_0")
    eyes = path.with_name("mmproj.gguf")
    whole = {each: each.read_bytes() for each in (path, eyes)}
    dice, answered = random.Random(0), 0
    for turn in range(60):
        file = path if turn % 3 else eyes
        changed = bytearray(whole[file])
        # Half of them in the first bytes, which say what the rest is.
        end = len(changed) if turn % 2 else 3000
        for _ in range(20 if turn % 2 else 1):
            changed[dice.randrange(end)] = dice.choice((0, 1, 127, 128, 255, dice.randrange(256)))
        file.write_bytes(changed)
        with contextlib.suppress(UserError):
            answered += bool(pumice.load(path, template="vicuna_v1").ask("What is it?", PICTURE, sampling=FEW).tokens)
        file.write_bytes(whole[file])
    assert answered > 10, "few of these bytes are needed"


def test_without_eyes_it_is_a_text_model(command: Command, tmp_path: Path) -> None:  # noqa: F811
    folder = tiny.hf_folder(tmp_path / "hf", family="1.5")
    path = pair(folder, tmp_path / "gguf")
    eyes = path.with_name("mmproj.gguf")
    named = eyes.rename(tmp_path / "eyes.gguf")
    model = pumice.load(path, template="vicuna_v1")
    assert model.ask("Hi", sampling=FEW).text
    with pytest.raises(UserError, match="text model"):
        model.ask("What?", PICTURE)
    for seeing in (
        pumice.load(path, mmproj=named, template="vicuna_v1"),
        pumice.load(path, beside=named, template="vicuna_v1"),
    ):
        assert seeing.ask("What?", PICTURE, sampling=FEW).image_tokens == (4,)
    for option in ("--with", "--mmproj"):
        shown = command("show", path, option, named, "--json", "--template", "vicuna_v1")
        assert json.loads(shown.out)["family"] == "llava-1.5"
    with pytest.raises(UserError, match="both a projector"):
        pumice.load(path, mmproj=named, beside=named)
    with pytest.raises(UserError, match="has no place"):
        pumice.load(folder, mmproj=named)


def edited(path: Path, *, values: dict[str, Value] | None = None, names: dict[str, str] | None = None) -> Path:
    """The same file with other metadata, or tensors under other names."""
    found = open_gguf(path)

    def bytes_of(stored: Stored) -> np.ndarray[Any, Any]:
        return stored.file.bytes[stored.start : stored.start + stored.nbytes].numpy()

    tensors = [
        ToStore((names or {}).get(name, name), each.shape, each.format, functools.partial(bytes_of, each))
        for name, each in found.tensors.items()
    ]
    out = path.with_name(f"edited-{path.name}")
    list(write_gguf(out, dict(found.values) | (values or {}), tensors))
    return out


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"llama.attention.head_count": Value("u32", 3)}, "head_count_kv"),
        (
            {"llama.attention.key_length": Value("u32", 2**20), "llama.attention.head_count": Value("u32", 1024)},
            "shape",
        ),
        ({"llama.expert_count": Value("u32", 8)}, "mixture of experts"),
        ({"llama.rope.scaling.type": Value("string", "yarn")}, "'yarn'"),
        ({"llama.block_count": Value("u32", 4)}, "lacks"),
        ({"general.architecture": Value("string", "gemma")}, "'gemma'"),
        ({"tokenizer.ggml.model": Value("string", "rwkv")}, "'rwkv'"),
        ({"tokenizer.ggml.tokens": Value("string", ["a", "a"])}, "differ from each other"),
        ({"tokenizer.ggml.scores": Value("f32", [0.0])}, "1 values for"),
        ({"tokenizer.chat_template": Value("string", "{{ x }}")}, "does not know"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_language_models_that_are_refused(values: dict[str, Value], words: str, tmp_path: Path) -> None:
    """In bounded memory too: a file of 2^30 rows by its metadata has no such tensor."""
    path = pair(tiny.hf_folder(tmp_path / "hf", family="1.5"), tmp_path / "gguf")
    if "llama.attention.key_length" in values:
        values = values | {"llama.rope.dimension_count": Value("u32", 2**20)}
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=words):
        checkpoints.read(edited(path, values=values))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 300_000


@pytest.mark.parametrize(
    ("values", "names", "words"),
    [
        ({"clip.projector_type": Value("string", "ldp")}, {}, "'ldp'"),
        ({"clip.vision.attention.head_count": Value("u32", 5)}, {}, "head_count is 5"),
        ({"clip.vision.patch_size": Value("u32", 56)}, {}, "patch_size is 56"),
        ({"clip.use_silu": Value("bool", True)}, {}, "use_silu"),
        ({"clip.vision.image_grid_pinpoints": Value("i32", [28, 56])}, {}, "no image_newline"),
        ({}, {"mm.2.weight": "mm.3.weight"}, "the layers"),
        ({}, {"mm.2.bias": "mm.1.bias"}, "mm.0.bias and mm.1.bias are both"),
        ({}, {"v.class_embd": "language_model.norm.weight"}, "are both language_model.norm.weight"),
        ({}, {"v.pre_ln.bias": "v.extra"}, "v.extra|pre_layrnorm"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_projectors_that_are_refused(
    values: dict[str, Value], names: dict[str, str], words: str, tmp_path: Path
) -> None:
    path = pair(tiny.hf_folder(tmp_path / "hf", family="1.5"), tmp_path / "gguf")
    with pytest.raises(UserError, match=words):
        checkpoints.read(path, beside=[edited(path.with_name("mmproj.gguf"), values=values, names=names)])


def test_training_starts_from_a_folder(tmp_path: Path) -> None:
    path = pair(tiny.hf_folder(tmp_path / "hf", family="1.5"), tmp_path / "gguf")
    recipe = Recipe(str(path), data=str(tmp_path / "none.json"), steps=1)
    with pytest.raises(UserError, match="is a GGUF file"):
        train(recipe, output=tmp_path / "run")


def test_projectors_beside(tmp_path: Path) -> None:
    path = pair(tiny.hf_folder(tmp_path / "hf", family="1.5"), tmp_path / "gguf")
    with pytest.raises(UserError, match="is a projector"):
        pumice.load(path.with_name("mmproj.gguf"))
    path.with_name("two.gguf").write_bytes(path.with_name("mmproj.gguf").read_bytes())
    with pytest.raises(UserError, match="both projectors that fit"):
        pumice.load(path)
    with pytest.raises(UserError, match=r"name a file in it, such as .*lm\.gguf"):
        pumice.load(path.parent)
    with pytest.raises(UserError, match="'clip'"):
        checkpoints.read(path, beside=[path])


@pytest.mark.parametrize("name", ["llama-spm", "llama-bpe", "phi-3", "qwen2"])
def test_vocabularies(name: str) -> None:
    """The texts and ids that llama.cpp's own tests use."""
    path = reference("data/vocab") / f"ggml-vocab-{name}.gguf"
    words = tokenizer(open_gguf(path).fields)
    texts = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = Path(f"{path}.out").read_text(encoding="utf-8").splitlines()
    assert len(lines) > 40
    for text, line in zip(texts, lines):
        ids = words.encode([Part("text", text)], [], image_id=-200).ids
        assert ids[int(words.adds_bos) :] == [int(each) for each in line.split()], text
        assert words.decode(ids).strip(" ") == text.strip(" "), text


def test_ends_that_a_file_does_not_name() -> None:
    fields = open_gguf(reference("data/vocab") / "ggml-vocab-llama-bpe.gguf").fields
    words = tokenizer(fields)
    assert [words.token_of(id) for id in stop_ids(fields, words)] == ["<|end_of_text|>", "<|eot_id|>"]
