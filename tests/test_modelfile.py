"""Modelfiles, options and durations, as Ollama reads and writes them."""

from __future__ import annotations

import contextlib
import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.durations import FOREVER_NS, SECOND_NS, duration_text, keep_alive, keep_alive_setting, read_duration
from pumice.errors import UserError
from pumice.modelfile import Modelfile, read_modelfile
from pumice.options import KINDS, Options, parameter_texts, parameter_value, parameters_text

EXAMPLE = '''# a comment
FROM ./ggml-model-q4_k.gguf
from ./mmproj-model-f16.gguf

TEMPLATE """[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} [/INST]"""
PARAMETER stop "[INST]"
PARAMETER stop [/INST]
PARAMETER temperature 0.2
\tParameter  num_ctx\t4096
PARAMETER use_mmap true
PARAMETER mirostat 1
SYSTEM "You say ""yes"".
Always. # not a comment"
MESSAGE user Hello there
MESSAGE assistant """Hi
you"""
LICENSE first
LICENSE 'second'
ADAPTER ./lora.gguf
REQUIRES 0.12.0
SYSTEM """later"""'''


def test_an_example() -> None:
    found = read_modelfile(EXAMPLE)
    assert found == Modelfile(
        ("./ggml-model-q4_k.gguf", "./mmproj-model-f16.gguf"),
        adapters=("./lora.gguf",),
        template="[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} [/INST]",
        system="later",
        parameters={"stop": ("[INST]", "[/INST]"), "temperature": 0.2, "num_ctx": 4096, "use_mmap": True},
        messages=(("user", "Hello there"), ("assistant", "Hi\nyou")),
        licenses=("first", "'second'"),
        requires="0.12.0",
        ignored=("mirostat",),
    )
    assert read_modelfile(str(found)) == dataclasses.replace(found, ignored=())
    for content in (EXAMPLE.encode(), b"\xef\xbb\xbf" + EXAMPLE.encode(), EXAMPLE.encode("utf-16")):
        assert read_modelfile(content) == found
    assert read_modelfile(EXAMPLE.replace("\n", "\r\n")).messages[1] == ("assistant", "Hi\r\nyou")


VALUES = {
    "SYSTEM  plain text \t": "plain text",
    'SYSTEM "quoted"': "quoted",
    'SYSTEM "a" b\nstill"': 'a" b\nstill',
    'SYSTEM """a "quoted" word"""': 'a "quoted" word',
    'SYSTEM """\na\n"""': "\na\n",
    'SYSTEM """\n\n\n"""  ': "\n\n\n",
    'SYSTEM ""': "",
    'SYSTEM """"""': "",
    'SYSTEM """""""': '"',
    "SYSTEM ": "",
    "SYSTEM 'single'": "'single'",
    "SYSTEM #text": "#text",
    "SYSTEM back\\": "back\\",
    "SYSTEM a\u200d\u00a0b": "a\u200d\u00a0b",
    'SYSTEM say "hi"': 'say "hi"',
}


@pytest.mark.parametrize("line", VALUES)
def test_values(line: str) -> None:
    assert read_modelfile(f"FROM x\r{line}\nLICENSE l").system == VALUES[line]
    assert read_modelfile(f"FROM x\n{line}").system == VALUES[line]


FAULTS = {
    "": "no FROM line",
    "# FROM x": "no FROM line",
    "FROM x\n\nFRM y": '(line 3): command must be one of "from", "license", "template", "system", "adapter", "draft", '
    '"renderer", "parser", "parameter", "message", or "requires"',
    "FROM\n": "(line 1): command must be one of",
    "FROM x\nSYSTEM": "(line 2): command must be one of",
    "FROM \nSYSTEM x": "(line 1): FROM came without a value",
    "FROM x\r\n\r\nMESSAGE User hi": '(line 3): message role must be one of "system", "user", or "assistant"',
    "FROM x\nMESSAGE user\n": "(line 2): 'user' came without a value",
    "FROM x\nPARAMETER\n": "(line 2): command must be",
    "FROM x\nPARAMETER foo 1": "(line 2): unknown parameter 'foo'",
    "FROM x\nPARAMETER top_k x": "(line 2): invalid int value [x]",
    "FROM x\nPARAMETER top_k 1.5": "invalid int value [1.5]",
    "FROM x\nPARAMETER top_k 99999999999999999999": "invalid int value",
    "FROM x\nPARAMETER top_p high": "invalid float value [high]",
    "FROM x\nPARAMETER top_p 1e999": "invalid float value",
    "FROM x\nPARAMETER use_mmap yes": "invalid bool value [yes]",
    'FROM x\n\nSYSTEM "open\n\n': '(line 3): the value that opens with " has no end',
    'FROM x\nSYSTEM """open"\n""': '(line 2): the value that opens with """ has no end',
    "x" * (1 << 23): "characters",
}


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: repr(text[:40]))
def test_faults_have_their_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        read_modelfile(text)
    assert FAULTS[text] in caught.value.message


def test_bytes_that_are_no_text() -> None:
    for content in (b"FROM \xff", b"\xff\xfeF"):
        with pytest.raises(UserError, match="the Modelfile is no UTF"):
            read_modelfile(content)


LINES = st.lists(st.sampled_from(['"', '""', '"""', "\n", "\r", " ", "\t", "#", "a", "é"]), max_size=12).map("".join)
TEXTS = LINES | st.text(max_size=10)
NAMES = st.text("abcXYZ./:-_", min_size=1, max_size=8)
PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "stop": st.lists(TEXTS, min_size=1, max_size=3).map(tuple),
        "temperature": st.floats(-1e6, 1e6),
        "top_k": st.integers(-(2**63), 2**63 - 1),
        "use_mmap": st.booleans(),
    },
)
MODELFILES = st.builds(
    Modelfile,
    st.lists(NAMES, min_size=1, max_size=2).map(tuple),
    adapters=st.lists(NAMES, max_size=1).map(tuple),
    template=st.none() | TEXTS,
    system=st.none() | TEXTS,
    parameters=PARAMETERS,
    messages=st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), max_size=2).map(tuple),
    licenses=st.lists(TEXTS, max_size=2).map(tuple),
)


@settings(deadline=None, max_examples=200)
@given(MODELFILES)
def test_what_is_written_reads_back(value: Modelfile) -> None:
    try:
        text = str(value)
    except UserError as error:
        # Only a line that ends in quotes, in a text of several, cannot be written.
        assert "a line that ends in quotes" in error.message  # noqa: PT017
        assert '"' in repr(value)
        return
    assert read_modelfile(text) == value


def test_a_text_that_cannot_be_written() -> None:
    assert str(Modelfile(("x",), system='a "quoted"\nb')).endswith('SYSTEM """a "quoted"\nb"""\n')
    with pytest.raises(UserError, match="ends in quotes"):
        str(Modelfile(("x",), system='a"""\nb'))


PIECES = ["FROM ", "SYSTEM ", "PARAMETER ", "stop ", "MESSAGE ", "user ", '"', '"""', "\n", "\r", "#", "x"]


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=2), max_size=20).map("".join) | st.binary(max_size=20))
def test_nothing_but_a_user_error(content: str | bytes) -> None:
    with contextlib.suppress(UserError):
        assert read_modelfile(content).sources


def test_reading_takes_time_in_proportion() -> None:
    before = time.process_time()
    for text in ('"\n' * 500_000, 'FROM """' + "\n" * 1_000_000, "FROM x\n" + "MESSAGE user x\n" * 20_000):
        with contextlib.suppress(UserError):
            read_modelfile(text)
    assert time.process_time() - before < 20


# options


def test_options_are_merged_in_their_order() -> None:
    model, unknown = Options().updated({"temperature": 0.2, "stop": ["[INST]", "[/INST]"], "tfs_z": 1, "num_ctx": 4096})
    assert unknown == ("tfs_z",)
    asked, unknown = model.updated({"top_k": None, "stop": ["x"], "top_p": 1, "num_predict": 16.9, "mirostat": None})
    assert unknown == ("mirostat",)
    assert (asked.temperature, asked.stop, asked.top_p, asked.num_predict, asked.num_ctx, asked.top_k) == (
        0.2, ("x",), 1.0, 16, 4096, 40)  # fmt: skip
    assert isinstance(asked.top_p, float)
    assert isinstance(asked.num_predict, int)


def test_the_table_is_ollamas() -> None:
    reals = {"top_p", "min_p", "typical_p", "temperature"}
    reals |= {"repeat_penalty", "presence_penalty", "frequency_penalty"}
    assert {name for name, kind in KINDS.items() if kind == "float"} == reals
    assert (KINDS["stop"], KINDS["use_mmap"], KINDS["num_ctx"]) == ("tuple[str, ...]", "bool", "int")
    assert len(KINDS) == 20
    plain = Options()
    assert (plain.num_keep, plain.seed, plain.top_k, plain.top_p, plain.temperature, plain.repeat_last_n) == (
        4, -1, 40, 0.9, 0.8, 64)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("top_k", "40", 'option "top_k" must be of type integer'),
        ("top_k", True, 'option "top_k" must be of type integer'),
        ("top_k", float("nan"), 'option "top_k" must be of type integer'),
        ("top_k", 10**400, 'option "top_k" must be of type integer'),
        ("temperature", "hot", 'option "temperature" must be of type float32'),
        ("temperature", False, 'option "temperature" must be of type float32'),
        ("temperature", float("inf"), 'option "temperature" must be of type float32'),
        ("use_mmap", 1, 'option "use_mmap" must be of type boolean'),
        ("stop", "x", 'option "stop" must be of type array'),
        ("stop", ["x", 1], 'option "stop" must be of an array of strings'),
    ],
)
def test_wrong_types_in_ollamas_words(name: str, value: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Options().updated({name: value})
    assert caught.value.message == message


def test_parameters_as_show_writes_them() -> None:
    text = parameters_text({"stop": ["[INST]", "[/INST]"], "temperature": 0.2, "num_ctx": 4096, "use_mmap": False})
    assert text.splitlines() == [
        'stop                           "[INST]"',
        'stop                           "[/INST]"',
        "temperature                    0.2",
        "num_ctx                        4096",
        "use_mmap                       false",
    ]


@given(PARAMETERS)
def test_parameters_read_back(parameters: dict[str, object]) -> None:
    for name, value in parameters.items():
        read = [parameter_value(name, text) for text in parameter_texts(value)]
        assert (tuple(each for (each,) in read) if name == "stop" else read[0]) == value


def test_options_as_sampling() -> None:
    from pumice.sampling_options import sampling

    made, deaf = sampling(Options(), context=4096)
    assert (made.temperature, made.top_k, made.top_p, made.seed, made.max_tokens, deaf) == (
        0.8,
        40,
        0.9,
        None,
        40960,
        (),
    )
    given, _ = Options().updated(
        {"temperature": -1, "top_k": -5, "top_p": 7, "min_p": -1, "seed": 7, "num_predict": 3, "stop": ["", "x"],
         "repeat_penalty": 1.2, "num_keep": 9}
    )  # fmt: skip
    made, deaf = sampling(given, context=4096, given=("seed", "repeat_last_n", "num_keep"))
    assert (made.temperature, made.top_k, made.top_p, made.min_p, made.seed, made.max_tokens, made.stop) == (
        0.0, 0, 1.0, 0.0, 7, 3, ("x",))  # fmt: skip
    assert (made.repetition_penalty, deaf) == (1.2, ("repeat_last_n", "num_keep"))
    off, deaf = sampling(dataclasses.replace(given, repeat_last_n=0), context=1, given=("repeat_last_n",))
    assert (off.repetition_penalty, deaf) == (1.0, ())
    with pytest.raises(UserError, match="repetition_penalty"):
        sampling(dataclasses.replace(given, repeat_penalty=0.0), context=1)


# durations

DURATIONS = {
    "0": 0,
    "0s": 0,
    "-0": 0,
    "300ms": 300_000_000,
    "5m": 300 * SECOND_NS,
    "1h30m": 5400 * SECOND_NS,
    "1.5h": 5400 * SECOND_NS,
    "-1m": -60 * SECOND_NS,
    "+.5s": SECOND_NS // 2,
    "1.s": SECOND_NS,
    "1us1\u00b5s1\u03bcs": 3000,
    "1ns": 1,
    "0.3333333333333333333h": 1200 * SECOND_NS,  # this and the next two: Go's own tests
    "0.830103483285477580700h": 2988 * SECOND_NS + 372_539_827,
    "0.9223372036854775807h": 55 * 60 * SECOND_NS + 20_413_933_267,
    "9223372036854775807ns": FOREVER_NS,
    "-9223372036854775808ns": -FOREVER_NS - 1,
}


def test_durations_read() -> None:
    assert {text: read_duration(text) for text in DURATIONS} == DURATIONS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("300", 'time: missing unit in duration "300"'),
        ("-1", 'time: missing unit in duration "-1"'),
        ("", 'time: invalid duration ""'),
        ("-", 'time: invalid duration "-"'),
        (".s", 'time: invalid duration ".s"'),
        ("x", 'time: invalid duration "x"'),
        ("1d", 'time: unknown unit "d" in duration "1d"'),
        ("1m 5s", 'time: unknown unit "m " in duration "1m 5s"'),
        ("9223372036854775808ns", 'time: invalid duration "9223372036854775808ns"'),
        ("3000000h", 'time: invalid duration "3000000h"'),
        ("1" * 5000 + "s", "time: invalid duration"),
        ("٣s", "time: invalid duration"),
    ],
)
def test_durations_in_gos_words(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        read_duration(text)
    assert message in caught.value.message


SHOWN = {0: "0s", 1: "1ns", 1_100: "1.1\u00b5s", 2_154_458: "2.154458ms", 300 * SECOND_NS: "5m0s",
         5_191_566_416: "5.191566416s", 62_500_000_000: "1m2.5s", 3600 * SECOND_NS: "1h0m0s", -SECOND_NS: "-1s",
         FOREVER_NS: "2562047h47m16.854775807s", 999_999_999: "999.999999ms"}  # fmt: skip


def test_durations_written() -> None:
    assert {each: duration_text(each) for each in SHOWN} == SHOWN


@given(st.integers(-(2**63), 2**63 - 1))
def test_a_written_duration_reads_back(nanoseconds: int) -> None:
    assert read_duration(duration_text(nanoseconds)) == nanoseconds


@settings(deadline=None)
@given(st.text("0123456789.-+nsumh\u00b5 ", max_size=12) | st.text(max_size=5))
def test_no_duration_but_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        assert -(2**63) <= read_duration(text) < 2**63


def test_keep_alive() -> None:
    assert [keep_alive(each) for each in (None, 0, "0", "0s", 300, 0.5, "5m", -1, -0.5, "-1m", 1e300, 10**400)] == [
        None, 0, 0, 0, 300 * SECOND_NS, SECOND_NS // 2, 300 * SECOND_NS, *[FOREVER_NS] * 5]  # fmt: skip
    for value, kind in ((True, "bool"), ({}, "map[string]interface {}"), ([], "[]interface {}")):
        with pytest.raises(UserError) as caught:
            keep_alive(value)
        assert caught.value.message == f"Unsupported type: '{kind}'"
    with pytest.raises(UserError, match="missing unit"):
        keep_alive("300")
    assert [keep_alive_setting(each) for each in ("300", "-1", "5m", "-5m", "0")] == [
        300 * SECOND_NS, FOREVER_NS, 300 * SECOND_NS, FOREVER_NS, 0]  # fmt: skip
    with pytest.raises(UserError, match="invalid duration"):
        keep_alive_setting("soon")
