"""How much memory a 7B LLaVA needs: make a random checkpoint of 7B shape, load it, ask it about a picture.

    python bench/memory.py [--folder DIR] [--tokens 16] [--dtype bfloat16]

Writes bench/results-memory.md. The checkpoint (2 bytes a weight) is made once in DIR and deleted at the end unless a
folder is named. Peak memory is the kernel's own high-water mark of the process that answers (Linux), in which the
mapped pages of the weights count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pumice import store
from pumice.checkpoints import expected_tensors, read, write_hf
from pumice.config import ImageConfig, LlavaConfig, ProjectorConfig, TextConfig, VisionConfig

HERE = Path(__file__).resolve().parent
ALLOWED_BYTES = 2e9
"""What the process may hold beyond the file."""
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def shape_of_7b() -> LlavaConfig:
    """LLaVA 1.5 7B: CLIP ViT-L/14-336, a two-layer projector, Vicuna 7B; the words of the bundled model."""
    pebble = read(store.resolve("pebble:1.5")).config
    return dataclasses.replace(
        pebble,
        vision=VisionConfig(image_px=336, patch_px=14, width=1024, layers=24, heads=16, ffn_width=4096),
        text=TextConfig(vocab=32064, width=4096, layers=32, heads=32, kv_heads=32, head_width=128, ffn_width=11008),
        projector=ProjectorConfig(layers=2),
        image=ImageConfig("crop", 336, 336, CLIP_MEAN, CLIP_STD),
        has_newline=False,
    )


class RandomWeights(dict[str, torch.Tensor]):
    """Tensors that are drawn when they are asked for, so that making the file costs the memory of one shard."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__({name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()})

    def __getitem__(self, name: str) -> torch.Tensor:
        blank = super().__getitem__(name)
        if (
            name.endswith("norm.weight")
            or "layernorm.weight" in name
            or ("layer_norm" in name and name.endswith("weight"))
        ):
            return torch.ones(blank.shape, dtype=blank.dtype)
        return torch.empty(blank.shape, dtype=blank.dtype).normal_(std=0.02)


def answer(folder: Path, tokens: int) -> dict[str, float | str]:
    """In the measured process: load, ask, and report the high-water mark."""
    import time

    import pumice

    started = time.perf_counter()
    model = pumice.load(folder)
    load_s = time.perf_counter() - started
    from PIL import Image

    picture = Image.effect_mandelbrot((640, 480), (-2, -1, 1, 1), 60).convert("RGB")
    said = model.ask("What is shown?", picture, sampling=pumice.Sampling(max_tokens=tokens))
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak_kib = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    timings = dataclasses.asdict(said.timings) | {"tokens_per_s": said.timings.tokens_per_s}
    return {"peak_bytes": peak_kib * 1024, "load_s": load_s, "prompt_tokens": said.prompt_tokens, **timings}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--measured", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measured:
        print(json.dumps(answer(chosen.folder, chosen.tokens)))
        return
    folder = chosen.folder or Path(tempfile.mkdtemp(dir=Path.cwd())) / "llava-7b-random"
    if not folder.exists():
        config, dtype = shape_of_7b(), getattr(torch, chosen.dtype)
        write_hf(
            folder, config, RandomWeights(expected_tensors(config), dtype), tokenizer_files=store.resolve("pebble:1.5")
        )
    file_bytes = sum(each.stat().st_size for each in folder.glob("*.safetensors"))
    command = [sys.executable, __file__, "--measured", "--folder", str(folder), "--tokens", str(chosen.tokens)]
    figures = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    report(figures, file_bytes, chosen.dtype)
    if chosen.folder is None:
        shutil.rmtree(folder.parent)


def report(figures: dict[str, float], file_bytes: int, dtype: str) -> None:
    beyond = figures["peak_bytes"] - file_bytes
    verdict = "met" if beyond < ALLOWED_BYTES else "NOT MET"
    lines = [
        "# Memory of a 7B LLaVA 1.5, random weights",
        "",
        f"Made by `python bench/memory.py` with torch {torch.__version__} on {platform.machine()},",
        f"{torch.get_num_threads()} threads,",
        f"CPU capability {torch.backends.cpu.get_cpu_capability()}, weights {dtype}.",
        "",
        "| what | value |",
        "|---|---|",
        f"| weights on disk | {file_bytes / 1e9:.2f} GB |",
        f"| peak memory of the process | {figures['peak_bytes'] / 1e9:.2f} GB |",
        f"| beyond the file, allowed {ALLOWED_BYTES / 1e9:.0f} GB | {beyond / 1e9:.2f} GB: {verdict} |",
        f"| load | {figures['load_s']:.1f} s |",
        f"| image and tower | {figures['encode_s']:.1f} s |",
        f"| prefill of {figures['prompt_tokens']:.0f} tokens | {figures['prefill_s']:.1f} s |",
        f"| decode | {figures['tokens_per_s']:.2f} tokens/s |",
    ]
    text = "\n".join(lines) + "\n"
    (HERE / "results-memory.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
