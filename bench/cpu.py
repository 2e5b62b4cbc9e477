"""pumice beside llama.cpp, Transformers and OpenVINO GenAI on this CPU: same shapes, random weights, one after another.

    python bench/cpu.py --llama-cpp DIR [--shape 7b] [--quant q4_0] [--phases …] [--peers …] [--rounds 3]

Writes bench/results-cpu.md (`--output` names another file). In each round every phase is run by every program in turn,
and the machine's limits are measured beside them; the table has medians and, in brackets, the least and the most.
The files are made once in `--models`; 7B takes 5 GB for each `--quant`. DIR has llama.cpp's llama-bench,
llama-mtmd-cli and llama-completion.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import platform
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from mmap import PAGESIZE
from pathlib import Path

import limits
import peers
import random_models
from limits import Limits
from peers import PHASES, Job
from PIL import Image

from pumice.checkpoints.mapped import MappedFile
from pumice.config import TextConfig, VisionConfig

HERE = Path(__file__).resolve().parent
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
    "sve",
)
"""The processor's features that kernels for such weights use."""
PROMPT_LIMITS, TILE_LIMITS = ("int8", "narrow", "tiles"), ("int8", "wide", "fp32", "tiles")
"""What a prompt and a tile of an image may be bound by."""
PICTURES = {"1.5": (336, 336), "1.6": (672, 672)}
"""(width, height): a picture of one tile, and one that LLaVA 1.6 sees in five."""
ROWS = {
    ("image-1.5", "encode_s"): "one tile through tower and projector, s",
    ("prefill-576", "tokens_per_s"): "prefill of 576 tokens, tokens/s",
    ("prefill-2880", "tokens_per_s"): "prefill of 2880 tokens, tokens/s",
    ("decode", "tokens_per_s"): "decode, tokens/s",
    ("decode", "reading"): "other memory is read between its steps, GB/s",
    ("decode", "of_reading"): "a step reads weights, of that rate",
    ("decode", "of_reading_file"): "a step reads weights, of the rate at which the same file is read between steps",
    ("image-1.5", "first_s"): "first token of a picture, LLaVA 1.5, s",
    ("image-1.6", "first_s"): "first token of a picture of five tiles, LLaVA 1.6, s",
    ("start", "start_s"): "a process from its start to the first token of a short text, s",
    ("start", "import_s"): "of which the import of PyTorch, s",
    ("start", "ready_s"): "from `load` to the first token of a short text, s",
    ("start", "peak_bytes"): "peak memory with a short text, GB",
    ("features", "off"): "image features, 1 - least cosine against float32",
    ("features", "off_bfloat16"): "the same, the tower in bfloat16",
    ("features", "off_outliers"): "of this tower where norms give 4 channels 20 times greater, which count as before",
    ("features", "off_outliers_bfloat16"): "the same, the tower in bfloat16",
    ("image-1.5", "load_s"): "load, s",
    ("image-1.5", "peak_bytes"): "peak memory with a picture, LLaVA 1.5, GB",
    ("image-1.6", "peak_bytes"): "peak memory with a picture, LLaVA 1.6, GB",
}
Samples = dict[tuple[str, str, str], list[float]]
"""By phase, figure and peer."""


def main() -> None:
    chosen = _arguments()
    models = chosen.models.resolve()
    model, eyes_15 = random_models.files(models, chosen.shape, chosen.quant, tiled=False)
    _, eyes_16 = random_models.files(models, chosen.shape, chosen.quant, tiled=True)
    job = Job(
        chosen.shape, model, {"1.5": eyes_15, "1.6": eyes_16}, _pictures(models), chosen.threads, chosen.llama_cpp,
        chosen.openvino or _for_openvino(models, chosen),
    )  # fmt: skip
    for path in {model, eyes_15, eyes_16}:
        _read_anew(path)
    names = chosen.peers or peers.peers(job)
    program = limits.build(models)
    samples: Samples = defaultdict(list)
    measured: dict[str, list[Limits]] = defaultdict(list)
    before = os.getloadavg()[0]
    for round in range(chosen.rounds):
        for phase in chosen.phases:
            if program is not None:
                measured[phase].append(limits.measure(program, chosen.threads, chosen.read_bytes))
            for peer in names:
                for name, value in peers.figures(peer, phase, job).items():
                    samples[phase, name, peer].append(value)
                print(f"round {round + 1}: {phase}, {peer}", file=sys.stderr)
    head = _head(chosen, job, names, before)
    every = list(itertools.chain(*measured.values()))
    text = "\n".join([*head, *_table(samples, names, _bounds(job, measured)), "", *_limits(every)]) + "\n"
    chosen.output.write_text(text, encoding="utf-8")
    print(text)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=random_models.SHAPES, default="7b")
    parser.add_argument("--quant", choices=random_models.MIXES, default="q4_0")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--peers", nargs="+", help="of pumice, 'llama.cpp', 'llama.cpp best', transformers, openvino")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument(
        "--openvino", type=Path, help="a language model of this shape in OpenVINO's own format, instead of a GGUF file"
    )
    parser.add_argument("--models", type=Path, default=HERE / "models", help="where the random files are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--read-bytes", type=int, default=limits.READ_BYTES, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=HERE / "results-cpu.md")
    return parser.parse_args()


def _read_anew(path: Path) -> None:
    """A file that was just written, or of which a part was put aside, lies in small pages: it is read again as pumice
    asks for it, in large ones where the file system has them."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    MappedFile(path, path.stat().st_size).bytes[::PAGESIZE].sum()


def _for_openvino(models: Path, chosen: argparse.Namespace) -> Path | None:
    if importlib.util.find_spec("openvino_genai") is None or "openvino" not in (chosen.peers or ["openvino"]):
        return None
    return random_models.with_byte_levels(models, chosen.shape, chosen.quant)


def _pictures(folder: Path) -> dict[str, Path]:
    made = {family: folder / f"picture-{family}.png" for family in PICTURES}
    for family, path in made.items():
        if not path.exists():
            Image.effect_mandelbrot(PICTURES[family], (-2, -1, 1, 1), 60).convert("RGB").save(path)
    return made


# --- how fast it could be ---------------------------------------------------------------------------------------------


def text_weights(text: TextConfig) -> int:
    """Weights that every token is multiplied with, the head apart."""
    attention = 2 * text.width * text.head_width * (text.heads + text.kv_heads)
    return text.layers * (attention + 3 * text.width * text.ffn_width)


def prefill_ops(text: TextConfig, tokens: int) -> float:
    """Multiplications and additions of a prompt; the head runs for its last token alone."""
    products = text_weights(text) * tokens + text.width * text.vocab
    attention = text.layers * text.heads * text.head_width * tokens**2  # two products over half of a square
    return 2.0 * (products + attention)


def tile_ops(vision: VisionConfig, width_out: int) -> float:
    """Of one tile: the blocks up to the features, and the projector."""
    tokens, width = vision.positions, vision.width
    block = tokens * (4 * width**2 + 2 * width * vision.ffn_width) + 2 * tokens**2 * width
    projector = vision.patches * (width * width_out + width_out**2)
    return 2.0 * (vision.blocks_needed * block + tokens * width * 3 * vision.patch_px**2 + projector)


def _bounds(job: Job, measured: Mapping[str, Sequence[Limits]]) -> dict[tuple[str, str], dict[str, float]]:
    """For each figure its best possible value by each limit that binds it, under the limit's name. measured: limits
    before each phase; those before its own count, since a machine that others share is now faster, now slower."""
    shape, mix = random_models.SHAPES[job.shape], job.model.stem.partition("-")[2]
    found: dict[tuple[str, str], dict[str, float]] = {}
    for phase, those in measured.items():
        middle = {name: statistics.median(vars(each)[name] for each in those) for name in limits.MEANING}
        there = {name: value for name, value in middle.items() if value}
        if phase == "decode":
            weights = random_models.read_bytes(shape, mix)
            found[phase, "tokens_per_s"] = {name: middle[name] / weights for name in ("read", "mapped")}
        elif phase == "image-1.5":
            ops = tile_ops(shape.vision, shape.text.width)
            found[phase, "encode_s"] = {name: ops / there[name] for name in TILE_LIMITS if name in there}
        elif phase.startswith("prefill"):
            tokens = int(phase.partition("-")[2])
            rate = tokens / prefill_ops(shape.text, tokens)
            found[phase, "tokens_per_s"] = {name: rate * there[name] for name in PROMPT_LIMITS if name in there}
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def _table(samples: Samples, names: Sequence[str], bounds: dict[tuple[str, str], dict[str, float]]) -> list[str]:
    others = [name for name in names if name != "pumice"]
    head = [*names, *(f"times {name}" for name in others), "of the limit"]
    lines = [f"| what | {' | '.join(head)} |", "|" + "---|" * (len(head) + 1)]
    for (phase, figure), what in ROWS.items():
        found = {peer: samples[phase, figure, peer] for peer in names if samples.get((phase, figure, peer))}
        if found:
            cells = [_cell(found[peer], figure) if peer in found else "" for peer in names]
            cells += [_ratio(found, peer, figure) for peer in others]
            reached = bounds.get((phase, figure), {}) if "pumice" in found else {}
            middle = statistics.median(found["pumice"]) if reached else 0.0
            fractions = [f"{_share(middle, bound, figure):.0%} {name}" for name, bound in reached.items()]
            lines.append(f"| {what} | {' | '.join([*cells, ', '.join(fractions)])} |")
    return lines


def _share(reached: float, possible: float, figure: str) -> float:
    return reached / possible if figure == "tokens_per_s" else possible / reached


def _cell(values: Sequence[float], figure: str) -> str:
    scale = 1e-9 if figure == "peak_bytes" else 1.0
    middle, least, most = (each * scale for each in (statistics.median(values), min(values), max(values)))
    return f"{middle:.3g}" if len(values) == 1 else f"{middle:.3g} ({least:.3g}–{most:.3g})"


def _ratio(found: dict[str, list[float]], peer: str, figure: str) -> str:
    """How many times faster, or smaller, pumice is."""
    if peer not in found or "pumice" not in found:
        return ""
    ours, theirs = statistics.median(found["pumice"]), statistics.median(found[peer])
    return f"{ours / theirs if figure == 'tokens_per_s' else theirs / ours:.2f}"


def _limits(measured: Sequence[Limits]) -> list[str]:
    """All of them together."""
    if not measured:
        return ["The limits of the machine were not measured: there is no C++ compiler."]
    lines = ["| limit | median | least | most |", "|---|---|---|---|"]
    for name, meaning in limits.MEANING.items():
        values = [vars(each)[name] / 1e9 for each in measured]
        lines.append(f"| {name}: {meaning} | {statistics.median(values):.1f} | {min(values):.1f} | {max(values):.1f} |")
    return lines


def _head(chosen: argparse.Namespace, job: Job, names: Sequence[str], load_before: float) -> list[str]:
    kernels = f" Kernels for {os.environ['PUMICE_CPU']}." if "PUMICE_CPU" in os.environ else ""
    file_gb = (job.model.stat().st_size + job.eyes["1.5"].stat().st_size) / 1e9
    return [
        f"# LLaVA on this CPU: {chosen.shape}, {chosen.quant}, random weights",
        "",
        "Made by `python bench/cpu.py`: " + ", ".join(_programs(names, job)) + ".",
        f"{processor()}; {chosen.threads} threads.{kernels} Load average {load_before:.1f} before,",
        f"{os.getloadavg()[0]:.1f} after: only a quiet machine gives figures. Language model and projector take",
        f"{file_gb:.2f} GB on disk. llama.cpp runs 22 of the 23 blocks of the tower, pumice all; of a picture of five",
        "tiles llama.cpp reads 2880 tokens, pumice 2928. `best` is llama.cpp with `-ub 1024` and without repacking.",
        "Medians (least–most); `times` is how many times pumice is faster or smaller; the limits are measured before",
        "each phase.",
        "",
    ]


def _programs(names: Sequence[str], job: Job) -> list[str]:
    found = []
    for package in ("pumice", "torch", "transformers", "openvino-genai"):
        try:
            if package in ("torch", *(name.replace("openvino", "openvino-genai") for name in names)):
                found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(package)
    if job.llama_cpp is not None and "llama.cpp" in names:
        library = (job.llama_cpp / "libggml-base.so").resolve().name
        found.append(f"llama.cpp with ggml {library.partition('.so.')[2] or 'linked in'}")
    return found


def processor() -> str:
    """The name and the features that matter, as Linux has them."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    have = [flag for flag in FLAGS if flag in flags]
    numbers = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return (
        f"{fields.get('model name', platform.machine())}, {numbers}, with {', '.join(have) or 'none of the features'}"
    )


if __name__ == "__main__":
    main()
