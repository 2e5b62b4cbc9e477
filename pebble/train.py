"""Step 3: the stages of both forms, by `pumice.train`. Resumable: a stage that is done is not done again.

    python pebble/train.py --output runs/pebble [--threads 2]

words: the language model alone, on the text of the conversations; look: the projector alone (LLaVA's stage 1); read:
projector and language model (LLaVA 1.5's stage 2); all: the tower too (1.6's stage 2); tiles: the 1.6 form, from the
trained 1.5 form and a newline vector of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from pathlib import Path

import torch
from samples import Scenes

from pumice import checkpoints
from pumice.train import Recipe, train
from pumice.train.recipe import Part

BOTH: tuple[Part, ...] = ("projector", "language_model")
ALL: tuple[Part, ...] = (*BOTH, "vision_tower")
STAGES = (
    ("words", "1.5", Recipe("start/pebble-1.5", parts=("language_model",), steps=300, rate=1.5e-3, seed=1)),
    ("look", "1.5", Recipe("words/model", parts=("projector",), steps=100, rate=2e-3, seed=2)),
    ("read", "1.5", Recipe("look/model", parts=BOTH, steps=2800, rate=1.5e-3, seed=3)),
    ("all", "1.5", Recipe("read/model", parts=ALL, steps=1000, rate=6e-4, tower_rate=3e-4, seed=4)),
    ("tiles", "1.6", Recipe("all/tiled", parts=ALL, steps=700, batch=8, rate=5e-4, tower_rate=2e-4, seed=5)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for number, (name, form, recipe) in enumerate(STAGES):
        folder = chosen.output / name
        if (folder / "model" / "config.json").exists():
            continue
        if name == "tiles":
            _tiled(chosen.output)
        recipe = dataclasses.replace(recipe, model=str(chosen.output / recipe.model), save_every=100)
        print(f"stage {name}: {recipe.steps} steps of {recipe.batch}", flush=True)
        train(recipe, output=folder, dataset=Scenes(form, first=(number + 1) << 25, text_only=name == "words"))


def _tiled(output: Path) -> None:
    """The trained 1.5 form as a 1.6 form: the same weights, and the newline vector it has not yet learned."""
    trained, fresh = checkpoints.read(output / "all" / "model"), checkpoints.read(output / "start" / "pebble-1.6")
    state = {name: (fresh if name == "image_newline" else trained).tensors[name] for name in fresh.tensors.names()}
    shutil.rmtree(output / "all" / "tiled", ignore_errors=True)
    checkpoints.write_hf(output / "all" / "tiled", fresh.config, state, tokenizer_files=fresh.path)


if __name__ == "__main__":
    main()
