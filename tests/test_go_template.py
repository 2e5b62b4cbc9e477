"""Templates against results worked out by hand from the documentation of Go's text/template."""

from __future__ import annotations

import contextlib
import hashlib
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumice.errors import UserError
from pumice.go_template import Budget, Own, Record, read_template
from pumice.go_template.values import float_text, quoted, to_json

TOOL = Record({"Name": "f", "Type": ["integer", "null"]}, {"name": "f", "type": ["integer", "null"]})
VALUES = {
    "Response": "",
    "S": "text",
    "Empty": "",
    "N": 3,
    "Zero": 0,
    "F": 0.5,
    "Yes": True,
    "No": False,
    "Nil": None,
    "L": ["a", "b", "c"],
    "None": [],
    "M": {"z": 1, "a": {"deep": "x"}},
    "Nothing": {},
    "T": [TOOL],
    "One": TOOL,
    "U": "é€",
}

CASES = {
    # text, trim markers, comments
    "": "",
    "a { b }} c": "a { b }} c",
    "{{ .S }}": "text",
    "a \n{{- .S -}}\n\t b": "atextb",
    "{{3}}{{-3}} {{- 3}}": "3-33",
    "a{{/* no }} end {{ */}}b": "ab",
    "a {{- /* gone */ -}} b": "ab",
    "{{ .S\n}}": "text",
    # literals
    r'{{ "a\t\"\\\u00e9\x41\101" }}{{ `r\n` }}': "a\t\"\\éAAr\\n",
    "{{ 0x1F }} {{ 1_000 }} {{ -7 }} {{ 'a' }} {{ '\\n' }} {{ true }}": "31 1000 -7 97 10 true",
    "{{ 1.5 }} {{ 1e6 }} {{ 100000.0 }} {{ .5 }} {{ 1e-5 }}": "1.5 1e+06 100000 0.5 1e-05",
    # fields, missing ones, chains
    "{{ .M.a.deep }}{{ (index .M \"a\").deep }}{{ $.S }}{{ (.M).z }}": "xxtext1",
    "{{ .Missing }}|{{ .Nil }}|{{ .Nothing.x }}": "<no value>|<no value>|<no value>",
    # if, truth
    "{{ if .S }}1{{ end }}{{ if .Empty }}2{{ end }}{{ if .Zero }}3{{ end }}{{ if .No }}4{{ end }}": "1",
    "{{ if .None }}1{{ else if .Nothing }}2{{ else if .Nil }}3{{ else if .Missing }}4{{ else }}5{{ end }}": "5",
    "{{ if .One }}struct{{ end }}{{ if .L }}list{{ end }}{{ if .F }}float{{ end }}": "structlistfloat",
    "{{ if .No }}1{{ else if .Yes }}2{{ else }}3{{ end }}": "2",
    # with
    "{{ with .M.a }}{{ .deep }}{{ $.S }}{{ end }}{{ with .Empty }}1{{ else }}{{ .S }}{{ end }}": "xtexttext",
    "{{ with $x := .N }}{{ . }}{{ $x }}{{ end }}{{ with .No }}{{ else with .N }}{{ . }}{{ end }}": "333",
    # range
    "{{ range .L }}{{ . }}{{ end }}": "abc",
    "{{ range $e := .L }}{{ $e }}{{ . }}{{ end }}": "aabbcc",
    "{{ range $i, $e := .L }}{{ $i }}{{ $e }}{{ else }}none{{ end }}": "0a1b2c",
    "{{ range .None }}x{{ else }}none{{ end }}{{ range .Missing }}x{{ else }}!{{ end }}": "none!",
    "{{ range $k, $v := .M }}{{ $k }};{{ end }}": "a;z;",
    "{{ range 3 }}{{ . }}{{ end }}": "012",
    "{{ range $i, $_ := .L }}{{ if eq $i 1 }}{{ break }}{{ end }}{{ $i }}{{ end }}": "0",
    "{{ range .L }}{{ if eq . \"b\" }}{{ continue }}{{ end }}{{ . }}{{ end }}": "ac",
    "{{ range .L }}{{ range $.L }}{{ break }}{{ end }}{{ . }}{{ end }}": "abc",
    # variables
    "{{ $x := 1 }}{{ if true }}{{ $x = 2 }}{{ $x := 3 }}{{ $x }}{{ end }}{{ $x }}": "32",
    "{{ $last := 0 }}{{ range $i, $e := .L }}{{ $last = $i }}{{ end }}{{ $last }}": "2",
    "{{ $x := .M }}{{ $x.a.deep }}": "x",
    # pipes and parentheses: what comes is the last argument
    '{{ .S | printf "%s-%s" "x" }}{{ "b" | eq "a" }}': "x-textfalse",
    "{{ (len .L) | printf \"%03d\" }}{{ not (and .Yes (or .No .Empty)) }}": "003true",
    # and, or: the deciding argument itself, nothing after it is looked at
    "{{ and .S .N }}|{{ and .S .Empty .N }}|{{ or .Empty .Zero }}|{{ or .No .S }}": "3||0|text",
    "{{ or .S (index .L 9) }}": "text",
    "{{ and .Empty (index .L 9) }}|{{ not .Empty }}": "|true",
    # comparison
    '{{ eq .S "x" "text" }}{{ eq .N 1 2 }}{{ ne .N 3 }}': "truefalsefalse",
    '{{ eq .Missing "x" }}{{ ne .Missing "x" }}{{ eq "x" .Missing }}': "falsetruefalse",
    '{{ lt 1 2 }}{{ le 2 2 }}{{ gt "b" "a" }}{{ ge 1.5 2.5 }}{{ lt "Z" "a" }}': "truetruetruefalsetrue",
    # len counts bytes; index and slice
    "{{ len .U }}{{ len .L }}{{ len .M }}{{ index .L 1 }}{{ index .M \"a\" \"deep\" }}{{ index .U 0 }}": "532bx195",
    "{{ slice .L 1 }}{{ slice .L 1 2 }}{{ slice .S 1 3 }}{{ slice .U 2 }}{{ slice .S }}": "[b c][b]ex€text",
    "{{ range $i, $e := .L }}{{ $e }}{{ if eq (len (slice $.L $i)) 1 }}.{{ end }}{{ end }}": "abc.",
    # print, printf
    '{{ print "a" 1 2 "b" 3 }}{{ print .Missing }}': "a1 2b3<nil>",
    '{{ printf "%v %d %s %q %t" .L 3 "s" "q\\n" true }}': '[a b c] 3 s "q\\n" true',
    '{{ printf "%5.1f|%-3d|%+d|%%" 2.25 7 7 }}': "  2.2|7  |+7|%",
    '{{ printf "%s %d" .Missing "x" }}{{ printf "%.2s" "text" }}': "%!s(<nil>) %!d(string=x)te",
    # printing: lists as Go, tools and their parts as JSON
    "{{ .L }}{{ .None }}{{ .M }}": '[a b c][]{"z":1,"a":{"deep":"x"}}',
    "{{ .T }}": '[{"name":"f","type":["integer","null"]}]',
    "{{ .One }}{{ .One.Name }}": '{"name":"f","type":["integer","null"]}f',
    "{{ json .S }}{{ json .L }}{{ json .Nil }}{{ json \"<&>\" }}": '"text"["a","b","c"]null"\\u003c\\u0026\\u003e"',
    "{{ toTypeScriptType .One }}|{{ toTypeScriptType .S }}": "number | null|any",
}  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_it_writes_what_go_writes(text: str) -> None:
    assert "".join(read_template(text).run(VALUES)) == CASES[text]


def test_dates() -> None:
    today = "".join(read_template("{{ currentDate }}|{{ yesterdayDate }}").run(VALUES))
    assert today in {time.strftime("%Y-%m-%d", time.localtime(time.time() - late)) + "|" + time.strftime(
        "%Y-%m-%d", time.localtime(time.time() - late - 86400)) for late in (0, 5)}  # fmt: skip


FAULTS = {
    "a\n\n{{ .X": "line 3 of the template: an action has no end",
    "{{ if .X }}": "line 1 of the template: an {{if}} has no end",
    "a\n{{ end }}": "line 2 of the template: {{end}} closes nothing",
    "{{ else }}": "{{else}} closes nothing",
    "{{ if 1 }}{{ else }}{{ else }}{{ end }}": "a second {{else}}",
    "{{ if }}x{{ end }}": "a value is missing",
    "{{ }}": "a value is missing",
    "{{ .A | }}": "a value is missing",
    "{{ nope .A }}": 'function "nope" not defined',
    "{{ $x }}": 'undefined variable "$x"',
    "{{ $x = 1 }}": 'undefined variable "$x"',
    "{{ if $x := 1 }}{{ end }}{{ $x }}": 'undefined variable "$x"',
    "{{ if true }}{{ $x := 1 }}{{ else }}{{ $x }}{{ end }}": 'undefined variable "$x"',
    "{{ break }}": "{{break}} stands outside",
    "{{ range .L }}{{ else }}{{ continue }}{{ end }}": "{{continue}} stands outside",
    "{{ .A .B }}": "no function is given an argument",
    "{{ .A | .B }}": "no function is given an argument",
    "{{ nil }}": "nil is no command",
    '{{ "a': "without a closing quote",
    "{{ `a }}": "no closing quote",
    "{{ 'ab' }}": "is no number",
    "{{ 12ab }}": "is no number",
    "{{ 99999999999999999999 }}": "is no number",
    "{{ 1e999 }}": "is no number",
    '{{ "\\q" }}': "has the escape",
    '{{ "\\ud800" }}': "has the escape",
    "{{ /* a */ b }}": "the character '/'",
    "{{/* a": "a comment has no end",
    "{{ (.A }}": "| or ) was expected",
    "{{ .A) }}": "| or }} was expected",
    "{{ .A\"x\" }}": "without a space",
    "{{ template \"x\" }}": "{{template}} is not supported",
    "{{ range $a, $b, $c := .L }}{{ end }}": "3 variables",
    "{{ if $a, $b := .L }}{{ end }}": "2 variables",
    "{{ range $a, := .L }}{{ end }}": "a $variable was expected",
    "{{ .end if }}": "the word if stands where a value",
    "\ud800": "half of a character pair",
    "x" * 70_000: "the template has 70000 characters",
    "{{if 1}}" * 60 + "{{end}}" * 60: "more than 50 blocks",
    "{{ " + "(" * 60 + "1" + ")" * 60 + "}}": "more than 50 blocks",
    "{{ $a := 1 }}" * 200: "more than 100 variables",
}  # fmt: skip


@pytest.mark.parametrize("text", FAULTS, ids=lambda text: text[:30].encode("ascii", "replace").decode())
def test_what_is_no_template_is_named_with_its_line(text: str) -> None:
    with pytest.raises(UserError) as caught:
        read_template(text)
    assert FAULTS[text] in caught.value.message
    assert caught.value.hint


RUN_FAULTS = {
    "{{ .S.X }}": "can't evaluate field X of a str",
    "a\n{{ .Missing.X }}": "line 2 of the template: can't evaluate field X of nil",
    "{{ .One.Nome }}": "can't evaluate field Nome",
    "{{ index .L 3 }}": "index out of range: 3",
    "{{ index .L -1 }}": "index out of range",
    '{{ index .L "a" }}': "an index is a string",
    "{{ index .N 1 }}": "index of a number",
    "{{ slice .S 3 2 }}": "slice from 3 to 2",
    "{{ len .N }}": "len of a number",
    '{{ eq .N "3" }}': "incompatible types",
    "{{ eq .L .L }}": "eq cannot compare a list",
    "{{ lt .Yes true }}": "lt cannot compare a bool",
    "{{ eq 1 }}": "eq has 1 arguments",
    "{{ and }}": "and came without an argument",
    "{{ range .S }}{{ end }}": "range can't iterate over",
    '{{ printf "%z" 1 }}': "printf knows",
    '{{ printf "%d" }}': "no value for %d",
    '{{ printf "x" 1 }}': "1 values more",
    "{{ printf 1 }}": "a format string first",
    "{{ range 1000000000 }}{{ end }}": "more than 500000 steps",
    "{{ range 1000 }}{{ range 1000 }}{{ range 1000 }}{{ end }}{{ end }}{{ end }}": "more than 500000 steps",
    '{{ $x := "xx" }}{{ range 100 }}{{ $x = printf "%s%s" $x $x }}{{ end }}': "characters",
    '{{ range 400000 }}{{ print "0123456789012345678901234567890123456789" }}{{ end }}': "characters",
}


@pytest.mark.parametrize("text", RUN_FAULTS, ids=lambda text: text[:30])
def test_what_cannot_be_run_is_named(text: str) -> None:
    template = read_template(text)
    with pytest.raises(UserError) as caught:
        template.run(VALUES)
    assert RUN_FAULTS[text] in caught.value.message


def test_a_budget_holds_over_several_runs() -> None:
    template, budget = read_template("{{ range 100 }}x{{ end }}{{ .Response }}"), Budget(steps=450)
    template.run(VALUES, budget)
    template.run(VALUES, budget)
    with pytest.raises(UserError, match="steps"):
        template.run(VALUES, budget)


@pytest.mark.parametrize("work", ["if json $.L", "if print $.L", "range $.M", "if true }}{{ $.L"])
def test_many_elements_again_and_again_are_bounded(work: str) -> None:
    leave = "{{ break }}" if work.startswith("range") else ""
    values = {**VALUES, "L": [[]] * 100_000, "M": {str(number): 0 for number in range(100_000)}}
    with pytest.raises(UserError, match="steps"):
        read_template(f"{{{{ range 100000 }}}}{{{{ {work} }}}}{leave}{{{{ end }}}}{{{{ end }}}}").run(values)


@pytest.mark.parametrize("work", ["eq $.A $.B", "len $.A", "len (slice $.Long 1)", "json $.A"])
def test_looking_at_a_long_value_again_and_again_is_bounded(work: str) -> None:
    """Work that writes nothing counts too."""
    values = {**VALUES, "A": "a" * 1_000_000, "B": "a" * 1_000_000, "Long": list(range(1_000_000))}
    with pytest.raises(UserError, match="characters"):
        read_template(f"{{{{ range 100000 }}}}{{{{ if {work} }}}}{{{{ end }}}}{{{{ end }}}}").run(values)


def test_the_names_decide_and_the_response_is_implicit() -> None:
    template = read_template("{{ if .System }}{{ range $.Messages.Items }}{{ (index .Tools 0).Not }}{{ end }}{{ end }}")
    assert template.names == {"system", "messages", "items", "tools"}
    assert "".join(read_template("{{ .Prompt }}:").run({"Prompt": "p", "Response": "r"})) == "p:r"
    assert "".join(read_template("{{ .Response }}{{ .Prompt }}").run({"Prompt": "p", "Response": "r"})) == "rp"


CUTS = {
    "a{{ .Response }}b{{ .System }}": "aR",
    "a{{ if .System }}s{{ .Response }}t{{ else }}u{{ end }}b": "asR",
    "a{{ if .No }}{{ .Response }}{{ else }}u{{ end }}b": "a",
    "a{{ if .Response }}x{{ end }}b{{ .Response }}c": "axbR",
    "a{{ if .No }}x{{ else }}y{{ .Response }}z{{ end }}b": "ayR",
    '{{ printf "%s!" .Response }}b': "R!",
    "a{{ $.Response }}b": "aRb",  # as in Ollama: only a field of the dot is looked for
    "a": "aR",
}


@pytest.mark.parametrize("text", CUTS)
def test_the_cut(text: str) -> None:
    template = read_template(text)
    assert "".join(template.cut.run({**VALUES, "System": "S", "Response": "R"})) == CUTS[text]


def test_what_a_template_wrote_is_told_from_what_came_from_outside() -> None:
    text = (
        '<s>{{ "own" }}{{ .S }}{{ print "own" 1 }}{{ print "own" .S }}{{ printf "%s" .S }}{{ json .S }}'
        "{{ slice .S 1 }}{{ .L }}{{ .N }}"
    )
    pieces = read_template(text).run(VALUES)
    assert [(str(piece), isinstance(piece, Own)) for piece in pieces] == [
        ("<s>", True), ("own", True), ("text", False), ("own1", True), ("owntext", False), ("text", False),
        ('"text"', False), ("ext", False), ("[a b c]", False), ("3", False),
    ]  # fmt: skip


P = (
    "{{ if .System }}<|system|>\n{{ .System }}<|end|>\n{{ end }}{{ if .Prompt }}<|user|>\n{{ .Prompt }}<|end|>\n"
    "{{ end }}<|assistant|>\n{{ .Response }}<|end|>"
)
L = (
    "{{ if .System }}<|start_header_id|>system<|end_header_id|>\n\n{{ .System }}<|eot_id|>{{ end }}{{ if .Prompt }}"
    "<|start_header_id|>user<|end_header_id|>\n\n{{ .Prompt }}<|eot_id|>{{ end }}<|start_header_id|>assistant"
    "<|end_header_id|>\n\n{{ .Response }}<|eot_id|>"
)
LIBRARY = {
    "c43332387573": "[INST] {{ if .System }}{{ .System }} {{ end }}{{ .Prompt }} [/INST]",
    "a47b02e00552": "<|im_start|>system\n{{ .System }}<|im_end|>\n<|im_start|>user\n{{ .Prompt }}<|im_end|>\n"
    "<|im_start|>assistant\n",
    "542b217f179c": P,
    "8ab4849b038c": L,
}
"""Templates of Ollama's library, by the beginnings of the digests that its manifests name."""


@pytest.mark.parametrize("digest", LIBRARY)
def test_templates_of_the_library_read(digest: str) -> None:
    assert hashlib.sha256(LIBRARY[digest].encode()).hexdigest()[:12] == digest
    values = {"System": "S", "Prompt": "P", "Response": "R"}
    assert "".join(read_template(LIBRARY[digest]).run(values)).count("R") >= 1


FLOATS = {0.0: "0", 1.0: "1", 0.1: "0.1", -2.5: "-2.5", 123456.0: "123456", 1234567.0: "1.234567e+06", 1e20: "1e+20",
          0.0001: "0.0001", 0.00001: "1e-05", 1e100: "1e+100", float("inf"): "+Inf", 40.0: "40"}  # fmt: skip


def test_numbers_as_go_writes_them() -> None:
    assert {value: float_text(value) for value in FLOATS} == FLOATS
    assert [to_json(value) for value in (1e20, 1e21, 1e-6, 1e-7, 1.5, 3.0)] == [
        "100000000000000000000", "1e+21", "0.000001", "1e-7", "1.5", "3"]  # fmt: skip


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_written_number_reads_back(value: float) -> None:
    assert float(float_text(value)) == value
    assert float(to_json(value)) == value


def test_quotes() -> None:
    assert quoted('a"\\\n\x00é\u200b') == '"a\\"\\\\\\n\\x00é\\u200b"'


WORDS = ["{{", "}}", "{{- ", " -}}", "/*", "*/", "if ", "else ", "end", "range ", "with ", "break", "$x", " := ", "=",
         ",", "|", "(", ")", ".S", ".L", ".", "..", '"a"', "`", "'", "1", "-", "1e9", "printf ", "len ", "index ",
         "slice ", "and ", "eq ", "nil", "true", " ", "\n", "é", "\x00", "define"]  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=3), max_size=40).map("".join))
def test_nothing_but_a_user_error(text: str) -> None:
    with contextlib.suppress(UserError):
        template = read_template(text)
        template.run(VALUES)
        template.cut.run(VALUES)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.sampled_from(WORDS[6:]), max_size=8).map("".join))
def test_nothing_but_a_user_error_inside_an_action(text: str) -> None:
    with contextlib.suppress(UserError):
        read_template("{{ " + text + " }}").run(VALUES)


@given(st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: "{{" not in text))
def test_text_without_actions_is_itself(text: str) -> None:
    assert "".join(read_template(text).run({"Response": ""})) == text
