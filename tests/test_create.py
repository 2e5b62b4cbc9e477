"""`create`: models made of models, of GGUF files and of folders, in the bytes that Ollama would write."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import gguf
import pytest
import torch
from PIL import Image

import ollama_store
import pumice
import tiny
from conftest import reference
from ollama_store import LLAVA, PARAMS, TEMPLATE, compact
from pumice import UserError, creating, store
from pumice.checkpoints import mixes
from pumice.checkpoints.gguf_file import Value
from pumice.checkpoints.mixes import MIXES
from pumice.cli import main
from pumice.creating import Recipe
from pumice.creating.following import following
from pumice.creating.layers import config_bytes, human
from pumice.creating.local import of_this_machine
from pumice.go_template import read_template
from pumice.modelfile import read_modelfile
from pumice.ollama_prompt import Turn, render_turns, worded
from pumice.prompt import TEMPLATES, Message, Part, render
from pumice.store import gguf_keys
from pumice.store.layout import OwnStore
from pumice.store.link import Reach
from pumice.store.manifest import Manifest
from pumice.store.names import Name
from pumice.store.places import own_store
from pumice.store.registry import Missing
from pumice.store.transfer import Progress
from test_gguf import edited
from test_gguf import logits as of_network
from wires import Fake, serving

PICTURE = Image.effect_noise((50, 90), 90).convert("RGB")
MINE = Name.parse("me/mine:v1")
NO = "0000000000000000000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("create") / "tiny", family="1.6", lm="vicuna")


@pytest.fixture(scope="module")
def pair(folder: Path) -> Path:
    """A language model's file in F16, with its projector's beside it."""
    path = folder.with_name("lm.gguf")
    pumice.convert(folder, path, quant="F16", vision="f16")
    return path


@pytest.fixture
def own(places: Path) -> OwnStore:
    return own_store()


def made(recipe: Recipe, own: OwnStore, name: Name = MINE) -> list[str]:
    """Create, and the statuses in their order, each once."""
    return list(dict.fromkeys(step.status for step in creating.create(name, recipe, own)))


def stored(own: OwnStore, name: Name = MINE) -> store.Stored:
    found = own.find(name)
    assert found is not None
    return found


def logits(name: str | Path, *beside: Path) -> torch.Tensor:
    """Of the tokens behind an image and a question, whatever the model's own template, by the plain network."""
    model = pumice.load(name, dtype="float32", **({"beside": beside} if beside else {}))
    seen = model.see(pumice.Question("<image>\nwhat is this", PICTURE, raw=True))
    return of_network(model, seen)


def uploaded(own: OwnStore, *paths: Path) -> dict[str, object]:
    """Files as a client sends them: blobs, and their digests by name."""
    return {each.name: own.blobs.put([each.read_bytes()], "").digest for each in paths}


# --- what is written --------------------------------------------------------------------------------------------------


def test_a_config_is_that_of_ollamas_llava() -> None:
    """llava:latest as its registry serves it: 564 bytes, and their digest."""
    said = {key: value for key, value in ollama_store.CONFIG.items() if key not in ("architecture", "os")}
    digests = [
        "170370233dd5c5415250a2ecd5c71586352850729062ccef1496385647293868",
        "72d6f08a42f656d36b356dbe0920675899a99ce21192fd66266fb7d82ed07539",
        "43070e2d4e532684de521b885f385d0841030efa2b1a20bafb76133a5e1379c1",
        "c43332387573e98fdfad4a606171279955b53d891ba2500552c2984a6560ffb4",
        "ed11eda7790d05b49395598a42b155812b17e263214292f7b87d15e14003d337",
    ]
    written = config_bytes(said, [f"sha256:{each}" for each in digests])
    assert len(written) == 564
    assert hashlib.sha256(written).hexdigest() == "7c658f9561e5dbbafb042a00f6a4de57877adddd957809111f3123e272632b4d"


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (7_241_732_096, "7.2B"),
        (7_000_000_000, "7B"),
        (311_890_000, "311.89M"),
        (2_000_000, "2M"),
        (1500, "2K"),
        (9, "9"),
    ],
)
def test_counts_are_told_as_ollama_tells_them(count: int, words: str) -> None:
    assert human(count) == words


def test_gguf_files_become_a_model_of_ollamas_bytes(own: OwnStore, pair: Path) -> None:
    eyes = pair.with_name("mmproj-lm.gguf")
    files = uploaded(own, eyes, pair)  # the projector first: their order says nothing
    body = {
        "files": files, "template": TEMPLATE.decode(), "parameters": {"stop": ["[INST]", "[/INST]"]},
        "license": ["Free.", "To <all>."], "system": "Be brief.", "unknown": 1, "quantize": None,
        "messages": [{"role": "user", "content": "a & b"}, {"role": "assistant", "content": "é"}],
    }  # fmt: skip
    statuses = made(creating.asked(body, own), own)
    found = stored(own)
    blobs = own.blobs.folder

    def layer(role: str, data: bytes) -> dict[str, object]:
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        return {"mediaType": f"application/vnd.ollama.image.{role}", "digest": digest, "size": len(data)}

    messages = b'[{"role":"user","content":"a \\u0026 b"},{"role":"assistant","content":"\xc3\xa9"}]\n'
    layers = [
        layer("model", pair.read_bytes()), layer("projector", eyes.read_bytes()), layer("template", TEMPLATE),
        layer("system", b"Be brief."), layer("license", b"Free."), layer("license", b"To <all>."),
        layer("params", PARAMS), layer("messages", messages),
    ]  # fmt: skip
    count = sum(int(each.n_elements) for each in gguf.GGUFReader(pair).tensors)
    config = compact({
        "model_format": "gguf", "model_family": "llama", "model_families": ["llama", "clip"],
        "model_type": f"{count / 1000:.0f}K", "file_type": "F16", "architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [each["digest"] for each in layers]},
    }) + b"\n"  # fmt: skip
    config_layer = {**layer("", config), "mediaType": "application/vnd.docker.container.image.v1+json"}
    assert found.manifest.raw == compact({
        "schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": config_layer, "layers": layers,
    })  # fmt: skip
    assert {each.name for each in blobs.iterdir()} == {
        str(each["digest"]).replace(":", "-") for each in [*layers, config_layer]
    }
    assert statuses == [
        "parsing GGUF", "validating GGUF model",
        *(f"using existing layer {each['digest']}" for each in layers[:2]),
        *(f"creating new layer {each['digest']}" for each in [*layers[2:], config_layer]),
        "writing manifest", "success",
    ]  # fmt: skip
    assert torch.equal(logits("me/mine:v1"), logits(pair, eyes))


@pytest.mark.parametrize("lm", ["vicuna", "mistral", "yi", "llama3"])
def test_a_folder_becomes_a_model_of_the_same_logits(own: OwnStore, tmp_path: Path, lm: str) -> None:
    """What Ollama cannot make: of LLaVA's safetensors."""
    source = tiny.hf_folder(tmp_path / "llava", family="1.5" if lm == "vicuna" else "1.6", lm=lm)
    files = uploaded(own, *(each for each in source.iterdir() if each.is_file()))
    statuses = made(creating.asked({"files": files}, own), own)
    template = pumice.load(source).config.template
    assert statuses[:3] == ["converting model", "verifying conversion", f"using autodetected template {template}"]
    found, words = stored(own), worded(template)
    assert words is not None
    assert (found.text("template"), found.parameters()) == (words.template, {"stop": list(words.stops)})
    assert found.config["model_families"] == ["llama", "clip"]
    assert found.config["file_type"] == "F32"
    assert gguf.GGUFReader(found.path).fields["general.architecture"].contents() == "llama"
    assert gguf.GGUFReader(found.beside[0]).fields["general.architecture"].contents() == "clip"
    assert torch.equal(logits("me/mine:v1"), logits(source))
    # What was sent is not the model's any more.
    assert own.prune(older_s=-1) == len(set(files.values()))
    assert torch.equal(logits("me/mine:v1"), logits(source))


def test_an_authors_folder_with_its_tower_beside_it(own: OwnStore, folder: Path, tmp_path: Path) -> None:
    pumice.convert(folder, tmp_path / "theirs", choices=pumice.conversion.Choices(format="original"))
    said = read_modelfile(f"FROM {tmp_path / 'theirs'}")
    made(of_this_machine(said, tmp_path), own)
    assert torch.equal(logits("me/mine:v1"), logits(tmp_path / "theirs"))


@pytest.mark.parametrize("lines", [1, 3])
def test_a_lora_with_what_belongs_under_and_beside_it(own: OwnStore, tmp_path: Path, lines: int) -> None:
    """Three FROM lines: the authors' adapter with its projector, the language model, the tower. One is enough where
    the others lie under the names that its configs have."""
    root = reference("golden/models-original")
    names = ("llava-v1.5-tiny-lora", "vicuna-tiny", "llava-v1.5-tiny-clip")
    said = read_modelfile("".join(f"FROM {root / name}\n" for name in names[:lines]))
    assert made(of_this_machine(said, tmp_path), own)[0] == "converting model"
    lora = root / names[0]
    expected = pumice.load(lora, dtype="float32", beside=[root / names[1], root / names[2]])
    found = pumice.load("me/mine:v1", dtype="float32")
    question = pumice.Question("what is this", PICTURE)
    assert torch.equal(of_network(found, found.see(question)), of_network(expected, expected.see(question)))


def test_a_model_of_another_kind_is_kept_and_not_quantised(own: OwnStore, pair: Path, tmp_path: Path) -> None:
    """As `pull` keeps it: other programs may run it."""
    gemma = edited(pair, values={"general.architecture": Value("string", "gemma")})
    body: dict[str, object] = {"files": uploaded(own, gemma)}
    made(creating.asked(body, own), own)
    assert stored(own).config["model_family"] == "gemma"
    assert [each.role for each in stored(own).manifest.layers] == ["model"]
    with pytest.raises(UserError, match='unsupported architecture "gemma"'):
        made(creating.asked({**body, "quantize": "q4_0"}, own), own, Name.parse("x"))
    adapter = edited(pair, values={"general.type": Value("string", "adapter")})
    with pytest.raises(UserError, match="an adapter came"):
        made(creating.asked({"files": uploaded(own, adapter)}, own), own)


def test_a_chat_template_that_nobody_knows_needs_one_that_is_given(own: OwnStore, pair: Path) -> None:
    strange = edited(pair, values={"tokenizer.chat_template": Value("string", "{{ strange }}")})
    strange = edited(strange, values={"pumice.model": Value("string", "{}")})
    body: dict[str, object] = {"files": uploaded(own, strange)}
    with pytest.raises(UserError, match="chat template that pumice does not know"):
        made(creating.asked(body, own), own)
    made(creating.asked({**body, "template": "{{ .Prompt }}"}, own), own)
    assert stored(own).text("template") == "{{ .Prompt }}"
    # As llava-llama3 of Ollama's library: its file has the chat template of a language model.
    assert pumice.load("me/mine:v1").config.template == "vicuna_v1"
    made(Recipe("me/mine:v1", quantize="q8_0"), own)
    assert pumice.load("me/mine:v1").config.template == "vicuna_v1"
    with pytest.raises(UserError, match="chat template that pumice does not know"):
        pumice.load(strange)


def test_the_model_in_the_package_becomes_one_for_ollama(own: OwnStore) -> None:
    statuses = made(Recipe("pebble", quantize="q4_k"), own)
    assert statuses[:3] == ["converting model", "quantizing BF16 model to Q4_K_M", "verifying conversion"]
    assert stored(own).config["file_type"] == "Q4_K_M"
    types = {each.tensor_type.name for each in gguf.GGUFReader(stored(own).path).tensors}
    assert types == {"F32", "Q4_K", "Q6_K"} or types == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}, types


# --- from a model -----------------------------------------------------------------------------------------------------


def of_ollama(places: Path, pair: Path, *more: tuple[str, bytes]) -> Path:
    root, eyes = places / "ollama", pair.with_name("mmproj-lm.gguf")
    layers = [("model", pair.read_bytes()), ("projector", eyes.read_bytes()), ("license", b"Free.")]
    config = {**ollama_store.CONFIG, "file_type": "F16", "renderer": "x"}
    ollama_store.install(root, LLAVA, [*layers, ("template", TEMPLATE), ("params", PARAMS), *more], config)
    return root


def test_from_a_model_keeps_what_is_not_replaced(own: OwnStore, places: Path, pair: Path) -> None:
    root = of_ollama(places, pair, ("messages", b'[{"role":"user","content":"old"}]\n'), ("system", b"old"))
    before = ollama_store.tree(root)
    base = store.find("llava:7b")
    assert isinstance(base, store.Stored)
    statuses = made(Recipe("LLaVA:7B", system="new", parameters={"temperature": 0.5, "num_ctx": 4096.0}), own)
    found = stored(own)
    assert ollama_store.tree(root) == before
    assert found.text("system") == "new"
    assert found.messages() == [("user", "old")]
    assert found.texts("license") == ["Free."]
    params = found.manifest.role("params")[0]
    assert own.blobs.read(params, 1000) == b'{"num_ctx":4096,"stop":["[INST]","[/INST]"],"temperature":0.5}\n'
    assert [each.role for each in found.manifest.layers] == [
        "model", "projector", "license", "template", "messages", "system", "params",
    ]  # fmt: skip
    assert {each.role for each in found.manifest.layers if each.origin == "llava:7b"} == {
        "model", "projector", "license", "template", "messages",
    }  # fmt: skip
    raw = json.loads(found.manifest.raw)
    assert list(raw["layers"][0]) == ["mediaType", "digest", "size", "from"]
    assert found.config["renderer"] == "x"
    assert list(found.config)[5:] == ["renderer", "architecture", "os", "rootfs"]
    assert f"using existing layer {base.manifest.layers[0].digest}" in statuses
    again = made(Recipe("me/mine:v1", messages=(("user", "hi"),), licenses=("a", "b"), template="{{ .Prompt }}!"), own)
    assert again[-1] == "success"
    assert (stored(own).messages(), stored(own).texts("license")) == ([("user", "hi")], ["a", "b"])
    assert stored(own).text("template") == "{{ .Prompt }}!"
    assert stored(own).text("system") == "new"


def test_a_model_without_a_template_gets_the_one_of_its_weights(own: OwnStore, places: Path, pair: Path) -> None:
    layers = [("model", pair.read_bytes()), ("system", b"Mine.")]
    ollama_store.install(places / "ollama", LLAVA, layers)
    assert "using autodetected template vicuna_v1" in made(Recipe("llava:7b", parameters={"stop": ["x"]}), own)
    words = worded("vicuna_v1")
    assert words is not None
    assert stored(own).text("template") == words.template
    assert stored(own).text("system") == "Mine."  # not the template's own
    assert stored(own).parameters() == {"stop": ["x"]}


def test_a_model_that_is_not_here_is_pulled_first(own: OwnStore) -> None:
    with serving(Fake()) as registry:
        registry.model(b"weights", b"{{ .Prompt }}", b'{"model_format":"gguf","model_type":"7B"}')
        source = f"{registry.host}/me/tiny"
        steps = creating.create(MINE, Recipe(source, system="Mine."), own, Reach(plain=True, inner=True))
        statuses = [step.status for step in steps]
    assert (statuses[0], statuses[-2:]) == ("pulling manifest", ["writing manifest", "success"])
    assert statuses.count("success") == 1
    assert stored(own).text("system") == "Mine."
    assert stored(own).config["model_type"] == "7B"
    assert stored(own).manifest.layers[0].origin == f"{source}:latest"
    with pytest.raises(UserError, match="private network"):
        made(Recipe("127.0.0.1:9/me/other"), own)  # A7: not by a request


def test_quantising_a_model(own: OwnStore, places: Path, pair: Path) -> None:
    of_ollama(places, pair)
    statuses = made(Recipe("llava:7b", quantize="Q8_0"), own)
    assert "quantizing F16 model to Q8_0" in statuses
    found = stored(own)
    assert found.config["file_type"] == "Q8_0"
    # The eyes stay as they are, and the old weights do not come along.
    assert found.beside[0].read_bytes() == pair.with_name("mmproj-lm.gguf").read_bytes()
    assert own.prune(older_s=-1) == 0
    pumice.convert(pair, pair.with_name("q8.gguf"), quant="Q8_0")
    assert torch.equal(logits("me/mine:v1"), logits(pair.with_name("q8.gguf"), pair.with_name("mmproj-lm.gguf")))
    with pytest.raises(UserError, match="quantization is only supported for F16, BF16 and F32 models"):
        made(Recipe("me/mine:v1", quantize="Q4_0"), own, Name.parse("other"))
    # What it is already is nothing to do.
    made(Recipe("me/mine:v1", quantize="q8_0"), own, Name.parse("other"))
    assert stored(own, Name.parse("other")).manifest.layers[0].digest == found.manifest.layers[0].digest
    assert own.find(Name.parse("third")) is None


def test_a_projector_beside_a_model(own: OwnStore, places: Path, pair: Path) -> None:
    """In Ollama a second FROM loses sight (its issue 8022)."""
    config = {**ollama_store.CONFIG, "model_families": ["llama"]}
    ollama_store.install(places / "ollama", LLAVA, [("model", pair.read_bytes()), ("template", TEMPLATE)], config)
    eyes = pair.with_name("mmproj-lm.gguf")
    recipe = of_this_machine(read_modelfile(f"FROM llava:7b\nFROM {eyes}"), places)
    assert (recipe.source, recipe.files) == ("llava:7b", {eyes.name: eyes})
    made(recipe, own)
    assert stored(own).config["model_families"] == ["llama", "clip"]
    assert torch.equal(logits("me/mine:v1"), logits(pair, eyes))


# --- pumice's templates in Ollama's words -----------------------------------------------------------------------------

TALKS = [
    [("user", "hi there", 1)],
    [("user", "hi", 2), ("assistant", "yes", 0), ("user", "and now?", 0)],
    [("user", "a", 0), ("assistant", "b", 0), ("user", "c", 1), ("assistant", "d", 0), ("user", "e", 0)],
]


@pytest.mark.parametrize("name", sorted({each.name for each in TEMPLATES.values()}))
@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("talk", TALKS)
def test_a_template_in_gos_words_makes_the_same_prompt(
    name: str, system: str | None, talk: list[tuple[str, str, int]]
) -> None:
    words = worded(name)
    if words is None:
        assert name in ("v0", "plain", "hf_llama3")
        return
    said = words.system if system is None else system
    turns = [Turn("system", said)] * bool(said) + [Turn(role, text, images) for role, text, images in talk]  # type: ignore[arg-type]
    messages = [Message("system", system)] * (system is not None)
    messages += [Message(role, text, images) for role, text, images in talk]  # type: ignore[arg-type]
    # A token that begins a prompt is the tokenizer's.
    expected = [each for each in render(name, messages) if each.text != "<|begin_of_text|>"]
    rendered = render_turns(read_template(words.template), turns)
    assert joined(rendered.parts) == joined(expected)


def joined(parts: list[Part] | tuple[Part, ...]) -> list[tuple[str, str]]:
    """Neighbours of one kind as one; [INST], which is no token of these vocabularies, as text."""
    found: list[tuple[str, str]] = []
    for each in parts:
        kind = "text" if each.text in ("[INST]", "[/INST]") else each.kind
        if found and kind == found[-1][0] == "text":
            found[-1] = (kind, found[-1][1] + each.text)
        else:
            found.append((kind, each.text))
    return found


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_errors_are_in_ollamas_words(own: OwnStore, pair: Path, tmp_path: Path) -> None:
    digest = own.blobs.put([pair.read_bytes()], "").digest
    text = own.blobs.put([b"hello"], "").digest
    bad: list[tuple[dict[str, object], str]] = [
        ({}, "neither 'from' or 'files' was specified"),
        ({"files": {}}, "neither 'from' or 'files' was specified"),
        ({"files": {"a.gguf": "sha256:xyz"}}, "invalid digest format"),
        ({"files": {"a.gguf": text}}, "supplied file was not in GGUF format"),
        ({"files": {"a.txt": text}}, "unknown type"),
        ({"files": {"a.gguf": digest}, "template": "{{ .Prompt"}, "template error: "),
        ({"files": {"a.gguf": digest}, "quantize": "Q9"}, "unsupported quantization type Q9"),
        ({"files": {"a.gguf": digest}, "parameters": {"top_k": "x"}}, 'option "top_k" must be of type integer'),
        ({"files": {"a.gguf": digest}, "parameters": {"x": {}}}, "parameter 'x' is an object"),
        ({"files": {"a.gguf": digest}, "parameters": []}, "'parameters' is not an object"),
        ({"files": {"a.gguf": digest}, "messages": [{"role": "king"}]}, "'messages' is not objects with"),
        ({"files": {"a.gguf": digest}, "adapters": {"b.gguf": digest}}, "an adapter came"),
        ({"files": {"a.gguf": digest, "b.gguf": digest}}, "2 GGUF files with weights and 0 with a projector"),
        ({"from": 7}, "'from' is not a text"),
    ]
    for body, words in bad:
        with pytest.raises(UserError) as caught:
            made(creating.asked(body, own), own)
        assert words in caught.value.message
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(UserError, match="inside the package"):
        made(Recipe("pebble"), own, Name.parse("Pebble"))
    assert own.models() == ([], [])


@pytest.mark.parametrize("cut", [0.5, 0.999])
def test_a_damaged_gguf_is_refused(own: OwnStore, pair: Path, cut: float, tmp_path: Path) -> None:
    """CVE-2026-7482: tensors that lie beyond the file."""
    data = pair.read_bytes()
    body = {"files": {"a.gguf": own.blobs.put([data[: int(len(data) * cut)]], "").digest}, "quantize": "Q4_0"}
    with pytest.raises(UserError, match=r"a\.gguf.* is no GGUF file") as caught:
        made(creating.asked(body, own), own)
    assert str(tmp_path) not in str(caught.value)
    assert own.models() == ([], [])


def test_eyes_of_another_model_are_refused(own: OwnStore, pair: Path) -> None:
    pumice.convert("pebble", pair.with_name("pebble.gguf"), choices=pumice.conversion.Choices(force=True))
    made(Recipe(files={pair.name: pair}), own, Name.parse("base"))
    eyes = pair.with_name("mmproj-pebble.gguf")
    with pytest.raises(UserError, match=r"mmproj-pebble\.gguf makes features of width"):
        made(Recipe("base", {eyes.name: eyes}), own)
    before = sorted(own.blobs.folder.iterdir())
    with pytest.raises(UserError, match=r"mmproj-pebble\.gguf makes features of width"):
        made(Recipe(files={pair.name: pair, eyes.name: eyes}), own)
    assert sorted(own.blobs.folder.iterdir()) == before  # nothing was copied


def test_eyes_of_another_model_that_were_sent_are_refused(own: OwnStore, pair: Path) -> None:
    pumice.convert("pebble", pair.with_name("pebble.gguf"), choices=pumice.conversion.Choices(force=True))
    files = uploaded(own, pair, pair.with_name("mmproj-pebble.gguf"))
    with pytest.raises(UserError, match=r"mmproj-pebble\.gguf makes features of width"):
        made(creating.asked({"files": files}, own), own)


@pytest.mark.parametrize(
    "name",
    ["../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "C:\\x.gguf", "C:x.gguf", "", ".", "a//b.gguf", "x\0.gguf", "a/"],
)
def test_a8_a_name_that_leads_out_is_refused(own: OwnStore, pair: Path, name: str) -> None:
    digest = own.blobs.put([pair.read_bytes()], "").digest
    with pytest.raises(UserError, match="file path must be relative"):
        creating.asked({"files": {name: digest}}, own)
    with pytest.raises(UserError, match="file path must be relative"):
        made(Recipe(files={name: pair}), own)


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a8_an_archive_is_never_unpacked(own: OwnStore, pair: Path, tmp_path: Path, kind: str) -> None:
    """Whatever names its members have: out of the folder, absolute, twice, links, a device."""
    archive = tmp_path / f"model.{kind}"
    names = ["../out.gguf", str(tmp_path / "absolute.gguf"), "C:\\drive.gguf", "twice.gguf", "twice.gguf"]
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as packed, warnings.catch_warnings(action="ignore"):
            for each in names:
                packed.writestr(each, pair.read_bytes())
    else:
        with tarfile.open(archive, "w") as tar:
            for each in names:
                tar.add(pair, each)
            for each, what in (("link.gguf", tarfile.SYMTYPE), ("null.gguf", tarfile.CHRTYPE)):
                member = tarfile.TarInfo(each)
                member.type, member.linkname = what, "/etc/passwd"
                tar.addfile(member)
    for name, words in (("model.gguf", "supplied file was not in GGUF format"), (archive.name, "unknown type")):
        body = {"files": {name: own.blobs.put([archive.read_bytes()], "").digest}}
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words):
            made(creating.asked(body, own), own)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "body",
    [{"from": "{}"}, {"files": {"a.gguf": "{}"}}, {"modelfile": "FROM {}"}, {"from": "pebble", "adapters": {"a": "{}"}},
     {"modelfile": "FROM pebble\nADAPTER {}"}],
    ids=json.dumps,
)  # fmt: skip
def test_a9_a_path_that_is_there_and_one_that_is_not_say_the_same(
    own: OwnStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: dict[str, object]
) -> None:
    """CVE-2024-39719, CVE-2024-39722: what a request names is a model or a digest, and no file is looked at."""

    def nowhere(name: Name, *of: object) -> Iterator[Progress]:
        raise Missing("pull model manifest: file does not exist", hint="check the name")
        yield

    monkeypatch.setattr("pumice.store.transfer.pull", nowhere)
    monkeypatch.setattr("pumice.store.pulling._from_hub", nowhere)
    monkeypatch.chdir(tmp_path)
    for folder in ("kept", "deep/kept"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file").write_bytes(b"GGUF")
    pairs = [(f"{each}kept/file", f"{each}gone/file") for each in ("", "./", "deep/", "../", f"{tmp_path}/", "~/")]
    for paths in [*pairs, ("/etc/passwd", "/etc/passwx"), ("kept", "gone")]:
        said = []
        for path in paths:
            filled = json.loads(json.dumps(body).replace("{}", path))
            with pytest.raises(UserError) as caught:
                # A name that might be in a registry is asked there, in both cases: there is none in a test.
                made(creating.asked(filled, own), own)
            said.append((type(caught.value), str(caught.value).replace(path, "…").replace("gone", "kept")))
        assert said[0] == said[1]


def test_a9_a_path_in_a_config_that_was_sent_is_not_followed(own: OwnStore, tmp_path: Path) -> None:
    """Else weights of this machine would come into a model that anybody may push."""
    root = reference("golden/models-original")
    lora = Path(shutil.copytree(root / "llava-v1.5-tiny-lora", tmp_path / "lora"))
    config = json.loads((lora / "config.json").read_text())
    adapter = json.loads((lora / "adapter_config.json").read_text())
    said = []
    for tower, base in (("llava-v1.5-tiny-clip", "vicuna-tiny"), ("gone", "gone")):
        (lora / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(root / tower)}))
        changed = adapter | {"base_model_name_or_path": str(root / base)}
        (lora / "adapter_config.json").write_text(json.dumps(changed))
        if base != "gone":
            pumice.load(lora)  # who sits here may
        with pytest.raises(UserError, match="the language model under it was not found") as caught:
            made(creating.asked({"files": uploaded(own, *lora.iterdir())}, own), own)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert str(tmp_path) not in said[0]


def test_g_any_body_makes_a_model_or_is_refused_without_a_path(own: OwnStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(name: Name, *of: object) -> Iterator[Progress]:
        raise Missing("pull model manifest: file does not exist", hint="check the name")
        yield

    monkeypatch.setattr("pumice.store.transfer.pull", nowhere)
    monkeypatch.setattr("pumice.store.pulling._from_hub", nowhere)
    made(Recipe("pebble"), own, Name.parse("base"))
    text, binary = (own.blobs.put([data], "").digest for data in (b"{}", b"GGUF" + bytes(100)))
    atoms: list[object] = [
        None, True, 0, -1, 1e300, float("nan"), "", "x", "base", "base", "../x", text, "sha256:" + "0" * 64, [], {},
        {"a": text}, {"config.json": text, "m.safetensors": text}, {"config.json": text, "model.bin": binary},
        {"a.gguf": binary}, {"m.safetensors": text, "m.safetensors/x": text}, {"a" * 300 + ".bin": text},
        {"\ud800.bin": text}, {"stop": ["a"]}, {"stop": "a"}, {"num_ctx": 1e3}, {"temperature": float("inf")},
        {"x": None}, {"x": {"y": []}}, {"x": ["\ud800"]}, {"x": 2**70}, [{"role": "user", "content": "x"}],
        [{"role": "user", "content": "\ud800"}], [1], "{{ .Prompt }}", "{{", "FROM base\nPARAMETER stop y", "q4_0",
        "\ud800", "\0", "a" * 5000,
    ]  # fmt: skip
    keys = (
        "from", "from", "from", "files", "adapters", "template", "license", "system", "parameters", "messages",
        "quantize", "modelfile", "stream",
    )  # fmt: skip
    rng, count, refusals = random.Random(4), 0, list[str]()
    for _ in range(200):
        body = {rng.choice(keys): rng.choice(atoms) for _ in range(rng.randint(1, 4))}
        try:
            made(creating.asked(body, own), own)
            count += 1
        except UserError as error:
            refusals.append(str(error))
    assert count
    assert not [each for each in refusals if str(own.root) in each]
    assert own.models()[1] == []
    assert not [each for each in own.blobs.folder.iterdir() if each.name.startswith(".")]


# --- stopped ----------------------------------------------------------------------------------------------------------


def test_closing_ends_a_creation_and_leaves_nothing(own: OwnStore, pair: Path) -> None:
    steps = creating.create(MINE, Recipe("pebble"), own)
    assert next(steps).status == "converting model"
    assert next(steps).total is not None
    steps.close()
    assert own.models() == ([], [])
    assert list(own.blobs.folder.iterdir()) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_creation_that_is_killed_leaves_a_whole_store(own: OwnStore, tmp_path: Path, seed: int) -> None:
    made(Recipe("pebble", system="old"), own)
    before = stored(own).digest
    code = (
        "from pumice import creating, store\n"
        "for step in creating.create(store.Name.parse('me/mine:v1'), creating.Recipe('pebble', quantize='Q8_0'),"
        " store.own_store()): print(step.status, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = random.Random(seed).randint(1, 12)
    for _ in range(lines):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = stored(own)
    assert all(own.blobs.has(each) for each in found.manifest.blobs)
    assert found.digest == before or found.config["file_type"] == "Q8_0"
    made(Recipe("pebble", quantize="Q8_0"), own)
    own.prune(older_s=-1)
    named = {each.file_name for each in stored(own).manifest.blobs}
    assert {each.name for each in own.blobs.folder.iterdir()} == named


def test_a10_two_creations_of_one_name_at_once(own: OwnStore) -> None:
    with ThreadPoolExecutor(4) as threads:
        mixes = ("Q8_0", "Q4_0", "Q8_0", "Q4_K_M")
        done = [threads.submit(made, Recipe("pebble", quantize=each), own) for each in mixes]
    assert [each.result()[-1] for each in done] == ["success"] * 4
    assert all(own.blobs.has(each) for each in stored(own).manifest.blobs)
    assert [each.name for each in own.blobs.folder.iterdir() if each.name.startswith(".")] == []


def test_a_full_disk_is_an_error_and_leaves_nothing(own: OwnStore) -> None:
    code = (
        "import resource, signal; from pumice import UserError, creating, store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))\n"
        "try: list(creating.create(store.Name.parse('x'), creating.Recipe('pebble'), store.own_store()))\n"
        "except UserError as error: print(error.message)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "mmproj-x.gguf cannot be written: File too large\n"
    assert own.models() == ([], [])
    assert list(own.blobs.folder.iterdir()) == []


def test_old_blobs_that_nothing_names_go(own: OwnStore) -> None:
    made(Recipe("pebble"), own)
    loose = own.blobs.path(own.blobs.put([b"loose"], ""))
    (own.blobs.folder / "sha256-x").write_bytes(b"not ours")
    assert own.prune() == 0
    os.utime(loose, (time.time() - 3700,) * 2)
    for each in stored(own).manifest.blobs:
        os.utime(own.blobs.path(each), (1, 1))
    assert own.prune() == 1
    assert not loose.exists()
    assert all(own.blobs.has(each) for each in stored(own).manifest.blobs)
    broken = own.root / "manifests/a/b/c/d"
    broken.parent.mkdir(parents=True)
    broken.write_text("?")
    os.utime(own.blobs.path(own.blobs.put([b"loose"], "")), (1, 1))
    assert own.prune() == 0  # the broken one may need it


def test_an_upload_comes_piece_by_piece(own: OwnStore) -> None:
    digest = f"sha256:{hashlib.sha256(b'onetwo').hexdigest()}"
    with own.blobs.arriving(digest) as arrival:
        arrival.write(b"one")
        assert own.blobs.held(digest) is None
        arrival.write(b"two")
    held = own.blobs.held(creating.digest_of(digest.replace(":", "-").upper().replace("SHA", "sha")))
    assert held is not None
    assert held.size == 6
    wrong = f'digest mismatch, expected "{digest}", got "sha256:{hashlib.sha256(b"on").hexdigest()}"'
    own.blobs.remove(held)
    with pytest.raises(UserError) as caught, own.blobs.arriving(digest) as arrival:
        arrival.write(b"on")
    assert caught.value.message == wrong
    assert list(own.blobs.folder.iterdir()) == []


def test_work_is_followed_and_left() -> None:
    def counted(told: Callable[[int], None]) -> str:
        for number in range(8):
            time.sleep(0.03)
            told(number)
        return "done"

    results: list[str] = []

    def driven() -> Iterator[int]:
        results.append((yield from following(counted)))

    steps = list(driven())
    assert steps == sorted(set(steps))
    assert (steps[-1], results) == (7, ["done"])
    told: list[int] = []

    def endless(tell: Callable[[int], None]) -> None:
        while True:
            time.sleep(0.01)
            told.append(1)
            tell(1)

    left = following(endless)
    next(left)
    left.close()
    count = len(told)
    time.sleep(0.05)
    assert len(told) == count

    def wrong(tell: Callable[[int], None]) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        list(following(wrong))


# --- the verb ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pumice", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run


Cli = Callable[..., tuple[int, str, str]]


def test_the_verb_makes_a_model_of_a_modelfile(
    own: OwnStore, cli: Cli, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Modelfile").write_text(
        f"FROM {os.path.relpath(pair, tmp_path)}\nFROM {pair.with_name('mmproj-lm.gguf')}\n"
        "PARAMETER temperature 0.2\nPARAMETER mirostat 1\nSYSTEM Be brief.\nMESSAGE user hi\n"
    )
    code, out, err = cli("create", "me/mine:v1", "-f", tmp_path / "Modelfile", "-q", "q8_0")
    assert (code, out) == (0, ""), err
    lines = err.splitlines()
    assert lines[0] == "warning: parameter mirostat is deprecated"
    assert lines[-2:] == ["writing manifest", "success"]
    assert any(each.startswith("quantizing F16 model to Q8_0") for each in lines)
    assert stored(own).parameters() == {"temperature": 0.2, "stop": ["</s>"]}
    assert (stored(own).text("system"), stored(own).messages()) == ("Be brief.", [("user", "hi")])
    code, out, _ = cli("show", "me/mine:v1", "--modelfile")
    assert code == 0
    again = read_modelfile(out)
    assert again.system == "Be brief."
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"SYSTEM x\n")))
    code, _, err = cli("create", "again", "-f", "-")
    assert (code, err.splitlines()[0]) == (1, "Error: no FROM line")


def test_the_verb_without_a_modelfile_takes_this_folder(
    own: OwnStore, cli: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert cli("create", "me/mine:v1")[0] == 0
    assert torch.equal(logits("me/mine:v1"), logits(folder))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = cli("create", "x")
    assert (code, err.splitlines()[0]) == (1, "Error: no Modelfile or safetensors files found")
    assert cli("create", "x:y:z")[2].splitlines()[0] == "Error: invalid model name"
    assert cli("create", "x", "-f", "nothing")[0] == 1


def test_a_link_out_of_the_folder_is_refused(own: OwnStore, cli: Cli, folder: Path, tmp_path: Path) -> None:
    for each in folder.iterdir():
        (tmp_path / each.name).symlink_to(each)
    with pytest.raises(UserError, match="is a link that leads out of"):
        of_this_machine(read_modelfile(f"FROM {tmp_path}"), tmp_path)


# --- what GGUF files say ----------------------------------------------------------------------------------------------


def test_keys_are_those_that_ggufs_own_package_reads(pair: Path) -> None:
    for path in (pair, pair.with_name("mmproj-lm.gguf")):
        reader, whole, short = gguf.GGUFReader(path), gguf_keys.said(path, "x", whole=True), gguf_keys.said(path, "x")
        theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        assert whole.values == theirs
        assert short.values == {
            key: None if isinstance(value, list) and len(value) > 5 else value for key, value in theirs.items()
        }
        assert whole.tensors == tuple(
            (each.name, each.tensor_type.name, tuple(map(int, each.shape))) for each in reader.tensors
        )
        assert whole.parameters == sum(int(each.n_elements) for each in reader.tensors)
        assert whole.is_projector == path.name.startswith("mmproj")
    assert creating._SHORT == mixes._SHORT
    assert {number: each.name for each in MIXES.values() for number in [each.file_type]} == gguf_keys.FILE_TYPES


def test_every_prefix_and_many_mutations_of_a_gguf_end_well(pair: Path, tmp_path: Path) -> None:
    data, path, rng = pair.read_bytes()[:20_000], tmp_path / "x.gguf", random.Random(3)
    for cut in (*range(300), *range(300, 20_000, 501)):
        path.write_bytes(data[:cut])
        with pytest.raises(UserError):
            gguf_keys.said(path, "x")
    whole = pair.read_bytes()
    for _ in range(500):
        changed = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            changed[rng.randrange(3000)] = rng.choice((0, 1, 0x7F, 0xFF, rng.randrange(256)))
        path.write_bytes(changed)
        with suppress(UserError):
            gguf_keys.said(path, "x")


def test_manifests_keep_where_a_layer_came_from() -> None:
    raw = compact({"schemaVersion": 2, "config": layer_of("a"), "layers": [{**layer_of("b"), "from": "llava:7b"}]})
    read = Manifest.read(raw, "x")
    assert [each.origin for each in read.blobs] == ["llava:7b", ""]
    assert json.loads(Manifest.of(read.config, read.layers).raw)["layers"] == json.loads(raw)["layers"]


def layer_of(what: str) -> dict[str, object]:
    return {"mediaType": "t", "digest": f"sha256:{hashlib.sha256(what.encode()).hexdigest()}", "size": 1}
