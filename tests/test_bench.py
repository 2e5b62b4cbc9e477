"""The bench scripts run, on shapes that take no time: not their figures are tested here, but their form."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parent.parent / "bench"
CPU = BENCH / "cpu.py"


def test_the_cpu_table_has_a_figure_in_each_row(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    command = [sys.executable, str(CPU), "--shape", "tiny", "--quant", "q4_k_m", "--peers", "pumice", "--rounds", "1"]
    phases = ["--phases", "prefill-576", "decode", "image-1.5"]
    places = ["--models", str(tmp_path / "models"), "--output", str(page), "--read-bytes", str(10**7)]
    done = subprocess.run(command + phases + places, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = page.read_text(encoding="utf-8")
    assert done.stdout.strip() == text.strip()
    rows = {cells[0]: cells[1:] for line in text.splitlines() if (cells := re.findall(r"[^|]+", line.strip("|")))}
    rows = {name.strip(): [each.strip() for each in cells] for name, cells in rows.items() if cells}
    for what in ("prefill of 576 tokens, tokens/s", "decode, tokens/s", "one tile through tower and projector, s"):
        figure, share = rows[what]
        assert float(figure) > 0
        assert re.fullmatch(r"(\d+% \w+(, )?)*", share)
    assert float(rows["peak memory with a picture, LLaVA 1.5, GB"][0]) > 0.1
    assert "prefill of 2880 tokens, tokens/s" not in rows
    assert sorted(each.name for each in (tmp_path / "models").glob("*.gguf")) == [
        "tiny-mmproj-1.5.gguf", "tiny-mmproj-1.6.gguf", "tiny-q4_k_m.gguf",
    ]  # fmt: skip


def test_the_table_of_image_tokens_has_a_row_for_each_limit(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCH / "image_tokens.py"), "--parts", "prefill", "--shape", "tiny", "--rounds", "1"]
    done = subprocess.run([*command, "--models", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "LLaVA" in line
    ]
    assert [tuple(map(int, row[1:4])) for row in rows] == [
        (576, 576, 1), (288, 288, 1), (144, 144, 1), (72, 72, 1), (36, 36, 1),
        (2928, 2928, 5), (1464, 576, 1), (732, 576, 1), (366, 366, 1), (183, 183, 1),
    ]  # fmt: skip
    assert all(float(cell) >= 0 for row in rows for cell in row[4:])
    assert [row[6:] for row in rows if row[1] in ("576", "2928")] == [["1.00", "1.00"]] * 2


def test_the_tables_of_labels_have_a_row_for_each_task() -> None:
    if not (
        Path("/usr/share/fonts/truetype/liberation").is_dir() and Path("/usr/share/dict/american-english").exists()
    ):
        pytest.skip("drawing needs fonts-liberation, fonts-dejavu-core and wamerican")
    command = [
        sys.executable,
        str(BENCH / "classify.py"),
        "--models",
        "pebble:1.5",
        "--pictures",
        "3",
        "--threads",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    right, trust = (table.splitlines() for table in done.stdout.split("\n\n")[1::2])
    assert (len(right), len(trust)) == (2 + 6, 2 + 6 * 3)
    for row in right[2:]:
        cells = row.strip("| ").split(" | ")
        assert all(cell in ("0.00", "0.50", "1.00") for cell in cells[3:8]), "shares of two pictures"
