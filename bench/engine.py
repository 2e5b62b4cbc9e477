"""The engine beside the bare network on this machine: one request, many at once, an image asked about again, a form.

    python bench/engine.py [--shape 7b] [--quant q4_0] [--parts …] [--rounds 3] [--models DIR]

Random weights, made once in `--models`. Writes bench/results-engine.md (`--output` names another file): medians of the
rounds, in brackets the least and the most; each part runs in a process of its own, so that "after a restart" is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import random_models
import torch
from cpu import PICTURES, processor
from PIL import Image

import pumice
from pumice.engine import Engine, Limits, Request, Sampling
from pumice.engine.form import Form
from pumice.network.llama import Batch
from pumice.network.llava import Llava
from pumice.ops import Pages

HERE = Path(__file__).resolve().parent
PARTS = ("decode", "image", "form", "chunk")
TOKENS = 32
CONTEXT = 64
"""Tokens of the prompt, before which no decode step is measured."""
AT_ONCE = (1, 2, 4, 8, 16)
CHUNKS = (32, 64, 128, 256, 576)
QUESTIONS = ("What is it?", "Who made this picture, and when?")
WORDS = Form.of(regex="[a-z ]{200,}")
ROWS = {
    "bare": "one row, the bare network: tokens/s",
    "engine": "one request, the engine: tokens/s",
    "overhead": "what the engine adds to a token, %",
    **{f"rows {rows}": f"{rows} requests at once: tokens/s" for rows in AT_ONCE},
    **{f"times {rows}": f"{rows} requests at once: times one" for rows in AT_ONCE[1:]},
    "first": "first question about a picture of five tiles: first token, s",
    "second": "second question about it: first token, s",
    "restart": "the same in a new process with the cache folder: first token, s",
    "times second": "second question: times sooner",
    "times restart": "in a new process: times sooner",
    "folder": "what the cache folder takes, GB",
    "free": "free answers: a token, ms",
    "held": "answers held to a form: a token, ms",
    "form": "what a form adds to a token, %",
    **{f"chunk {size}": f"a prompt of 576 tokens in parts of {size}: tokens/s" for size in CHUNKS},
    **{f"stall {size}": f"what a row waits for a part of {size}, s" for size in CHUNKS},
}  # fmt: skip
Figures = dict[str, float]


# --- one part, in a process of its own --------------------------------------------------------------------------------


def loaded(files: list[str]) -> pumice.Model:
    model = pumice.load(files[0], beside=files[1], template="vicuna_v1")
    # Random weights end whenever they like.
    model.network.config = dataclasses.replace(model.network.config, stop_ids=())
    return model


def random_ids(network: Llava, tokens: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, network.config.text.vocab, (tokens,), generator=random).tolist()


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@torch.inference_mode()
def bare(network: Llava) -> Iterator[None]:
    """A step a token, with pages that nobody manages."""
    text = network.config.text
    shape = (1, text.kv_heads, CONTEXT + TOKENS + 1, text.head_width)
    keys, values = ([torch.zeros(shape, dtype=torch.float16) for _ in range(text.layers)] for _ in range(2))
    pages = Pages(keys, values, torch.zeros(1, 1, dtype=torch.int64))
    ids_1T = torch.tensor([random_ids(network, CONTEXT)])
    positions_1T = torch.arange(CONTEXT)[None]
    while True:
        hidden = network(network.language_model.embed_tokens(ids_1T), Batch(positions_1T, pages=pages, kept=1))
        ids_1T = network.logits(hidden[:, -1]).argmax(-1, keepdim=True)
        positions_1T = positions_1T[:, -1:] + 1
        yield


def decoding(model: pumice.Model, rows: int, form: Form | None = None) -> Engine:
    """An engine whose requests have all read their prompts."""
    engine = Engine(model.network)
    grammar = None if form is None else model._grammar(form)
    asked = [
        Request(random_ids(model.network, CONTEXT, seed), [], Sampling(max_tokens=TOKENS + rows + 8), grammar)
        for seed in range(rows)
    ]
    under_way = [engine.submit(each) for each in asked]
    while not all(each.steps for each in under_way):
        engine.step()
    return engine


def decode(files: list[str]) -> Figures:
    model = loaded(files)
    alone, loop = decoding(model, 1), bare(model.network)
    next(loop)
    passed: dict[str, list[float]] = defaultdict(list)
    for _ in range(TOKENS):
        passed["bare"].append(seconds(lambda: next(loop)))
        passed["engine"].append(seconds(alone.step))
    found = {name: 1 / statistics.median(each) for name, each in passed.items()}
    found["overhead"] = 100 * (found["bare"] / found["engine"] - 1)
    for rows in AT_ONCE:
        engine = decoding(model, rows)
        found[f"rows {rows}"] = rows * TOKENS / seconds(lambda engine=engine: [engine.step() for _ in range(TOKENS)])
    return found | {f"times {rows}": found[f"rows {rows}"] / found["rows 1"] for rows in AT_ONCE[1:]}


def first_token(model: pumice.Model, question: str, picture: str) -> float:
    return seconds(lambda: model.ask(question, picture, sampling=Sampling(max_tokens=1)))


def image(files: list[str]) -> Figures:
    """A folder is made and left; a new process finds it."""
    model, picture = loaded(files[:2]), files[2]
    with tempfile.TemporaryDirectory() as folder:
        model.limit(Limits(cache_dir=Path(folder)))
        found = {
            "first": first_token(model, QUESTIONS[0], picture),
            "second": first_token(model, QUESTIONS[1], picture),
        }
        model.engine.wait()
        found["folder"] = sum(each.stat().st_size for each in Path(folder).iterdir()) / 1e9
        del model
        found |= child(["again", *files, folder])
    return found | {f"times {name}": found["first"] / found[name] for name in ("second", "restart")}


def again(files: list[str]) -> Figures:
    model = loaded(files[:2])
    model.limit(Limits(cache_dir=Path(files[3])))
    return {"restart": first_token(model, QUESTIONS[1], files[2])}


def form(files: list[str]) -> Figures:
    model = loaded(files)
    engines = {"free": decoding(model, 1), "held": decoding(model, 1, WORDS)}
    passed: dict[str, list[float]] = defaultdict(list)
    for _ in range(TOKENS):
        for name, engine in engines.items():
            passed[name].append(1000 * seconds(engine.step))
    found = {name: statistics.median(each) for name, each in passed.items()}
    return found | {"form": 100 * (found["held"] / found["free"] - 1)}


def chunk(files: list[str]) -> Figures:
    """What reading a prompt in parts costs, and how long a part lets other rows wait."""
    model, found = loaded(files), {}
    for size in CHUNKS:
        engine = Engine(model.network, Limits(alone_chunk=size))
        request = Request(random_ids(model.network, 576, size), [], Sampling(max_tokens=1))
        passed = seconds(lambda engine=engine, request=request: list(engine.follow(engine.submit(request))))
        found |= {f"chunk {size}": 576 / passed, f"stall {size}": passed * size / 576}
    return found


def child(arguments: list[str]) -> Figures:
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], stdout=subprocess.PIPE, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


# --- the page ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=random_models.SHAPES, default="7b")
    parser.add_argument("--quant", choices=random_models.MIXES, default="q4_0")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--models", type=Path, default=HERE / "models", help="where the random files are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results-engine.md")
    chosen = parser.parse_args()
    files = [str(each) for each in random_models.files(chosen.models.resolve(), chosen.shape, chosen.quant, tiled=True)]
    picture = chosen.models.resolve() / "picture-1.6.png"
    if not picture.exists():
        Image.effect_mandelbrot(PICTURES["1.6"], (-2, -1, 1, 1), 60).convert("RGB").save(picture)
    samples: dict[str, list[float]] = defaultdict(list)
    before = os.getloadavg()[0]
    for round in range(chosen.rounds):
        for part in chosen.parts:
            for name, value in child([part, *files, *([str(picture)] if part == "image" else [])]).items():
                samples[name].append(value)
            print(f"round {round + 1}: {part}", file=sys.stderr)
    lines = [
        f"# The engine on this CPU: {chosen.shape}, {chosen.quant}, random weights",
        "",
        f"Made by `python bench/engine.py`. {processor()}; {torch.get_num_threads()} threads. Load average",
        f"{before:.1f} before, {os.getloadavg()[0]:.1f} after: only a quiet one gives figures. Prompts of {CONTEXT}",
        f"tokens, then {TOKENS} tokens each. Medians (least–most) of {chosen.rounds} rounds.",
        "",
        "| what | figure |",
        "|---|---|",
    ]
    lines += [f"| {what} | {_cell(samples[name])} |" for name, what in ROWS.items() if name in samples]
    chosen.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(chosen.output.read_text(encoding="utf-8"))


def _cell(values: list[float]) -> str:
    middle, least, most = statistics.median(values), min(values), max(values)
    return f"{middle:.3g}" if len(values) == 1 else f"{middle:.3g} ({least:.3g}–{most:.3g})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        part, *arguments = sys.argv[2:]
        print(
            json.dumps(
                {"decode": decode, "image": image, "again": again, "form": form, "chunk": chunk}[part](arguments)
            )
        )
    else:
        main()
