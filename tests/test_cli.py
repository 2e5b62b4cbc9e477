"""The command line as people use it: answers on stdout, all else on stderr, exit codes, and bad input in two lines."""

from __future__ import annotations

import io
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

import pumice
import tiny
from pumice import Sampling
from pumice.cli import main
from pumice.cli.paths import images_in, real_path

PIPES = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
AS_PUMICE = "import sys; sys.argv[0] = 'pumice'; from pumice.cli import main; main()"
GOLDEN = Path(__file__).parent / "golden"


class Done(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Done]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.hf_folder(tmp_path_factory.mktemp("cli") / "tiny-llava", family="1.6", lm="vicuna")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.effect_noise((60, 45), 90).convert("RGB").save(path)
    return path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command in this process; `stdin` is what is piped in."""

    def run(*arguments: object, stdin: str = "") -> Done:
        monkeypatch.setattr(sys, "argv", ["pumice", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        return Done(int(left.value.code or 0), *capsys.readouterr())

    return run


def refused(done: Done, *words: str) -> None:
    """Two lines on stderr, the first an error; nothing on stdout; exit code 2."""
    assert done.code == 2, done
    assert done.out == ""
    lines = done.err.rstrip("\n").split("\n")
    assert len(lines) == 2, done.err
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in done.err, done.err


def test_help_is_golden_and_light() -> None:
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    pages = []
    verbs = (
        "run", "classify", "caption", "show", "prompt", "plan", "verify", "convert", "quantize", "pull", "push",
        "create", "list", "rm", "cp", "serve", "ps", "stop", "llava-cli",
    )  # fmt: skip
    for verb in ("", *verbs):
        done = subprocess.run(
            [sys.executable, "-c", AS_PUMICE, *verb.split(), "--help"],
            capture_output=True, text=True, env=environment, check=True,
        )  # fmt: skip
        pages.append(done.stdout)
    assert pages.pop() == (GOLDEN / "llava_cli_help.txt").read_text(encoding="utf-8")
    assert "\n".join(pages) == (GOLDEN / "cli_help.txt").read_text(encoding="utf-8")


def test_one_question_many_ways(command: Command, folder: Path, photo: Path) -> None:
    """run, a piped prompt, a path in the prompt, --json, the Python API, a stream and a chat give the same answer."""
    model = pumice.load(folder)
    few = Sampling(max_tokens=12)
    whole = model.ask("What is it?", photo, sampling=few)
    expected = whole.text
    assert expected
    assert "".join(model.stream("What is it?", photo, sampling=few)) == expected
    assert model.chat(sampling=few).ask("What is it?", photo).text == expected
    options = ["--max-tokens", 12]
    assert command("run", folder, "What is it?", "-i", photo, *options).out == expected + "\n"
    assert command("run", folder, "-i", photo, *options, stdin="What is it?\n").out == expected + "\n"
    named = command("run", folder, f"What is it? {photo}", *options)
    assert (named.out, named.err) == (expected + "\n", f"Added image '{photo}'\n")
    facts = json.loads(command("run", folder, "What is it?", "-i", photo, "--json", *options).out)
    assert facts["text"] == expected
    assert facts["tokens"] == len(whole.tokens)
    assert facts["finish_reason"] == whole.finish_reason
    assert facts["image_tokens"] == [model.see(pumice.Question("", photo)).images[0].grid.tokens]


def test_sampling_options_reach_the_model(command: Command, folder: Path) -> None:
    drawn = ["run", folder, "Hi", "--temperature", 1.5, "--max-tokens", 10, "--seed"]
    first, again, other = command(*drawn, 1), command(*drawn, 1), command(*drawn, 2)
    assert first.out == again.out != other.out
    said = command("run", folder, "Hi", "--max-tokens", 10).out
    stop = said[3:5]
    stopped = command("run", folder, "Hi", "--max-tokens", 10, "--stop", stop)
    assert stopped.out == said[: said.index(stop)].rstrip() + "\n"


def test_timings_go_to_stderr(command: Command, folder: Path, photo: Path) -> None:
    done = command("run", folder, "What?", "-i", photo, "--timings", "--max-tokens", 3)
    assert "tokens/s" in done.err
    assert "tokens/s" not in done.out


def test_prompt_shows_what_the_model_sees(command: Command, folder: Path, photo: Path, tmp_path: Path) -> None:
    done = command("prompt", folder, "What is it?", "-i", photo, "--save-tiles", tmp_path / "tiles")
    seen = pumice.load(folder).see(pumice.Question("What is it?", photo))
    tokens = seen.images[0].grid.tokens
    assert f"<image> x {tokens}" in done.out
    assert f"total: {len(seen.encoded.ids)} tokens" in done.out
    saved = sorted((tmp_path / "tiles").glob("*.png"))
    assert len(saved) == seen.images[0].grid.tiles
    for path in saved:
        with Image.open(path) as tile:
            assert tile.size == (28, 28)
    listed = [line.split() for line in command("prompt", folder, "What is it?", "-i", photo, "--all").out.splitlines()]
    assert [int(words[0]) for words in listed if words and words[0].isdigit()] == seen.encoded.ids
    assert json.loads(command("prompt", folder, "What is it?", "-i", photo, "--json").out)["ids"] == seen.encoded.ids


def test_show_and_list(command: Command, folder: Path) -> None:
    facts = json.loads(command("show", folder, "--json").out)
    network = pumice.load(folder).network
    assert facts["parameters"] == sum(weight.numel() for weight in network.state_dict().values())
    assert facts["weights_bytes"] == 4 * facts["parameters"]
    assert facts["template"] == "vicuna_v1"
    assert "3 layers" in command("show", folder).out
    assert "\npebble:1.5 " in command("list").out


def test_version(command: Command) -> None:
    assert command("--version").out.startswith("pumice 0.")


# Bad input: each is two lines and exit code 2.


def test_no_such_model(command: Command, folder: Path) -> None:
    refused(command("run", "pebbel", "Hi"), "'pebbel'", "did you mean 'pebble'")
    refused(command("run", folder.parent / "tiny-lava", "Hi"), "did you mean", str(folder))


def test_a_file_as_model(command: Command, folder: Path) -> None:
    refused(command("run", folder / "config.json", "Hi"), "config.json", "no GGUF file")


@pytest.fixture
def broken(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "broken"))


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
def test_truncated_weights(command: Command, broken: Path, kept: float) -> None:
    weights = broken / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * kept)])
    refused(command("run", broken, "Hi"), "model.safetensors")


def test_half_written_weights(command: Command, broken: Path) -> None:
    """A download that stopped after the header: the right size for a while, but no weights file at all in the end."""
    (broken / "model.safetensors").rename(broken / "model.safetensors.part")
    refused(command("run", broken, "Hi"), "broken")


def edited(broken: Path, **changes: object) -> None:
    raw = json.loads((broken / "config.json").read_text(encoding="utf-8"))
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = raw
        for parent in parents:
            place = place[parent]
        place[last] = value
    (broken / "config.json").write_text(json.dumps(raw), encoding="utf-8")


def test_wrong_shapes(command: Command, broken: Path) -> None:
    edited(broken, text_config__intermediate_size=96)
    refused(command("run", broken, "Hi"), "mlp.")


def test_unknown_model_type(command: Command, broken: Path) -> None:
    edited(broken, model_type="qwen9_vl")
    refused(command("run", broken, "Hi"), "qwen9_vl", "llava")


def test_a_config_that_is_no_json(command: Command, broken: Path) -> None:
    (broken / "config.json").write_text("{", encoding="utf-8")
    refused(command("run", broken, "Hi"), "config.json")


def bomb() -> bytes:
    """A PNG that declares 65 535 x 65 535 pixels in a hundred bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 20)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [("note.jpg", b"just some words\n", "note.jpg"), ("bomb.png", bomb(), "65535"), ("empty.png", b"", "empty")],
)
def test_bad_images(command: Command, folder: Path, tmp_path: Path, name: str, data: bytes, word: str) -> None:
    (tmp_path / name).write_bytes(data)
    refused(command("run", folder, "Hi", "-i", tmp_path / name), word)


def test_a_directory_as_image(command: Command, folder: Path, tmp_path: Path) -> None:
    refused(command("run", folder, "Hi", "-i", tmp_path), "directory")


def test_a_missing_image(command: Command, folder: Path, photo: Path) -> None:
    refused(command("run", folder, "Hi", "-i", photo.with_name("foto.png")), "foto.png", "photo.png")


def test_a_typed_image_mark(command: Command, folder: Path, photo: Path) -> None:
    refused(command("run", folder, "<image>\nWhat is it?", "-i", photo), "<image>", "-i")
    raw = command("run", folder, "USER: <image>\nWhat? ASSISTANT:", "-i", photo, "--raw", "--max-tokens", 3)
    assert raw.code == 0
    refused(
        command("run", folder, "USER: <image><image> ASSISTANT:", "-i", photo, "--raw"), "2 <image> marks", "1 images"
    )


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--temperature", "nan"], "temperature"), (["--max-tokens", "0"], "max_tokens"), (["--top-p", "2"], "top_p"),
        (["--typical-p", "nan"], "typical_p"), (["--presence-penalty", "-3"], "presence_penalty"),
        (["--frequency-penalty", "inf"], "frequency_penalty"),
        (["--template", "vicunna_v1"], "vicuna_v1"), (["--dtype", "float12"], "float12"),
        (["--device", "abacus"], "abacus"),
        (["--logprobs", "21"], "logprobs is 21"), (["--logprobs", "-1"], "from 0 to 20"),
        (["--logit-bias", "822"], "822=-100"), (["--logit-bias", "=5"], "822=-100"),
        (["--logit-bias", "822=high"], "822=high"), (["--logit-bias", "\udcff=1"], "822=-100"),
        (["--logit-bias", "822=nan"], "from -100.0 to 100.0"), (["--logit-bias", "a=101"], "from -100.0 to 100.0"),
        (["--logit-bias", "9999999999=1"], "9999999999"), (["--logit-bias", "99999=1"], "token 99999"),
        (["--logit-bias", "5=1", "--logit-bias", "5=2"], "twice"),
        (["--logit-bias", "9" * 5000 + "=1"], "not one token"),
        (["--logit-bias", "no such word as this=1"], "not one token"),
    ],
)  # fmt: skip
def test_bad_options(command: Command, folder: Path, arguments: list[str], word: str) -> None:
    refused(command("run", folder, "Hi", *arguments), word)


def test_drawing_follows_its_options(command: Command, folder: Path) -> None:
    """Each option reaches its setting: one answer of all, other ones without any of them."""
    chosen = {
        "temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.8, "repetition_penalty": 1.2,
        "presence_penalty": -2.0, "frequency_penalty": 1.5, "seed": 3, "max_tokens": 40,
    }  # fmt: skip
    words = [word for name, value in chosen.items() for word in (f"--{name.replace('_', '-')}", value)]
    expected = pumice.load(folder).ask("Hi", sampling=Sampling(**chosen)).text
    assert command("run", folder, "Hi", *words).out == expected + "\n"
    for name in ("typical_p", "presence_penalty", "frequency_penalty"):
        less = {key: value for key, value in chosen.items() if key != name}
        assert pumice.load(folder).ask("Hi", sampling=Sampling(**less)).text != expected


def test_log_probabilities_are_those_of_python(command: Command, folder: Path) -> None:
    """As JSON, and as a table on stderr, of which nothing reaches stdout."""
    model = pumice.load(folder)
    told = model.ask("Hi", sampling=Sampling(max_tokens=5, logprobs=3))
    assert [each.id for each in told.logprobs] == list(told.tokens)
    for each in told.logprobs:
        assert bytes(each.bytes) == model.tokenizer.bytes_of(each.id)
        assert (each.id, each.logprob) == (each.top[0].id, each.top[0].logprob)
    asked = ["run", folder, "Hi", "--max-tokens", 5]
    found = json.loads(command(*asked, "--logprobs", 3, "--json").out)["logprobs"]
    assert [(each["id"], each["token"], each["logprob"]) for each in found] == [
        (each.id, each.token, each.logprob) for each in told.logprobs
    ]
    assert [[(top["id"], top["logprob"]) for top in each["top_logprobs"]] for each in found] == [
        [(top.id, top.logprob) for top in each.top] for each in told.logprobs
    ]
    done = command(*asked, "--logprobs", 3)
    assert done.out == told.text + "\n"
    heads, *rows = done.err.splitlines()
    assert heads.split() == ["id", "logprob", "token", "most", "likely"]
    assert [row.split()[:2] for row in rows] == [[str(each.id), f"{each.logprob:.4f}"] for each in told.logprobs]
    for row, each in zip(rows, told.logprobs):
        assert all(f"{top.logprob:.4f}" in row for top in each.top)
    bare = json.loads(command(*asked, "--logprobs", 0, "--json").out)["logprobs"]
    assert all("top_logprobs" not in each for each in bare)
    assert [each["logprob"] for each in bare] == [each.logprob for each in told.logprobs]
    assert "most likely" not in command(*asked, "--logprobs", 0).err
    assert "logprobs" not in json.loads(command(*asked, "--json").out)


def test_biases_by_id_by_text_and_by_name(command: Command, folder: Path) -> None:
    """A token by its number, by the text that it adds, and as the vocabulary has it is the same token."""
    model = pumice.load(folder)
    tokenizer = model.tokenizer
    plain = model.ask("Hi", sampling=Sampling(max_tokens=5)).tokens
    wanted = next(
        id
        for id in range(300, tokenizer.vocab_size)
        if (text := tokenizer.bytes_of(id)).startswith(b" ") and tokenizer.continued(text.decode()) == [id]
    )
    expected = model.ask("Hi", sampling=Sampling(max_tokens=5, logit_bias={wanted: 100.0, plain[0]: -1.5}))
    assert wanted in expected.tokens
    for name in (wanted, tokenizer.bytes_of(wanted).decode(), tokenizer.token_of(wanted)):
        said = ["--logit-bias", f"{name}=100", "--logit-bias", f"{plain[0]}=-1.5"]
        assert command("run", folder, "Hi", "--max-tokens", 5, *said).out == expected.text + "\n"
    end = tokenizer.token_of(model.config.stop_ids[0])
    ended = command("run", folder, "Hi", "--max-tokens", 5, "--logit-bias", f"{end}=100", "--json")
    assert (json.loads(ended.out)["finish_reason"], json.loads(ended.out)["tokens"]) == ("stop", 1)


def test_an_unknown_option_is_a_usage_error(command: Command, folder: Path) -> None:
    done = command("run", folder, "Hi", "--imagge", "x")
    assert done.code == 2
    assert "--image" in done.err


def test_images_for_a_text_model(command: Command, tmp_path: Path, photo: Path) -> None:
    from transformers import LlamaForCausalLM

    folder = tiny.hf_folder(tmp_path / "whole", lm="vicuna")
    whole = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    from transformers import LlamaConfig

    LlamaForCausalLM(LlamaConfig(**whole["text_config"])).save_pretrained(tmp_path / "text")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "text")
    refused(command("run", tmp_path / "text", "Hi", "-i", photo), "text model", "image")
    assert command("run", tmp_path / "text", "Hi", "--max-tokens", 2).code == 0


# Images inside prompts.


def test_paths_in_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "my cat.JPG", "b.webp"):
        (tmp_path / name).write_bytes(b"x")
    assert images_in("What is in ./a.png?") == ("What is in ?", ["./a.png"])
    assert images_in("compare a.png and b.webp")[1] == ["a.png", "b.webp"]
    assert images_in("look at 'my cat.JPG' now") == ("look at now", ["my cat.JPG"])
    assert images_in(r"look at my\ cat.JPG now") == ("look at now", ["my cat.JPG"])
    assert images_in(f"see {tmp_path / 'a.png'}, please")[1] == [str(tmp_path / "a.png")]
    assert images_in("there is no c.png  here") == ("there is no c.png  here", [])
    assert images_in("if x:\n    y  # see\na.png why") == ("if x:\n    y  # see\n why", ["a.png"])
    assert images_in(f"what is {tmp_path}/my cat.JPG") == ("what is", [f"{tmp_path}/my cat.JPG"])
    assert images_in("\\ " * 100_000)[1] == []
    for lost in ("~nobodyhere/x.png what", "x " + "a" * 300 + ".png", "see /root/secret/x.png"):
        assert images_in(lost) == (lost, [])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert images_in("b.webp, then ~/a.png")[1] == ["b.webp", f"{tmp_path}/a.png"]
    assert real_path(' "~/my cat.JPG"') == real_path("~/my\\ cat.JPG") == f"{tmp_path}/my cat.JPG"


# A real process: streams, signals, a terminal.


def started(*arguments: object, **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "pumice", *map(str, arguments)], **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="session")
def endless(folder: Path) -> Path:
    """The same model with an end token that its greedy answer to "Hi" does not come to."""
    said = set(pumice.load(folder).ask("Hi", sampling=Sampling(max_tokens=600)).tokens)
    copied = Path(shutil.copytree(folder, folder.parent / "endless"))
    unsaid = next(token for token in range(10, 300) if token not in said)
    (copied / "generation_config.json").write_text(json.dumps({"eos_token_id": unsaid}), encoding="utf-8")
    return copied


def test_ctrl_c_ends_with_130(endless: Path) -> None:
    def heed() -> None:
        # A job in the background of a script is started with this signal ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with started("run", endless, "Hi", "--max-tokens", 7000, preexec_fn=heed, **PIPES) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_reader_that_leaves_is_no_error(endless: Path) -> None:
    with started("run", endless, "Hi", "--max-tokens", 3000, **PIPES) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait(timeout=120) == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_chat_on_a_terminal(folder: Path, photo: Path) -> None:
    """Commands, a turn with an image, many lines, an error that the chat survives."""
    leader, follower = pty.openpty()
    words = ("run", folder, "--max-tokens", 6, "--logprobs", 2)
    process = started(*words, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    seen = b""

    def until(text: str) -> bytes:
        """What came before the text."""
        nonlocal seen
        limit = time.monotonic() + 90
        while text.encode() not in seen:
            assert time.monotonic() < limit, seen
            seen += os.read(leader, 4096)
        before, _, seen = seen.partition(text.encode())
        return before

    def say(line: str) -> None:
        os.write(leader, line.encode() + b"\n")

    until(">>> ")
    say(f"/image {photo}")
    until("Added image")
    until("\n")
    before = until(">>> ")
    assert before.strip() == b"", "attaching asks nothing"
    say("What is it?")
    until("most likely")
    until(">>> ")
    say("/image nowhere.png")
    until("error: ")
    until(">>> ")
    say('"""two')
    until("... ")
    say('lines"""')
    until(">>> ")
    say(f"/image {photo}")
    until(">>> ")
    say("/nonsense")
    until("is no command")
    until(">>> ")
    say("/image")
    until("without a path")
    until(">>> ")
    say('"""' + "word " * 700)
    for _ in range(5):  # a terminal takes lines of 4 KiB at most
        until("... ")
        say("word " * 700)
    until("... ")
    say('"""')
    until("8192 positions")
    until("images of this turn are dropped")  # those that two errors of typing left attached
    until(">>> ")
    say("/clear")
    until("Forgotten.")
    until(">>> ")
    say("/bye")
    assert process.wait(timeout=60) == 0
    os.close(leader)


def test_a_chat_refuses_a_bad_image_before_it_begins(folder: Path) -> None:
    leader, follower = pty.openpty()
    with started(
        "run", folder, "-i", "missing.png", stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        _, err = process.communicate(timeout=90)
    os.close(leader)
    os.close(follower)
    assert process.returncode == 2
    assert b"no image 'missing.png'" in err


def test_the_mark_of_a_chat_stays_out_of_a_file(folder: Path) -> None:
    """stdin is a terminal, stdout is not: only answers go there."""
    leader, follower = pty.openpty()
    os.write(leader, b"Hi\n/bye\n")
    with started(
        "run", folder, "--max-tokens", 4, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        out, err = process.communicate(timeout=90)
    os.close(leader)
    os.close(follower)
    answer = pumice.load(folder).chat(sampling=Sampling(max_tokens=4)).ask("Hi").text
    assert out.decode() == answer + "\n"
    assert b">>> " in err


@pytest.mark.parametrize(("encoding", "data"), [("utf-8", b"\xff\xfe"), ("ascii", "größer".encode())])
def test_input_that_is_no_text_in_its_encoding(folder: Path, encoding: str, data: bytes) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    with started("run", folder, "What?", env=environment, **(PIPES | {"stdin": subprocess.PIPE})) as process:
        _, err = process.communicate(data, timeout=90)
    assert process.returncode == 2
    assert b"lone surrogate" in err


def test_output_that_an_encoding_cannot_say_is_escaped(folder: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with started("prompt", folder, "größer", env=environment, **PIPES) as process:
        out, err = process.communicate(timeout=90)
    assert (process.returncode, err) == (0, b"")
    assert b"gr\\xf6\\xdfer" in out


def test_a_schema_and_a_cache_folder(command: Command, folder: Path, photo: Path, tmp_path: Path) -> None:
    """The second process finds the picture that the first has read, and both keep to the schema."""
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"]}')
    asked = ["run", folder, "What is it?", "-i", photo, "--schema", schema, "--cache", tmp_path / "cache", "--json"]
    first, second = (json.loads(command(*asked, "--max-tokens", 200).out) for _ in range(2))
    assert first["text"] == second["text"]
    assert isinstance(json.loads(first["text"])["big"], bool)
    assert first["cached_tokens"] == 0
    assert len(list((tmp_path / "cache").iterdir())) >= 1
    refused(command("run", folder, "What?", "--schema", tmp_path / "none.json"), "No such file", "JSON schema")
    schema.write_text('{"type": "string", "minLenght": 3}')
    refused(command("run", folder, "What?", "--schema", schema), "minLenght", "minLength")
