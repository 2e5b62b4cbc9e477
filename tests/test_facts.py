"""What lists and `show` say of a model: of GGUF files as their own package reads them, of folders in the same keys."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import transformers

import ollama_store
import pumice
import tiny
from ollama_store import LLAVA, TEMPLATE
from pumice import UserError, creating, store
from pumice.config import TEXT_DEFAULTS
from pumice.modelfile import read_modelfile
from pumice.server.settings import Settings
from pumice.store import facts, model_info
from pumice.store.names import Name
from pumice.store.places import own_store
from served import post, served
from test_installed import hub_model


def found(name: str) -> store.Installed:
    model = store.find(name)
    assert model is not None
    return model


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.hf_folder(tmp_path_factory.mktemp("facts") / "tiny", family="1.6", lm="mistral")
    pumice.convert(folder, folder.with_name("lm.gguf"), quant="Q8_0")
    return folder.with_name("lm.gguf")


@pytest.fixture
def llava(places: Path, pair: Path) -> store.Installed:
    eyes = pair.with_name("mmproj-lm.gguf").read_bytes()
    layers = [("model", pair.read_bytes()), ("projector", eyes), ("template", TEMPLATE)]
    ollama_store.install(places / "ollama", LLAVA, layers)
    return found("llava:7b")


def keys(path: Path) -> dict[str, object]:
    """As GGUF's own package reads them."""
    fields = gguf.GGUFReader(path).fields
    return {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}


def count(path: Path) -> int:
    return sum(int(each.n_elements) for each in gguf.GGUFReader(path).tensors)


def test_a_stored_model_says_what_its_files_say(llava: store.Installed, pair: Path) -> None:
    eyes = pair.with_name("mmproj-lm.gguf")
    theirs = keys(pair)
    assert theirs.pop("general.name")
    assert model_info.of_model(llava, whole=True) == {"general.parameter_count": count(pair), **theirs}
    short = model_info.of_model(llava)
    assert short["tokenizer.ggml.tokens"] is None
    assert short.keys() == theirs.keys() | {"general.parameter_count"}
    assert {key: value for key, value in short.items() if value is not None} == {
        key: value
        for key, value in {"general.parameter_count": count(pair), **theirs}.items()
        if not isinstance(value, list) or len(value) <= 5
    }
    projector = model_info.of_eyes(llava)
    assert projector is not None
    assert projector["general.parameter_count"] == count(eyes)
    assert projector["clip.has_vision_encoder"] is True
    assert projector["clip.vision.image_size"] == keys(eyes)["clip.vision.image_size"]
    assert model_info.tensors(llava) == [
        {"name": each.name, "type": each.tensor_type.name, "shape": [int(size) for size in each.shape]}
        for each in gguf.GGUFReader(pair).tensors
    ]


@pytest.mark.parametrize(("family", "lm"), [("1.5", "vicuna"), ("1.6", "mistral"), ("1.6", "yi"), ("1.6", "llama3")])
def test_a_folder_says_the_same_in_the_same_keys(places: Path, tmp_path: Path, family: str, lm: str) -> None:
    folder = tiny.hf_folder(tmp_path / "tiny", family=family, lm=lm)
    pumice.convert(folder, tmp_path / "lm.gguf")
    hub_model(places / "hub", folder)
    model = found("llava-hf/tiny-hf")
    said, theirs = model_info.of_model(model), keys(tmp_path / "lm.gguf")
    assert said.pop("general.parameter_count") == count(tmp_path / "lm.gguf")
    assert len(said) == 11
    assert said == pytest.approx({key: theirs[key] for key in said})
    eyes = keys(tmp_path / "mmproj-lm.gguf")
    projector = model_info.of_eyes(model)
    assert projector is not None
    assert len(projector) == 8
    # The converter leaves out what stands behind the layer that is looked at.
    del projector["clip.vision.block_count"]
    assert projector == {key: eyes[key] for key in projector}
    assert model_info.tensors(model) == []


@pytest.mark.parametrize("kind", sorted(TEXT_DEFAULTS))
def test_what_a_config_leaves_out_is_what_transformers_takes(kind: str) -> None:
    theirs = transformers.AutoConfig.for_model(kind)
    usual = TEXT_DEFAULTS[kind]
    assert (usual.vocab, usual.ffn_width, usual.max_positions, usual.width, usual.layers, usual.heads) == (
        theirs.vocab_size, theirs.intermediate_size, theirs.max_position_embeddings, theirs.hidden_size,
        theirs.num_hidden_layers, theirs.num_attention_heads,
    )  # fmt: skip
    assert (usual.kv_heads or usual.heads, usual.norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)


def test_the_model_in_the_package_is_listed_and_shown(places: Path) -> None:
    """So a first-time user sees one."""
    titles = [each.title for each in store.installed().models]
    assert "pebble:1.6" in titles
    for title in titles:
        model = found(title)
        assert facts.details(model) == facts.Details("safetensors", "llama", ("llama", "clip"), "2.89M", "BF16")
        assert facts.capabilities(model) == ("completion", "vision")
        checkpoint = store.read(title)
        words = pumice.ollama_prompt.worded(checkpoint.config.template)
        assert words is not None
        assert (facts.template(model), facts.system(model)) == (words.template, words.system)
        assert facts.parameters(model) == 'stop                           "<|im_end|>"'
        assert read_modelfile(facts.modelfile(model)).sources == (title,)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (b"{{ .Prompt }}", ("completion", "vision")),
        (b"{{ range .Messages }}{{ .Content }}{{ end }}{{ range $.Tools }}{{ . }}{{ end }}",
         ("completion", "tools", "vision")),
        (b"{{ .Prompt }}{{ .Suffix }}{{ .Response }}", ("completion", "insert", "vision")),
        (b"{{ if .Suffix }}{{ .tools }}", ("completion", "vision")),  # no template
    ],
)  # fmt: skip
def test_what_a_model_can_do_is_what_its_template_names(
    places: Path, pair: Path, template: bytes, expected: tuple[str, ...]
) -> None:
    layers = [("model", pair.read_bytes()), ("projector", b"GGUF"), ("template", template)]
    ollama_store.install(places / "ollama", LLAVA, layers)
    assert facts.capabilities(found("llava:7b")) == expected


def test_an_embedding_model_of_ollamas_gives_vectors_and_is_not_run(places: Path, pair: Path) -> None:
    """Its file is a GGUF of a kind that pumice does not have."""
    config = {**ollama_store.CONFIG, "model_family": "bert", "model_families": ["bert"]}
    ollama_store.install(
        places / "ollama", "registry.ollama.ai/library/all-minilm/latest", [("model", pair.read_bytes())], config
    )
    assert facts.capabilities(found("all-minilm")) == ("embedding",)
    with served(Settings(port=0)) as base:
        answer = post(base, "/api/embed", {"model": "all-minilm", "input": "a"})
        assert answer.status_code == 400
        assert "pull sentence-transformers/all-MiniLM-L6-v2" in answer.json()["error"]
        assert "does not support chat" in post(base, "/api/chat", {"model": "all-minilm"}).json()["error"]


@pytest.mark.parametrize("family", [["bert"], {"bert": 1}, 1, None])
def test_a_family_that_is_no_text_is_none(places: Path, pair: Path, family: object) -> None:
    config = {**ollama_store.CONFIG, "model_family": family}
    ollama_store.install(places / "ollama", LLAVA, [("model", pair.read_bytes())], config)
    assert facts.details(found("llava:7b")).family == ""
    assert facts.capabilities(found("llava:7b")) == ("completion",)


def test_whose_child_a_model_is(llava: store.Installed, places: Path, pair: Path) -> None:
    list(creating.create(Name.parse("mine"), creating.Recipe("llava:7b"), own_store()))
    assert facts.details(found("mine")).parent_model == "llava:7b"
    assert facts.details(llava).parent_model == ""
    manifest = places / "ollama" / "manifests" / LLAVA
    raw = json.loads(manifest.read_bytes())
    raw["layers"][0]["from"] = "/root/secret/model.gguf"
    manifest.write_text(json.dumps(raw))
    assert facts.details(found("llava:7b")).parent_model == ""


def test_files_that_are_damaged_are_an_error_or_unknown(places: Path, pair: Path) -> None:
    ollama_store.install(places / "ollama", LLAVA, [("model", b"GGUF" + bytes(9))])
    with pytest.raises(UserError, match="'llava:7b' is no GGUF file"):
        model_info.of_model(found("llava:7b"))
    folder = pair.with_name("tiny")
    snapshot = hub_model(places / "hub", folder)
    for data in (b"", b"\xff" * 8, (2**40).to_bytes(8, "little"), (2).to_bytes(8, "little") + b"[]"):
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").write_bytes(data)
        assert facts.details(found("llava-hf/tiny-hf")).parameter_size == ""
        assert "general.parameter_count" not in model_info.of_model(found("llava-hf/tiny-hf"))


def test_nothing_of_this_loads_torch_or_numpy(llava: store.Installed, places: Path, pair: Path) -> None:
    hub_model(places / "hub", pair.with_name("tiny"))
    code = (
        "import sys\n"
        "from pumice import store\n"
        "from pumice.store import facts, model_info\n"
        "for each in store.installed().models:\n"
        "    facts.details(each), facts.capabilities(each), facts.template(each), facts.system(each), each.size\n"
        "    facts.parameters(each), facts.modelfile(each), model_info.of_model(each), model_info.of_eyes(each)\n"
        "    print(each.title)\n"
        "assert not {'torch', 'numpy', 'httpx2', 'huggingface_hub'} & sys.modules.keys()\n"
        "import pumice.creating\n"
        "assert not {'torch', 'numpy', 'huggingface_hub'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split()) == ["llava-hf/tiny-hf", "llava:7b", "pebble:1.5", "pebble:1.6"]
