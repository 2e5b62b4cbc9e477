"""README.md beside this file names tests that are there, and each of its lines says something."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROWS = re.findall(r"^\| ([A-J])([0-9]+) \| (.+) \| (.+) \|$", (TESTS / "security" / "README.md").read_text(), re.M)


def test_the_tests_of_the_table_are_there() -> None:
    known = {
        f"{path.relative_to(TESTS)}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    named = {name for *_, tests in ROWS for name in re.findall(r"`([^`]*::[^`]*)`", tests)}
    assert len(named) > 100
    assert not named - known


def test_each_line_names_tests_or_says_what_is_missing() -> None:
    letters: dict[str, list[int]] = {}
    for letter, number, attack, tests in ROWS:
        letters.setdefault(letter, []).append(int(number))
        assert attack.strip(), letter + number
        assert "::" in tests or "not yet" in tests, letter + number
    assert "".join(letters) == "ABCDEFGHIJ"
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in letters.values())


def test_tests_with_a_letter_in_their_name_are_in_the_table() -> None:
    """A test that is called after a line of the list, as `test_a7_…` or `test_h_…`, is named in it."""
    table = (TESTS / "security" / "README.md").read_text()
    called = {
        f"{path.relative_to(TESTS)}::{node.name}"
        for path in TESTS.rglob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and re.match(r"test_(a[0-9]+|[b-j])_", node.name)
    }
    assert called
    assert sorted(each for each in called if f"`{each}`" not in table) == []
