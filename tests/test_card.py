"""The card in a GGUF file: it takes its room and nothing else, and a write that is cut short leaves no half of one."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from pumice import Card, UserError
from pumice.checkpoints.card import CARD_BYTES, CARD_KEY, NO_CARD, check_room, read_card, write_card
from pumice.checkpoints.gguf_file import ToStore, Value, open_gguf, write_gguf
from pumice.quant import FORMATS
from pumice.tasks.card import Bounds, Build, Features, Logits, Pixels

BUILD = Build("llava-q4.gguf", "gguf", "F16 391", "Q4_K 193, F32 65", 4_080_000_000)
LOGITS = Logits(0.03, 0.2, 1.5, 0.95, 1.01, 2.5)
CARD = Card(
    model=BUILD,
    reference=replace(BUILD, name="llava", format="hf", language_model="bfloat16 291"),
    pumice="0.1.0",
    questions=6,
    pictures=3,
    places=192,
    same_prompts=5,
    pixels=Pixels(2, None),
    features=Features(0.5, 0.01, 0.9999, 0.999, (0.01, 0.02)),
    language_model=LOGITS,
    whole=replace(LOGITS, kl_mean=0.04),
)


def gguf_with(path: Path, room: object = NO_CARD) -> Path:
    """A small file, the card's room between other keys."""
    values = {"general.architecture": Value("string", "llama"), "a.words": Value("string", ["ä", "▁b"])}
    if room is not None:
        values[CARD_KEY] = Value("u32", room) if isinstance(room, int) else Value("string", room)
    values |= {"general.name": Value("string", "größer")}
    tensor = ToStore("plain", (3, 5), FORMATS["F32"], lambda: np.arange(15, dtype=np.float32))
    list(write_gguf(path, values, [tensor]))
    return path


def test_a_card_takes_its_room_and_nothing_else(tmp_path: Path) -> None:
    path = gguf_with(tmp_path / "a.gguf")
    before = path.read_bytes()
    assert read_card(path) is None
    write_card(path, CARD.to_json())
    assert read_card(path) == CARD.to_json()
    after, start = path.read_bytes(), before.index(NO_CARD.encode())
    assert len(after) == len(before)
    assert after[:start] == before[:start]
    assert after[start + CARD_BYTES :] == before[start + CARD_BYTES :]
    assert json.loads(open_gguf(path).values[CARD_KEY].value) == json.loads(CARD.to_json())
    theirs = gguf.GGUFReader(path)
    assert json.loads(theirs.fields[CARD_KEY].contents())["places"] == 192
    write_card(path, "{}")
    assert read_card(path) == "{}"


@pytest.mark.parametrize("old", [None, '{"old": 1}' * 30])
def test_a_write_that_is_cut_short(old: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped behind any of its steps: ASCII that reads as no card, or the whole new one; the file stays whole."""
    path = gguf_with(tmp_path / "a.gguf")
    if old is not None:
        write_card(path, old)
    seen = []
    real = os.fsync

    def stops_at(step: int) -> None:
        calls = iter(range(step + 1))

        def fsync(handle: int) -> None:
            real(handle)
            if next(calls) == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(os, "fsync", fsync)

    for step in range(3):
        stops_at(step)
        with pytest.raises(KeyboardInterrupt):
            write_card(path, CARD.to_json())
        seen.append(read_card(path))
        assert open_gguf(path).values[CARD_KEY].value.isascii()
        assert len(open_gguf(path).values[CARD_KEY].value) == CARD_BYTES
        if step < 2 and old is not None:
            monkeypatch.undo()
            write_card(path, old)
    assert seen == [None, None, CARD.to_json()]


def test_files_without_room(tmp_path: Path) -> None:
    for room in (None, 7, " " * 100):
        path = gguf_with(tmp_path / "a.gguf", room)
        assert read_card(path) is None
        with pytest.raises(UserError, match="has no room for a card"):
            check_room(path)
        before = path.read_bytes()
        with pytest.raises(UserError, match="has no room for a card"):
            write_card(path, "{}")
        assert path.read_bytes() == before
    path = gguf_with(tmp_path / "a.gguf")
    with pytest.raises(UserError, match="room for 4096"):
        write_card(path, "{" + "x" * CARD_BYTES)
    with pytest.raises(UserError, match="is no GGUF file"):
        check_room(tmp_path)


def test_every_prefix_of_a_file(tmp_path: Path) -> None:
    """No card, or a UserError; a card only once all of its bytes are there."""
    path = gguf_with(tmp_path / "a.gguf")
    write_card(path, CARD.to_json())
    whole, part = path.read_bytes(), tmp_path / "part.gguf"
    end = whole.index(b"{") + CARD_BYTES
    for length in [*range(300), *range(end - 3, end + 3)]:
        part.write_bytes(whole[:length])
        try:
            found = read_card(part)
        except UserError:
            found = None
        assert (found is not None) == (length >= end)


def test_a_card_and_its_text() -> None:
    text = CARD.to_json()
    assert len(text) < CARD_BYTES
    assert text.isascii()
    assert Card.from_json(text) == CARD
    words_only = replace(CARD, pixels=None, features=None)
    assert Card.from_json(words_only.to_json()) == words_only


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts.pop("whole"),
        lambda facts: facts.update(extra=1),
        lambda facts: facts.update(places="many"),
        lambda facts: facts.update(places=True),
        lambda facts: facts.update(pumice="\x1b[31m"),
        lambda facts: facts.update(model=None),
        lambda facts: facts["features"].update(by_tile=[]),
        lambda facts: facts["features"].update(by_tile=["0.5"]),
        lambda facts: facts["whole"].update(kl_mean=float("nan")),
        lambda facts: facts["whole"].update(kl_mean=10**400),
    ],
)
def test_texts_that_are_no_card(change: object) -> None:
    facts = json.loads(CARD.to_json())
    change(facts)  # type: ignore[operator]
    with pytest.raises(UserError, match="the card cannot be read"):
        Card.from_json(json.dumps(facts))


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 4000, "{" + " " * CARD_BYTES + "}"])
def test_texts_that_are_no_object(text: str) -> None:
    with pytest.raises(UserError, match="the card cannot be read"):
        Card.from_json(text)


def test_words_beside_figures() -> None:
    rows = {(row.part, row.figure): (row.value, row.word) for row in CARD.rows()}
    assert rows["prompts", "equal"] == ("5 of 6", "different")
    assert rows["pixels", "largest difference"] == ("-", "other tiles")
    assert rows["tower", "relative L2, worst: tile 1"] == ("0.02", "very close")
    assert rows["tower", "cosine, least"] == ("0.999", "close")
    assert rows["language model", "KL divergence, mean"] == ("0.03", "close")
    assert rows["language model", "KL divergence, largest"] == ("1.5", "different")
    assert rows["whole", "same best token"] == ("0.95", "close")


def test_what_only_rounds_to_its_best_is_not_called_equal() -> None:
    almost = replace(LOGITS, kl_mean=0.0, perplexity_ratio=1.0, agreement=1.0, largest=1e-7)
    words = {row.figure: row.word for row in almost.rows("whole")}
    assert words["KL divergence, mean"] == words["perplexity ratio"] == words["largest difference"] == "rounding"
    assert words["same best token"] == "equal"


def test_bounds() -> None:
    assert Bounds().broken(CARD) == []
    assert Bounds(0.04, 0.95, 0.999).broken(CARD) == []
    broken = Bounds(0.039, 0.951, 0.9991).broken(CARD)
    assert [each.split(" is ")[0] for each in broken] == [
        "the mean KL divergence", "the share of same best tokens", "the least cosine",
    ]  # fmt: skip
    assert Bounds(min_cosine=1).broken(replace(CARD, features=None)) == []
    for wrong in ({"max_kl": -1.0}, {"max_kl": float("nan")}, {"min_agreement": 95.0}, {"min_cosine": float("nan")}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} is"):
            Bounds(**wrong)
