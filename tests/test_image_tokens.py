"""Fewer tokens an image: how many, which, and that nothing changes unless it is asked for."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText

import pumice
import tiny
from pumice import Exchange, Question, Sampling, UserError
from pumice.cli import main
from pumice.config import ImageConfig, Size, VisionConfig
from pumice.image import Grid, grid_for, prepare, tile_pictures
from pumice.model import Model
from pumice.network.llava import merge
from pumice.network.pruning import most_diverse

FEW = Sampling(max_tokens=12)
TILE_PX = 84
"""6 x 6 patches: a base view of 36 tokens."""
BASE = 36
VISION = VisionConfig(image_px=336, patch_px=14, width=64, layers=2, heads=4, ffn_width=128)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
TILED = ImageConfig("anyres", 336, 336, MEAN, STD, pinpoints=PINPOINTS)
PADDED = ImageConfig("pad", 336, 336, MEAN, STD)


def diverse(x_XD: np.ndarray, count: int) -> tuple[list[int], float]:
    """The paper's algorithm 1, one distance at a time, in float64; and by how much its choices led the next best."""
    rows = [row / np.sqrt((row * row).sum()) for row in x_XD.astype(np.float64)]
    distances = [[1.0 - float((a * b).sum()) for b in rows] for a in rows]
    staying: list[int] = []
    lead = np.inf
    while len(staying) < count:
        scores = {}
        for place in range(len(rows)):
            if place not in staying:
                near = staying or [other for other in range(len(rows)) if other != place]
                scores[place] = min((distances[place][other] for other in near), default=0.0)
        first, *others = sorted(scores, key=lambda place: -scores[place])
        lead = min(lead, scores[first] - scores[others[0]]) if others else lead
        staying.append(first)
    return sorted(staying), float(lead)


def picture(seed: int, size: tuple[int, int]) -> Image.Image:
    """Coarse noise, (width, height): each patch shows something else."""
    drawn = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize(size, Image.Resampling.BICUBIC)


# --- which tokens -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 9), st.integers(0, 10**6), st.data())
def test_the_most_diverse_stay(rows: int, width: int, seed: int, data: st.DataObject) -> None:
    x_XD = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    count = data.draw(st.integers(1, rows))
    expected, lead = diverse(x_XD, count)
    assume(lead > 1e-5)
    assert most_diverse(torch.from_numpy(x_XD), count).tolist() == expected


def test_directions_worked_by_hand() -> None:
    """Angles of vectors, whose lengths do not matter: 170 lies farthest from its neighbour, 0 from it, 90 between."""
    degrees = torch.tensor([0.0, 10.0, 25.0, 75.0, 90.0, 170.0]).deg2rad()
    x_XD = torch.stack((degrees.cos(), degrees.sin()), dim=1) * torch.tensor([1.0, 5.0, 0.2, 3.0, 1.0, 1.0])[:, None]
    assert [most_diverse(x_XD, count).tolist() for count in range(1, 7)] == [
        [5], [0, 5], [0, 4, 5], [0, 2, 4, 5], [0, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip


def test_equal_features_are_each_chosen_once() -> None:
    x_XD = torch.ones(6, 4)
    assert most_diverse(x_XD, 4).tolist() == [0, 1, 2, 3]
    assert most_diverse(torch.zeros(3, 4), 3).tolist() == [0, 1, 2]


def test_a_map_with_row_ends_keeps_its_order() -> None:
    """`merge` takes any grid: what stays is part of what would be there without a limit, in the same order."""
    torch.manual_seed(0)
    tiles, newline = torch.randn(3, 9, 16), torch.randn(16)
    grid = Grid(3, rows=1, columns=2, left=1, newline=True)
    whole = merge(tiles, grid, newline)
    assert len(whole) == 9 + 3 * 5
    fewer = merge(tiles, dataclasses.replace(grid, most=10), newline)
    expected, _ = diverse(whole.numpy(), 10)
    assert torch.equal(fewer, whole[expected])
    for most in (24, 99):
        assert torch.equal(merge(tiles, dataclasses.replace(grid, most=most), newline), whole)
    with_class = Grid(3, class_token=True, most=4)
    assert len(merge(torch.randn(1, 10, 16), with_class, None)) == with_class.tokens == 4


# --- how many ---------------------------------------------------------------------------------------------------------


def on_canvas(size: Size, canvas: Size) -> tuple[int, int]:
    """Tokens of a picture that has this canvas alone to lie on, and how many of its pixels survive there."""
    (height, width), scale = size, min(canvas[0] / size[0], canvas[1] / size[1])
    only = dataclasses.replace(TILED, pinpoints=(canvas,))
    return grid_for(size, only, VISION).tokens, min(int(width * scale) * int(height * scale), width * height)


EDGES = st.integers(1, 400) | st.integers(1, 3000)


@settings(max_examples=300, deadline=None)
@given(EDGES, EDGES, st.integers(1, 3200))
def test_the_grid_that_shows_most_within_the_limit(height: int, width: int, most: int) -> None:
    size = (height, width)
    whole, grid = grid_for(size, TILED, VISION), grid_for(size, TILED, VISION, most)
    assert grid.tokens == len(merge(torch.zeros(grid.tiles, 576, 1), grid, torch.zeros(1))) <= most
    assert grid_for(size, TILED, VISION, whole.tokens) == whole
    if whole.tokens <= most:
        assert grid == whole
    elif most < 576:
        assert (grid.tokens, grid.tiles, grid.whole) == (most, 1, 576)
    else:
        base = (576, min(height, 336) * min(width, 336))
        fitting = [each for each in (base, *(on_canvas(size, canvas) for canvas in PINPOINTS)) if each[0] <= most]
        pixels = max(pixels for _, pixels in fitting)
        assert grid.tokens == grid.whole == min(tokens for tokens, shown in fitting if shown == pixels)


@settings(max_examples=100, deadline=None)
@given(EDGES, EDGES, st.integers(1, 3000), st.integers(0, 500))
def test_a_higher_limit_never_gives_fewer_tokens(height: int, width: int, most: int, more: int) -> None:
    for config in (TILED, PADDED):
        few, many = (grid_for((height, width), config, VISION, each).tokens for each in (most, most + more))
        assert few <= many <= grid_for((height, width), config, VISION).tokens


def test_layouts_worked_by_hand() -> None:
    """A photo of 640 x 480 lies on 2 x 2 tiles: 576 + 36 rows of 49. On two tiles side by side it is 448 x 336, with
    24 rows of 33; on two above each other 336 x 252, fewer pixels than in the base view."""
    found = {most: grid_for((480, 640), TILED, VISION, most) for most in (2340, 2339, 1368, 1367, 576, 575, 1)}
    assert [(each.tokens, each.rows, each.columns) for each in found.values()] == [
        (2340, 2, 2), (1368, 1, 2), (1368, 1, 2), (576, 0, 0), (576, 0, 0), (575, 0, 0), (1, 0, 0),
    ]  # fmt: skip
    assert grid_for((480, 640), PADDED, VISION, 100) == Grid(24, most=100)


@pytest.mark.parametrize("most", [2339, 576, 100])
def test_the_pixels_are_those_of_the_smaller_grid(most: int) -> None:
    """Tiles and base view are what the same rules make of a checkpoint with that canvas alone."""
    photo = picture(1, (640, 480))
    found = prepare(photo, TILED, VISION, most)
    only = dataclasses.replace(TILED, pinpoints=((336, 672),))
    expected = prepare(photo, only, VISION).pixels[: found.grid.tiles]
    assert np.array_equal(found.pixels, expected)
    assert len(tile_pictures(photo, TILED, VISION, most)) == found.grid.tiles == len(found.pixels)


def test_digests_tell_limits_apart() -> None:
    """The base view has the same pixels under both; the language model gets different features."""
    photo = picture(2, (640, 480))
    digests = [prepare(photo, TILED, VISION, most).digest for most in (None, 3000, 576, 100, 99)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["1.5", "1.6"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = f"tiny-{request.param}"
    return tiny.hf_folder(tmp_path_factory.mktemp("fewer") / name, family=request.param, tile_px=TILE_PX, seed=5)


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return pumice.load(folder)


@pytest.mark.parametrize("most", [1, 7, 35])
def test_features_are_those_of_transformers_that_lie_farthest_apart(folder: Path, model: Model, most: int) -> None:
    """Transformers' tower and projector, the twin's choice of their rows, and Transformers' language model on them."""
    oracle = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    seen = model.see(Question("What is it?", picture(3, (200, 150)), image_tokens=most))
    ids = torch.tensor([seen.encoded.ids])
    with torch.inference_mode():
        states = oracle.model.vision_tower(torch.from_numpy(seen.images[0].pixels), output_hidden_states=True)
        theirs_XD = oracle.model.multi_modal_projector(states.hidden_states[-2][:, 1:])[0]
        chosen, lead = diverse(theirs_XD.numpy(), most)
        assert lead > 1e-5, "draw another picture"
        x_1TD = oracle.get_input_embeddings()(ids)
        x_1TD[ids == model.config.image_token_id] = theirs_XD[chosen]
        expected = oracle.lm_head(oracle.model.language_model(inputs_embeds=x_1TD).last_hidden_state)[0, -1]
    (ours_XD,) = model.features(seen.images)
    assert torch.allclose(ours_XD, theirs_XD[chosen], atol=1e-4)
    ours = model.logits(seen.encoded.ids, [ours_XD], 1)[0]
    assert float((ours - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_what_fits_does_not_change(model: Model) -> None:
    photo = picture(4, (200, 150))
    whole = model.see(Question("What is it?", photo))
    tokens = whole.images[0].grid.tokens
    expected = model.ask("What is it?", photo, sampling=FEW)
    for most in (tokens, tokens + 1, 10**9, 2**70):
        seen = model.see(Question("What is it?", photo, image_tokens=most))
        assert (seen.encoded.ids, seen.images[0].digest) == (whole.encoded.ids, whole.images[0].digest)
        assert torch.equal(model.features(seen.images)[0], model.features(whole.images)[0])
        assert model.ask("What is it?", photo, sampling=FEW, image_tokens=most).tokens == expected.tokens
    assert model.see(Question("What is it?", photo, image_tokens=tokens - 1)).images[0].grid.tokens < tokens


def test_every_door_has_the_limit(model: Model) -> None:
    photo, few = picture(5, (150, 200)), 9
    question = Question("What is it?", photo, sampling=FEW, image_tokens=few)
    expected = model.answer(question)
    assert expected.image_tokens == (few,)
    assert model.see(question).encoded.ids.count(model.config.image_token_id) == few
    assert model.ask("What is it?", photo, sampling=FEW, image_tokens=few).tokens == expected.tokens
    assert model.stream("What is it?", photo, sampling=FEW, image_tokens=few).answer.tokens == expected.tokens
    assert model.chat(sampling=FEW, image_tokens=few).ask("What is it?", photo).tokens == expected.tokens
    assert expected.tokens != model.ask("What is it?", photo, sampling=FEW).tokens


def test_a_chat_keeps_what_its_images_took(model: Model) -> None:
    chat = model.chat(sampling=FEW, image_tokens=9)
    chat.ask("What is it?", picture(6, (150, 200)))
    assert chat.ask("And now?").image_tokens == (9,)
    assert chat.ask("And this?", picture(7, (90, 90))).image_tokens == (9, 9)
    (prepared,) = chat.history[0].images
    later = Question("And?", picture(7, (90, 90)), history=(Exchange("What is it?", "It.", (prepared,)),))
    whole = model.see(dataclasses.replace(later, history=())).images[0].grid.tokens
    assert [each.grid.tokens for each in model.see(later).images] == [9, whole]


def test_several_images_and_rows_with_limits_of_their_own(model: Model) -> None:
    """Each answer of a batch is what it is alone; each image of a prompt has the limit."""
    photos = [picture(seed, size) for seed, size in enumerate([(150, 200), (84, 84), (40, 300), (168, 168)])]
    questions = [
        Question("Which?", photos[:2], sampling=FEW, image_tokens=5),
        Question("What is it?", photos[2], sampling=FEW),
        Question("What is shown?", photos, sampling=FEW, image_tokens=BASE),
        Question("How many?", photos[3], sampling=FEW, image_tokens=1),
        Question("Who?", sampling=FEW, image_tokens=1),
    ]
    answers = model.ask_all(questions)
    assert [each.image_tokens for each in answers[:1] + answers[2:]] == [(5, 5), (BASE,) * 4, (1,), ()]
    assert [each.tokens for each in answers] == [model.answer(each).tokens for each in questions]
    seen = model.see(questions[0]).images
    together, alone = model.features(seen), [model.features([each])[0] for each in seen]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(together, alone, strict=True))


# --- refusals, and the command line -----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [0, -1, -(2**70), True, 2.5, float("nan"), "9", [9]])
def test_no_number_of_tokens(model: Model, wrong: int) -> None:
    for asked in (model.ask, lambda text, image_tokens: model.chat(image_tokens=image_tokens)):
        with pytest.raises(UserError, match="image_tokens is") as refused:
            asked("What is it?", image_tokens=wrong)
        assert "from 1" in str(refused.value.hint)


def test_a_text_model_has_no_images_to_limit(model: Model) -> None:
    config = dataclasses.replace(model.config, vision=None, projector=None, image=None)
    blind = Model("blind", config, model.tokenizer, model.network)
    for asked in (blind.ask, lambda text, image_tokens: blind.chat(image_tokens=image_tokens)):
        with pytest.raises(UserError, match="image_tokens is 9, and blind is a text model"):
            asked("Hello", image_tokens=9)


def test_the_command_line(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def pumice_says(*arguments: object, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["pumice", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO())
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        assert int(left.value.code or 0) == code, err
        return err if code else out

    photo = tmp_path / "photo.png"
    picture(8, (200, 150)).save(photo)
    asked = [folder, "What is it?", "-i", photo, "--image-tokens"]
    facts = json.loads(pumice_says("run", *asked, 9, "--json", "--max-tokens", 4))
    assert facts["image_tokens"] == [9]
    shown = pumice_says("prompt", *asked, 9, "--save-tiles", tmp_path / "tiles")
    assert "<image> x 9" in shown
    assert f"9 of {BASE} tokens" in shown
    assert [each.name for each in (tmp_path / "tiles").iterdir()] == ["image1-base.png"]
    assert "image_tokens is 0" in pumice_says("run", *asked, 0, code=2)
