"""Clients of Ollama that need an environment of their own, unchanged, against `pumice serve`.

Optional: PUMICE_CLIENTS names a folder with two virtual environments, made by

    python -m venv langchain && langchain/bin/pip install embedchain==0.1.128 langchain-community==0.3.27 ollama==0.6.3
    python -m venv llm && llm/bin/pip install llm==0.36 llm-ollama==0.19.1

Each walk is a small program that its environment's Python runs; what it prints as JSON is held against the Python API.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import pumice

if "PUMICE_CLIENTS" not in os.environ:
    pytest.skip("PUMICE_CLIENTS names no folder with the clients' environments", allow_module_level=True)
CLIENTS = Path(os.environ["PUMICE_CLIENTS"])
QUESTION = "What is in the picture?"
MADE = "my-own"
"""A model of the server's own store, asked for without its tag."""


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("picture") / "red.png"
    Image.new("RGB", (60, 40), (200, 20, 20)).save(path)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`pumice serve` with a model of its own store beside the bundled ones. It reaches no other machine: what clients
    pull at their start must be known to be here."""
    home = tmp_path_factory.mktemp("home")
    environment = {**os.environ, "PUMICE_HOME": str(home), "http_proxy": "http://127.0.0.1:9"}
    environment["https_proxy"] = environment["http_proxy"]
    (home / "Modelfile").write_text("FROM pebble\nPARAMETER temperature 0\n")
    pumice_cli = [sys.executable, "-m", "pumice"]
    subprocess.run([*pumice_cli, "create", MADE, "-f", home / "Modelfile"], env=environment, check=True, timeout=120)
    log = home / "serve.log"
    with log.open("w") as told:
        server = subprocess.Popen([*pumice_cli, "serve", "--port", "0"], env=environment, stderr=told)
    try:
        until = time.monotonic() + 60
        while (found := re.search(r"http://127\.0\.0\.1:\d+(?=\n)", log.read_text())) is None:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        yield found[0]
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def model() -> pumice.Model:
    return pumice.load("pebble")


def run(call: list[str | Path], folder: Path, **more: str) -> str:
    """What a program prints, with a home of its own and no news for its makers. Fails where the program does."""
    quiet = {"EC_TELEMETRY": "false", "ANONYMIZED_TELEMETRY": "False", "MEM0_TELEMETRY": "False", "DO_NOT_TRACK": "1"}
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "LANG")}
    environment = {**kept, **quiet, "HOME": str(folder), "PYTHONWARNINGS": "ignore", **more}
    done = subprocess.run(
        call, capture_output=True, encoding="utf-8", timeout=240, cwd=folder, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def walk(environment: str, program: str, folder: Path, *arguments: object) -> dict[str, Any]:
    """What a program of one of the environments finds: the JSON of its last line."""
    python = CLIENTS / environment / "bin" / "python"
    printed = run([python, "-c", textwrap.dedent(program), *map(str, arguments)], folder)
    return dict(json.loads(printed.splitlines()[-1]))


# --- langchain-community ----------------------------------------------------------------------------------------------

LANGCHAIN = """
    import asyncio, base64, json, sys
    from langchain_community.chat_models import ChatOllama
    from langchain_community.embeddings import OllamaEmbeddings
    from langchain_community.llms import Ollama
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage

    base, path, question = sys.argv[1:]
    image = base64.b64encode(open(path, "rb").read()).decode()
    url = "data:image/png;base64," + image
    options = dict(model="pebble:1.6", base_url=base, temperature=0)
    chat, llm = ChatOllama(**options), Ollama(**options)
    seen = HumanMessage([{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}])
    embeddings = OllamaEmbeddings(model="pebble", base_url=base)

    def refused(client):
        try:
            client.invoke("Hi")
        except Exception as error:
            return type(error).__name__

    told = chat.invoke("Hi")
    turns = [SystemMessage("Be brief."), seen]
    first = chat.invoke(turns).content
    print(json.dumps({
        "chat": told.content,
        "told": told.response_metadata,
        "chat_stream": "".join(each.content for each in chat.stream("Hi")),
        "chat_async": asyncio.run(chat.ainvoke("Hi")).content,
        "chat_picture": chat.invoke([seen]).content,
        "chat_turns": [first, chat.invoke([*turns, AIMessage(first), HumanMessage("Which colour?")]).content],
        "chat_json": ChatOllama(**options, format="json", num_predict=9).invoke("Hi").content,
        "llm": llm.invoke("Hi"),
        "llm_stream": "".join(llm.stream("Hi")),
        "llm_picture": llm.bind(images=[image]).invoke(question),
        "llm_options": Ollama(**options, system="Be brief.", stop=["x"], keep_alive=9, num_ctx=512, mirostat=1)
        .invoke("Hi"),
        "llm_several": [each[0].text for each in llm.generate(["Hi", "Ho"]).generations],
        "vectors": embeddings.embed_documents(["a", "b"]),
        "vector": embeddings.embed_query("a"),
        "refused": [refused(each(model="nope", base_url=base)) for each in (ChatOllama, Ollama)],
    }))
"""


def test_langchain_community(base: str, model: pumice.Model, red: Path, tmp_path: Path) -> None:
    found = walk("langchain", LANGCHAIN, tmp_path, base, red, QUESTION)
    said, seen = model.ask("Hi").text, model.ask(QUESTION, red).text
    assert {found[name] for name in ("chat", "chat_stream", "chat_async", "llm", "llm_stream")} == {said}
    assert found["llm_picture"] == seen
    assert found["chat_picture"] == model.ask(f"\n{QUESTION}", red).text
    chat = model.chat(system="Be brief.")
    turns = [chat.ask(f"\n{QUESTION}", red).text, chat.ask("Which colour?").text]
    assert found["chat_turns"] == turns
    assert found["llm_options"] == model.ask("Hi", system="Be brief.").text
    assert found["llm_several"] == [said, model.ask("Ho").text]
    assert found["chat_json"].startswith("{")
    told = found["told"]
    assert (told["model"], told["done"], told["done_reason"]) == ("pebble:1.6", True, "stop")
    assert min(told["prompt_eval_count"], told["eval_count"], told["total_duration"]) > 0
    # It writes words in front of its texts.
    wanted = model.embed(["passage: a", "passage: b", "query: a"], normalise=False).vectors_ND.tolist()
    for vector, expected in zip([*found["vectors"], found["vector"]], wanted, strict=True):
        assert vector == pytest.approx(expected, abs=1e-5)
    assert found["refused"] == ["OllamaEndpointNotFoundError"] * 2


# --- embedchain -------------------------------------------------------------------------------------------------------

EMBEDCHAIN = """
    import contextlib, json, os, sys
    base, name, folder = sys.argv[1:]
    with contextlib.redirect_stdout(sys.stderr):
        from embedchain import App
        app = App.from_config(config={
            "app": {"config": {"id": "walk", "collect_metrics": False}},
            "llm": {"provider": "ollama", "config": {
                "model": name, "temperature": 0.0, "top_p": 1.0, "base_url": base, "stream": False}},
            "embedder": {"provider": "ollama", "config": {"model": name, "base_url": base}},
            "vectordb": {"provider": "chroma", "config": {"collection_name": "walk", "dir": folder}},
        })
        app.add("The red square is on the left of the blue circle.", data_type="text")
        app.add("Bread is made of flour and water.", data_type="text")
        found = {
            "count": app.db.count(),
            "search": [each["context"] for each in app.search("Bread is made of flour and water.", num_documents=1)],
            "query": app.query("Where is the red square?"),
            "again": app.query("Where is the red square?"),
            "chat": app.chat("And the circle?"),
        }
    print(json.dumps(found))
"""


@pytest.mark.parametrize("name", ["pebble:1.6", "pebble", MADE])
def test_embedchain(base: str, tmp_path: Path, name: str) -> None:
    """Its App asks for the list at the start, and pulls what it does not find under exactly that name."""
    found = walk("langchain", EMBEDCHAIN, tmp_path, base, name, tmp_path / "db")
    assert found["count"] == 2
    assert found["search"] == ["Bread is made of flour and water."]
    assert found["query"]
    assert found["query"] == found["again"]
    assert isinstance(found["chat"], str)


# --- llm --------------------------------------------------------------------------------------------------------------


def test_llm(base: str, model: pumice.Model, red: Path, tmp_path: Path) -> None:
    def llm(*arguments: object) -> str:
        call: list[str | Path] = [CLIENTS / "llm" / "bin" / "llm", *map(str, arguments)]
        return run(call, tmp_path, OLLAMA_HOST=base, LLM_USER_PATH=str(tmp_path / "llm")).removesuffix("\n")

    listed = llm("models")
    for name in ("pebble:1.6", "pebble:1.5", f"{MADE}:latest"):
        assert re.search(rf"^Ollama: (ollama/)?{re.escape(name)}", listed, re.MULTILINE), name
    known = llm("models", "--options", "-m", "ollama/pebble:1.6")
    assert "image/png" in known
    assert "schemas" in known
    cold = ("-m", "ollama/pebble:1.6", "-o", "temperature", "0")
    said, seen = model.ask("Hi").text, model.ask(QUESTION, red).text
    assert llm(*cold, "Hi") == said
    assert llm(*cold, "--no-stream", "Hi") == said
    assert llm(*cold, QUESTION, "-a", red) == seen
    assert llm("-m", f"ollama/{MADE}", "Hi") == said
    assert llm(*cold, "-s", "Be brief.", "Hi") == model.ask("Hi", system="Be brief.").text
    assert llm("-c", "-o", "temperature", "0", "And?")
    schema = ("--schema", "good bool", "--no-log")
    assert json.loads(llm(*cold, *schema, "Good?")).keys() == {"good"}
    logged = json.loads(llm("logs", "-n", "1", "--json"))[0]
    assert logged["response_json"]["done_reason"] == "stop"
    assert min(logged["input_tokens"], logged["output_tokens"]) > 0
