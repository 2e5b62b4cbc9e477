"""Captions of many pictures: each once, whatever happens in between."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import pumice
from pumice.errors import UserError
from pumice.model import WAITING, Model
from pumice.question import Question
from pumice.tasks.captions import Captions, caption

COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "black", "white", "grey"]
SLOWLY = """
import sys, time
import pumice
from pumice.tasks.captions import caption

def told(name, done, total):
    print(done, flush=True)
    time.sleep(0.2)

caption(pumice.load("pebble"), sys.argv[1:2], sys.argv[2], told=told)
"""


@pytest.fixture(scope="module")
def pebble() -> Model:
    return pumice.load("pebble")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Nine pictures in two folders, a broken one among them, and a file that is none."""
    for number, colour in enumerate(COLOURS):
        place = tmp_path / "photos" / ("more" if number % 3 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (48 + number, 40), colour).save(place / f"{colour}.png")
    (tmp_path / "photos" / "grey.png").write_bytes(b"grey")
    (tmp_path / "photos" / "notes.txt").write_text("no picture")
    return tmp_path / "photos"


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_picture_has_a_line(pebble: Model, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert caption(pebble, [photos], out) == Captions(described=9, failed=1, earlier=0)
    paths = sorted(photos.glob("*.png")) + sorted(photos.glob("more/*.png"))
    assert [row["image"] for row in rows(out)] == [str(path) for path in paths]
    for row in rows(out):
        if Path(row["image"]) == photos / "grey.png":
            assert "is not a picture" in row["error"]
        else:
            assert row["caption"] == pebble.ask("Describe the picture.", row["image"]).text
    before = out.read_bytes()
    assert caption(pebble, [photos, photos / "red.png"], out) == Captions(0, 0, 10)
    assert out.read_bytes() == before


def test_killed_again_and_again_it_ends_as_undisturbed(pebble: Model, photos: Path, tmp_path: Path) -> None:
    caption(pebble, [photos], tmp_path / "undisturbed.jsonl")
    out = tmp_path / "out.jsonl"
    for lines in (1, 3):
        arguments = [sys.executable, "-c", SLOWLY, str(photos), str(out)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(lines):
            assert process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert lines <= len(rows(out)) < 10
    caption(pebble, [photos], out)
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_the_last_line_may_be_cut_anywhere(pebble: Model, photos: Path, tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out.jsonl"
    caption(pebble, [photos], out)
    whole = out.read_bytes()
    out.write_bytes(whole[:-cut])
    assert caption(pebble, [photos], out).earlier == 9
    assert out.read_bytes() == whole


def test_lines_of_others_are_refused(pebble: Model, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    caption(pebble, [photos / "red.png"], out)
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"line 1 of .* another model, question or choices"):
        caption(pebble, [photos], out, Question("What colour is it?"))
    with pytest.raises(UserError, match=r"line 1 of .* another model, question or choices"):
        caption(pumice.load("pebble:1.5"), [photos], out)
    assert out.read_bytes() == before
    for text in ("mine\n", "[1]\n", "{}\n", '{"image": 1}\n', "[" * 10**5 + "\n"):
        out.write_text(text)
        with pytest.raises(UserError, match=r"line 1 of .* is none that pumice caption writes"):
            caption(pebble, [photos], out)
        assert out.read_text() == text


def test_two_do_not_write_at_once(pebble: Model, photos: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, str(photos), str(tmp_path / "out.jsonl")], stdout=-1)
    assert process.stdout is not None
    process.stdout.readline()
    with pytest.raises(UserError, match="is being written by another process"):
        caption(pebble, [photos], tmp_path / "out.jsonl")
    process.kill()
    process.communicate()


def test_what_is_not_there(pebble: Model, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no picture or folder"):
        caption(pebble, [photos, tmp_path / "gone"], tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    with pytest.raises(UserError, match="cannot be written: No such file"):
        caption(pebble, [photos], tmp_path / "gone" / "out.jsonl")


def test_what_is_wrong_with_the_question_is_said_once(pebble: Model, photos: Path, tmp_path: Path) -> None:
    """Not in each picture's line."""
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="image_tokens is 0"):
        caption(pebble, [photos], out, Question("Hm?", image_tokens=0))
    with pytest.raises(UserError, match="the prompt has 0 <image> marks"):
        caption(pebble, [photos], out, Question("Hm?", raw=True))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no picture in"):
        caption(pebble, [tmp_path / "empty"], out)
    assert not out.exists()


def test_a_folder_that_cannot_be_read(pebble: Model, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pictures are not left out without a word."""

    def closed(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr("os.scandir", closed)
    with pytest.raises(UserError, match=r"the folder .* cannot be read: Permission denied"):
        caption(pebble, [photos], photos / "out.jsonl")


def test_a_full_disk(pebble: Model, photos: Path, tmp_path: Path) -> None:
    """A bound on the sizes of files stands for it. What was written is kept, and goes on when there is room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    try:
        with pytest.raises(UserError, match="cannot be written: File too large"):
            caption(pebble, [photos], tmp_path / "out.jsonl")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caption(pebble, [photos], tmp_path / "out.jsonl").earlier > 0
    assert len(rows(tmp_path / "out.jsonl")) == 10


def test_a_name_that_is_no_text(pebble: Model, photos: Path, tmp_path: Path) -> None:
    (photos / "red.png").rename(os.fsdecode(os.fsencode(photos) + b"/\xff.png"))
    caption(pebble, [photos], tmp_path / "out.jsonl")
    assert os.fsencode(photos) + b"/\xff.png" in [os.fsencode(row["image"]) for row in rows(tmp_path / "out.jsonl")]
    assert caption(pebble, [photos], tmp_path / "out.jsonl").earlier == 10


def test_answers_come_in_order_and_errors_in_their_place(pebble: Model, photos: Path) -> None:
    paths = [photos / "red.png", photos / "grey.png", photos / "more" / "green.png"] * (WAITING // 2)
    questions = [Question("What colour is it?", path) for path in paths]
    ended = list(pebble.ask_each(iter(questions)))
    alone = {path: str(pebble.answer(Question("What colour is it?", path))) for path in (paths[0], paths[2])}
    for path, answer in zip(paths, ended, strict=True):
        if path.name == "grey.png":
            assert isinstance(answer, UserError)
        else:
            assert str(answer) == alone[path]


def test_who_stops_taking_answers_frees_what_they_hold(pebble: Model, photos: Path) -> None:
    answers = pebble.ask_each(Question("Describe the picture.", photos / "red.png") for _ in range(200))
    next(answers)
    answers.close()  # type: ignore[attr-defined]
    while pebble.step():
        time.sleep(0)
    assert pebble.engine.pages_held == 0


def test_by_the_command(photos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pumice", "caption", "pebble", str(photos), "-o", str(tmp_path / "out.jsonl")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert "9 pictures described, 1 could not be" in done.stderr
    done = subprocess.run([*command, "--prompt", "What colour is it?"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "another model, question or choices" in done.stderr
