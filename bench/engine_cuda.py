"""The engine on a GPU beside what the GPU can do, and Transformers: `python bench/engine.py --cuda`.

Shapes of LLaVA 1.5 in bfloat16, weights drawn on the device: there is no file. Writes bench/results-gpu.md. Parts:

limits: memory read by a sum, memory copied, and products of large bfloat16 matrices.
one: one request, tokens a second of the decode steps, by the engine and by Transformers' generate.
crowd: `--requests` questions at once, each about an image of its own, from their pixels to their last token.
prefill: one long prompt; MFU is 2 × weights × tokens / seconds, of what the matrix products reach.

`--device cpu --shape tiny` runs the same where there is no GPU, to see that it works.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import random_models
import torch
from cpu import text_weights
from measured import random_llava, seconds
from serving import CONTEXT, Figures, rows_per_s

from pumice.config import ImageConfig, LlavaConfig, ProjectorConfig
from pumice.engine import Engine, Limits, Request, Sampling, position_bytes
from pumice.image import Grid, Prepared
from pumice.network.llava import Llava

HERE = Path(__file__).resolve().parent
REPEATS = 10


@dataclass(frozen=True)
class Work:
    """How much of each thing: bytes that are read, rows and columns of matrices, new tokens of one request and of each
    in the crowd, tokens of the long prompt."""

    probe_bytes: int
    side: int
    one: int
    crowd: int
    prompt: int


WORK = {"cuda": Work(2**32, 8192, 128, 64, 2048), "cpu": Work(2**24, 256, 8, 4, 128)}
IMAGE_ID = 1
"""The token that stands for a feature; none of the random prompts has it otherwise."""
ROWS = {
    "read": "memory read, GB/s",
    "copy": "memory read and written by a copy, GB/s",
    "matmul": "products of bfloat16 matrices, TFLOP/s",
    "one": "one request: tokens/s",
    "one share": "one request, of what the faster of both memory speeds allows",
    "one transformers": "one row of Transformers' generate: tokens/s",
    "one times": "one request, times Transformers",
    "crowd images": "{requests} requests at once, an image each: images/s",
    "crowd": "{requests} requests at once: tokens/s",
    "crowd images transformers": "{requests} rows of Transformers' generate: images/s",
    "crowd transformers": "{requests} rows of Transformers' generate: tokens/s",
    "crowd times": "{requests} requests at once, times Transformers",
    "prefill": "a prompt of {prompt} tokens: tokens/s",
    "prefill share": "its MFU, of the products above",
}
SHARES = {"one share", "prefill share"}


# --- one part, in a process of its own --------------------------------------------------------------------------------


def random_network(shape_name: str, device: str) -> Llava:
    """LLaVA 1.5 of a shape. Norms are 1, matrices as wide as training begins with, so no score leaves bfloat16."""
    shape = random_models.SHAPES[shape_name]
    vision = shape.vision
    mean, std = ((each[0], each[1], each[2]) for each in (random_models.CLIP_MEAN, random_models.CLIP_STD))
    config = LlavaConfig(
        text=shape.text, vision=vision, projector=ProjectorConfig(),
        image=ImageConfig("pad", vision.image_px, vision.image_px, mean, std),
        template="vicuna_v1", stop_ids=(), image_token_id=IMAGE_ID, family="llava-1.5",
    )  # fmt: skip
    with torch.device("meta"):
        network = Llava(config).to(torch.bfloat16)
    network.to_empty(device=device).requires_grad_(False).eval()
    for name, values in network.named_parameters():
        if "norm" in name:
            values.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            values.normal_(std=0.02)
    return network


def work(device: str) -> Work:
    return WORK[device.partition(":")[0]]


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def fastest(job: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of several runs, after one that warms up."""

    def run() -> None:
        job()
        wait(device)

    run()
    return min(seconds(run) for _ in range(REPEATS))


@torch.inference_mode()
def limits(shape: str, device: str, requests: str) -> Figures:
    size, side = work(device).probe_bytes, work(device).side
    numbers_N = torch.ones(size // 4, device=device)
    other_N, square_CC = torch.empty_like(numbers_N), torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return {
        "read": size / fastest(numbers_N.sum, device),
        "copy": 2 * size / fastest(lambda: other_N.copy_(numbers_N), device),
        "matmul": 2 * side**3 / fastest(lambda: square_CC @ square_CC, device),
    }


def request(network: Llava, words: int, new: int, seed: int, image: Prepared | None = None) -> Request:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, network.config.text.vocab - 1, (words,), generator=random).tolist()
    shown = [] if image is None else [IMAGE_ID] * image.grid.tokens
    return Request(ids[:4] + shown + ids[4:], [image] if image else [], Sampling(max_tokens=new))


def picture(network: Llava, seed: int) -> Prepared:
    """An image whose pixels are noise: no other has its digest."""
    vision = random_models.SHAPES["7b"].vision if network.config.vision is None else network.config.vision
    pixels = torch.randn(1, 3, vision.image_px, vision.image_px, generator=torch.Generator().manual_seed(seed))
    size = (vision.image_px, vision.image_px)
    return Prepared(pixels.numpy(), Grid(vision.side), size, f"{seed + 1:064x}")


def answered(engine: Engine, requests: list[Request]) -> None:
    """All of them to their end."""
    under_way = [engine.submit(each) for each in requests]
    while engine.step():
        pass
    for each in under_way:
        assert len(each.steps) == each.request.sampling.max_tokens, each.error


def one(shape: str, device: str, requests: str) -> Figures:
    """Bytes of a token beside its speed: what must be read of weights and of keys and values."""
    network, new = random_network(shape, device), work(device).one
    engine = Engine(network, Limits(drafts=0), positions=2048)
    generation = engine.submit(request(network, CONTEXT, new + 8, seed=0))
    while len(generation.steps) < 4:  # the first steps choose kernels
        engine.step()
    passed = seconds(lambda: [engine.step() for _ in range(new)])
    weights = text_weights(network.config.text) + network.config.text.width * network.config.text.vocab
    read = weights * network.like.itemsize + (CONTEXT + new // 2) * position_bytes(network)
    return {"one": new / passed, "bytes": read}


@torch.inference_mode()
def one_transformers(shape: str, device: str, requests: str) -> Figures:
    return {"one transformers": rows_per_s(random_llava(shape, torch.bfloat16, device), 1, work(device).one)}


def crowd(shape: str, device: str, requests: str) -> Figures:
    network, count, new = random_network(shape, device), int(requests), work(device).crowd
    pictures = [picture(network, seed) for seed in range(count + 1)]
    length = len(request(network, CONTEXT, new, 0, pictures[0]).ids) + new
    positions = (count + 1) * -(-length // 32) * 32
    engine = Engine(network, Limits(rows=count, drafts=0), positions=positions)
    answered(engine, [request(network, CONTEXT, 4, count, pictures[count])])
    asked = [request(network, CONTEXT, new, seed, pictures[seed]) for seed in range(count)]
    passed = seconds(lambda: answered(engine, asked))
    assert engine.pages_held == 0
    return {"crowd": count * new / passed, "crowd images": count / passed}


@torch.inference_mode()
def crowd_transformers(shape: str, device: str, requests: str) -> Figures:
    model, count, new = random_llava(shape, torch.bfloat16, device), int(requests), work(device).crowd
    text, vision = random_models.SHAPES[shape].text, random_models.SHAPES[shape].vision
    ids = torch.randint(3, text.vocab - 1, (count, CONTEXT), generator=torch.Generator().manual_seed(0))
    shown = torch.full((count, vision.patches), model.config.image_token_id)
    ids = torch.cat((ids[:, :4], shown, ids[:, 4:]), dim=1).to(device)
    pixels = torch.randn(count, 3, vision.image_px, vision.image_px, dtype=torch.bfloat16)

    def run(new: int) -> None:
        settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        on_device = pixels.to(device)
        said = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=on_device, **settings)
        assert said.shape[1] >= new
        wait(device)

    run(4)
    passed = seconds(lambda: run(new))
    return {"crowd transformers": count * new / passed, "crowd images transformers": count / passed}


def prefill(shape: str, device: str, requests: str) -> Figures:
    network, prompt = random_network(shape, device), work(device).prompt
    engine = Engine(network, Limits(alone_chunk=prompt), positions=3 * prompt)
    answered(engine, [request(network, prompt, 1, seed=1)])
    passed = seconds(lambda: answered(engine, [request(network, prompt, 1, seed=2)]))
    return {"prefill": prompt / passed, "flops": 2 * text_weights(network.config.text) * prompt / passed}


PARTS: dict[str, Callable[[str, str, str], Figures]] = {
    "cuda-limits": limits, "cuda-one": one, "cuda-one-transformers": one_transformers, "cuda-crowd": crowd,
    "cuda-crowd-transformers": crowd_transformers, "cuda-prefill": prefill,
}  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cuda", action="store_true", help="measure on a GPU, in bfloat16, instead")
    parser.add_argument("--device", default="cuda", help="with --cuda: which one")
    parser.add_argument("--requests", type=int, default=64, help="with --cuda: so many at once")


def main(parser: argparse.ArgumentParser, chosen: argparse.Namespace, child: Callable[[list[str]], Figures]) -> None:
    """child: runs a part in a process of its own."""
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--cuda came, and PyTorch finds no CUDA device on this machine; nothing was measured")
    parts = [f"cuda-{each}" for each in chosen.parts] if chosen.parts else list(PARTS)
    if unknown := [each for each in parts if each not in PARTS]:
        named = ", ".join(each.removeprefix("cuda-") for each in PARTS)
        parser.error(f"there is no part {unknown[0].removeprefix('cuda-')!r}; with --cuda parts are {named}")
    samples: dict[str, list[float]] = defaultdict(list)
    for round in range(chosen.rounds):
        for part in parts:
            for name, value in child([part, chosen.shape, chosen.device, str(chosen.requests)]).items():
                samples[name].append(value)
            print(f"round {round + 1}: {part}", file=sys.stderr)
    middle = {name: statistics.median(values) for name, values in samples.items()}
    output = chosen.output or HERE / "results-gpu.md"
    output.write_text("\n".join(_page(chosen, middle)) + "\n", encoding="utf-8")
    print(output.read_text(encoding="utf-8"))


def _page(chosen: argparse.Namespace, middle: Figures) -> list[str]:
    figures, of = middle | _ratios(middle), work(chosen.device)
    scale = {"read": 1e-9, "copy": 1e-9, "matmul": 1e-12}
    name = torch.cuda.get_device_name(chosen.device) if chosen.device.startswith("cuda") else "the CPU"
    lines = [
        f"# The engine on {name}: {chosen.shape}, bfloat16, random weights",
        "",
        f"Made by `python bench/engine.py --cuda` with torch {torch.__version__}: medians of {chosen.rounds} rounds.",
        f"Prompts of {CONTEXT} tokens and what an image takes; answers of {of.one} tokens alone and {of.crowd}",
        "in the crowd, whose time runs from the pixels to the last token.",
        "",
        "| what | figure |",
        "|---|---|",
    ]
    for name, what in ROWS.items():
        if name in figures:
            value = f"{figures[name]:.0%}" if name in SHARES else f"{figures[name] * scale.get(name, 1.0):.3g}"
            lines.append(f"| {what.format(requests=chosen.requests, prompt=of.prompt)} | {value} |")
    return lines


def _ratios(middle: Figures) -> Figures:
    found: Figures = {}
    if {"one", "read"} <= {*middle}:
        found["one share"] = middle["one"] * middle["bytes"] / max(middle["read"], middle["copy"])
    if {"prefill", "matmul"} <= {*middle}:
        found["prefill share"] = middle["flops"] / middle["matmul"]
    for name in ("one", "crowd"):
        if {name, f"{name} transformers"} <= {*middle}:
            found[f"{name} times"] = middle[name] / middle[f"{name} transformers"]
    return found
