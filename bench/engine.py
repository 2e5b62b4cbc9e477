"""The engine beside the bare network and its peers: one request, many at once, an image asked about again, a form.

    python bench/engine.py [--shape 7b] [--quant q4_0] [--parts …] [--rounds 3] [--models DIR] [--llama DIR]
    python bench/engine.py --cuda [--shape 7b] [--parts …] [--rounds 3]

Random weights, made once in `--models`. Each part runs in a process of its own, so that "after a restart" is one; in
each round all of them, one after another. Parts may be run one by one: their samples stay in a file in `--models`,
where new ones of a part replace the old, and the page is written from all. It is bench/results-engine.md (`--output`
names another file): medians, in brackets the least and the most.

The part `drafts` asks the model that `--repeating` names, if it does: drafts pay as far as answers repeat themselves.

Parts of peers: `slots` and `slots-image` need llama.cpp's llama-server in `--llama`, `bfloat16` and `float32` need
Transformers. With `--cuda` see `engine_cuda.py`.
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
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import engine_cuda
import random_models
import torch
from cpu import PICTURES, processor
from measured import seconds
from PIL import Image
from serving import AT_ONCE, CONTEXT, QUESTIONS, TOKENS, Figures, generate, slots, slots_image

import pumice
from pumice.engine import Engine, Limits, Request, Sampling
from pumice.engine.form import Form
from pumice.network.llama import Batch
from pumice.network.llava import Llava
from pumice.ops import Pages

HERE = Path(__file__).resolve().parent
OURS, SERVER = "pumice", "llama.cpp's server"
PARTS = {
    "decode": OURS, "slots": SERVER, "bfloat16": "Transformers bfloat16", "float32": "Transformers float32",
    "image": OURS, "slots-image": SERVER, "form": OURS, "drafts": OURS, "chunk": OURS,
}  # fmt: skip
"""In the order of a round, and whose figures they are."""
CHUNKS = (32, 64, 128, 256, 576)
WORDS = Form.of(regex="[a-z ]{200,}")
REPEATED = "amber, copper, glass, harbour, lantern, pebble, river, silver, stone, willow"
ASKED_AGAIN = (
    f"Write these words in one line, and then the same line three times more: {REPEATED}.",
    f"Write a JSON list of these words, and then the same list three times more: {REPEATED}.",
)
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
    "plain": "answers that repeat themselves, without drafts: tokens/s",
    "drafted": "the same with drafts: tokens/s",
    "times drafts": "with drafts: times without",
    "a pass": "with drafts: tokens a pass",
    **{f"chunk {size}": f"a prompt of 576 tokens in parts of {size}: tokens/s" for size in CHUNKS},
    **{f"stall {size}": f"what a row waits for a part of {size}, s" for size in CHUNKS},
}  # fmt: skip
Samples = dict[str, dict[str, list[float]]]
"""Of each part each figure, and the load average at its beginning."""


# --- one part, in a process of its own --------------------------------------------------------------------------------


def loaded(files: Sequence[str]) -> pumice.Model:
    model = pumice.load(files[0], beside=files[1], template="vicuna_v1")
    # Random weights end whenever they like.
    model.network.config = dataclasses.replace(model.network.config, stop_ids=())
    return model


def random_ids(network: Llava, tokens: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(3, network.config.text.vocab, (tokens,), generator=random).tolist()


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
    engine = Engine(model.network, Limits(drafts=0))  # random weights repeat themselves
    grammar = None if form is None else model._grammar(form)
    asked = [
        Request(random_ids(model.network, CONTEXT, seed), [], Sampling(max_tokens=TOKENS + rows + 8), grammar)
        for seed in range(rows)
    ]
    under_way = [engine.submit(each) for each in asked]
    while not all(each.steps for each in under_way):
        engine.step()
    return engine


def decode(*files: str) -> Figures:
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


def image(*files: str) -> Figures:
    """A folder is made and left; a new process finds it."""
    model, picture = loaded(files[:2]), files[2]
    with tempfile.TemporaryDirectory() as folder:
        model.limit(Limits(cache_dir=Path(folder), drafts=0))
        found = {
            "first": first_token(model, QUESTIONS[0], picture),
            "second": first_token(model, QUESTIONS[1], picture),
        }
        model.engine.wait()
        found["folder"] = sum(each.stat().st_size for each in Path(folder).iterdir()) / 1e9
        del model
        found |= child(["again", *files, folder])
    return found | {f"times {name}": found["first"] / found[name] for name in ("second", "restart")}


def again(*files: str) -> Figures:
    model = loaded(files[:2])
    model.limit(Limits(cache_dir=Path(files[3]), drafts=0))
    return {"restart": first_token(model, QUESTIONS[1], files[2])}


def form(*files: str) -> Figures:
    model = loaded(files)
    engines = {"free": decoding(model, 1), "held": decoding(model, 1, WORDS)}
    passed: dict[str, list[float]] = defaultdict(list)
    for _ in range(TOKENS):
        for name, engine in engines.items():
            passed[name].append(1000 * seconds(engine.step))
    found = {name: statistics.median(each) for name, each in passed.items()}
    return found | {"form": 100 * (found["held"] / found["free"] - 1)}


def drafts(*files: str) -> Figures:
    """Of one file: a model by its name, which is asked to repeat itself. Random weights do so unasked."""
    if len(files) == 1:
        model = pumice.load(files[0])
        prompts = [model.see(pumice.Question(each)).encoded.ids for each in ASKED_AGAIN]
    else:
        model = loaded(files)
        prompts = [random_ids(model.network, CONTEXT, seed) for seed in range(2)]
    requests = [Request(ids, [], Sampling(max_tokens=4 * TOKENS)) for ids in prompts]
    found: dict[str, float] = {}
    for name, limits in (("plain", Limits(drafts=0)), ("drafted", Limits())):
        engine = Engine(model.network, limits)
        list(engine.follow(engine.submit(requests[0])))  # from it is known what passes take
        tokens, passes, passed = 0, 0, 0.0
        for request in requests:
            generation = engine.submit(request)
            while not generation.steps:
                engine.step()
            read = len(generation.steps)
            while not generation.ended:
                passed += seconds(engine.step)
                passes += 1
            tokens += len(generation.steps) - read
        found[name] = tokens / passed
    return found | {"times drafts": found["drafted"] / found["plain"], "a pass": tokens / passes}


def chunk(*files: str) -> Figures:
    """What reading a prompt in parts costs, and how long a part lets other rows wait."""
    model, found = loaded(files), {}
    for size in CHUNKS:
        engine = Engine(model.network, Limits(alone_chunk=size))
        request = Request(random_ids(model.network, 576, size), [], Sampling(max_tokens=1))
        passed = seconds(lambda engine=engine, request=request: list(engine.follow(engine.submit(request))))
        found |= {f"chunk {size}": 576 / passed, f"stall {size}": passed * size / 576}
    return found


def part(name: str, *arguments: str) -> Figures:
    """The figures of a part, in this process."""
    ours = {"decode": decode, "image": image, "again": again, "form": form, "drafts": drafts, "chunk": chunk}
    theirs = {"slots": slots, "slots-image": slots_image, "bfloat16": generate, "float32": generate}
    return {**ours, **theirs, **engine_cuda.PARTS}[name](*arguments)


def child(arguments: list[str]) -> Figures:
    """Those of a part, in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--child", *arguments], stdout=subprocess.PIPE, check=True)
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


# --- the page ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=random_models.SHAPES, default="7b")
    parser.add_argument("--quant", choices=random_models.MIXES, default="q4_0")
    parser.add_argument("--parts", nargs="+", help=f"of {', '.join(PARTS)}; the default are pumice's own")
    parser.add_argument(
        "--repeating", help="a model by its name that the part `drafts` asks, instead of random weights"
    )
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--models", type=Path, default=HERE / "models", help="where the random files are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    engine_cuda.add_options(parser)
    chosen = parser.parse_args()
    if chosen.cuda:
        engine_cuda.main(parser, chosen, child)
        return
    parts = chosen.parts or [part for part, peer in PARTS.items() if peer == OURS]
    if unknown := sorted({*parts} - {*PARTS}):
        parser.error(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    if chosen.llama is None and any(PARTS[part] == SERVER for part in parts):
        parser.error("llama.cpp's server is asked for; name its folder with --llama")
    models = chosen.models.resolve()
    given = _given(models, chosen)
    kept = models / f"engine-{chosen.shape}-{chosen.quant}.json"
    samples: Samples = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for part in parts:
        samples.pop(part, None)
    for round in range(chosen.rounds):
        for part in [each for each in PARTS if each in parts]:
            found = {"load": os.getloadavg()[0]} | child([part, *given[part]])
            for name, value in found.items():
                samples.setdefault(part, {}).setdefault(name, []).append(value)
            kept.write_text(json.dumps(samples), encoding="utf-8")
            print(f"round {round + 1}: {part}", file=sys.stderr)
    output = chosen.output or HERE / "results-engine.md"
    output.write_text("\n".join(_page(chosen, samples)) + "\n", encoding="utf-8")
    print(output.read_text(encoding="utf-8"))


def _given(models: Path, chosen: argparse.Namespace) -> dict[str, list[str]]:
    """What the process of each part is told."""
    files = [str(each) for each in random_models.files(models, chosen.shape, chosen.quant, tiled=True)]
    picture = models / "picture-1.6.png"
    if not picture.exists():
        Image.effect_mandelbrot(PICTURES["1.6"], (-2, -1, 1, 1), 60).convert("RGB").save(picture)
    given = dict.fromkeys(PARTS, files) | {"image": [*files, str(picture)]}
    given |= {"drafts": [chosen.repeating]} if chosen.repeating else {}
    given |= {dtype: [chosen.shape, dtype] for dtype in ("bfloat16", "float32")}
    llama = str(chosen.llama)
    return given | {"slots": [llama, files[0]], "slots-image": [llama, *files, str(picture)]}


def _page(chosen: argparse.Namespace, samples: Samples) -> list[str]:
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for part, figures in samples.items():
        for name, values in figures.items():
            found[name][PARTS[part]] = values
    loads = [load for figures in samples.values() for load in figures["load"]]
    rounds = sorted({len(figures["load"]) for figures in samples.values()})
    lines = [
        f"# The engine on this CPU: {chosen.shape}, {chosen.quant}, random weights",
        "",
        f"Made by `python bench/engine.py`. {processor()}; {torch.get_num_threads()} threads. Load average",
        f"{min(loads):.1f} to {max(loads):.1f} when a part began: only a quiet machine gives figures. Prompts of",
        f"{CONTEXT} tokens, then {TOKENS} tokens each. Medians (least–most) of {' or '.join(map(str, rounds))} rounds.",
    ]
    beside = {name: found[name] for name in ROWS if {*found[name]} - {OURS}}
    if beside:
        lines += ["", *_beside(beside)]
    alone = [f"| {what} | {_cell(found[name][OURS])} |" for name, what in ROWS.items() if {*found[name]} == {OURS}]
    return lines + (["", "| what | pumice |", "|---|---|", *alone] if alone else [])


def _beside(found: dict[str, dict[str, list[float]]]) -> list[str]:
    """Figures that peers have too, and how many times faster pumice is."""
    peers = [each for each in dict.fromkeys(PARTS.values()) if any(each in row for row in found.values())]
    others = [each for each in peers if each != OURS]
    lines = [
        f"| what | {' | '.join(peers)} | {' | '.join(f'times {each}' for each in others)} |",
        "|---|" + "---|" * (len(peers) + len(others)),
    ]
    for name, row in found.items():
        cells = [_cell(row.get(each, [])) for each in peers] + [_times(name, row, each) for each in others]
        lines.append(f"| {ROWS[name]} | {' | '.join(cells)} |")
    return lines


def _times(name: str, row: dict[str, list[float]], peer: str) -> str:
    if not {OURS, peer} <= {*row} or name.startswith("times"):
        return ""
    ours, theirs = statistics.median(row[OURS]), statistics.median(row[peer])
    return f"{theirs / ours if ROWS[name].endswith(', s') else ours / theirs:.2f}"


def _cell(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{each:.3g}" for each in values)
    return f"{statistics.median(values):.3g} ({min(values):.3g}–{max(values):.3g})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(part(*sys.argv[2:])))
    else:
        main()
