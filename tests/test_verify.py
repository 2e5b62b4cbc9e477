"""Builds of one model compared: figures against numpy and Transformers, each fault in its place, files of values."""

from __future__ import annotations

import io
import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import pumice
import tiny
from pumice import UserError
from pumice.checkpoints.card import CARD_KEY, NO_CARD
from pumice.checkpoints.gguf_file import Value
from pumice.cli.terminal import counting
from pumice.image import Grid, Prepared
from pumice.model import load_from
from pumice.network.llava import Llava, merge
from pumice.source import Source
from pumice.tasks import verify as task
from pumice.tasks.figures import FeatureTally, LogitTally, PixelTally
from pumice.tasks.probes import page, probes, scene, tower
from pumice.tasks.values import IMAGE, Values, measured, read_values
from test_cli import Command, command, refused  # noqa: F401 (a fixture)
from test_gguf import edited, pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("verify") / "tiny", family="1.6", lm="mistral", seed=3)


def changed(folder: Path, out: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy with another value of the one tensor whose key holds `name`."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    (key,) = [each for each in tensors if name in each]
    save_file(tensors | {key: change(tensors[key]).contiguous()}, out / "model.safetensors", metadata={"format": "pt"})
    return out


def words(card: pumice.Card) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in card.rows():
        found.setdefault(row.part, set()).add(row.word)
    return found


# --- figures ----------------------------------------------------------------------------------------------------------


def test_logits_by_hand() -> None:
    """Two places, three tokens, probabilities that can be written down."""
    tally = LogitTally()
    p, q = np.array([[0.5, 0.25, 0.25], [0.2, 0.2, 0.6]]), np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
    tally.add(torch.tensor(np.log(p)), torch.tensor(np.log(q) + np.array([[3.0], [0.0]])), torch.tensor([0, 2]))
    found = tally.figures()
    assert found.kl_max == pytest.approx(0.5 * np.log(2) + 0.25 * np.log(0.5))
    assert found.kl_mean == pytest.approx(found.kl_max / 2)
    assert found.kl_p99 == pytest.approx(0.99 * found.kl_max)
    assert found.agreement == 0.5
    assert found.perplexity_ratio == pytest.approx(np.sqrt(2))
    assert found.largest == pytest.approx(3 + np.log(2))
    assert tally.places == 2


def test_logits_against_numpy() -> None:
    """Several answers, one vocabulary padded; equal logits give exactly nothing."""
    random = np.random.default_rng(1)
    tally, same = LogitTally(), LogitTally()
    kl, agree, worse, largest = [], [], [], 0.0
    for length in (7, 1, 30):
        a, b = random.normal(0, 3, (length, 50)), random.normal(0, 3, (length, 53))
        answer = random.integers(0, 50, length)
        tally.add(torch.tensor(a), torch.tensor(b), torch.tensor(answer))
        same.add(torch.tensor(a).float(), torch.tensor(a).float(), torch.tensor(answer))
        p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b[:, :50]))
        kl += (p * np.log(p / q)).sum(1).tolist()
        agree += (p.argmax(1) == q.argmax(1)).tolist()
        worse += [np.log(p[n, t] / q[n, t]) for n, t in enumerate(answer)]
        largest = max(largest, abs(a - b[:, :50]).max())
    found = tally.figures()
    assert found.kl_mean == pytest.approx(np.mean(kl))
    assert found.kl_p99 == pytest.approx(np.percentile(kl, 99))
    assert found.kl_max == pytest.approx(max(kl))
    assert found.agreement == pytest.approx(np.mean(agree))
    assert found.perplexity_ratio == pytest.approx(np.exp(np.mean(worse)))
    assert found.largest == pytest.approx(largest)
    exact = same.figures()
    assert (exact.kl_max, exact.agreement, exact.perplexity_ratio, exact.largest) == (0, 1, 1, 0)


def test_features_against_numpy() -> None:
    """Two pictures of other grids; the worst place is the one that was made so."""
    random = np.random.default_rng(2)
    grids = [Grid(2, rows=2, columns=1, left=0, newline=True), Grid(2, rows=1, columns=3, top=0, newline=True)]
    tally, off, of, cosines = FeatureTally(), [], [], []
    for grid in grids:
        a = random.normal(0, 1, (grid.tokens, 8))
        b = a + random.normal(0, 0.01, a.shape)
        b[grid.sources() == 1] += 0.5
        tally.add(torch.tensor(a), torch.tensor(b), grid)
        off.append(b - a)
        of.append(a)
        cosines += [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b)]
    found = tally.figures()
    assert found.largest == pytest.approx(max(abs(each).max() for each in off))
    assert found.relative_l2 == pytest.approx(np.linalg.norm(np.concatenate(off)) / np.linalg.norm(np.concatenate(of)))
    assert found.cosine_mean == pytest.approx(np.mean(cosines))
    assert found.cosine_min == pytest.approx(min(cosines))
    for place, value in enumerate(found.by_tile):
        here = [grid.sources() == place for grid in grids]
        expected = np.linalg.norm(np.concatenate([x[y] for x, y in zip(off, here)]))
        assert value == pytest.approx(expected / np.linalg.norm(np.concatenate([x[y] for x, y in zip(of, here)])))
    assert len(found.by_tile) == 4
    assert max(found.by_tile) == found.by_tile[1] > 0.4
    assert [row.figure for row in found.rows()][1] == "relative L2, worst: tile 1"


def test_features_that_are_nothing() -> None:
    tally, zeros = FeatureTally(), torch.zeros(4, 8)
    tally.add(zeros, zeros, Grid(2))
    assert (tally.figures().relative_l2, tally.figures().cosine_min) == (0, 1)
    tally.add(zeros, torch.ones(4, 8), Grid(2))
    assert (tally.figures().relative_l2, tally.figures().cosine_min) == (1, 0)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(3), Grid(3, class_token=True), Grid(3, rows=2, columns=2, top=1, newline=True),
        Grid(2, rows=1, columns=3, left=1, newline=True), Grid(2, rows=3, columns=1),
    ],
    ids=str,
)  # fmt: skip
def test_which_tile_a_token_comes_from(grid: Grid) -> None:
    """As the network joins tiles that are filled with their own numbers."""
    tiles = torch.arange(grid.tiles)[:, None, None].expand(-1, grid.tile_side**2 + int(grid.class_token), 1).float()
    newline = torch.tensor([-1.0]) if grid.newline else None
    assert merge(tiles, grid, newline)[:, 0].tolist() == grid.sources().tolist()


def test_pixels() -> None:
    a, grid = np.random.default_rng(0).normal(size=(1, 3, 4, 4)).astype(np.float32), Grid(2)
    tally = PixelTally()
    assert tally.add(Prepared(a, grid, (4, 4), ""), Prepared(a.copy(), grid, (9, 9), "x"))
    b = a.copy()
    b[0, 1, 2, 3] += 0.25
    assert not tally.add(Prepared(a, grid, (4, 4), ""), Prepared(b, grid, (4, 4), ""))
    assert tally.figures().equal == 1
    assert tally.figures().largest == pytest.approx(0.25)
    assert not tally.add(Prepared(a, grid, (4, 4), ""), Prepared(np.concatenate((a, a)), Grid(2, 1), (4, 4), ""))
    assert tally.figures().largest is None


# --- builds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "lm"), [("1.5", "vicuna"), ("1.6", "llama3")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_is_equal_to_itself(family: str, lm: str, dtype: str, tmp_path: Path) -> None:
    path = tiny.hf_folder(tmp_path / "hf", family=family, lm=lm)
    card = pumice.verify(path, path, dtype=dtype)
    assert all(found == {"equal"} for found in words(card).values())
    assert (card.questions, card.pictures, card.same_prompts) == (6, 3, 6)
    assert card.whole.agreement == card.whole.perplexity_ratio == 1.0
    assert card.whole.kl_max == card.whole.largest == card.language_model.kl_max == 0.0
    assert card.features is not None
    assert card.features.cosine_min == 1.0
    assert len(card.features.by_tile) == (5 if family == "1.6" else 1)


def test_a_damaged_tower_is_seen_in_the_tower(folder: Path, tmp_path: Path) -> None:
    bad = changed(folder, tmp_path / "bad", "layers.0.mlp.fc1.weight", lambda weight: weight * 1.2)
    card = pumice.verify(bad, folder)
    found = words(card)
    assert "equal" not in found.pop("tower")
    whole = found.pop("whole")
    assert found == {"prompts": {"equal"}, "pixels": {"equal"}, "language model": {"equal"}}
    assert whole != {"equal"}
    assert card.whole.kl_max > 0


def test_a_damaged_language_model_is_seen_there(folder: Path, tmp_path: Path) -> None:
    bad = changed(folder, tmp_path / "bad", "layers.1.mlp.up_proj.weight", lambda weight: weight * 1.2)
    found = words(pumice.verify(bad, folder))
    assert found["prompts"] == found["pixels"] == found["tower"] == {"equal"}
    assert "rounding" not in found["language model"]
    assert found["language model"] == found["whole"]


def test_other_image_rules_are_seen_in_the_pixels(tmp_path: Path) -> None:
    """The tower gets the reference's pixels, so it is not to blame."""
    path = tiny.hf_folder(tmp_path / "hf", family="1.5")
    card = pumice.verify(Source(path, preprocess="original"), path)
    found = words(card)
    assert found["prompts"] == found["tower"] == found["language model"] == {"equal"}
    assert "different" in found["pixels"]
    assert found["whole"] != {"equal"}


def test_other_canvases_are_seen_in_the_prompts(folder: Path, tmp_path: Path) -> None:
    """Each build makes a prompt of its own length; the places of the answers are the same."""
    other = shutil.copytree(folder, tmp_path / "other")
    for name in ("config.json", "preprocessor_config.json"):
        facts = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(facts | {"image_grid_pinpoints": [[28, 56], [56, 28]]}))
    card = pumice.verify(other, folder)
    found = words(card)
    assert found["tower"] == found["language model"] == {"equal"}
    assert found["pixels"] == {"different", "other tiles"}
    assert card.pixels is not None
    assert 0 <= card.pixels.equal < 3
    assert 3 <= card.same_prompts < 6  # another grid may have as many tokens
    assert card.whole.kl_max > 0


def test_another_template_is_seen_in_the_prompts(folder: Path) -> None:
    card = pumice.verify(Source(folder, template="llava_v1"), folder)
    assert card.same_prompts == 0
    assert words(card)["language model"] == {"equal"}
    assert card.whole.kl_max > 0


def test_quantised_against_transformers(tmp_path: Path, unrounded: None) -> None:
    """F32 and Q4_0 of one model: the figures that come from Transformers' logits of both sets of weights."""
    path = tiny.hf_folder(tmp_path / "hf", family="1.5", lm="vicuna", seed=5)
    blocks = Source(pair(path, tmp_path / "q4", quant="Q4_0"), template="vicuna_v1")
    plain = Source(pair(path, tmp_path / "f32"), template="vicuna_v1")
    card = pumice.verify(blocks, plain, dtype="float32")
    assert card.features is not None
    assert card.features.relative_l2 == 0
    assert card.language_model == card.whole
    values = measured(plain, probes(eyes=True), dtype=None, device=None)
    oracles = [AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval() for _ in range(2)]
    kind = gguf.GGMLQuantizationType.Q4_0
    with torch.no_grad():
        for name, weight in oracles[1].named_parameters():
            if ("language_model" in name or "lm_head" in name) and weight.dim() == 2 and weight.shape[1] % 32 == 0:
                weight.copy_(torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), kind), kind)))
    tally = LogitTally()
    for each in values.results:
        ids = [oracles[0].config.image_token_id if id == IMAGE else id for id in each.ids] + each.answer[:-1]
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if each.image is not None:
            inputs["pixel_values"] = torch.from_numpy(each.image.pixels)
        with torch.inference_mode():
            first, second = (oracle(**inputs).logits[0, -len(each.answer) :] for oracle in oracles)
        assert float((first - each.logits_AV).abs().max()) < 2e-5 * float(first.abs().max())
        assert first.argmax(-1).tolist() == each.answer
        tally.add(first, second, torch.tensor(each.answer))
    theirs, ours = tally.figures(), card.language_model
    assert ours.kl_mean == pytest.approx(theirs.kl_mean, rel=1e-3)
    assert ours.kl_p99 == pytest.approx(theirs.kl_p99, rel=1e-3)
    assert ours.largest == pytest.approx(theirs.largest, rel=1e-3)
    assert ours.perplexity_ratio == pytest.approx(theirs.perplexity_ratio, rel=1e-4)
    assert abs(ours.agreement - theirs.agreement) * card.places < 1.5
    assert 1e-4 < ours.kl_mean < 0.1


def test_a_text_model(tmp_path: Path) -> None:
    path = tiny.hf_folder(tmp_path / "hf", family="1.5")
    blind = pair(path, tmp_path / "gguf")
    blind.with_name("mmproj.gguf").unlink()
    source = Source(blind, template="vicuna_v1")
    card = pumice.verify(source, source)
    assert (card.pictures, card.pixels, card.features) == (0, None, None)
    assert words(card) == {"prompts": {"equal"}, "language model": {"equal"}, "whole": {"equal"}}
    with pytest.raises(UserError, match="text model"):
        pumice.verify(source, source, images=[Image.new("RGB", (9, 9))])
    with pytest.raises(UserError, match=r"llava-1.5 and text"):
        pumice.verify(path, source)


def test_one_model_in_memory_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []

    def watched(*args: Any, **options: Any) -> pumice.Model:
        assert all(each() is None for each in alive)
        model = load_from(*args, **options)
        alive.append(weakref.ref(model.network))
        return model

    monkeypatch.setattr("pumice.tasks.values.load_from", watched)
    monkeypatch.setattr(task, "load_from", watched)
    pumice.verify(folder, folder)
    assert len(alive) == 2


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"lm": "vicuna"}, None),
        ({"lm": "llama3"}, "different vocabularies"),
        ({"lm": "yi"}, "different vocabularies"),
        ({"tile_px": 56}, "tile_px is 56 and 28"),
        ({"family": "1.5"}, "llava-1.5 and llava-1.6"),
    ],
)
def test_other_models_are_refused(other: dict[str, Any], says: str | None, folder: Path, tmp_path: Path) -> None:
    """Mistral's words in tiny models are Vicuna's: there the figures tell."""
    options = {"family": "1.6", "lm": "mistral"} | other
    second = tiny.hf_folder(tmp_path / "other", **options)
    if says is None:
        assert pumice.verify(second, folder).whole.kl_mean > 0.1
        return
    with pytest.raises(UserError, match=says):
        pumice.verify(second, folder)


def test_weights_that_make_no_numbers(folder: Path, tmp_path: Path) -> None:
    bad = changed(folder, tmp_path / "a", "layers.0.mlp.fc1.weight", lambda weight: weight * torch.nan)
    with pytest.raises(UserError, match="image features that are no numbers"):
        pumice.verify(bad, folder)
    bad = changed(folder, tmp_path / "b", "layers.1.mlp.up_proj.weight", lambda weight: weight * torch.inf)
    with pytest.raises(UserError, match="logits that are no numbers"):
        pumice.verify(bad, folder)


def test_the_drawn_pictures_stay_what_they_are() -> None:
    """Stored values name them by their digests."""
    digests = [each.digest[:16] for each in probes(eyes=True) if each.picture is not None]
    assert digests == ["3d65ed921257a625", "9040d5f37a88c5f2", "0edab02d78171cd1"]
    assert [each().shape for each in (scene, page, tower)] == [(480, 640, 3), (260, 600, 3), (560, 200, 3)]


# --- files of values --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def values(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("values") / "values.safetensors"
    pumice.save_values(folder, path)
    return path


def test_stored_values_stand_for_their_model(folder: Path, values: Path, tmp_path: Path) -> None:
    bad = changed(folder, tmp_path / "bad", "layers.1.mlp.up_proj.weight", lambda weight: weight * 1.2)
    for model in (folder, bad):
        assert pumice.verify(model, values) == pumice.verify(model, folder)
    shutil.copy(values, bad / task.VALUES_NAME)
    assert pumice.verify(bad) == pumice.verify(bad, folder)
    with pytest.raises(UserError, match="nothing to compare"):
        pumice.verify(folder)


def test_values_in_sixteen_bits(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    pumice.save_values(folder, path, dtype="bfloat16")
    assert words(pumice.verify(folder, path, dtype="bfloat16"))["whole"] == {"equal"}
    assert pumice.verify(folder, path).whole.kl_mean > 0


def test_values_of_own_pictures(folder: Path, tmp_path: Path) -> None:
    path, noise = tmp_path / "v.safetensors", Image.effect_noise((60, 45), 90).convert("RGB")
    pumice.save_values(folder, path, images=[noise])
    assert pumice.verify(folder, path, images=[noise]).pictures == 1
    for others in ([], [noise, noise], [noise.rotate(90)]):
        with pytest.raises(UserError, match="other pictures or questions"):
            pumice.verify(folder, path, images=others)


def test_values_of_another_model_are_refused(values: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="different vocabularies"):
        pumice.verify(tiny.hf_folder(tmp_path / "yi", lm="yi"), values)


def test_where_values_are_not_written(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the model runs; a file that is there, such as the model's own weights, stays."""
    monkeypatch.setattr(task, "measured", None)
    weights = shutil.copytree(folder, tmp_path / "copy") / "model.safetensors"
    for path, says in (
        (weights, "is there already"),
        (tmp_path / "v.npz", r"does not end in \.safetensors"),
        (tmp_path / "no" / "v.safetensors", "there is no folder"),
    ):
        with pytest.raises(UserError, match=says):
            pumice.save_values(folder, path)


def facts_of(tensors: dict[str, torch.Tensor], change: Callable[[dict[str, Any]], object]) -> None:
    facts = json.loads(bytes(tensors["facts"].numpy()))
    change(facts)
    tensors["facts"] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)


HOSTILE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "no facts": (lambda t: t.pop("facts"), "it has no facts"),
    "facts of text": (lambda t: t.update(facts=torch.full((9,), 120, dtype=torch.uint8)), "Expecting value"),
    "deep facts": (lambda t: t.update(facts=torch.full((10**5,), 91, dtype=torch.uint8)), "recursion"),
    "a list": (lambda t: t.update(facts=torch.tensor([91, 93], dtype=torch.uint8)), "facts are none"),
    "no probes": (lambda t: facts_of(t, lambda f: f.update(probes=[])), "0 probes"),
    "a probe of three": (lambda t: facts_of(t, lambda f: f["probes"][0].append("x")), "6 probes"),
    "no subject": (lambda t: facts_of(t, lambda f: f.pop("subject")), "subject is None"),
    "a subject of text": (lambda t: facts_of(t, lambda f: f["subject"].update(width="64")), "width is '64'"),
    "a text model": (lambda t: facts_of(t, lambda f: f["subject"].update(side=0)), "is none of this model"),
    "another family": (lambda t: facts_of(t, lambda f: f["subject"].update(family="llava-1.5")), "is none of this"),
    "another width": (lambda t: facts_of(t, lambda f: f["subject"].update(width=65)), "features is of shape"),
    "a text with tiles": (lambda t: facts_of(t, lambda f: f["probes"][0].__setitem__(1, "")), "other tokens"),
    "no logits": (lambda t: t.pop("3.logits"), "it has no 3.logits"),
    "logits of another length": (lambda t: t.update({"3.logits": t["3.logits"][1:].clone()}), "of shape"),
    "logits without numbers": (lambda t: t["3.logits"].fill_(torch.nan), "no number"),
    "wide logits": (lambda t: t.update({"3.logits": t["3.logits"].double()}), "of type torch.float64"),
    "features of bytes": (lambda t: t.update({"0.features": t["0.features"].byte()}), "of type torch.uint8"),
    "an answer of nothing": (lambda t: t.update({"3.answer": t["3.answer"][:0].clone()}), "of shape"),
    "an answer beyond the words": (lambda t: t["3.answer"].fill_(10**6), "other tokens"),
    "a prompt below the words": (lambda t: t["3.ids"].fill_(-7), "other tokens"),
    "a grid of minus one": (lambda t: t["0.grid"].fill_(-1), "is none of this model"),
    "an endless grid": (lambda t: t["0.grid"][2:4].fill_(2**40), "is none of this model"),
    "a cut beyond the grid": (lambda t: t["0.grid"][4].fill_(100), "is none of this model"),
    "a grid of more tokens": (lambda t: t["0.grid"][4].sub_(1).abs_(), "features|is none"),
    "pixels of another size": (lambda t: t.update({"0.pixels": t["0.pixels"][..., 1:].clone()}), "pixels is of shape"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_values_that_are_refused(fault: str, folder: Path, values: Path, tmp_path: Path) -> None:
    change, says = HOSTILE[fault]
    tensors = load_file(values)
    change(tensors)
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=says):
        pumice.verify(folder, path)


def test_values_cut_short(folder: Path, values: Path, tmp_path: Path) -> None:
    data, path = values.read_bytes(), tmp_path / "bad.safetensors"
    for length in (0, 7, 8, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            pumice.verify(folder, path)
    path.write_bytes(b"PK\x03\x04" + data)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        pumice.verify(folder, path)


def test_bytes_at_random(values: Path, tmp_path: Path) -> None:
    """What is damaged is refused or, where only numbers changed, read; no other error."""
    data, random, path = values.read_bytes(), np.random.default_rng(4), tmp_path / "bad.safetensors"
    start = data.index(b'"pumice": ')
    refusals = 0
    for number in range(400):
        bad = bytearray(data)
        end = 3000 if number % 2 else min(start + 1200, len(data))
        for place in random.integers(0 if number % 2 else start, end, 1 + number % 3):
            bad[place] = random.integers(256)
        path.write_bytes(bad)
        try:
            read_values(path)
        except UserError:
            refusals += 1
    assert refusals > 200


def test_a_file_and_its_values(values: Path, folder: Path) -> None:
    found, asked = read_values(values), probes(eyes=True)
    expected = measured(Source(folder), asked, dtype=None, device=None)
    assert isinstance(found, Values)
    assert (found.subject, found.probes) == (expected.subject, expected.probes)
    for a, b in zip(found.results, expected.results, strict=True):
        assert (a.ids, a.answer) == (b.ids, b.answer)
        assert torch.equal(a.logits_AV, b.logits_AV)
        if b.image is not None:
            assert a.image is not None
            assert a.image.grid == b.image.grid
            assert np.array_equal(a.image.pixels, b.image.pixels)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_verb(command: Command, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    bad = changed(folder, tmp_path / "bad", "layers.1.mlp.up_proj.weight", lambda weight: weight * 1.2)
    done = command("verify", bad, "--against", folder, "--json")
    assert (done.code, done.err) == (0, "")
    card = pumice.Card.from_json(done.out)
    assert card == pumice.verify(bad, folder)
    table = command("verify", bad, "--against", folder).out
    for row in card.rows():
        assert row.value in table
    assert "bad (hf; tower float32" in table
    kl, share = card.whole.kl_mean, card.whole.agreement
    assert command("verify", bad, "--against", folder, "--max-kl", kl, "--min-agreement", share).code == 0
    done = command("verify", bad, "--against", folder, "--max-kl", kl / 2, "--min-cosine", 1)
    assert done.code == 1
    assert done.err.startswith("out of bounds: the mean KL divergence is ")
    assert done.err.count("\n") == 1
    saved = tmp_path / "v.safetensors"
    assert command("verify", folder, "--save", saved).code == 0
    assert pumice.Card.from_json(command("verify", bad, "--against", saved, "--json").out) == card


def test_what_the_verb_refuses(command: Command, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    refused(command("verify", folder), "nothing to compare", "--against")
    refused(command("verify", folder, "--against", folder, "--max-kl", "nan"), "max_kl is nan")
    refused(command("verify", folder, "--against", folder, "--keep"), "no GGUF file")
    refused(command("verify", folder, "--against", folder, "--save", tmp_path / "v.safetensors"), "--save came with")
    refused(command("verify", folder, "--against", tmp_path / "nothing"), "no model named")
    refused(command("verify", folder, "--against", folder, "-i", "nowhere.png"), "nowhere.png")


def test_a_card_is_kept_and_shown(command: Command, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    path = pair(folder, tmp_path / "gguf", quant="Q4_0")
    options = ["--template", "mistral_instruct"]
    refused(command("verify", path, "--against", path, "--keep", *options), "has no room for a card")
    kept = edited(path, values={CARD_KEY: Value("string", NO_CARD)})
    assert "quality card" not in command("show", kept, *options).out
    done = command("verify", kept, "--against", folder, "--preprocess", "original", *options, "--keep", "--json")
    assert done.code == 0, done.err
    card = pumice.Card.from_json(done.out)
    assert card.same_prompts == 6
    assert card.reference.name == folder.name
    assert (
        f"against {folder.name} (float32 30): KL divergence {card.whole.kl_mean:.4g}"
        in command("show", kept, *options).out
    )
    facts = json.loads(command("show", kept, "--json", *options).out)
    assert facts["quality_card"] == card.summary
    assert pumice.load(kept, template="mistral_instruct").ask("Hi").text
    strange = edited(path, values={CARD_KEY: Value("string", '{"a": "\x1b[31m"}')})
    assert "one that cannot be read" in command("show", strange, *options).out


# --- how far it is ----------------------------------------------------------------------------------------------------


def test_each_question_is_counted(folder: Path, values: Path) -> None:
    """The reference's, then the model's; a file of values has the reference's already."""
    heard: list[tuple[str, int, int]] = []
    how = task.How(progress=lambda *each: heard.append(each))
    counts = {what: [(what, done, 6) for done in range(7)] for what in ("reference", "model")}
    card = task.compare(folder, folder, how)
    assert heard == counts["reference"] + counts["model"]
    heard.clear()
    assert task.compare(folder, values, how) == card
    assert heard == counts["model"]


def test_the_reference_s_pictures_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its answer and for its features."""
    seen: list[Grid] = []
    merge = Llava.merge

    def counted(self: Llava, tiles: torch.Tensor, grid: Grid) -> torch.Tensor:
        seen.append(grid)
        return merge(self, tiles, grid)

    monkeypatch.setattr(Llava, "merge", counted)
    measured(Source(folder), probes(eyes=True), dtype=None, device=None)
    assert len(seen) == 3


def test_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("sys.stderr", stream)
        with counting() as told:
            told("reference", 2, 6)
        assert ("reference" in stream.getvalue() and "2/6" in stream.getvalue()) == terminal
        assert bool(stream.getvalue()) == terminal
