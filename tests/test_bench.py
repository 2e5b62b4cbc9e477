"""The bench scripts run, on shapes that take no time: not their figures are tested here, but their form."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"
CPU = BENCH / "cpu.py"
Here = Callable[..., None]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Here:
    """Runs a script in this process, the parts of engine.py too, which get one of their own when it is run by hand:
    each would import again what is imported here, and that takes longer than what it does."""

    def run(script: str, *arguments: str | Path) -> None:
        monkeypatch.syspath_prepend(BENCH)
        found = importlib.import_module(script)
        monkeypatch.setattr(sys, "argv", [str(BENCH / f"{script}.py"), *map(str, arguments)])
        if script == "engine":
            monkeypatch.setattr(found, "child", lambda arguments: found.part(*arguments))
        found.main()

    return run


def test_the_cpu_table_has_a_figure_in_each_row(tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    command = [sys.executable, str(CPU), "--shape", "tiny", "--quant", "q4_k_m", "--peers", "pumice", "--rounds", "1"]
    phases = ["--phases", "prefill-576", "decode", "image-1.5", "--threads", "1"]
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
    assert float(rows["other memory is read between its steps, GB/s"][0]) > 0
    assert float(rows["a step reads weights, of that rate"][0]) > 0
    assert float(rows["a step reads weights, of the rate at which the same file is read between steps"][0]) > 0
    assert float(rows["peak memory with a picture, LLaVA 1.5, GB"][0]) > 0.1
    assert "prefill of 2880 tokens, tokens/s" not in rows
    assert sorted(each.name for each in (tmp_path / "models").glob("*.gguf")) == [
        "tiny-mmproj-1.5.gguf", "tiny-mmproj-1.6.gguf", "tiny-q4_k_m.gguf",
    ]  # fmt: skip


def test_the_table_of_image_tokens_has_a_row_for_each_limit(
    here: Here, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    chosen = ("--parts", "prefill", "--shape", "tiny", "--rounds", "1", "--threads", "1", "--models", tmp_path)
    here("image_tokens", *chosen)
    lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "LLaVA" in line]
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


# --- the engine -------------------------------------------------------------------------------------------------------


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def table(page: Path) -> dict[str, list[str]]:
    """The cells behind the first of each row."""
    lines = [line.strip("|").split("|") for line in page.read_text(encoding="utf-8").splitlines() if "|" in line]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in lines}


def test_parts_of_the_engine_s_table_are_run_one_by_one(here: Here, tmp_path: Path) -> None:
    """What ran before stays, of other processes too, and pumice stands beside a server and Transformers."""
    page, programs = tmp_path / "results.md", tmp_path / "llama"
    programs.mkdir()
    stand_in = f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent / "llama_server.py"}" "$@"\n'
    (programs / "llama-server").write_text(stand_in)
    (programs / "llama-server").chmod(0o755)
    places = ("--models", tmp_path / "models", "--output", page)
    common = ("--shape", "tiny", *places, "--rounds", "1", "--llama", programs)
    done = run("engine.py", *common, "--parts", "decode")
    assert done.returncode == 0, done.stderr
    for parts in (["drafts", "--repeating", "pebble"], ["float32", "slots", "slots-image"]):
        here("engine", *common, "--parts", *parts)
    rows = table(page)
    assert rows["what"] == ["pumice"]  # of the second table
    for count in (1, 8):
        ours, server, transformers, *times = map(float, rows[f"{count} requests at once: tokens/s"])
        assert times == pytest.approx([ours / server, ours / transformers], rel=0.02, abs=0.006)
    assert rows["2 requests at once: tokens/s"][2::2] == ["", ""]
    ratio, plain, drafted = (
        float(rows[name][0])
        for name in (
            "with drafts: times without",
            "answers that repeat themselves, without drafts: tokens/s",
            "the same with drafts: tokens/s",
        )
    )
    assert ratio == pytest.approx(drafted / plain, rel=0.02)
    assert float(rows["with drafts: tokens a pass"][0]) >= 1
    first, second = (rows[f"{name}: first token, s"][1] for name in (
        "first question about a picture of five tiles", "second question about it",
    ))  # fmt: skip
    assert float(first) > 0.3 > float(second)
    assert float(rows["16 requests at once: tokens/s"][0]) > 0


@pytest.mark.parametrize(
    ("wrong", "words"), [(["--parts", "slots"], "name its folder with --llama"), (["--parts", "x"], "no part 'x'")]
)
def test_parts_that_cannot_run(here: Here, capsys: pytest.CaptureFixture[str], wrong: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        here("engine", *wrong)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_the_table_of_a_gpu_is_made_on_the_cpu_too(here: Here, tmp_path: Path) -> None:
    page = tmp_path / "results.md"
    chosen = ("--cuda", "--device", "cpu", "--shape", "tiny", "--requests", "3", "--rounds", "1", "--output", page)
    here("engine", *chosen)
    rows = table(page)
    assert {"memory read, GB/s", "3 requests at once, an image each: images/s", "a prompt of 128 tokens: tokens/s"} <= {
        *rows
    }
    figures = [float(cells[0].rstrip("%")) for cells in rows.values() if cells[0] not in ("figure", "---")]
    assert len(figures) == 14
    assert all(each > 0 for each in figures[:4])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(here: Here, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        here("engine", "--cuda", "--output", tmp_path / "results.md")
    assert ended.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_many_requests_of_many_threads_are_neither_lost_nor_crossed(tmp_path: Path) -> None:
    """The soak's short form."""
    page = tmp_path / "results.md"
    done = run("soak.py", "--models", "pebble:1.5", "--requests", "60", "--cases", "12", "--output", page)
    assert done.returncode == 0, done.stderr
    rows = {what: int(cells[0]) for what, cells in table(page).items() if cells[0].isdigit()}
    assert rows["requests"] >= 60
    assert rows["answers lost, crossed or otherwise wrong"] == rows["pages held at the end"] == 0
    assert rows["rows that lost their pages and read again"] > 0
    assert rows["pages given away that could be found"] > 0
