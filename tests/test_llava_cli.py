"""llama.cpp's command lines: the same answers as by the Python API and by Transformers, the lines people look for, and
what happens to each flag."""

from __future__ import annotations

import base64
import functools
import io
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pumice
import tiny
from pumice import Sampling
from pumice.checkpoints.gguf_file import ToStore, open_gguf, write_gguf
from pumice.cli import main
from pumice.cli.llava_cli import STOPS, question, unescaped
from pumice.cli.llava_flags import HONOURED, INERT, REFUSED, Given, read_flags
from pumice.errors import UserError
from pumice.model import load_from
from pumice.network.llava import Llava
from test_cli import Done, refused
from test_equality import Pair, picture
from test_gguf import pair

SENTENCE = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
GREEDY = Sampling(stop=STOPS, max_tokens=10)
SHORT = ["--temp", "0", "-n", "10"]

Cli = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run `pumice llava-cli` in this process."""

    def run(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["pumice", "llava-cli", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        return Done(int(left.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`1.5/lm.gguf`, `1.6/lm.gguf` with their projectors, of tiles of 336 pixels, and the folders `hf1.5`, `hf1.6`."""
    place = tmp_path_factory.mktemp("door")
    for family in ("1.5", "1.6"):
        pair(tiny.hf_folder(place / f"hf{family}", family=family, tile_px=336, seed=5), place / family)
    return place


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A square, which no reference crops or pads."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    picture((672, 672), 4).save(path)
    return path


def names(rows: object) -> list[str]:
    return [name for row in rows for name in row.names.split(", ")]  # type: ignore[attr-defined]


# --- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("What is shown?", f"{SENTENCE}\nUSER:<image>What is shown?\nASSISTANT:"),
        (r"<image>\nUSER:\nWhat?\nASSISTANT:\n", "<image>\nUSER:\nWhat?\nASSISTANT:\n"),
        (
            r"<|im_start|>system\nAnswer.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>",
            "<|im_start|>system\nAnswer.<|im_end|><|im_start|>user\n<image>\nWhat?<|im_end|>",
        ),
        (None, f"{SENTENCE}\nUSER:<image>describe the image in detail.\nASSISTANT:"),
    ],
    ids=["rule", "image-mark", "chatml", "no-prompt"],
)
@pytest.mark.parametrize("family", ["1.5", "1.6"])
def test_the_answer_is_that_of_the_raw_prompt(
    family: str, text: str | None, prompt: str, models: Path, photo: Path, cli: Cli
) -> None:
    place = models / family
    words = ["-m", place / "lm.gguf", "--mmproj", place / "mmproj.gguf", "--image", photo, *SHORT]
    words += [] if text is None else ["-p", text, "-e"]
    assert question(read_flags(list(map(str, words)))[0]).prompt == prompt
    done = cli(*words)
    answer = pumice.load(place / "lm.gguf", template="plain").ask(prompt, photo, sampling=GREEDY, raw=True)
    assert (done.code, done.out) == (0, answer.text + "\n")
    tokens = {"1.5": 576, "1.6": 576 + 48 * 49}[family]
    assert answer.image_tokens == (tokens,)
    assert f"encode_image_with_clip: image embedding created: {tokens} tokens\n" in done.err
    assert f" / {answer.prompt_tokens:5d} tokens (" in done.err


@pytest.mark.parametrize("family", ["1.5", "1.6"])
def test_the_answer_is_transformers(family: str, models: Path, photo: Path, cli: Cli) -> None:
    """From the folder, which -m takes too."""
    oracle = Pair(models / f"hf{family}", "vicuna")
    prompt = f"{SENTENCE}\nUSER:<image>What is shown?\nASSISTANT:"
    with Image.open(photo) as image:
        inputs = dict(oracle.processor(images=[image], text=prompt, return_tensors="pt"))
    tokens = oracle.oracle_tokens(inputs, 10)
    expected = oracle.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert not any(stop in expected for stop in STOPS)
    done = cli("-m", models / f"hf{family}", "--image", photo, "-p", "What is shown?", *SHORT)
    assert done.out == expected + "\n"


def test_a_models_own_format_written_out(cli: Cli) -> None:
    """The README of llama-llava-cli does it so for the 34B model; here a trained model, whose words show the prompt."""
    star = Path(__file__).parent.parent / "docs" / "images" / "star.png"
    prompt = (
        r"<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat colour is it?<|im_end|>"
        r"<|im_start|>assistant\n"
    )
    done = cli("-m", "pebble", "--image", star, "-e", "-p", prompt, *SHORT)
    assert done.out == pumice.load("pebble").ask("What colour is it?", star).text + "\n"


def test_printed_lines(models: Path, photo: Path, cli: Cli) -> None:
    """The forms that scripts look for, and nothing but the answer on stdout."""
    number, per_second = r"\s*\d+\.\d\d", r"\s*\d+\.\d\d ms per token,\s*\d+\.\d\d tokens per second"
    clip = [
        rf"encode_image_with_clip: image encoded in {number} ms by CLIP \({number} ms per image patch\)",
        rf"llama_print_timings:        load time = {number} ms",
        rf"llama_print_timings: prompt eval time = {number} ms / \s*\d+ tokens \({per_second}\)",
        rf"llama_print_timings:        eval time = {number} ms / \s*\d+ runs   \({per_second}\)",
        rf"llama_print_timings:       total time = {number} ms / \s*\d+ tokens",
    ]
    for family, first in (
        ("1.5", ["encode_image_with_clip: image embedding created: 576 tokens"]),
        (
            "1.6",
            [
                rf"encode_image_with_clip: 5 segments encoded in {number} ms",
                "encode_image_with_clip: image embedding created: 2928 tokens",
            ],
        ),
    ):
        done = cli("-m", models / family / "lm.gguf", "--image", photo, *SHORT)
        lines = done.err.splitlines()
        assert len(lines) == len(first) + len(clip)
        for line, form in zip(lines, [*first, *clip]):
            assert re.fullmatch(form, line), line
        assert "encode_image" not in done.out
        assert "llama_print" not in done.out


def test_the_time_of_an_image_is_that_of_the_tower(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    look = Llava.look

    def slow(self: Llava, pixels_N3YX: torch.Tensor) -> torch.Tensor:
        time.sleep(0.2)
        return look(self, pixels_N3YX)

    monkeypatch.setattr(Llava, "look", slow)
    star = Path(__file__).parent.parent / "docs" / "images" / "star.png"
    done = cli("-m", "pebble", "--image", star, "-p", "What is it?", *SHORT)
    (ms,) = re.findall(r"image encoded in\s+([\d.]+) ms", done.err)
    assert float(ms) >= 200


def test_without_an_image_it_is_a_question_in_words(models: Path, cli: Cli) -> None:
    path = models / "1.5" / "lm.gguf"
    done = cli("-m", path, "-p", "What is shown?", *SHORT)
    prompt = f"{SENTENCE}\nUSER:What is shown?\nASSISTANT:"
    assert done.out == pumice.load(path, template="plain").ask(prompt, sampling=GREEDY, raw=True).text + "\n"
    assert "encode_image" not in done.err


def test_several_images(models: Path, photo: Path, tmp_path: Path, cli: Cli) -> None:
    """With commas or by repeating, each at its mark; a file's own comma is no separator."""
    other = tmp_path / "a,b.png"
    picture((100, 60), 5).save(other)
    path = models / "1.5" / "lm.gguf"
    model = pumice.load(path, template="plain")
    prompt = f"{SENTENCE}\nUSER:<image><image>Compare\nASSISTANT:"
    expected = model.ask(prompt, [photo, photo], sampling=GREEDY, raw=True).text + "\n"
    words = ["-m", path, "-p", "Compare", *SHORT]
    assert cli(*words, "--image", f"{photo},{photo}").out == expected
    assert cli(*words, "--image", photo, "--image", photo).out == expected
    expected = model.ask("a <image> b <image>", [photo, other], sampling=GREEDY, raw=True).text + "\n"
    done = cli("-m", path, "-p", "a <image> b <image>", *SHORT, "--image", photo, "--image", other)
    assert done.out == expected
    assert done.err.count("image embedding created: 576 tokens") == 2


@pytest.mark.parametrize(("theirs", "ours"), [("vicuna", "vicuna_v1"), ("hf_vicuna", "hf_vicuna")])
def test_a_chat_template_by_its_name(theirs: str, ours: str, models: Path, photo: Path, cli: Cli) -> None:
    path = models / "1.5" / "lm.gguf"
    done = cli("-m", path, "--image", photo, "-p", "What is shown?", "--chat-template", theirs, *SHORT)
    few = Sampling(max_tokens=10)
    assert done.out == pumice.load(path, template=ours).ask("What is shown?", photo, sampling=few).text + "\n"
    assert (f"--chat-template {theirs} is {ours} here\n" in done.err) == (theirs != ours)


def test_an_image_inside_the_prompt(models: Path, photo: Path, cli: Cli) -> None:
    path = models / "1.5" / "lm.gguf"
    data = io.BytesIO()
    with Image.open(photo) as image:
        image.save(data, "JPEG")
    element = f'<img src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'
    prompt = f"{SENTENCE}\nUSER:<image>What?\nASSISTANT:"
    model = pumice.load(path, template="plain")
    expected = model.ask(prompt, data.getvalue(), sampling=GREEDY, raw=True).text + "\n"
    assert cli("-m", path, "-p", f"{element}What?", *SHORT).out == expected
    done = cli("-m", path, "-p", f"What?{element}", "--image", "nowhere.png", *SHORT)
    assert done.out == expected
    assert "--image does not apply" in done.err


# --- flags -----------------------------------------------------------------------------------------------------------


def test_a_name_has_one_meaning() -> None:
    every = names([*HONOURED, *INERT, *REFUSED])
    assert len(every) == len(set(every))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "-m lm --mmproj mm --image x.jpg -p TEXT -e --temp 0.1 -c 4096 -ngl 99 -t 2 -n 32",
            Given(
                model="lm", mmproj="mm", images=("x.jpg",), prompt="TEXT", temperature=0.1, context=4096,
                gpu_layers=99, threads=2, new_tokens=32,
            ),
        ),
        ("-n -1 -mm a -ngl all -s -1", Given(mmproj="a")),
        ("-n 5 --n_predict 6 --seed 4294967295 --no-escape", Given(new_tokens=6, escape=False)),
        ("-s 7 --top-k 3 --top-p 0.5 --min-p 0 --repeat-penalty 1.1",
         Given(seed=7, top_k=3, top_p=0.5, min_p=0.0, penalty=1.1)),
        ("--typical 0.8 --presence-penalty 0.5 --frequency-penalty -0.5 -l 7+1 --logit-bias 9-inf -l 8-2",
         Given(typical_p=0.8, presence_penalty=0.5, frequency_penalty=-0.5, biases=((7, 1.0), (9, -100.0), (8, -2.0)))),
        ("--image a,b --image c -p -x", Given(images=("a", "b", "c"), prompt="-x")),
        ("--predict 4 --gpu-layers 0 --ctx-size 0 --chat-template vicuna --temperature 0 --threads -1",
         Given(new_tokens=4, gpu_layers=0, template="vicuna", temperature=0.0, threads=-1)),
        ("-h", Given(help=True)),
    ],
)  # fmt: skip
def test_lines_of_flags(line: str, expected: Given) -> None:
    assert read_flags(line.split()) == (expected, [])


@pytest.mark.parametrize("row", INERT, ids=lambda row: row.names.split(", ")[0])
def test_flags_without_effect(row: object) -> None:
    """Each takes what belongs to it and no more, and says that it does not apply."""
    for name in names([row]):
        values = [["7"]] if row.takes else [[], ["on"], ["auto"]] if row.maybe else [[]]  # type: ignore[attr-defined]
        for value in values:
            given, notes = read_flags([name, *value, "-n", "3"])
            assert given == Given(new_tokens=3)
            assert len(notes) == 1
            assert notes[0].startswith(" ".join([name, *value]) + " does not apply: ")


@pytest.mark.parametrize("name", names(REFUSED))
def test_flags_that_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{re.escape(name)} cannot be had: "):
        read_flags([name, "1"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--imgae", "x"], "'--image'"),
        (["-ngk", "9"], "'-ngl'"),
        (["-n32"], "no flag '-n32'"),
        (["What is it?"], "give the prompt with -p"),
        (["-n"], "-n came without its value"),
        (["-n", "many"], "-n is 'many'"),
        (["-n", "0"], "-n is '0'"),
        (["-c", "-4"], "-c is '-4'"),
        (["-t", "100000"], "-t is '100000'"),
        (["--temp", "warm"], "--temp is 'warm'"),
        (["-s", "-2"], "-s is '-2'"),
        (["-l", "7"], "-l is '7'"),
        (["-l", "-7+1"], "-l is '-7+1'"),
        (["-l", "7+much"], "-l is '7+much'"),
        (["-l", "7+1000"], "logit_bias of token 7 is 1000.0"),
        (["-l", "7+nan"], "logit_bias of token 7 is nan"),
        (["-l", "999999+1"], "logit_bias names token 999999"),
    ],
)
def test_flags_that_are_wrong(words: list[str], said: str, cli: Cli) -> None:
    refused(cli("-m", "pebble", "-p", "Hi", *words), said)


def test_where_flags_go(models: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """-ngl is the layers on the GPU, -t the threads; what cannot be had is said."""
    path = models / "1.5" / "lm.gguf"
    layers: list[object] = []

    def noted(source: object, *, gpu_layers: int | None) -> object:
        layers.append(gpu_layers)
        return load_from(source, device="cpu")  # type: ignore[arg-type]

    monkeypatch.setattr("pumice.model.load_from", noted)
    before = torch.get_num_threads()
    try:
        done = cli("-m", path, "-p", "Hi", *SHORT, "-ngl", "99", "-t", before + 1, "-b", "512", "--mlock", "-fa", "on")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    notes = [line for line in done.err.splitlines() if "does not apply" in line]
    assert [line.split(" does")[0] for line in notes] == ["-b 512", "--mlock", "-fa on", "-ngl 99"]
    assert "does not apply" not in cli("-m", path, "-p", "Hi", *SHORT, "-ngl", "0").err
    assert "does not apply" not in cli("-m", path, "-p", "Hi", *SHORT).err
    assert layers == [None, 0, None]
    monkeypatch.setattr("pumice.model.chosen_device", lambda device: torch.device(device or "cuda"))
    assert "does not apply" not in cli("-m", path, "-p", "Hi", *SHORT, "-ngl", "20").err
    assert layers[-1] == 20


def test_drawing_follows_its_flags(models: Path, cli: Cli) -> None:
    path = models / "1.5" / "lm.gguf"
    words = ["-m", path, "-p", "Hi", "-n", "12", "--temp", "1.5", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01"]
    words += ["--repeat-penalty", "1.2", "--typical", "0.8", "--presence-penalty", "1.5", "--frequency-penalty", "1.2"]
    words += ["-l", "9+3.5", "-s"]
    first, other = cli(*words, 1), cli(*words, 2)
    added = {"typical_p": 0.8, "presence_penalty": 1.5, "frequency_penalty": 1.2, "logit_bias": {9: 3.5}}
    drawn = Sampling(1.5, 50, 0.9, 0.01, 1.2, 1, STOPS, 12, **added)
    prompt = f"{SENTENCE}\nUSER:Hi\nASSISTANT:"
    assert first.out == pumice.load(path, template="plain").ask(prompt, sampling=drawn, raw=True).text + "\n"
    assert first.out != other.out


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r"a\nb\tc\rd", "a\nb\tc\rd"),
        (r"\"\'", "\"'"),
        (r"\\n", r"\n"),
        (r"\x41\x0a", "A\n"),
        (r"\xc3\xa9", "é"),
        (r"\\x41", r"\x41"),
        (r"\x4", r"\x4"),
        (r"\xzz\q", r"\xzz\q"),
        ("é\\", "é\\"),
    ],
)
def test_escapes(typed: str, meant: str) -> None:
    assert unescaped(typed) == meant


def test_escapes_are_read_unless_told_not_to() -> None:
    def prompt(*words: str) -> str:
        return question(read_flags(["-p", r"a\nb", *words])[0]).prompt

    assert prompt() == prompt("-e") == f"{SENTENCE}\nUSER:a\nb\nASSISTANT:"
    assert prompt("--no-escape") == f"{SENTENCE}\nUSER:a\\nb\nASSISTANT:"


def test_the_texts_that_end_an_answer() -> None:
    """Those of llama-llava-cli under its rule, a template's own under a template."""
    literal, by_template = (question(read_flags(["-p", "Hi", *words])[0]) for words in ([], ["--chat-template", "v1"]))
    assert literal.sampling.stop == ("</s>", "###", "<|im_end|>", "<|im_start|>", "USER:")
    assert (by_template.sampling.stop, by_template.raw) == ((), False)


def test_the_context_is_a_limit(models: Path, photo: Path, cli: Cli) -> None:
    words = ["-m", models / "1.6" / "lm.gguf", "--image", photo, "-p", "Hi", "--temp", "0"]
    prompt = pumice.load(models / "1.6" / "lm.gguf", template="plain").see(
        pumice.Question(f"{SENTENCE}\nUSER:<image>Hi\nASSISTANT:", photo, raw=True)
    )
    length = len(prompt.encoded.ids)
    done = cli(*words, "-c", length + 3, "-n", "4")
    refused(done, f"-c {length + 3} is too small", f"{length} tokens long", "4 more", f"-c {length + 4}")
    assert cli(*words, "-c", length + 4, "-n", "4").code == 0
    done = cli("-m", models / "1.5" / "lm.gguf", "-p", "Hi", "--temp", "0", "-c", "512", "-n", "600")
    assert done.code == 0
    assert "-c 512 is raised to 2048" in done.err
    done = cli("-m", models / "1.5" / "lm.gguf", "-p", "Hi", *SHORT, "-c", "32768")
    assert "-c 32768 does not apply: the model has 8192 positions" in done.err


# --- what is wrong ---------------------------------------------------------------------------------------------------


def test_errors_are_two_lines(models: Path, photo: Path, tmp_path: Path, cli: Cli) -> None:
    path = models / "1.5" / "lm.gguf"
    refused(cli("-p", "Hi"), "there is no model", "-m model.gguf")
    refused(cli("-m", path), "no image and no prompt")
    refused(cli("-m", tmp_path / "lm.gguf", "-p", "Hi"), "no model named")
    refused(cli("-m", path, "--mmproj", tmp_path / "mm.gguf", "-p", "Hi"), "no model named")
    refused(cli("-m", path, "--image", tmp_path / "x.png"), "no image")
    refused(cli("-m", path, "--image", ""), "no image ''")
    refused(cli("-m", path, "--image", path), "not a picture")
    refused(cli("-m", path, "-p", "<image> <image>", "--image", photo), "2 <image> marks", "1 images")
    refused(cli("-m", path, "-p", "<image>", "--image", photo, "--chat-template", "vicuna"), "<image>")
    refused(cli("-m", path, "-p", "Hi", "--chat-template", "vicuma"), "'vicuma'", "'vicuna_v1'")
    refused(cli("-m", path, "-p", "Hi", "-hf", "a/b"), "-hf cannot be had", "-m and --mmproj")
    refused(cli("-m", path, "-p", r"\xff"), "not Unicode")
    refused(cli("-m", path, "-p", 'a <img src="data:image/jpeg;base64,AAAA'), "does not end")
    refused(cli("-m", path, "-p", '<img src="data:image/jpeg;base64,A!">Hi'), "base64")
    refused(cli("-m", path, "-p", '<img src="data:image/jpeg;base64,QUFB">Hi'), "not a picture")


def test_a_projector_of_another_model(models: Path, tmp_path: Path, cli: Cli) -> None:
    """Its last layer is as wide as that model, half of this one."""
    found = open_gguf(models / "1.5" / "mmproj.gguf")
    narrow = []
    for name, each in found.tensors.items():
        halves = 2 if name.startswith("mm.2.") else 1
        shape = (each.shape[0] // halves, *each.shape[1:])
        data = each.file.bytes[each.start : each.start + each.nbytes // halves].numpy()
        narrow.append(ToStore(name, shape, each.format, functools.partial(np.copy, data)))
    path = tmp_path / "narrow.gguf"
    list(write_gguf(path, dict(found.values), narrow))
    refused(cli("-m", models / "1.5" / "lm.gguf", "--mmproj", path, "-p", "Hi"), "narrow.gguf", "32", "64")


def test_help_names_every_flag(cli: Cli) -> None:
    for words in (["-h"], ["--help"], ["-m", "x", "--help"]):
        done = cli(*words)
        assert done.code == 0
        listed = set(re.findall(r"(?<![\w-])-{1,2}[A-Za-z][\w-]*", done.out))
        assert set(names([*HONOURED, *INERT, *REFUSED])) <= listed
