"""Training: gradients against Transformers' own, a loss that falls, and a stop that leaves no trace.

B rows · T positions
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
from pumice.train.data import IGNORED, Row, collate, encode
from pumice.train.loop import build, loss_of, part_of
from pumice.train.state import Stop
from test_checkpoints import authors_folder

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
    """One plain colour a picture, and its name; `meanwhile` is called when sample `at` is drawn, counted from 1."""

    def __init__(self, at: int = 0, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._left, self._meanwhile = at, meanwhile

    def __len__(self) -> int:
        return 3

    def sample(self, index: int) -> Sample:
        self._left -= 1
        if self._left == 0:
            self._meanwhile()
        name = tuple(COLOURS)[index]
        asked = (Message("user", "What colour is this?", 1), Message("assistant", name))
        return Sample(asked, (Image.new("RGB", (28, 28), COLOURS[name]),), f"square {index}")


def _recipe(folder: Path, **changes: object) -> Recipe:
    parts = ("projector", "language_model", "vision_tower")
    usual = {"model": str(folder), "template": "vicuna_v1", "parts": parts, "steps": 20, "batch": 3, "rate": 1e-3}
    return Recipe(**(usual | changes))  # type: ignore[arg-type]


def _log(output: Path) -> list[dict[str, Any]]:
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def interrupted(number: signal.Signals) -> Squares:
    """Gets the signal while the batch of the eighth step is drawn."""
    return Squares(24, lambda: os.kill(os.getpid(), number))


def refused() -> None:
    raise UserError("this one is no good", hint="mend it")


@pytest.mark.parametrize("family", ["1.5", "1.6"])
def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(tmp_path: Path, family: str) -> None:
    recipe = _recipe(tiny.hf_folder(tmp_path / "start", family=family))
    whole = train(recipe, output=tmp_path / "whole", dataset=Squares())
    with pytest.raises(SystemExit, match="stopped at step 8 of 20"):
        train(recipe, output=tmp_path / "parts", dataset=interrupted(signal.SIGTERM))
    assert not (tmp_path / "parts" / "model").exists()
    resumed = train(recipe, output=tmp_path / "parts", dataset=Squares())
    log = _log(tmp_path / "whole")
    assert log == _log(tmp_path / "parts")
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    _same(whole, resumed)


@pytest.fixture
def start(tmp_path: Path) -> Path:
    """A 1.5 model to start from, its eyes 28 pixels wide: four tokens an image."""
    return tiny.hf_folder(tmp_path / "start", family="1.5")


# A run that does not come to its end.


def test_ctrl_c_ends_the_step_and_is_resumed_from_there(start: Path, tmp_path: Path) -> None:
    recipe, usual = _recipe(start), signal.getsignal(signal.SIGINT)
    whole = train(recipe, output=tmp_path / "whole", dataset=Squares())
    # A job in the background of a script is started with this signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match="stopped at step 8 of 20"):
            train(recipe, output=tmp_path / "parts", dataset=interrupted(signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, usual)
    resumed = train(recipe, output=tmp_path / "parts", dataset=Squares())
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole")
    _same(whole, resumed)


def test_an_ignored_ctrl_c_stays_ignored(start: Path, tmp_path: Path) -> None:
    usual = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(_recipe(start, steps=9), output=tmp_path / "run", dataset=interrupted(signal.SIGINT))
    except KeyboardInterrupt:
        pytest.fail("it was heard")
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_second_ctrl_c_does_not_wait() -> None:
    stop = Stop()
    stop.ask(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt, match="last saved step"):
        stop.ask(signal.SIGINT, None)


def test_a_refused_sample_costs_no_finished_step(start: Path, tmp_path: Path) -> None:
    """The refused step is not begun: with the sample mended, the run is the one that never met it."""
    recipe = _recipe(start)
    train(recipe, output=tmp_path / "whole", dataset=Squares())
    with pytest.raises(UserError, match="this one is no good"):
        train(recipe, output=tmp_path / "parts", dataset=Squares(24, refused))
    assert torch.load(tmp_path / "parts" / "state.pt", weights_only=True)["step"] == 7
    train(recipe, output=tmp_path / "parts", dataset=Squares())
    assert _log(tmp_path / "parts") == _log(tmp_path / "whole")


def test_a_killed_run_has_each_step_once_in_its_log(start: Path, tmp_path: Path) -> None:
    """What kill -9 leaves: the state of step 4, and a log that had gone on to step 7 and into the next line."""
    recipe, output = _recipe(start, save_every=4), tmp_path / "run"
    with pytest.raises(UserError):
        train(recipe, output=output, dataset=Squares(3 * 4 + 1, refused))
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 4
    (output / "log.jsonl").write_text("".join([*lines, *lines[:3], lines[3][:9]]), encoding="utf-8")
    train(recipe, output=output, dataset=Squares())
    assert [line["step"] for line in _log(output)] == list(range(20))


def test_not_resumed_begins_anew(start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        train(_recipe(start), output=tmp_path / "run", dataset=Squares(24, refused))
    train(_recipe(start, rate=5e-4, steps=5), output=tmp_path / "run", dataset=Squares(), resume=False)
    assert [line["step"] for line in _log(tmp_path / "run")] == list(range(5))


def test_a_finished_run_leaves_no_state_and_is_refused(start: Path, tmp_path: Path) -> None:
    train(_recipe(start, steps=1), output=tmp_path / "run", dataset=Squares())
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["log.jsonl", "model"]
    with pytest.raises(UserError, match="model is there already"):
        train(_recipe(start, steps=1), output=tmp_path / "run", dataset=Squares(1, _never))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("rate", 5e-4, "began with rate = 0.001, the recipe has 0.0005"),
        ("parts", ("projector",), r"began with parts = \('projector', .*, the recipe has \('projector',\)"),
        ("steps", 30, "began with steps = 20, the recipe has 30"),
        ("preprocess", "original", "began with preprocess = '', the recipe has 'original'"),
    ],
)
def test_another_recipe_does_not_go_on_with_the_state(
    start: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    with pytest.raises(UserError):
        train(_recipe(start), output=tmp_path / "run", dataset=Squares(4, refused))
    with pytest.raises(UserError, match=words):
        train(_recipe(start, **{key: value}), output=tmp_path / "run", dataset=Squares(1, _never))


def test_how_the_work_is_cut_may_change_on_the_way(start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        train(_recipe(start, steps=2), output=tmp_path / "run", dataset=Squares(4, refused))
    changed = _recipe(start, steps=2, micro_batch=1, save_every=1, max_tokens=1024)
    assert (train(changed, output=tmp_path / "run", dataset=Squares()) / "config.json").is_file()


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"\x80hello"])
def test_a_damaged_state_is_named(start: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = tmp_path / "run" / "state.pt"
    with pytest.raises(UserError):
        train(_recipe(start), output=file.parent, dataset=Squares(4, refused))
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=r"state.pt is damaged"):
        train(_recipe(start), output=file.parent, dataset=Squares(1, _never))


def test_the_state_of_another_model_is_refused(start: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        train(_recipe(start), output=tmp_path / "run", dataset=Squares(4, refused))
    shutil.rmtree(start)
    tiny.hf_folder(start, family="1.5", tile_px=56)
    with pytest.raises(UserError, match="does not fit the model"):
        train(_recipe(start), output=tmp_path / "run", dataset=Squares(1, _never))


def test_a_model_that_cannot_be_written_is_refused_before_the_first_step(tmp_path: Path) -> None:
    made = {"1.6": tiny.hf_folder(tmp_path / "start")}
    recipe = _recipe(authors_folder(made, tmp_path, tower=True), steps=2)
    with pytest.raises(UserError, match="<image> is token -200") as refusal:
        train(recipe, output=tmp_path / "run", dataset=Squares(1, _never))
    assert "start from this model's Hugging Face folder" in refusal.value.hint
    with pytest.raises(UserError, match="authors' rules") as refusal:
        train(_recipe(made["1.6"], preprocess="original"), output=tmp_path / "run", dataset=Squares(1, _never))
    assert 'preprocess = "hf"' in refusal.value.hint
    assert not (tmp_path / "run").exists()


def _never() -> None:
    raise AssertionError("a sample was drawn")


def _same(first: Path, second: Path) -> None:
    one, other = checkpoints.read(first), checkpoints.read(second)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in build(one).state_dict())


# The arithmetic of a step.


class Captions:
    """Colours with answers of one, two and three words, so that equal numbers of samples are unequal work."""

    def __len__(self) -> int:
        return 3

    def sample(self, index: int) -> Sample:
        name = tuple(COLOURS)[index]
        messages = (Message("user", "What is it?", 1), Message("assistant", " ".join([name] * (index + 1))))
        # Twice as wide as high: cropped and padded it is not the same picture.
        return Sample(messages, (Image.new("RGB", (56, 28), COLOURS[name]),))


def test_a_batch_in_stretches_is_the_whole_batch(start: Path, tmp_path: Path) -> None:
    """Equal to the digits that the log has; a mean of the stretches' means would be off a hundred times as far."""
    checkpoint, samples = checkpoints.read(start), [Captions().sample(index) for index in range(3)]
    rows = [
        encode(each, checkpoint.config, checkpoint.tokenizer, template="vicuna_v1", max_tokens=2048) for each in samples
    ]
    network = build(checkpoint)
    whole, *alone = (loss_of(network, collate(some)).item() for some in (rows, *([row] for row in rows)))
    assert abs(sum(alone) / 3 - whole) > 2e-3
    norms = []
    for size in (0, 1, 2):
        recipe = _recipe(start, steps=1, micro_batch=size)
        train(recipe, output=tmp_path / f"run{size}", dataset=Captions())
        (line,) = _log(tmp_path / f"run{size}")
        assert line["loss"] == pytest.approx(whole, abs=2e-5)
        norms.append(line["norm"])
    assert norms[1:] == pytest.approx(norms[:1] * 2, abs=2e-4)


class Sometimes(Squares):
    """Every other sample has no picture."""

    def sample(self, index: int) -> Sample:
        found = super().sample(index)
        if index % 2:
            return found
        return Sample((Message("user", "What is it?"), *found.messages[1:]), (), found.name)


def test_a_stretch_without_a_picture_teaches_a_projector_nothing(start: Path, tmp_path: Path) -> None:
    norms = []
    for size in (0, 1):
        recipe = _recipe(start, parts=("projector",), steps=1, batch=4, micro_batch=size)
        train(recipe, output=tmp_path / f"run{size}", dataset=Sometimes())
        norms.append(_log(tmp_path / f"run{size}")[0]["norm"])
    assert norms[0] == pytest.approx(norms[1], abs=2e-4)


def test_a_batch_without_pictures_is_said_where_only_eyes_learn(start: Path, tmp_path: Path) -> None:
    class Words(Squares):
        def sample(self, index: int) -> Sample:
            return Sample((Message("user", "What is it?"), Message("assistant", "red")))

    with pytest.raises(UserError, match="batch of step 0 has no picture"):
        train(_recipe(start, parts=("projector",), steps=1), output=tmp_path / "run", dataset=Words())


def test_a_token_beyond_the_weights_is_said(start: Path) -> None:
    checkpoint = checkpoints.read(start)
    few = dataclasses.replace(checkpoint.config, text=dataclasses.replace(checkpoint.config.text, vocab=40))
    with pytest.raises(UserError, match=r"captions: it holds token \d+ .*; the model has 40"):
        encode(
            dataclasses.replace(Captions().sample(0), name="captions"),
            few,
            checkpoint.tokenizer,
            template="vicuna_v1",
            max_tokens=2048,
        )


def test_pictures_follow_the_recipes_rules_and_the_checkpoint_says_so(start: Path, tmp_path: Path) -> None:
    modes = {}
    for rules in ("", "hf", "original"):
        trained = train(_recipe(start, steps=1, preprocess=rules), output=tmp_path / f"run{rules}", dataset=Captions())
        image = checkpoints.read(trained).config.image
        assert image is not None
        modes[rules] = image.mode
    assert modes == {"": "crop", "hf": "crop", "original": "pad"}
    losses = {rules: _log(tmp_path / f"run{rules}")[0]["loss"] for rules in modes}
    assert losses[""] == losses["hf"] != losses["original"]


def test_the_log_tells_each_parts_own_rate(start: Path, tmp_path: Path) -> None:
    parts = ("projector", "vision_tower")
    train(_recipe(start, parts=parts, tower_rate=1e-4, steps=1), output=tmp_path / "run", dataset=Squares())
    assert _log(tmp_path / "run")[0]["rates"] == {"projector": 1e-3, "vision_tower": 1e-4}


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
    rates = [line["rates"]["projector"] for line in _log(tmp_path / "run")]
    assert rates[:3] == pytest.approx([5e-4, 1e-3, 1e-3])
    assert rates[11] == pytest.approx(5e-4)
    assert rates[-1] < 1e-5


# The authors' files.


def _said(question: object, answer: object) -> list[dict[str, object]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _json(folder: Path, **row: object) -> JsonDataset:
    """A data set of one row, beside one picture."""
    Image.new("RGB", (28, 28), (204, 102, 0)).save(folder / "orange.png")
    file = folder / "data.json"
    file.write_text(json.dumps([{"id": "black-7"} | row]), encoding="utf-8")
    return JsonDataset(file, folder)


def test_a_json_sample_becomes_ids_labels_and_pixels(start: Path, tmp_path: Path) -> None:
    """By hand: <s> is 1, <image> 3, after five special tokens byte b is 5 + b; a caption and its line end are learned.

    28 pixels of patches of 14 are four tokens. Pixels: (byte / 255 - mean) / deviation, CLIP's.
    """
    data = _json(tmp_path, image="orange.png", conversations=_said("<image>", "é"))
    checkpoint = checkpoints.read(start)
    sample = data.sample(0)
    assert sample.messages == (Message("user", "", 1), Message("assistant", "é"))
    row = encode(sample, checkpoint.config, checkpoint.tokenizer, template="plain", max_tokens=2048)
    space = checkpoint.tokenizer.id_of("▁")
    answer = [space, 5 + 0xC3, 5 + 0xA9, 5 + 0x0A]
    assert row.ids == [1, 3, 3, 3, 3, *answer]
    assert row.labels == [IGNORED] * 5 + answer
    assert row.learned == 4
    assert [grid.tokens for grid in row.grids] == [4]
    expected = [(0.8 - 0.48145466) / 0.26862954, (0.4 - 0.4578275) / 0.26130258, -0.40821073 / 0.27577711]
    assert row.pixels[0].shape == (1, 3, 28, 28)
    assert row.pixels[0].max(axis=(0, 2, 3)) == pytest.approx(expected, rel=1e-5)
    assert row.pixels[0].min(axis=(0, 2, 3)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": None, "conversations": _said("<image>", "a")}, "its image is None"),
        ({"image": 5, "conversations": _said("<image>", "a")}, "its image is 5"),
        ({"image": "../../../etc/passwd", "conversations": _said("<image>", "a")}, "leads out of the image folder"),
        ({"image": "sub/../../x.png", "conversations": _said("<image>", "a")}, "leads out of the image folder"),
        ({"image": "/etc/passwd", "conversations": _said("<image>", "a")}, "leads out of the image folder"),
        ({"image": "blue.png", "conversations": _said("<image>", "a")}, "there is no image"),
        ({"image": "orange.png", "conversations": _said("No mark", "a")}, "0 images, and 1 came"),
        ({"image": "orange.png", "conversations": _said("<image>", "a") * 2}, "2 images, and 1 came"),
        ({"image": "orange.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}]}, "nothing to learn"),
        ({"conversations": "What?"}, "no conversations"),
        ({"conversations": [1]}, "turn 1 of a conversation is 1"),
        ({"conversations": _said("What?", None)}, "turn 2 of a conversation is"),
        ({}, "no conversations"),
    ],
)
def test_a_spoilt_sample_is_named(start: Path, tmp_path: Path, row: dict[str, object], words: str) -> None:
    data = _json(tmp_path, **row)
    with pytest.raises(UserError, match=words) as refusal:
        train(_recipe(start, batch=1, steps=1), output=tmp_path / "run", dataset=data)
    assert refusal.value.message.startswith("data.json, sample 'black-7': ")


def test_a_sample_without_a_name_has_a_number(start: Path, tmp_path: Path) -> None:
    class Silent(Squares):
        def sample(self, index: int) -> Sample:
            return Sample((Message("user", "What?"),))

    with pytest.raises(UserError, match=r"^sample [012]: it has nothing to learn"):
        train(_recipe(start, steps=1), output=tmp_path / "run", dataset=Silent())


def test_a_long_sample_is_cut_behind_its_images(start: Path) -> None:
    """As the authors' model cuts the expanded sequence, but not through an image, nor to what teaches nothing."""
    checkpoint = checkpoints.read(start)
    picture = Image.new("RGB", (28, 28))
    sample = Sample((Message("user", "", 1), Message("assistant", "red green blue")), (picture,), "long-1")

    def at(max_tokens: int) -> Row:
        return encode(sample, checkpoint.config, checkpoint.tokenizer, template="plain", max_tokens=max_tokens)

    whole = at(2048)
    assert at(len(whole.ids)).ids == whole.ids
    cut = at(7)
    assert (cut.ids, cut.labels) == (whole.ids[:7], whole.labels[:7])
    assert cut.learned == 2
    with pytest.raises(UserError, match="long-1: it has nothing to learn: no answer in its first 5 tokens"):
        at(5)
    with pytest.raises(UserError, match="long-1: its images end beyond token 4"):
        at(4)


def test_no_data_is_said_at_once(start: Path, tmp_path: Path) -> None:
    class Empty(Squares):
        def __len__(self) -> int:
            return 0

    with pytest.raises(UserError, match="names no data"):
        train(_recipe(start), output=tmp_path / "run")
    with pytest.raises(UserError, match="has no samples"):
        train(_recipe(start), output=tmp_path / "run", dataset=Empty())


def test_an_output_that_is_no_folder(start: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="run cannot be made"):
        train(_recipe(start), output=tmp_path / "run", dataset=Squares(1, _never))
    (tmp_path / "other" / "log.jsonl").mkdir(parents=True)
    with pytest.raises(UserError, match=r"log\.jsonl cannot be written"):
        train(_recipe(start), output=tmp_path / "other", dataset=Squares(1, _never))


@pytest.mark.parametrize("content", ["", "[", "[1]", "[]", "{}", "[" * 100_000])
def test_a_file_that_holds_no_samples_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.json"):
        JsonDataset(tmp_path / "data.json", tmp_path)


# Recipes, and the command.


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("learning_rate = 1e-3", "learning_rate"),
        ('steps = "many"', "steps"),
        ("steps = 0", "steps"),
        ('parts = ["head"]', "head"),
        ("rate = nan", "rate = nan"),
        (f"rate = {10**400}", "rate = 1000"),
        (f"steps = {10**400}", "steps = 1000"),
        ("tower_rate = -1e-4", "tower_rate = -0.0001"),
        ("final = nan", "final = nan"),
        ("final = 1.5", "final = 1.5"),
        ("warmup = -0.1", "warmup = -0.1"),
        ("weight_decay = -0.1", "weight_decay = -0.1"),
        ("weight_decay = inf", "weight_decay = inf"),
        ("clip_norm = 0", "clip_norm = 0"),
        ("clip_norm = inf", "clip_norm = inf"),
        ("micro_batch = -1", "micro_batch = -1"),
        ('preprocess = "crop"', "preprocess = 'crop'"),
        ("preprocess = 1", "preprocess is 1"),
        ('template = "vicuna_v9"', "template = 'vicuna_v9'"),
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
    assert [read_recipe(path).preprocess for path in recipes] == ["hf", "original"]


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('model = "pebble"\nraet = 1.0\n', encoding="utf-8")
    command = [sys.executable, "-m", "pumice.train", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'raet'" in done.stderr
    assert "'rate'" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_the_command_stopped_by_ctrl_c(start: Path, tmp_path: Path) -> None:
    def heed() -> None:
        # A job in the background of a script is started with this signal ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    _json(tmp_path, image="orange.png", conversations=_said("<image>", "orange"))
    (tmp_path / "r.toml").write_text(
        f'model = "{start}"\ndata = "{tmp_path}/data.json"\nimages = "{tmp_path}"\nsteps = 100000\nbatch = 1\n',
        encoding="utf-8",
    )
    command = [sys.executable, "-m", "pumice.train", str(tmp_path / "r.toml"), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed) as process:
        log, deadline = tmp_path / "out" / "log.jsonl", time.monotonic() + 120
        while not (log.exists() and log.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130
    assert len(said.splitlines()) == 1
    assert said.startswith("stopped at step ")
    assert (tmp_path / "out" / "state.pt").is_file()
