"""The lines of Ollama's page on its API, sent by curl: the keys and types of each answer, the order of statuses.

What must be there is written down here from the protocol (api/types.go of Ollama), not from this server: `Shape` says
which keys an object has always, which it may have, and what each is. A body sent with `-d` is called a form's by curl.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pumice
import tiny
from served import served

pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
MODEL = "pebble"
COLD = {"temperature": 0}

Kind = Any
"""A type, a regular expression that a text matches, a Shape, or [kind]: a list of such."""
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)")
HEX = re.compile("[0-9a-f]{64}")
NAME = re.compile("[^:]+:[^:]+")


@dataclass(frozen=True)
class Shape:
    always: dict[str, Kind]
    maybe: dict[str, Kind] = field(default_factory=dict)

    def check(self, found: Any) -> None:
        assert isinstance(found, dict)
        assert found.keys() >= self.always.keys(), self.always.keys() - found.keys()
        kinds = {**self.always, **self.maybe}
        assert kinds.keys() >= found.keys(), found.keys() - kinds.keys()
        for name, value in found.items():
            check(kinds[name], value, name)


def check(kind: Kind, value: Any, name: str = "") -> None:
    if isinstance(kind, Shape):
        kind.check(value)
    elif isinstance(kind, list):
        assert isinstance(value, list), name
        for each in value:
            check(kind[0], each, name)
    elif isinstance(kind, re.Pattern):
        assert isinstance(value, str), name
        assert kind.fullmatch(value), (name, value)
    elif kind in (int, float):
        assert type(value) in (int, kind), (name, value)  # a bool is no number
    else:
        assert isinstance(value, kind), (name, value)


COUNTERS = dict.fromkeys(
    ("total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"), int
)
OWN = {"pumice": dict}
"""What Ollama has not."""
HEAD = {"model": re.compile(MODEL), "created_at": TIME, "done": bool}
SAID = Shape({"role": re.compile("assistant"), "content": str})
PIECE = Shape({**HEAD, "response": str})
LAST = Shape({**PIECE.always, **COUNTERS, "done_reason": re.compile("stop|length"), "context": [int]}, OWN)
LAST_RAW = Shape({name: kind for name, kind in LAST.always.items() if name != "context"}, OWN)
LOADED = Shape({**PIECE.always, "done_reason": re.compile("load|unload")})
CHAT_PIECE = Shape({**HEAD, "message": SAID})
CHAT_LAST = Shape({**CHAT_PIECE.always, **COUNTERS, "done_reason": re.compile("stop|length")}, OWN)
CHAT_LOADED = Shape({**CHAT_PIECE.always, "done_reason": re.compile("load|unload")})
ERROR = Shape({"error": str})
DETAILS = Shape(
    {"parent_model": str, "format": str, "family": str, "families": [str], "parameter_size": str,
     "quantization_level": str}
)  # fmt: skip
ENTRY = {"name": NAME, "model": NAME, "size": int, "digest": HEX, "details": DETAILS}
TAGS = Shape({"models": [Shape({**ENTRY, "modified_at": TIME}, {"capabilities": [str]})]})
PS = Shape(
    {"models": [Shape({**ENTRY, "expires_at": TIME, "size_vram": int}, {"context_length": int, "capabilities": [str]})]}
)
SHOW = Shape(
    {"modelfile": str, "parameters": str, "template": str, "details": DETAILS, "model_info": dict,
     "capabilities": [str]},
    {"license": str, "system": str, "messages": [Shape({"role": str, "content": str})], "projector_info": dict,
     "modified_at": TIME},
)  # fmt: skip
EMBED = Shape(
    {"model": str, "embeddings": [[float]], "total_duration": int, "load_duration": int, "prompt_eval_count": int}, OWN
)
STEP = Shape({"status": str}, {"digest": str, "total": int, "completed": int})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with a store of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PUMICE_HOME", str(tmp_path_factory.mktemp("home")))
        with served() as base:
            yield base


def curl(base: str, path: str, *more: str) -> tuple[int, str, str]:
    """Status, content type and body of one call."""
    end = "\n%{http_code} %{content_type}"
    call = ["curl", "-sS", "--max-time", "120", "-w", end, *more, base + path]
    done = subprocess.run(call, capture_output=True, text=True, encoding="utf-8", timeout=150)
    assert done.returncode == 0, done.stderr
    text, _, told = done.stdout.rpartition("\n")
    status, _, kind = told.partition(" ")
    return int(status), kind, text


def send(base: str, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects that a call is answered with, each on a line."""
    status, kind, text = curl(base, path, "-d", json.dumps(body))
    assert status == 200, text
    assert kind == "application/x-ndjson"
    assert text.endswith("\n")
    return [json.loads(each) for each in text.splitlines()]


def one(base: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The one object that a call is answered with."""
    status, kind, text = curl(base, path, "-d", json.dumps(body))
    assert status == 200, text
    assert kind.startswith("application/json")
    return dict(json.loads(text))


def refused(base: str, path: str, body: dict[str, Any]) -> tuple[int, str]:
    status, kind, text = curl(base, path, "-d", json.dumps(body))
    assert kind.startswith("application/json")
    check(ERROR, json.loads(text))
    return status, json.loads(text)["error"]


def picture() -> str:
    data = io.BytesIO()
    Image.effect_noise((60, 40), 90).convert("RGB").save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


# --- generate ---------------------------------------------------------------------------------------------------------


def streamed(base: str, path: str, body: dict[str, Any], piece: Shape, last: Shape) -> None:
    lines = send(base, path, {"model": MODEL, **body})
    for each in lines[:-1]:
        check(piece, each)
    check(last, lines[-1])
    assert [each["done"] for each in lines] == [False] * (len(lines) - 1) + [True]


def test_generate_streams(base: str) -> None:
    streamed(base, "/api/generate", {"prompt": "Why is the sky blue?"}, PIECE, LAST)


OPTIONS = {
    "num_keep": 5, "seed": 42, "num_predict": 10, "top_k": 20, "top_p": 0.9, "min_p": 0.0, "typical_p": 0.7,
    "repeat_last_n": 33, "temperature": 0.8, "repeat_penalty": 1.2, "presence_penalty": 1.5, "frequency_penalty": 1.0,
    "penalize_newline": True, "stop": ["\n", "user:"], "numa": False, "num_ctx": 1024, "num_batch": 2, "num_gpu": 1,
    "main_gpu": 0, "use_mmap": True, "num_thread": 8,
}  # fmt: skip


@pytest.mark.parametrize(("body", "shape"), [
    ({"prompt": "Why is the sky blue?"}, LAST),
    ({"prompt": "What is in this picture?", "images": [picture()]}, LAST),
    ({"prompt": "[INST] why is the sky blue? [/INST]", "raw": True}, LAST_RAW),
    ({"prompt": "Why is the sky blue?", "options": OPTIONS}, LAST),
    ({"prompt": "What color is the sky? Respond using JSON", "format": "json", "options": {"num_predict": 20}}, LAST),
])  # fmt: skip
def test_generate_at_once(base: str, body: dict[str, Any], shape: Shape) -> None:
    check(shape, one(base, "/api/generate", {"model": MODEL, "stream": False, **body}))


def test_a_picture_that_curl_announces_first(base: str, tmp_path: Path) -> None:
    """Of a body above a megabyte it asks whether it may send it (`Expect: 100-continue`)."""
    data = io.BytesIO()
    Image.effect_noise((1200, 1200), 90).convert("RGB").save(data, "PNG")
    image = base64.b64encode(data.getvalue()).decode()
    body = {"model": MODEL, "prompt": "What is it?", "stream": False, "images": [image]}
    (tmp_path / "body").write_text(json.dumps(body))
    assert len(image) > 2**20
    status, _, text = curl(base, "/api/generate", "-d", f"@{tmp_path / 'body'}", "-H", "Expect: 100-continue")
    assert status == 200
    check(LAST, json.loads(text))


SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 150}, "available": {"type": "boolean"}},
    "required": ["age", "available"],
}


@pytest.mark.parametrize("more", [{}, {"seed": 7, "temperature": 0.8}])
def test_structured_outputs(base: str, more: dict[str, Any]) -> None:
    question = "Ollama is 22 years old and is busy saving the world. Respond using JSON"
    common = {"model": MODEL, "stream": False, "format": SCHEMA, "options": COLD | more}
    answer = one(base, "/api/generate", {**common, "prompt": question})
    check(LAST, answer)
    chat = one(base, "/api/chat", {**common, "messages": [{"role": "user", "content": question}]})
    check(CHAT_LAST, chat)
    for text in (answer["response"], chat["message"]["content"]):
        check(Shape({"age": int, "available": bool}), json.loads(text))


def test_a_seed_repeats_an_answer(base: str) -> None:
    body = {"model": MODEL, "prompt": "Why is the sky blue?", "stream": False}
    drawn = [
        one(base, "/api/generate", {**body, "options": {"seed": seed, "temperature": 2.0, "top_p": 1, "top_k": 0}})
        for seed in (123, 123, 124, 125)
    ]
    first, again, *others = [each["response"] for each in drawn]
    assert first == again
    assert any(each != first for each in others)


def test_generate_loads_and_unloads(base: str) -> None:
    for body, reason in (({}, "load"), ({"keep_alive": 0}, "unload")):
        answer = one(base, "/api/generate", {"model": MODEL, **body})
        check(LOADED, answer)
        assert (answer["response"], answer["done"], answer["done_reason"]) == ("", True, reason)


def test_a_suffix_needs_a_template_for_it(base: str) -> None:
    body = {"model": MODEL, "prompt": "def compute_gcd(a, b):", "suffix": "    return result", "stream": False}
    status, error = refused(base, "/api/generate", body)
    assert (status, error.partition(" ")[2]) == (400, "does not support insert")


# --- chat -------------------------------------------------------------------------------------------------------------

HISTORY = [
    {"role": "user", "content": "why is the sky blue?"},
    {"role": "assistant", "content": "due to rayleigh scattering."},
    {"role": "user", "content": "how is that different than mie scattering?"},
]
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a given city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize("messages", [
    HISTORY[:1], HISTORY, [{"role": "system", "content": "Be brief."}, *HISTORY],
    [{"role": "user", "content": "what is in this image?", "images": [picture()]}],
])  # fmt: skip
def test_chat(base: str, messages: list[dict[str, Any]]) -> None:
    streamed(base, "/api/chat", {"messages": messages}, CHAT_PIECE, CHAT_LAST)
    body = {"model": MODEL, "messages": messages, "stream": False, "options": {"seed": 101, "temperature": 0}}
    answers = [one(base, "/api/chat", body) for _ in range(2)]
    for each in answers:
        check(CHAT_LAST, each)
    assert answers[0]["message"] == answers[1]["message"]


def test_tools_are_refused_where_the_model_has_none(base: str) -> None:
    for stream in (True, False):
        body = {"model": MODEL, "messages": HISTORY[:1], "tools": [TOOL], "stream": stream}
        status, error = refused(base, "/api/chat", body)
        assert (status, error.partition(" ")[2]) == (400, "does not support tools")
    check(CHAT_LAST, one(base, "/api/chat", {"model": MODEL, "messages": HISTORY[:1], "tools": [], "stream": False}))


def test_chat_loads_and_unloads(base: str) -> None:
    for body, reason in (({}, "load"), ({"keep_alive": 0}, "unload")):
        answer = one(base, "/api/chat", {"model": MODEL, "messages": [], **body})
        check(CHAT_LOADED, answer)
        assert answer["message"] == {"role": "assistant", "content": ""}
        assert (answer["done"], answer["done_reason"]) == (True, reason)


# --- models -----------------------------------------------------------------------------------------------------------

LAYER = re.compile(r"(using existing|creating new) layer sha256:[0-9a-f]{64}")
FILES = re.compile("(converting model|quantizing [A-Z0-9]+ model to [A-Z0-9_]+)")


def statuses(lines: list[dict[str, Any]]) -> list[str]:
    """Each once where it is repeated, layers without their digests."""
    found: list[str] = []
    for each in lines:
        check(STEP, each)
        status = LAYER.sub(r"\1 layer", each["status"])
        if found[-1:] != [status]:
            found.append(status)
    return found


def test_create_copy_show_and_delete(base: str) -> None:
    made = statuses(send(base, "/api/create", {"model": "mario", "from": MODEL, "system": "You are Mario."}))
    assert FILES.fullmatch(made[0])
    assert made[-2:] == ["writing manifest", "success"]
    assert "creating new layer" in made
    again = statuses(send(base, "/api/create", {"model": "luigi", "from": "mario", "system": "You are Luigi."}))
    assert again[-2:] == ["writing manifest", "success"]
    assert set(again[:-2]) == {"using existing layer", "creating new layer"}
    quantised = statuses(send(base, "/api/create", {"model": "mario:q8_0", "from": "mario", "quantize": "q8_0"}))
    assert "quantizing BF16 model to Q8_0" in quantised
    assert one(base, "/api/create", {"model": "peach", "from": "mario", "stream": False}) == {"status": "success"}

    assert curl(base, "/api/copy", "-d", '{"source": "mario", "destination": "mario-backup"}')[::2] == (200, "")
    status, _, text = curl(base, "/api/tags")
    assert status == 200
    check(TAGS, json.loads(text))
    names = {each["name"]: each for each in json.loads(text)["models"]}
    wanted = {"mario", "luigi", "peach", "mario-backup"}
    assert {f"{each}:latest" for each in wanted} | {"mario:q8_0", "pebble:1.6"} <= names.keys()
    assert names["mario:latest"]["digest"] == names["mario-backup:latest"]["digest"]
    for name, system in (("mario", "You are Mario."), ("luigi", "You are Luigi.")):
        shown = one(base, "/api/show", {"model": name})
        check(SHOW, shown)
        assert shown["system"] == system
        assert isinstance(shown["model_info"]["general.parameter_count"], int)
        assert "tensors" in one(base, "/api/show", {"model": name, "verbose": True})

    for name in ("mario-backup", "luigi", "peach", "mario:q8_0", "mario"):
        body = json.dumps({"model": name})
        assert curl(base, "/api/delete", "-X", "DELETE", "-d", body)[::2] == (200, "")
        status, _, text = curl(base, "/api/delete", "-X", "DELETE", "-d", body)
        assert (status, json.loads(text)) == (404, {"error": f"model '{name}' not found"})
    assert refused(base, "/api/show", {"model": "mario"}) == (404, "model 'mario' not found")


def test_blobs_and_what_is_made_of_them(base: str, tmp_path: Path) -> None:
    pumice.convert(tiny.hf_folder(tmp_path / "hf", family="1.5", seed=5), tmp_path / "lm.gguf")
    files = {}
    for name in ("lm.gguf", "mmproj-lm.gguf"):
        path = tmp_path / name
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        assert curl(base, f"/api/blobs/{digest}", "-I")[0] == 404
        assert curl(base, f"/api/blobs/{digest}", "-T", str(path), "-X", "POST")[::2] == (201, "")
        assert curl(base, f"/api/blobs/{digest}", "-I")[0] == 200
        assert curl(base, f"/api/blobs/{digest}", "-T", str(path), "-X", "POST")[::2] == (200, "")
        files[name] = digest
    made = statuses(send(base, "/api/create", {"model": "my-gguf-model", "files": files}))
    assert made[0] == "parsing GGUF"
    assert made[-2:] == ["writing manifest", "success"]
    check(SHOW, one(base, "/api/show", {"model": "my-gguf-model"}))
    wrong = f"/api/blobs/sha256:{'0' * 64}"
    status, _, text = curl(base, wrong, "-T", str(tmp_path / "lm.gguf"), "-X", "POST")
    assert status == 400
    assert "digest mismatch" in json.loads(text)["error"]
    assert curl(base, wrong, "-I")[0] == 404


def test_a_folder_of_safetensors(base: str, tmp_path: Path) -> None:
    files = {}
    for path in tiny.hf_folder(tmp_path / "hf", family="1.5", seed=5).iterdir():
        digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
        assert curl(base, f"/api/blobs/{digest}", "-T", str(path), "-X", "POST")[0] == 201
        files[path.name] = digest
    made = statuses(send(base, "/api/create", {"model": "fred", "files": files}))
    assert made[0] == "converting model"
    assert made[-2:] == ["writing manifest", "success"]
    check(SHOW, one(base, "/api/show", {"model": "fred"}))


def test_pull_and_push(base: str) -> None:
    assert statuses(send(base, "/api/pull", {"model": MODEL}))[-1] == "success"
    assert one(base, "/api/pull", {"model": MODEL, "stream": False}) == {"status": "success"}
    assert refused(base, "/api/push", {"model": "mattw/pygmalion:latest"})[0] == 404


def test_show(base: str) -> None:
    check(SHOW, one(base, "/api/show", {"model": MODEL}))


def test_embed_and_embeddings(base: str) -> None:
    texts = ["Why is the sky blue?", "Why is the grass green?"]
    for given in (texts[0], texts):
        answer = one(base, "/api/embed", {"model": MODEL, "input": given})
        check(EMBED, answer)
        assert len(answer["embeddings"]) == (2 if given is texts else 1)
        for vector in answer["embeddings"]:
            assert sum(each * each for each in vector) == pytest.approx(1, abs=1e-3)
    check(Shape({"embedding": [float]}), one(base, "/api/embeddings", {"model": MODEL, "prompt": texts[0]}))


def test_ps_and_version(base: str) -> None:
    one(base, "/api/generate", {"model": MODEL})
    status, _, text = curl(base, "/api/ps")
    assert status == 200
    check(PS, json.loads(text))
    assert [each["name"] for each in json.loads(text)["models"]] == ["pebble:1.6"]
    status, _, text = curl(base, "/api/version")
    check(Shape({"version": re.compile(r"\d+\.\d+\.\d+")}, {"pumice": str}), json.loads(text))
    assert curl(base, "/")[::2] == (200, "Ollama is running")
    assert curl(base, "/", "-I")[0] == 200
