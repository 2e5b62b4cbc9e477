"""The process that is measured, of pumice or Transformers: `python bench/measured.py PEER PHASE …` prints its figures.

Started by `peers.py`, once for every figure, so that no program finds what another left in memory.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import limits
import random_models
import torch

if TYPE_CHECKING:
    from pumice.engine import Engine

REPEATS = 3
DECODED_TOKENS = 32
WARM_UP_TOKENS = 16
QUESTION = "What is it?"
NO_SYSTEM = ""
"""llama.cpp's template of Vicuna has no words before the question."""
LEAST_VOCAB = 512
"""Every shape has so many tokens."""
OUTLIER, OUTLIER_CHANNELS = 20.0, 4
"""So many channels of what each norm gives are so many times greater than the others."""


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def pumice(phase: str, model_path: str, eyes_path: str, picture: str) -> dict[str, float]:
    if phase == "features":
        return features(model_path, eyes_path, picture)
    if phase == "start":
        return {"ready_s": seconds(lambda: ready(model_path, eyes_path))}
    import pumice
    from pumice.engine import Engine, Limits, Request, Sampling

    started = time.perf_counter()
    model = pumice.load(model_path, beside=eyes_path)
    figures = {"load_s": time.perf_counter() - started}
    network = model.network
    network.config = dataclasses.replace(network.config, stop_ids=())  # random weights end whenever they like

    def prefill(tokens: int) -> Engine:
        ids = torch.randint(3, network.config.text.vocab, (tokens,), generator=torch.Generator().manual_seed(0))
        engine = Engine(network, Limits(drafts=0))  # random weights repeat themselves: a step would be several tokens
        generation = engine.submit(Request(ids.tolist(), [], Sampling(max_tokens=2 * DECODED_TOKENS + 2)))
        while not generation.steps:
            engine.step()
        return engine

    if phase.startswith("prefill"):
        prefill(WARM_UP_TOKENS)
        tokens = int(phase.partition("-")[2])
        return figures | {"tokens_per_s": tokens / seconds(lambda: prefill(tokens))}
    if phase == "decode":
        engine = prefill(1)
        passed = seconds(lambda: [engine.step() for _ in range(DECODED_TOKENS)])
        figures["tokens_per_s"] = DECODED_TOKENS / passed
        return figures | of_reading(engine, Path(model_path))
    once = Sampling(max_tokens=1)
    figures["first_s"] = seconds(lambda: model.ask(QUESTION, picture, system=NO_SYSTEM, sampling=once))
    if phase == "image-1.5":
        from pumice.image import prepare

        seen = prepare(picture, *model.eyes())
        pixels = torch.from_numpy(seen.pixels).to(network.like.dtype)
        with torch.inference_mode():
            passed = [seconds(lambda: network.encode(pixels, [seen.grid])) for _ in range(REPEATS)]
        figures["encode_s"] = statistics.median(passed)
    return figures


def of_reading(engine: Engine, model: Path) -> dict[str, float]:
    """How fast a loop reads as much other memory between the steps, in GB/s, and how fast a step reads weights, as a
    share of that and of how fast the loop reads the same file: memory that others share is now faster, now slower.
    Medians. Nothing where no compiler is installed."""
    from pumice.checkpoints.mapped import MappedFile

    shape, _, mix = model.stem.partition("-")
    weights = random_models.read_bytes(random_models.SHAPES[shape], mix)
    read = limits.reader(model.parent, torch.get_num_threads())
    if read is None:
        return {}
    file_N, other_N = MappedFile(model, size := model.stat().st_size).bytes, limits.in_large_pages(size)
    rounds = [
        [seconds(work) for work in (engine.step, lambda: read(other_N), lambda: read(file_N))]
        for _ in range(DECODED_TOKENS + 1)
    ]
    step_s, other_s, file_s = (statistics.median(each) for each in zip(*rounds[1:]))  # the first finds pages
    return {
        "reading": size / other_s / 1e9,
        "of_reading": weights / step_s * other_s / size,
        "of_reading_file": weights / step_s * file_s / size,
    }


def ready(model_path: str, eyes_path: str) -> None:
    """From a file to the first token of a short text."""
    import pumice

    model = pumice.load(model_path, beside=eyes_path, template="plain")
    model.ask(QUESTION, sampling=pumice.Sampling(max_tokens=1))


def features(model_path: str, eyes_path: str, picture: str) -> dict[str, float]:
    """How far the features of the eyes, as they run beside a quantised model, are from those in float32: one less the
    least cosine of a position. Of the random tower, and of the same function where channels stand out."""
    files = (model_path, eyes_path, picture)
    return {
        "off": _off(*files, None, 1.0),
        "off_bfloat16": _off(*files, "bfloat16", 1.0),
        "off_outliers": _off(*files, None, OUTLIER),
        "off_outliers_bfloat16": _off(*files, "bfloat16", OUTLIER),
    }


@torch.inference_mode()
def _off(model_path: str, eyes_path: str, picture: str, of: str | None, factor: float) -> float:
    import pumice
    from pumice.image import prepare

    found = []
    for dtype in (of, "float32"):
        model = pumice.load(model_path, beside=eyes_path, dtype=dtype)
        for block in model.network.vision_tower.encoder.layers:
            attention = block.self_attn
            _stand_out(block.layer_norm1, [attention.q_proj, attention.k_proj, attention.v_proj], factor)
            _stand_out(block.layer_norm2, [block.mlp.fc1], factor)
        seen = prepare(picture, *model.eyes())
        (features_PD,) = model.network.encode(torch.from_numpy(seen.pixels).to(model.network.like.dtype), [seen.grid])
        found.append(features_PD.double())
    return 1 - float(torch.nn.functional.cosine_similarity(*found, dim=-1).min())


def _stand_out(norm: torch.nn.LayerNorm, readers: Sequence[torch.nn.Linear], factor: float) -> None:
    """Some channels become greater by a factor, and what reads them less by it, as trained towers have them: in exact
    numbers nothing changes, but whoever rounds all channels by one scale loses the others. They lie far from each
    other: where groups have scales, each spoils one of its own."""
    few = slice(None, None, norm.weight.shape[0] // OUTLIER_CHANNELS)
    for name in ("weight", "bias"):
        values_D = getattr(norm, name).clone()
        values_D[few] *= factor
        setattr(norm, name, torch.nn.Parameter(values_D, requires_grad=False))
    for reader in readers:  # whose matrices turn into fewer bits when they are first used
        weight_FD = reader.weight.float()
        weight_FD[:, few] /= factor
        reader.weight = torch.nn.Parameter(weight_FD.to(reader.weight.dtype), requires_grad=False)


def random_llava(shape_name: str, dtype: torch.dtype, device: str) -> Any:
    """Transformers' LLaVA 1.5 with random weights, made in memory: there is no file to load."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    shape = random_models.SHAPES[shape_name]
    text, vision = shape.text, shape.vision
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision.width, intermediate_size=vision.ffn_width, num_hidden_layers=vision.layers,
            num_attention_heads=vision.heads, image_size=vision.image_px, patch_size=vision.patch_px,
        ),
        text_config=LlamaConfig(
            vocab_size=text.vocab, hidden_size=text.width, intermediate_size=text.ffn_width,
            num_hidden_layers=text.layers, num_attention_heads=text.heads, num_key_value_heads=text.kv_heads,
            max_position_embeddings=text.max_positions,
        ),
        image_token_index=text.vocab - 1,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config).to(dtype).eval()
    model.to_empty(device=device)
    for values in (*model.parameters(), *model.buffers()):
        if values.is_floating_point():
            values.detach().normal_(std=0.02)
        else:  # the tower's positions
            values.copy_(torch.arange(values.numel()).view(values.shape))
    return model


def transformers(phase: str, shape_name: str) -> dict[str, float]:
    """In bfloat16."""
    model = random_llava(shape_name, torch.bfloat16, "cpu")
    text, vision = random_models.SHAPES[shape_name].text, random_models.SHAPES[shape_name].vision
    ids = torch.randint(3, text.vocab - 1, (1, 2880), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(1, 3, vision.image_px, vision.image_px, dtype=torch.bfloat16)
    with torch.inference_mode():
        if phase.startswith("prefill"):
            tokens = int(phase.partition("-")[2])
            model(input_ids=ids[:, :WARM_UP_TOKENS])
            passed = seconds(lambda: model(input_ids=ids[:, :tokens], logits_to_keep=1))
            return {"tokens_per_s": tokens / passed}
        if phase == "decode":
            cache = model(input_ids=ids[:, :1]).past_key_values
            each = lambda: model(input_ids=ids[:, :1], past_key_values=cache)  # noqa: E731
            return {"tokens_per_s": DECODED_TOKENS / seconds(lambda: [each() for _ in range(DECODED_TOKENS)])}
        image = torch.full((1, vision.patches), text.vocab - 1)
        prompt = torch.cat((ids[:, :4], image, ids[:, :8]), dim=1)
        figures = {"first_s": seconds(lambda: model(input_ids=prompt, pixel_values=pixels, logits_to_keep=1))}
        encode = lambda: model.get_image_features(pixel_values=pixels)  # noqa: E731
        figures["encode_s"] = statistics.median(seconds(encode) for _ in range(REPEATS))
        return figures


def openvino(phase: str, path: str) -> dict[str, float]:
    """A language model in OpenVINO's own format, in a folder, or in a GGUF file that it reads: prefill and decode."""
    import openvino
    import openvino_genai

    started = time.perf_counter()
    pipeline = openvino_genai.LLMPipeline(path, "CPU")
    figures = {"load_s": time.perf_counter() - started}
    tokens = 1 if phase == "decode" else int(phase.partition("-")[2])
    random = torch.Generator().manual_seed(0)
    # The warm-up's is another prompt: what was read once is not read again.
    warm_up, prompt = (
        openvino.Tensor(torch.randint(3, LEAST_VOCAB, (1, tokens), generator=random).numpy()) for _ in range(2)
    )
    pipeline.generate(warm_up, openvino_genai.GenerationConfig(max_new_tokens=1))
    settings = openvino_genai.GenerationConfig(max_new_tokens=DECODED_TOKENS + 1, ignore_eos=True)
    metrics = pipeline.generate(prompt, settings).perf_metrics
    if phase == "decode":
        return figures | {"tokens_per_s": 1000 / metrics.get_tpot().mean}
    return figures | {"tokens_per_s": metrics.get_num_input_tokens() / (metrics.get_ttft().mean / 1000)}


if __name__ == "__main__":
    peer, *arguments = sys.argv[1:]
    figures = {"pumice": pumice, "transformers": transformers, "openvino": openvino}[peer](*arguments)
    print(json.dumps(figures))
