"""What fewer tokens an image cost in pebble's answers, and what they save of a language model's time.

    python bench/image_tokens.py [--parts answers prefill] [--pictures 400] [--threads 2] [--write]

Prints a table for each part; --write puts them into docs/image-tokens.md between their marks. `answers` asks both
forms of pebble the questions of `pebble/evaluate.py`, once for each limit. `prefill` asks a model of random weights,
made once in `--models`, about one picture.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import random_models
from cpu import PICTURES, processor
from PIL import Image

import pumice
from pumice import Question, Sampling
from pumice.answer import Timings
from pumice.model import Model, use_threads

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "image-tokens.md"
END = "<!-- end of table -->"
FRACTIONS = (1, 2, 4, 8, 16)
"""An image may take all its tokens, half of them, and so on."""
FORMS = ("pebble:1.5", "pebble")
Scores = dict[str, tuple[int, int]]
"""Right answers and questions of each task."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("answers", "prefill"), default=("answers", "prefill"))
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--shape", choices=random_models.SHAPES, default="1.1b")
    parser.add_argument("--quant", choices=random_models.MIXES, default="q4_k_m")
    parser.add_argument("--models", type=Path, default=ROOT / "bench" / "models", help="where random files are kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--write", action="store_true")
    chosen = parser.parse_args()
    use_threads(chosen.threads)
    for part in chosen.parts:
        table = "\n".join(answers(chosen.pictures) if part == "answers" else prefill(chosen))
        print(table, end="\n\n", flush=True)
        if chosen.write:
            put(part, table)


def put(part: str, table: str) -> None:
    """Into the page, between the marks of this part."""
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(f"<!-- table: {part} -->\n")
    PAGE.write_text(f"{before}{mark}{table}\n{rest[rest.index(END) :]}", encoding="utf-8")


def tokens_of(model: Model, picture: Image.Image, limit: int | None = None) -> tuple[int, int]:
    """Tokens and views of a picture."""
    (image,) = model.see(Question("What is it?", picture, image_tokens=limit)).images
    return image.grid.tokens, image.grid.tiles


# --- what it costs ----------------------------------------------------------------------------------------------------


def answers(pictures: int) -> list[str]:
    """For each form the share of right answers by task, at each limit."""
    sys.path.insert(0, str(ROOT / "pebble"))
    from evaluate import EDGE_PX, asked, scores, wilson

    cases = asked(pictures)
    lines = [f"{len(cases)} questions about {pictures} drawn pictures and {pictures // 2} signs with known words."]
    for name in FORMS:
        model, picture = pumice.load(name), Image.new("RGB", (EDGE_PX, EDGE_PX))
        limits = [tokens_of(model, picture)[0] // fraction for fraction in FRACTIONS]
        taken = [tokens_of(model, picture, limit) for limit in limits]
        found: list[Scores] = []
        for limit in limits:
            found.append(scores(name, cases, limit))
            print(f"{name}, at most {limit} tokens", file=sys.stderr)
        right = [sum(each for each, _ in tasks.values()) for tasks in found]
        rows = {
            "tokens that a picture took": [f"{tokens}" for tokens, _ in taken],
            "views of it": [f"{views}" for _, views in taken],
            **{task: [f"{tasks[task][0] / tasks[task][1]:.2f}" for tasks in found] for task in sorted(found[0])},
            "**all questions**": [f"{each / len(cases):.3f}" for each in right],
            "95 % interval": ["{:.3f}-{:.3f}".format(*wilson(each, len(cases))) for each in right],
            "**times all tokens**": [f"{each / right[0]:.2f}" for each in right],
        }
        head = [f"{name}, at most", *(f"{limit}" for limit in limits)]
        lines += ["", *_table(head, [[row, *cells] for row, cells in rows.items()])]
    return lines


# --- what it saves ----------------------------------------------------------------------------------------------------


def prefill(chosen: argparse.Namespace) -> list[str]:
    """Seconds until the first token: the least of several rounds, in each of which every limit has its turn, since what
    else the machine does can only add to them."""
    before = os.getloadavg()[0]
    rows = []
    for family, size in PICTURES.items():
        files = random_models.files(chosen.models, chosen.shape, chosen.quant, tiled=family == "1.6")
        model = pumice.load(files[0], mmproj=files[1])
        picture = Image.effect_mandelbrot(size, (-2, -1, 1, 1), 60).convert("RGB")
        limits = [tokens_of(model, picture)[0] // fraction for fraction in FRACTIONS]
        seconds = _seconds(model, picture, limits, chosen.rounds)
        for limit, (image_s, prompt_s) in zip(limits, seconds):
            tokens, views = tokens_of(model, picture, limit)
            cells = [f"LLaVA {family}", f"{limit}", f"{tokens}", f"{views}", f"{image_s:.2f}", f"{prompt_s:.2f}"]
            rows.append([*cells, f"{prompt_s / seconds[0][1]:.2f}", f"{(image_s + prompt_s) / sum(seconds[0]):.2f}"])
    return [
        f"{chosen.shape}, {chosen.quant}, random weights; pumice {version('pumice')}, torch {version('torch')};",
        f"{processor()}; threads: {chosen.threads}.",
        f"Load average {before:.1f} before, {os.getloadavg()[0]:.1f} after: only a quiet machine gives figures.",
        "",
        *_table(["model", "at most", "tokens", "views", "image, s", "prompt, s", "prompt beside all", "both"], rows),
    ]


def _seconds(model: Model, picture: Image.Image, limits: Sequence[int], rounds: int) -> list[tuple[float, float]]:
    """For each limit the time of the picture through tower and projector, and of the prompt through the language
    model. What the first answer of all prepares is not counted."""
    asked = [
        Question("What is it?", picture, "", sampling=Sampling(max_tokens=1), image_tokens=each) for each in limits
    ]
    model.answer(asked[-1])
    found: list[list[Timings]] = [[] for _ in limits]
    for round in range(rounds):
        for timings, question in zip(found, asked):
            model.limit(pumice.Limits())  # and so forgets the picture
            timings.append(model.answer(question).timings)
        print(f"{model.name}, round {round + 1}", file=sys.stderr)
    return [(min(each.encode_s for each in timings), min(each.prefill_s for each in timings)) for timings in found]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
