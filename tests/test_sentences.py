"""Embedding models: what sentence-transformers itself says is what the server answers, by each of their names."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import openai
import pytest
import torch
from safetensors import safe_open
from sentence_transformers import SentenceTransformer

from pumice import store
from pumice.cli.look import show
from pumice.errors import UserError
from pumice.room.memory import Memory
from pumice.sentences import Machine, NoRoom, load_sentences
from pumice.server.residents import Residents
from pumice.server.settings import Settings
from pumice.server.wire import Refused
from pumice.store.hub_cache import wanted
from pumice.store.installed import Folder
from sentence_folder import WORDS, sentence_folder
from served import post, served

TEXTS = ["a red circle", "", "ünder 3", "two\nlines", "z" * 20]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sentence_folder(tmp_path_factory.mktemp("sentences") / "m")


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Any:
    return SentenceTransformer(str(folder), device="cpu")


@pytest.fixture(scope="module")
def base(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server whose Hub cache has one embedding model, and which looks up no name."""
    hub = tmp_path_factory.mktemp("hub")
    repository = hub / f"models--{HUB.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    found = socket.getaddrinfo

    def near(host: Any, *others: Any, **more: Any) -> Any:
        assert host in (None, "127.0.0.1", "localhost"), f"{host} was looked up"
        return found(host, *others, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(hub))
        patch.setattr(socket, "getaddrinfo", near)
        with served(Settings(port=0, folders=True)) as base:
            yield base


@pytest.fixture
def client(base: str) -> Iterator[ollama.Client]:
    with ollama.Client(base) as client:
        yield client


def test_vectors_by_each_name(base: str, client: ollama.Client, oracle: Any, folder: Path) -> None:
    wanted = oracle.encode(TEXTS)
    for name in ("all-minilm", "All-MiniLM:22m", HUB, f"hf.co/{HUB}", str(folder)):
        found = client.embed(name, TEXTS)
        assert found.model == name
        np.testing.assert_allclose(np.array(found.embeddings), wanted, atol=1e-5)
        assert found.prompt_eval_count == sum(len(each) for each in oracle.tokenizer(TEXTS)["input_ids"])
    one = client.embeddings("all-minilm", TEXTS[0]).embedding
    np.testing.assert_allclose(np.array(one), wanted[0], atol=1e-5)
    few = SentenceTransformer(str(folder), device="cpu", truncate_dim=7).encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(np.array(client.embed("all-minilm", TEXTS, dimensions=7).embeddings), few, atol=1e-5)
    with openai.OpenAI(base_url=base + "/v1", api_key="x") as other:
        # Left to itself the client asks for base64.
        for more in ({}, {"encoding_format": "float"}):
            data = other.embeddings.create(model="all-minilm", input=TEXTS, **more).data  # type: ignore[arg-type]
            np.testing.assert_allclose(np.array([each.embedding for each in data]), wanted, atol=1e-5)
    answer = post(base, "/api/embed", {"model": "all-minilm", "input": "a"}).json()
    assert answer["pumice"] == {"texts": "an embedding model's, by sentence-transformers"}


def test_long_texts_are_cut_or_refused(client: ollama.Client, oracle: Any) -> None:
    text = "a red circle " * 10
    found = client.embed("all-minilm", [text, "a"])
    np.testing.assert_allclose(np.array(found.embeddings), oracle.encode([text, "a"]), atol=1e-5)
    assert found.prompt_eval_count == 32 + 3
    with pytest.raises(ollama.ResponseError, match=r"the input length exceeds the context length: .* has 32 positions"):
        client.embed("all-minilm", ["a", text], truncate=False)


def test_lists_say_what_it_is(client: ollama.Client, base: str) -> None:
    (entry,) = (each for each in client.list().models if each.model == HUB)
    assert entry.details is not None
    assert (entry.details.family, entry.details.families) == ("bert", ["bert"])
    shown = client.show("all-minilm")
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo is not None
    assert (shown.modelinfo["general.architecture"], shown.modelinfo["bert.embedding_length"]) == ("bert", 32)
    listed = post_get(base, "/api/tags")["models"]
    assert [each["capabilities"] for each in listed if each["name"] == HUB] == [["embedding"]]
    client.embed("all-minilm", "a")
    (loaded,) = (each for each in post_get(base, "/api/ps")["models"] if each["name"] == HUB)
    assert (loaded["capabilities"], loaded["context_length"]) == (["embedding"], 32)
    assert 0 < loaded["size"] < 10**6
    assert f'model_name="{HUB}"' in post_get(base, "/metrics")
    client.generate("all-minilm", keep_alive=0)
    assert HUB not in [each.model for each in client.ps().models]
    client.embed("all-minilm", "a", keep_alive=0)
    assert HUB not in [each.model for each in client.ps().models]


def post_get(base: str, path: str) -> Any:
    import httpx2

    answer = httpx2.get(base + path)
    return answer.json() if "json" in answer.headers["content-type"] else answer.text


@pytest.mark.parametrize(
    ("path", "body", "to"),
    [
        ("/api/generate", {"prompt": "x"}, "generate"),
        ("/api/generate", {}, "generate"),
        ("/api/generate", {"prompt": "x", "_debug_render_only": True}, "generate"),
        ("/api/chat", {"messages": [{"role": "user", "content": "x"}]}, "chat"),
        ("/api/chat", {}, "chat"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "chat"),
        ("/v1/completions", {"prompt": "x", "stream": True}, "generate"),
        ("/pumice/see", {"images": []}, "generate"),
    ],
)
def test_it_answers_nothing(base: str, path: str, body: dict[str, Any], to: str) -> None:
    answer = post(base, path, {"model": "all-minilm", **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    said = error["message"] if path.startswith("/v1") else error
    assert said.startswith(f'"all-minilm" does not support {to}')


def test_it_sees_nothing(base: str) -> None:
    answer = post(base, "/api/embed", {"model": "all-minilm", "images": ["AAAA"]})
    assert (answer.status_code, "for texts alone" in answer.json()["error"]) == (400, True)


def test_a_folder_is_named_where_the_settings_allow_it(base: str, folder: Path) -> None:
    for name in (str(folder / "1_Pooling"), str(folder.parent), "/etc/passwd", "/no/such", "m", f"./{folder.name}"):
        answer = post(base, "/api/embed", {"model": name, "input": "a"})
        assert (answer.status_code, answer.json()["error"]) == (404, f"model '{name}' not found")

    async def ask() -> None:
        async with Residents(Settings()).use_for_vectors(str(folder)):
            raise AssertionError

    with pytest.raises(Refused, match="not found"):
        ask().send(None)


def test_commands_say_what_it_is(base: str, capsys: pytest.CaptureFixture[str]) -> None:
    show("all-minilm")
    said = capsys.readouterr().out
    assert "embedding" in said
    assert "bert" in said
    with pytest.raises(UserError, match="is an embedding model"):
        store.read("all-minilm")


def test_without_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match="not installed") as caught:
        load_sentences(folder, "all-minilm")
    assert "pip install 'pumice[embed]'" in caught.value.hint


def changed(folder: Path, tmp_path: Path, name: str, change: Any) -> Path:
    """A copy whose JSON file `name` is what `change` makes of it."""
    found = shutil.copytree(folder, tmp_path / "changed")
    path = found / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return found


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("os.system", "a part of the kind 'os.system'"),
        ("mine.Transformer", "a part of the kind 'mine.Transformer'"),
        ("sentence_transformers.evil.Thing", "a part of the kind"),
        ("sentence_transformers.models.WordEmbeddings", "a part of the kind"),
        ("sentence_transformers.no.such.Pooling", "cannot be loaded"),
    ],
)
def test_nothing_is_run_but_known_parts(folder: Path, tmp_path: Path, kind: str, words: str) -> None:
    found = changed(folder, tmp_path, "modules.json", lambda parts: [parts[0], {**parts[1], "type": kind}])
    with pytest.raises(UserError, match=words):
        load_sentences(found, "m")


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_d_no_code_of_the_folder_runs(folder: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    classes = dict.fromkeys(("AutoConfig", "AutoModel"), "evil.Thing") | {"AutoTokenizer": ["evil.Thing", None]}
    found = changed(folder, tmp_path, name, lambda said: {**said, "auto_map": classes, "trust_remote_code": True})
    (found / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Thing: pass\n")
    with suppress(UserError):
        load_sentences(found, "m").embed(["a"])
    assert not canary.exists()


def test_no_pickle_is_read(folder: Path, tmp_path: Path) -> None:
    for place in ("", "2_Dense"):
        found = shutil.copytree(folder, tmp_path / f"pickled{place}")
        (found / place / "model.safetensors").unlink()
        torch.save({}, found / place / "pytorch_model.bin")
        with pytest.raises(UserError, match="no weights as safetensors"):
            load_sentences(found, "m")


@pytest.mark.parametrize("text", ["", "{}", "[1]", "[" * 100_000, '[{"type": 1}]'])
def test_damaged_parts(folder: Path, tmp_path: Path, text: str) -> None:
    found = shutil.copytree(folder, tmp_path / "damaged")
    (found / "modules.json").write_text(text)
    with pytest.raises(UserError):
        load_sentences(found, "m")


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    found = shutil.copytree(folder, tmp_path / "damaged")
    path = found / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"^m: model\.safetensors is not a whole safetensors file") as caught:
        load_sentences(found, "m")
    assert str(found) not in caught.value.message
    shutil.copy(found / "tokenizer.json", found / "config.json")
    shutil.copy(folder / "model.safetensors", path)
    with pytest.raises(UserError, match="m cannot be loaded") as caught:
        load_sentences(found, "m")
    assert str(found) not in caught.value.message


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokenizer.json", lambda said: {**said, "model": {"type": "none"}}),
        ("tokenizer.json", lambda said: {}),
        ("tokenizer.json", lambda said: {**said, "normalizer": {"type": "none"}}),
        ("config.json", lambda said: {**said, "hidden_size": "wide"}),
        ("config.json", lambda said: {**said, "num_hidden_layers": [1]}),
        ("config.json", lambda said: {**said, "num_attention_heads": 0}),
        ("tokenizer_config.json", lambda said: {**said, "model_max_length": "long"}),
        ("config_sentence_transformers.json", lambda said: {**said, "prompts": [1]}),
        ("config_sentence_transformers.json", lambda said: {**said, "default_prompt_name": "none"}),
        ("2_Dense/config.json", lambda said: {**said, "in_features": -1}),
        ("1_Pooling/config.json", lambda said: {**said, "pooling_mode": "none"}),
    ],
)  # fmt: skip
def test_damaged_files_are_told_in_words(folder: Path, tmp_path: Path, name: str, change: Any) -> None:
    found = changed(folder, tmp_path, name, change)
    with pytest.raises(UserError, match=r"^m") as caught:
        load_sentences(found, "m")
    assert str(tmp_path) not in caught.value.message


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"merges": [["a", "Q"]]}, r"joins \['a', 'Q'\], which is of no tokens"),
        ({"merges": ["a c"]}, r"joins \['a', 'c'\], which gives no token"),
        ({"merges": [["a"]]}, r"a merge is \['a'\]"),
        # The library would end the process, cutting a byte off the second.
        ({"merges": [["a", "é"]], "continuing_subword_prefix": "x"}, "is of no tokens"),
        ({"dropout": 5.0}, "does not hold together"),
    ],
)
def test_a_tokenizer_that_does_not_hold_together(
    folder: Path, tmp_path: Path, model: dict[str, Any], words: str
) -> None:
    """A BPE, which transformers takes as it stands."""
    bpe = {"type": "BPE", "vocab": {word: id for id, word in enumerate([*WORDS[:-2], "ab", "é"])}, "unk_token": "[UNK]"}
    found = changed(folder, tmp_path, "tokenizer.json", lambda said: {**said, "model": {**bpe, "merges": ["a b"]}})
    config = json.loads((found / "tokenizer_config.json").read_text())
    (found / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "PreTrainedTokenizerFast"}))
    assert load_sentences(found, "m").embed(["ab"]).tokens == (3,)
    said = json.loads((found / "tokenizer.json").read_text())
    (found / "tokenizer.json").write_text(json.dumps({**said, "model": {**said["model"], **model}}))
    with pytest.raises(UserError, match=f"^m: the tokenizer.json .*{words}"):
        load_sentences(found, "m")


def test_words_that_the_network_has_not(folder: Path, tmp_path: Path) -> None:
    """The tokenizer gives numbers that its table does not reach."""
    found = shutil.copytree(folder, tmp_path / "few")
    said = json.loads((found / "tokenizer.json").read_text())
    said["model"]["vocab"]["a"] = 5000
    (found / "tokenizer.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"^m gives no vectors"):
        load_sentences(found, "m").embed(["a"])


def test_a_text_is_cut_to_what_the_network_has(folder: Path, oracle: Any, tmp_path: Path) -> None:
    found = changed(folder, tmp_path, "sentence_bert_config.json", lambda said: {**said, "max_seq_length": 10**6})
    model = load_sentences(found, "m")
    assert model.positions == 32
    got = model.embed(["a red circle " * 10], truncate=True)
    assert got.tokens == (32,)
    np.testing.assert_allclose(got.vectors_ND.numpy(), oracle.encode(["a red circle " * 10]), atol=1e-5)


def test_weights_have_one_name(folder: Path, tmp_path: Path) -> None:
    """What else is called safetensors lets no pickle be read."""
    for place in ("", "2_Dense"):
        found = shutil.copytree(folder, tmp_path / f"other{place}")
        (found / place / "model.safetensors").rename(found / place / "x.safetensors")
        torch.save({}, found / place / "pytorch_model.bin")
        with pytest.raises(UserError, match="no weights as safetensors"):
            load_sentences(found, "m")
        (found / place / "model.safetensors.index.json").write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
        with pytest.raises(UserError, match="not safetensors here" if not place else "no weights as safetensors"):
            load_sentences(found, "m")


def test_weights_in_several_files(folder: Path, oracle: Any, tmp_path: Path) -> None:
    found = shutil.copytree(folder, tmp_path / "sharded")
    name = "model-00001-of-00001.safetensors"
    (found / "model.safetensors").rename(found / name)
    with safe_open(found / name, "pt") as file:
        index = {"metadata": {}, "weight_map": dict.fromkeys(file.keys(), name)}
    (found / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_allclose(load_sentences(found, "m").embed(["a"]).vectors_ND, oracle.encode(["a"]), atol=1e-5)


@pytest.mark.parametrize(
    "more",
    [
        {"model_kwargs": {"use_safetensors": False}}, {"model_args": {"variant": "x"}},
        {"processor_kwargs": {"tokenizer_file": "/etc/passwd"}}, {"tokenizer_args": {"subfolder": ".."}},
        {"config_kwargs": {"revision": "x"}}, {"config_args": {"code_revision": "x"}}, {"model_kwargs": [1]},
        {"model_kwargs": {"dtype": {"": "float16"}}}, {"tokenizer_name_or_path": "/etc"},
    ],
)  # fmt: skip
def test_d_settings_that_ask_for_more_are_refused(folder: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    found = changed(folder, tmp_path, "sentence_bert_config.json", lambda said: {**said, **more})
    (found / "sentence_bert_config.json").rename(found / "sentence_xlm-roberta_config.json")
    with pytest.raises(UserError, match=r"^m: sentence_xlm-roberta_config\.json"):
        load_sentences(found, "m")


def test_harmless_settings_are_followed(folder: Path, tmp_path: Path) -> None:
    more = {"model_kwargs": {"torch_dtype": "float32"}, "processor_kwargs": {"model_max_length": 9}}
    found = changed(folder, tmp_path, "sentence_bert_config.json", lambda said: {**said, **more})
    assert load_sentences(found, "m").positions == 9


def test_d_an_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    found = shutil.copytree(folder, tmp_path / "adapted")
    (found / "adapter_config.json").write_text('{"base_model_name_or_path": "/etc"}')
    with pytest.raises(UserError, match="m: an adapter"):
        load_sentences(found, "m")


def test_what_other_programs_read_counts_nothing(folder: Path, tmp_path: Path) -> None:
    found = Folder("m", shutil.copytree(folder, tmp_path / "more"), "disk")
    digest = found.digest
    (found.path / "onnx").mkdir()
    (found.path / "onnx" / "model.safetensors").write_bytes(b"x")
    assert found.digest == digest
    (found.path / "2_Dense").rename(found.path / "2_Dense-b_3")
    assert found.digest == digest
    names = ["modules.json", "2_Dense-b_3/model.safetensors", "onnx/model.safetensors"]
    assert wanted(names) == ["2_Dense-b_3/model.safetensors", "modules.json"]


def test_a_part_outside_its_folder(folder: Path, tmp_path: Path) -> None:
    found = changed(folder, tmp_path, "modules.json", lambda parts: [{**parts[0], "path": "../../m"}, *parts[1:]])
    with pytest.raises(UserError, match="lies outside"):
        load_sentences(found, "m")


def test_no_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "memory", lambda self, device: Memory(10**9, 1000))
    with pytest.raises(NoRoom, match=r"m needs 0\.09 MB"):
        load_sentences(folder, "m")
