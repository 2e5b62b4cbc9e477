"""What others make of the engine's work: llama.cpp's server with slots, and Transformers' generate with rows.

Each function is a part of `engine.py`, which runs it in a process of its own. Figures have the engine's names.
"""

from __future__ import annotations

import base64
import http.client
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measured import random_llava, seconds

TOKENS = 32
CONTEXT = 64
"""Tokens of the prompt, before which no decode step is measured."""
AT_ONCE = (1, 2, 4, 8, 16)
SLOTS = 8
"""So many requests at once are asked of llama.cpp's server, at most."""
BATCHES = (1, 8)
"""And so many rows of Transformers."""
QUESTIONS = ("What is it?", "Who made this picture, and when?")
LEAST_VOCAB = 512
"""Every shape has so many tokens."""
STARTING_S = 300
Figures = dict[str, float]


# --- llama.cpp's server -----------------------------------------------------------------------------------------------


class Server:
    """`llama-server` on a port of its own, until the block ends."""

    def __init__(self, folder: Path, model: Path, options: Sequence[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        threads = ["-t", str(torch.get_num_threads())]
        # Without its second cache of whole prompts, which slots that keep theirs do not need.
        own = ["--host", "127.0.0.1", "--port", str(self._port), "--cache-ram", "0"]
        self._command = [str(folder / "llama-server"), "-m", str(model), *threads, *own, *options]

    def __enter__(self) -> Server:
        self._words = tempfile.TemporaryFile("w+")
        self._process = subprocess.Popen(self._command, stdout=self._words, stderr=subprocess.STDOUT)
        started = time.perf_counter()
        while not self._healthy():
            if self._process.poll() is not None or time.perf_counter() - started > STARTING_S:
                self._process.kill()
                self._words.seek(0)
                raise RuntimeError(f"{' '.join(self._command)} did not start:\n{self._words.read()[-2000:]}")
            time.sleep(0.2)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()
        self._words.close()

    def _healthy(self) -> bool:
        try:
            self.asked("/health")
        except (OSError, RuntimeError):
            return False
        return True

    def asked(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What it answers. Raises RuntimeError for an error."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port)
        try:
            connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"llama-server answered {response.status}: {text.decode(errors='replace'):.500}")
        return json.loads(text)


def slots(folder: str, model: str) -> Figures:
    """Several requests at once, each in its slot, where its prompt was read before."""
    options = ["-np", str(SLOTS), "-c", str(SLOTS * 256)]
    found: Figures = {}
    with Server(Path(folder), Path(model), options) as server, ThreadPoolExecutor(SLOTS) as crowd:

        def ask(slot: int, tokens: int) -> int:
            ids = torch.randint(3, LEAST_VOCAB, (CONTEXT,), generator=torch.Generator().manual_seed(slot)).tolist()
            settings = {"n_predict": tokens, "ignore_eos": True, "temperature": 0, "cache_prompt": True}
            said: dict[str, Any] = server.asked("/completion", {"prompt": ids, "id_slot": slot, **settings})
            return int(said["tokens_predicted"])

        for slot in range(SLOTS):
            ask(slot, 1)
        for rows in [each for each in AT_ONCE if each <= SLOTS]:
            started = time.perf_counter()
            tokens = sum(crowd.map(ask, range(rows), [TOKENS] * rows))
            found[f"rows {rows}"] = tokens / (time.perf_counter() - started)
            assert tokens == rows * TOKENS, f"{rows} requests gave {tokens} tokens"
    return found | {f"times {rows}": found[f"rows {rows}"] / found["rows 1"] for rows in AT_ONCE[1:] if rows <= SLOTS}


def slots_image(folder: str, model: str, eyes: str, picture: str) -> Figures:
    """Two questions about one picture, one after the other."""
    shown = base64.b64encode(Path(picture).read_bytes()).decode()
    with Server(Path(folder), Path(model), ["-mm", eyes, "-np", "1", "-c", "4096"]) as server:
        marker = server.asked("/props")["media_marker"]

        def first_token(question: str) -> float:
            prompt = {"prompt_string": f"USER: {marker}\n{question} ASSISTANT:", "multimodal_data": [shown]}
            settings = {"n_predict": 1, "temperature": 0, "cache_prompt": True}
            return seconds(lambda: server.asked("/completion", {"prompt": prompt, **settings}))

        found = {name: first_token(question) for name, question in zip(("first", "second"), QUESTIONS)}
    return found | {"times second": found["first"] / found["second"]}


# --- Transformers -----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(shape: str, dtype: str) -> Figures:
    """Rows of one length together, which no other can join."""
    model = random_llava(shape, getattr(torch, dtype), "cpu")
    return {f"rows {rows}": rows_per_s(model, rows, TOKENS) for rows in BATCHES}


def rows_per_s(model: Any, rows: int, tokens: int) -> float:
    """New tokens a second of so many rows together, the time of their prompts taken off."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, LEAST_VOCAB - 1, (rows, CONTEXT), generator=random).to(model.device)

    def run(new: int) -> None:
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)
        assert said[0, -1].item() >= 0  # waits for the device

    run(1)
    return rows * tokens / (seconds(lambda: run(1 + tokens)) - seconds(lambda: run(1)))
