"""Training: gradients against Transformers' own, a loss that falls, and a stop that leaves no trace.

B rows · T positions
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from conftest import GOLDEN_MODELS, reference
from pumice import checkpoints
from pumice.errors import UserError
from pumice.image import prepare
from pumice.prompt import Message
from pumice.train import JsonDataset, Recipe, Sample, read_recipe, train
from pumice.train.data import IGNORED, Row, collate
from pumice.train.loop import build, loss_of, part_of

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30)}


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_loss_and_gradients_are_those_of_transformers(name: str) -> None:
    """The golden's tolerances: 1e-4 for a loss, 1e-3 relative for the norm of a gradient."""
    entries = json.loads(reference("golden/generate.json").read_text(encoding="utf-8"))["models"]
    sample = next(entry for entry in entries if entry["name"] == name)["samples"][0]
    checkpoint = checkpoints.read(reference(f"golden/models/{name}"))
    network, config = build(checkpoint), checkpoint.config
    assert config.image is not None
    assert config.vision is not None
    shown = prepare(_drawn(sample["images"][0]), config.image, config.vision)
    for answer in sample["train"].values():
        ids = sample["input_ids"] + answer["answer"]
        labels = [IGNORED] * len(sample["input_ids"]) + answer["answer"]
        network.zero_grad()
        loss = loss_of(network, collate([Row(ids, labels, [shown.pixels], [shown.grid])]))
        assert loss.item() == pytest.approx(answer["loss"], abs=1e-4)
        if "grad_norm" in answer:
            loss.backward()
            weights = dict(network.named_parameters())
            measured = {hub: float(weights[_own_name(hub)].grad.norm()) for hub in answer["grad_norm"]}
            assert measured == pytest.approx(answer["grad_norm"], rel=1e-3)


def test_padding_changes_no_loss(tmp_path: Path) -> None:
    """A short row beside a long one: the mean over the learned tokens of both, as if each had been alone."""
    network = build(checkpoints.read(tiny.hf_folder(tmp_path / "model", lm="mistral")))
    rows = [
        Row([1, 5, 6, 7, 8, 9], [IGNORED, IGNORED, 6, 7, 8, 9], [], []),
        Row([1, 9, 4], [IGNORED, IGNORED, 4], [], []),
    ]
    alone = [loss_of(network, collate([row])) for row in rows]
    together = loss_of(network, collate(rows))
    assert together.item() == pytest.approx((4 * alone[0].item() + alone[1].item()) / 5, rel=1e-5)


class Squares:
    """One plain colour a picture, and its name; sends SIGTERM to this process when sample `stop_at` is drawn."""

    def __init__(self, stop_at: int | None = None) -> None:
        self._left = stop_at

    def __len__(self) -> int:
        return 3

    def sample(self, index: int) -> Sample:
        if self._left is not None:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGTERM)
        name = tuple(COLOURS)[index]
        asked = (Message("user", "What colour is this?", 1), Message("assistant", name))
        return Sample(asked, (Image.new("RGB", (28, 28), COLOURS[name]),), f"square {index}")


def _recipe(folder: Path, **changes: object) -> Recipe:
    parts = ("projector", "language_model", "vision_tower")
    usual = {"model": str(folder), "template": "vicuna_v1", "parts": parts, "steps": 20, "batch": 3, "rate": 1e-3}
    return Recipe(**(usual | changes))  # type: ignore[arg-type]


def _log(output: Path) -> list[dict[str, float]]:
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("family", ["1.5", "1.6"])
def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path: Path, family: str) -> None:
    recipe = _recipe(tiny.hf_folder(tmp_path / "start", family=family))
    whole = train(recipe, output=tmp_path / "whole", dataset=Squares())
    with pytest.raises(SystemExit, match="stopped at step 8 of 20"):
        train(recipe, output=tmp_path / "parts", dataset=Squares(stop_at=24))
    assert not (tmp_path / "parts" / "model").exists()
    resumed = train(recipe, output=tmp_path / "parts", dataset=Squares())
    log = _log(tmp_path / "whole")
    assert log == _log(tmp_path / "parts")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    first, second = checkpoints.read(whole), checkpoints.read(resumed)
    names = build(first).state_dict()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in names)


def test_stage_one_moves_the_projector_and_nothing_else(tmp_path: Path) -> None:
    folder = tiny.hf_folder(tmp_path / "start", family="1.6")
    trained = train(_recipe(folder, parts=("projector",), steps=2), output=tmp_path / "run", dataset=Squares())
    before, after = checkpoints.read(folder), checkpoints.read(trained)
    for name in build(before).state_dict():
        moved = not torch.equal(before.tensors[name].float(), after.tensors[name].float())
        assert moved == (part_of(name) == "projector"), name


def test_the_rate_warms_up_and_falls_to_nothing(tmp_path: Path) -> None:
    """Two warm-up steps of twenty, then half a cosine: at the middle of the rest, half the peak."""
    folder = tiny.hf_folder(tmp_path / "start")
    train(_recipe(folder, parts=("projector",), warmup=0.1), output=tmp_path / "run", dataset=Squares())
    rates = [line["rate"] for line in _log(tmp_path / "run")]
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rates[11] == pytest.approx(5e-4)
    assert rates[-1] < 1e-5


def test_a_sample_without_an_answer_is_named(tmp_path: Path) -> None:
    pairs = [{"from": "human", "value": "<image>\nWhat is this?"}]
    Image.new("RGB", (28, 28)).save(tmp_path / "black.png")
    (tmp_path / "data.json").write_text(json.dumps([{"id": "black-7", "image": "black.png", "conversations": pairs}]))
    data = JsonDataset(tmp_path / "data.json", tmp_path)
    recipe = _recipe(tiny.hf_folder(tmp_path / "start"), batch=1, steps=1)
    with pytest.raises(UserError, match="black-7"):
        train(recipe, output=tmp_path / "run", dataset=data)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rate = 1e-3", "learning_rate"),
        ('steps = "many"', "steps"),
        ("steps = 0", "steps"),
        ('parts = ["head"]', "head"),
    ],
)
def test_a_recipe_is_read_strictly(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(f'model = "pebble"\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError, match=said):
        read_recipe(path)


def test_a_recipe_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text('model = "pebble"\nparts = ["projector", "language_model"]\nrate = 2e-5\n', encoding="utf-8")
    assert read_recipe(path) == Recipe("pebble", parts=("projector", "language_model"), rate=2e-5)


def _own_name(hub: str) -> str:
    """The network's name of a tensor, from the published one."""
    return hub.replace("vision_model.", "").replace("language_model.model.", "language_model.")


def _drawn(image: dict[str, object]) -> Image.Image:
    """A picture by the formulas of the reference data (its pixels.json, `formulas`)."""
    k, width, height = (int(str(image[name])) for name in ("k", "w", "h"))
    y, x = np.mgrid[:height, :width].astype(np.uint64)
    match image["kind"]:
        case "ramp":
            channels = (7 * x + 3 * y + k, 5 * x + 11 * y + 2 * k, 13 * x + 2 * y + (x * y) % 17 + 3 * k)
        case "noise":
            v = (x * 73856093) ^ (y * 19349663) ^ np.uint64((k + 1) * 83492791)
            v = (v * 2654435761) % 2**32
            v = ((v ^ (v >> 15)) * 2246822519) % 2**32
            v = v ^ (v >> 13)
            channels = (v, v >> 8, v >> 16)
        case "smooth":
            t = ((x * x + y * y) // (37 + k)) % 256
            t = np.where(t > 127, 255 - t, t)
            channels = (2 * t, 255 * x // max(width - 1, 1), 255 - 255 * y // max(height - 1, 1))
        case other:
            raise AssertionError(f"no formula for {other!r}")
    return Image.fromarray(np.stack([channel % 256 for channel in channels], axis=-1).astype(np.uint8))


def test_the_shipped_recipes_are_read() -> None:
    recipes = sorted((Path(__file__).resolve().parent.parent / "recipes").glob("*.toml"))
    assert [read_recipe(path).parts for path in recipes] == [("projector",), ("projector", "language_model")]
    assert [read_recipe(path).rate for path in recipes] == [1e-3, 2e-5]


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('model = "pebble"\nraet = 1.0\n', encoding="utf-8")
    command = [sys.executable, "-m", "pumice.train", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'raet'" in done.stderr
    assert "'rate'" in done.stderr
